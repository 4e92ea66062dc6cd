"""A small data folder without any download: the language reference that Python itself ships."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from sala_training.data.corpus import Document, deduplicate
from sala_training.data.extract import normalise
from sala_training.data.prepare import write

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

VOCAB_SIZE = 1024


def miniature(out: Path, files: Sequence[Path] = (), vocab_size: int = VOCAB_SIZE) -> None:
    """Write a data folder from a little text, for tests and for trying a recipe on a CPU.

    Args:
        out: folder, made if missing; gets the same files as a full preparation.
        files: UTF-8 text files to use; none for the help texts of the running Python (0.3 MB).
        vocab_size: of the tokenizer.

    Raises:
        ValueError: fewer than two documents, or too little text for ``vocab_size``.
    """
    texts = _read(files) if files else _python_help()
    # every tenth document is held out, and the first one always
    package, version, licence = (
        ("files", "", "as the files state")
        if files
        else ("python", sys.version.split()[0], "PSF-2.0")
    )
    documents = [
        Document(package, version, name, licence, index % 10 == 0, text)
        for index, (name, text) in enumerate(texts)
    ]
    documents.sort(key=lambda document: not document.is_held_out)
    write(list(deduplicate(documents)), out, vocab_size)


def _read(files: Sequence[Path]) -> list[tuple[str, str]]:
    return [(path.name, normalise(path.read_text(encoding="utf-8"))) for path in sorted(files)]


def _python_help() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    texts = []
    for name, text in sorted(topics.items()):
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
        texts.append((name, normalise("\n\n".join(paragraphs))))
    return texts
