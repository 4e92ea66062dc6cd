"""The data job: packages -> documents -> tokenizer -> token files, provenance and a compressed bundle."""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from sala_training.data.tokenizer import EOS_ID, VOCAB_SIZE
from sala_training.data.tokenizer import save as save_tokenizer
from sala_training.data.tokenizer import train as train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

    from sala_training.data.corpus import Document

logger = logging.getLogger(__name__)

TOKENIZER_SAMPLE_BYTES = 20_000_000
MAX_MINED_WORDS = 4000
TRAIN_NAME, HELD_OUT_NAME, WORDS_NAME = "train.bin", "heldout.bin", "words.json"
PROVENANCE_NAME = "provenance.json"
BUNDLE_NAMES = (TRAIN_NAME, HELD_OUT_NAME)
"""Files of a data folder that travel compressed."""


def prepare(
    out: Path, cache: Path, max_text_bytes: int | None = None, num_workers: int = 2
) -> None:
    """Download the source packages and write everything training needs to ``out``.

    Args:
        out: folder for train.bin, heldout.bin, words.json, provenance.json and tokenizer/.
        cache: folder for packages and their files (about 4 GB).
        max_text_bytes: use at most this much training text; None for all.
        num_workers: processes that extract text.

    Raises:
        PackageError: a package cannot be downloaded or unpacked.
    """
    from sala_training.data import corpus

    documents = corpus.collect(cache, max_text_bytes=max_text_bytes, num_workers=num_workers)
    write(documents, out)


def write(documents: Sequence[Document], out: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Train the tokenizer on the training documents and write all files.

    Args:
        documents: training and held-out ones, already de-duplicated.
        out: folder, made if missing.
        vocab_size: of the tokenizer; smaller for tests on little text.

    Raises:
        ValueError: one side of the split is empty, or the text is too short for the vocabulary.
    """
    train = [document.text for document in documents if not document.is_held_out]
    held_out = [document.text for document in documents if document.is_held_out]
    if not train or not held_out:
        raise ValueError(
            "expected training and held-out documents, "
            f"got {len(train)} and {len(held_out)} of them"
        )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(tokenizer_sample(train), vocab_size)
    save_tokenizer(tokenizer, out / "tokenizer")
    files = {
        name: _write_tokens(tokenizer, texts, out / name)
        for name, texts in ((TRAIN_NAME, train), (HELD_OUT_NAME, held_out))
    }
    _write_json(out / WORDS_NAME, mine_words(train))
    sources = _sources(documents)
    _write_json(
        out / PROVENANCE_NAME, {"vocab_size": vocab_size, "files": files, "sources": sources}
    )
    logger.info("wrote %s", files)


def _sources(documents: Sequence[Document]) -> list[dict[str, str | int | bool]]:
    """Return one row per package and side of the split: version, licence, documents, bytes."""
    rows: dict[tuple[str, bool], dict[str, str | int | bool]] = {}
    totals: Counter[tuple[str, bool]] = Counter()
    counts: Counter[tuple[str, bool]] = Counter()
    for document in documents:
        key = (document.package, document.is_held_out)
        rows[key] = {
            "package": document.package,
            "version": document.version,
            "licence": document.licence,
            "is_held_out": document.is_held_out,
        }
        counts[key] += 1
        totals[key] += len(document.text.encode())
    return [
        {**row, "num_documents": counts[key], "text_bytes": totals[key]}
        for key, row in rows.items()
    ]


def _write_json(path: Path, content: object) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def tokenizer_sample(texts: Sequence[str]) -> list[str]:
    """Return evenly spaced runs of 20 paragraphs, about 20 MB or all of a smaller text."""
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    step = max(1, sum(map(len, paragraphs)) // TOKENIZER_SAMPLE_BYTES)
    return ["\n\n".join(paragraphs[i : i + 20]) for i in range(0, len(paragraphs), 20 * step)]


def _write_tokens(tokenizer: Tokenizer, texts: Sequence[str], path: Path) -> dict[str, Any]:
    num_tokens = 0
    digest = hashlib.sha256()
    num_bytes = sum(len(text.encode()) for text in texts)
    with path.open("wb") as file:
        # small batches: the encodings of one whole book take a hundred megabytes
        for start in range(0, len(texts), 16):
            batch = list(texts[start : start + 16])
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                ids = np.array([*encoding.ids, EOS_ID], "<u2")
                file.write(ids.tobytes())
                digest.update(ids.tobytes())
                num_tokens += len(ids)
    return {
        "num_tokens": num_tokens,
        "text_bytes": num_bytes,
        "bytes_per_token": round(num_bytes / num_tokens, 3),
        "sha256": digest.hexdigest(),
    }


def mine_words(texts: Iterable[str]) -> list[str]:
    """Return frequent lower-case words of 4 to 10 letters, the commonest (function words) left out."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"(?<![\w.'-])[a-z]{4,10}(?![\w.'-])", text))
    # ties broken by spelling, so that equal texts give equal files
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return sorted(ranked[300 : 300 + MAX_MINED_WORDS])


def compress(out: Path) -> int:
    """Write ``train.bin.xz`` and ``heldout.bin.xz`` beside the token files; return their bytes.

    Args:
        out: folder of :func:`prepare`.
    """
    # two-byte values: position and literal contexts follow the parity of the byte
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1, "dict_size": 1 << 26}
    ]
    num_bytes = 0
    for name in BUNDLE_NAMES:
        data = lzma.compress((out / name).read_bytes(), filters=filters)
        (out / f"{name}.xz").write_bytes(data)
        num_bytes += len(data)
    return num_bytes


def decompress(folder: Path) -> None:
    """Write the token files of a bundle that are not there yet."""
    for name in BUNDLE_NAMES:
        if not (folder / name).exists():
            partial = folder / f"{name}.partial"
            partial.write_bytes(lzma.decompress((folder / f"{name}.xz").read_bytes()))
            partial.replace(folder / name)
