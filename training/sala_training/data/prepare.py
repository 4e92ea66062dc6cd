"""The data job: packages -> documents -> tokenizer -> token files, provenance and a compressed bundle."""

from __future__ import annotations

import json
import logging
import lzma
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sala_training.data import corpus, tokenizer as tokenizers_
from sala_training.data.tokenizer import EOS_ID, VOCAB_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tokenizers import Tokenizer

    from sala_training.data.corpus import Document

logger = logging.getLogger(__name__)

TOKENIZER_SAMPLE_BYTES = 20_000_000
MAX_MINED_WORDS = 4000
TRAIN_NAME, HELD_OUT_NAME, WORDS_NAME = "train.bin", "heldout.bin", "words.json"
PROVENANCE_NAME = "provenance.json"


def prepare(
    out: Path, cache: Path, max_text_bytes: int | None = None, num_workers: int = 1
) -> None:
    """Download the source packages and write everything training needs to ``out``.

    Args:
        out: folder for train.bin, heldout.bin, words.json, provenance.json and tokenizer/.
        cache: folder for packages and their files.
        max_text_bytes: use at most this much training text; None for all.
        num_workers: processes that extract text.

    Raises:
        RuntimeError: a package cannot be downloaded.
    """
    documents = corpus.collect(cache, max_text_bytes=max_text_bytes, num_workers=num_workers)
    write(documents, out)


def write(documents: Sequence[Document], out: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Train the tokenizer on the training documents and write all files.

    Args:
        documents: training and held-out ones, already de-duplicated.
        out: folder, made if missing.
        vocab_size: of the tokenizer; smaller for tests on little text.
    """
    out.mkdir(parents=True, exist_ok=True)
    train = [document.text for document in documents if not document.is_held_out]
    held_out = [document.text for document in documents if document.is_held_out]
    if not train or not held_out:
        raise ValueError(
            f"expected training and held-out text, got {len(train)} and {len(held_out)} documents"
        )
    tokenizer = tokenizers_.train(tokenizer_sample(train), vocab_size)
    tokenizers_.save(tokenizer, out / "tokenizer")
    counts = {
        TRAIN_NAME: _write_tokens(tokenizer, train, out / TRAIN_NAME),
        HELD_OUT_NAME: _write_tokens(tokenizer, held_out, out / HELD_OUT_NAME),
    }
    _write_json(out / WORDS_NAME, mine_words(train))
    num_bytes = {
        TRAIN_NAME: sum(len(text.encode()) for text in train),
        HELD_OUT_NAME: sum(len(text.encode()) for text in held_out),
    }
    files = {
        name: {
            "tokens": counts[name],
            "text_bytes": num_bytes[name],
            "bytes_per_token": round(num_bytes[name] / counts[name], 3),
        }
        for name in counts
    }
    _write_json(
        out / PROVENANCE_NAME,
        {"vocab_size": vocab_size, "files": files, "sources": corpus.provenance(documents)},
    )
    logger.info("wrote %s", files)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_sample(texts: Sequence[str]) -> list[str]:
    """Return evenly spaced runs of 20 paragraphs, about 20 MB or all of a smaller text."""
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    step = max(1, sum(map(len, paragraphs)) // TOKENIZER_SAMPLE_BYTES)
    return ["\n\n".join(paragraphs[i : i + 20]) for i in range(0, len(paragraphs), 20 * step)]


def _write_tokens(tokenizer: Tokenizer, texts: Sequence[str], path: Path) -> int:
    num_tokens = 0
    with path.open("wb") as file:
        for start in range(0, len(texts), 64):
            batch = list(texts[start : start + 64])
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                ids = np.array([*encoding.ids, EOS_ID], "<u2")
                file.write(ids.tobytes())
                num_tokens += len(ids)
    return num_tokens


def mine_words(texts: Iterable[str]) -> list[str]:
    """Return frequent lower-case words of 4 to 10 letters, the commonest (function words) left out."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"(?<![\w.'-])[a-z]{4,10}(?![\w.'-])", text))
    # ties broken by spelling, so that equal texts give equal files
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return sorted(ranked[300 : 300 + MAX_MINED_WORDS])


BUNDLE_NAMES = (TRAIN_NAME, HELD_OUT_NAME)


def compress(out: Path, remove: bool = False) -> int:
    """Write ``train.bin.xz`` and ``heldout.bin.xz``; return their bytes.

    Args:
        out: folder of :func:`prepare`.
        remove: delete the plain files.
    """
    num_bytes = 0
    # two-byte values: position and literal contexts follow the parity of the byte
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1, "dict_size": 1 << 26}
    ]
    for name in BUNDLE_NAMES:
        data = lzma.compress((out / name).read_bytes(), filters=filters)
        (out / f"{name}.xz").write_bytes(data)
        num_bytes += len(data)
        if remove:
            (out / name).unlink()
    return num_bytes


def decompress(out: Path) -> None:
    """Write the plain token files of a bundle, if they are not there yet."""
    for name in BUNDLE_NAMES:
        if not (out / name).exists():
            partial = out / f"{name}.partial"
            partial.write_bytes(lzma.decompress((out / f"{name}.xz").read_bytes()))
            partial.replace(out / name)
