"""Download, unpack, extract, clean and de-duplicate the source packages into documents.

Deterministic for given package versions: files are read in sorted order, held-out documents first, so
that a paragraph that occurs on both sides of the split is kept only on the held-out side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

from sala_training.data import extract
from sala_training.data.sources import SOURCES, Format, Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

MIN_DOCUMENT_CHARS = 600
MIN_DUPLICATE_CHARS = 48
"""Shorter paragraphs (headings, "See also:") may repeat across documents."""
MAX_REPEATS = 100
"""Times that one shorter paragraph may occur in a package: more is furniture of its pages."""
JOINED_DOCUMENT_CHARS = 400_000
_STOP_WORDS = frozenset(
    {
        "the",
        "of",
        "and",
        "to",
        "a",
        "in",
        "is",
        "that",
        "it",
        "for",
        "as",
        "with",
        "be",
        "this",
        "are",
    }
    | {"on", "not", "or", "by", "you", "can", "an", "if", "from"}
)
MIN_STOP_WORD_FRAC = 0.12
"""Share of the commonest English words below which a page is a listing or another language."""


class PackageError(OSError):
    """A source package that cannot be downloaded or unpacked."""


@dataclass(frozen=True)
class Document:
    """One text with its provenance."""

    package: str
    version: str
    path: str
    """File (or first file, or folder, of joined pages) inside the package."""
    licence: str
    is_held_out: bool
    text: str


def download(package: str, cache: Path) -> Path:
    """Return the package's ``.deb`` in ``cache``, downloading it (without installing) if absent.

    Raises:
        PackageError: ``apt-get`` or ``dpkg-deb`` is missing or fails.
    """
    cache.mkdir(parents=True, exist_ok=True)
    found = sorted(cache.glob(f"{package}_*.deb"))
    if not found:
        _run(["apt-get", "download", package], cache)
        found = sorted(cache.glob(f"{package}_*.deb"))
    if len(found) != 1:
        raise PackageError(f"expected one {package}_*.deb in {cache}, got {len(found)}")
    return found[0]


def unpack(deb: Path, cache: Path) -> Path:
    """Return the folder below ``cache`` that holds the files of ``deb``."""
    target = cache / "tree" / deb.name.split("_", 1)[0]
    done = target / ".unpacked"
    if not done.exists() or done.read_text() != deb.name:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        _run(["dpkg-deb", "-x", str(deb.resolve()), str(target.resolve())], cache)
        done.write_text(deb.name)
    return target


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise PackageError(
            f"{command[0]} not found: collecting text needs a Debian or Ubuntu system"
        )
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PackageError(f"{' '.join(command)} failed:\n{result.stderr.strip()[-2000:]}")


def package_version(deb: Path) -> str:
    """Return the version in the file name of a ``.deb`` (an epoch's colon is written ``%3a``)."""
    return unquote(deb.name.split("_")[1])


def read_source(source: Source, tree: Path, version: str) -> list[Document]:
    """Extract all documents of one unpacked package, in a fixed order.

    Args:
        source: which files to read and how.
        tree: the unpacked package.
        version: recorded in the documents.
    """
    documents: list[Document] = []
    joined: list[tuple[str, str]] = []
    joined_folder = ""

    def add(path: str, text: str) -> None:
        held_out = source.is_held_out or text.split("\n", 1)[0] in source.held_out_titles
        documents.append(Document(source.package, version, path, source.licence, held_out, text))

    def flush() -> None:
        if joined:
            add(joined[0][0], "\n\n".join(text for _, text in joined))
            joined.clear()

    for path in _files(source, tree):
        name = str(path.relative_to(tree))
        for text in _read_file(source, path):
            if not source.join_pages:
                add(name, text)
                continue
            folder = str(path.parent.relative_to(tree))
            is_full = sum(len(page) for _, page in joined) > JOINED_DOCUMENT_CHARS
            if joined and (joined_folder != folder or is_full):
                flush()
            joined_folder = folder
            joined.append((name, text))
    flush()
    return documents


def _files(source: Source, tree: Path) -> list[Path]:
    exclude = [re.compile(pattern) for pattern in source.exclude]
    files: dict[Path, None] = {}
    for pattern in source.patterns:
        for path in sorted(tree.glob(pattern)):
            if (
                path.is_file()
                and not path.is_symlink()
                and not any(r.search(str(path)) for r in exclude)
            ):
                files[path] = None
    return list(files)


def _read_file(source: Source, path: Path) -> Iterator[str]:
    match source.file_format:
        case Format.DICT:
            yield from (clean(text) for text in extract.dict_to_texts(path))
        case Format.R_STRINGS:
            yield from extract.r_strings_to_texts(path)
        case other:
            raw = path.read_bytes()
            try:
                content = raw.decode("utf-8")
            except UnicodeDecodeError:
                content = raw.decode("latin-1")
            if other is Format.HTML:
                text = clean(extract.html_to_text(content, source.root, source.drop))
            elif other is Format.POD:
                text = clean(extract.pod_to_text(content))
            else:
                text = extract.normalise(content)
            if is_english(text):
                yield text


def clean(text: str) -> str:
    """Drop paragraphs that are mostly not ASCII letters, such as tables of numbers and lone marks."""
    kept = []
    for paragraph in text.split("\n\n"):
        num_letters = len(re.findall(r"[A-Za-z]", paragraph))
        num_spaces = paragraph.count(" ")
        if num_letters < 2 or num_letters + num_spaces < 0.6 * len(paragraph):
            continue
        kept.append(paragraph)
    return "\n\n".join(kept)


def is_english(text: str) -> bool:
    """Whether common English words make up enough of ``text`` for prose."""
    words = re.findall(r"[a-z]+", text[:50_000].lower())
    if not words:
        return False
    return sum(word in _STOP_WORDS for word in words) >= MIN_STOP_WORD_FRAC * len(words)


def paragraph_key(paragraph: str) -> bytes:
    """Return the digest by which paragraphs count as equal: letters and digits, case ignored."""
    return hashlib.blake2b(re.sub(r"\W+", " ", paragraph.lower()).encode(), digest_size=12).digest()


def deduplicate(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield the documents without paragraphs seen before and without those left too short.

    Args:
        documents: in order of precedence; pass held-out documents first.
    """
    seen: set[bytes] = set()
    repeats: Counter[tuple[str, str]] = Counter()
    for document in documents:
        kept = []
        for paragraph in document.text.split("\n\n"):
            if len(paragraph) >= MIN_DUPLICATE_CHARS:
                key = paragraph_key(paragraph)
                if key in seen:
                    continue
                seen.add(key)
            else:
                repeats[document.package, paragraph] += 1
                if repeats[document.package, paragraph] > MAX_REPEATS:
                    continue
            kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) >= MIN_DOCUMENT_CHARS:
            yield Document(**{**asdict(document), "text": text})


def collect(
    cache: Path,
    sources: Sequence[Source] = SOURCES,
    max_text_bytes: int | None = None,
    num_workers: int = 1,
) -> list[Document]:
    """Download every source and return its documents, de-duplicated, held-out ones first.

    Args:
        cache: folder for packages and their files; what is there already is not downloaded again.
        sources: rows of the table to use.
        max_text_bytes: stop after this much training text; None for all.
        num_workers: processes that extract text.

    Raises:
        PackageError: a package cannot be downloaded or unpacked.
    """
    debs = [download(source.package, cache) for source in sources]
    trees = [unpack(deb, cache) for deb in debs]
    versions = [package_version(deb) for deb in debs]
    documents: list[Document] = []
    with ProcessPoolExecutor(num_workers) as pool:
        for source, found in zip(
            sources, pool.map(read_source, sources, trees, versions), strict=True
        ):
            num_bytes = sum(len(document.text.encode()) for document in found)
            logger.info("%s: %d documents, %.1f MB", source.package, len(found), num_bytes / 1e6)
            documents.extend(found)
    # a stable sort: held-out first, the table's order within
    documents.sort(key=lambda document: not document.is_held_out)
    kept = []
    num_train_bytes = 0
    for document in deduplicate(documents):
        if not document.is_held_out:
            num_train_bytes += len(document.text.encode())
            if max_text_bytes is not None and num_train_bytes > max_text_bytes:
                break
        kept.append(document)
    return kept


def write_jsonl(documents: Iterable[Document], path: Path) -> None:
    """Write one JSON object per document: package, version, path, licence, is_held_out, text."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
