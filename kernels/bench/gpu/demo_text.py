"""Text for the demo checkpoint: on it the model's choices are clear, on random ids they are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu.settings import CHECKPOINT

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer() -> Tokenizer:
    """Return the demo checkpoint's tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def ids_of(text: str) -> list[int]:
    """Return the ids of ``text``, no special ones among them."""
    ids: list[int] = load_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def text_ids(num_tokens: int | None) -> list[int]:
    """Return the beginning of the held-out novel, all of it for None."""
    return ids_of((CHECKPOINT.parent / "persuasion.txt").read_text(encoding="utf-8"))[:num_tokens]
