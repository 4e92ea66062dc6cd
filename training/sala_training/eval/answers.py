"""Whether an answer says what was asked for."""

from __future__ import annotations

import re


def says(answer: str, expected: str) -> bool:
    """Return whether ``expected`` stands in ``answer`` as whole words, whatever case and punctuation."""
    return _spaced(expected) in _spaced(answer)


def _spaced(text: str) -> str:
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "
