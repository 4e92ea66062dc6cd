"""How prompts are counted."""

from __future__ import annotations

from pathlib import Path

from sala_serve.settings import PositiveInt, Section


class TokenSettings(Section):
    """Section ``tokens``."""

    tokenizer: Path | None = None
    """Folder of the checkpoint, or of its ``tokenizer.json`` and ``tokenizer_config.json`` alone. None: the engine
    is asked, which sends each prompt there once more."""
    num_threads: PositiveInt = 1
    """Prompts counted at the same time; others wait. Bounds memory too (docs/api.md)."""
