"""How prompts are counted."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class TokenSettings(BaseModel):
    """Section ``tokens``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: Path | None = None
    """Folder of the checkpoint, or of its ``tokenizer.json`` and ``tokenizer_config.json`` alone. None: the engine
    is asked, which sends each prompt there once more."""
    num_threads: int = Field(default=1, ge=1)
    """Prompts counted at the same time; others wait. Bounds memory too (docs/api.md)."""
