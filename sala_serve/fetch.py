"""A checkpoint from one archive, whole and of the stated digest, or not at all."""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

CONNECT_AND_READ_TIMEOUT_S = 60.0
"""Without a byte for so long, the download has failed."""
PIECE_BYTES = 1 << 20
DIGEST_FILE = ".sha256"
"""In the folder: the digest of the archive that it came from."""


class FetchError(Exception):
    """The checkpoint could not be had; the message says which step failed and why."""


def fetch_checkpoint(url: str, *, sha256: str, folder: Path) -> None:
    """Download the archive at ``url`` and unpack it as ``folder``, which then is complete or not there.

    A folder that came from an archive of this digest is left as it is, so that a restart costs nothing. One of
    another digest, or what an interrupted run left, is replaced.

    Args:
        url: ``http``, ``https`` or ``file``, of a tar archive whose files lie at its top or in one folder.
        sha256: digest of the archive, 64 hexadecimal digits.
        folder: its parent is made, and must have room for archive and checkpoint.

    Raises:
        FetchError: not downloaded, of another digest, not a safe tar archive, or no room.
    """
    wanted = sha256.lower()
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise FetchError(f"expected a SHA-256 of 64 hexadecimal digits, got {sha256!r}")
    if not re.match(r"(https?|file)://", url):
        raise FetchError(f"expected an http, https or file URL, got {url!r}")
    if _digest_of(folder) == wanted:
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as work:
            archive = Path(work, "archive")
            found = _download(url, archive)
            if found != wanted:
                raise FetchError(f"{url}: expected SHA-256 {wanted}, got {found}")
            unpacked = _unpack(archive, Path(work, "unpacked"))
            (unpacked / DIGEST_FILE).write_text(wanted, encoding="ascii")
            if folder.exists():
                shutil.rmtree(folder)
            unpacked.rename(folder)
    except (tarfile.TarError, EOFError) as error:
        raise FetchError(f"{url}: not a tar archive that can be unpacked safely: {error}") from None
    except OSError as error:
        raise FetchError(f"cannot write {folder}: {error}") from None


def _digest_of(folder: Path) -> str | None:
    try:
        return (folder / DIGEST_FILE).read_text(encoding="ascii")
    except OSError:
        return None


def _download(url: str, path: Path) -> str:
    """Write what is at ``url`` to ``path``; return its SHA-256."""
    digest = hashlib.sha256()
    try:
        with (
            urllib.request.urlopen(url, timeout=CONNECT_AND_READ_TIMEOUT_S) as answer,
            path.open("wb") as output,
        ):
            expected = answer.headers.get("Content-Length")
            while piece := answer.read(PIECE_BYTES):
                digest.update(piece)
                output.write(piece)
            if expected is not None and output.tell() != int(expected):
                raise FetchError(f"{url}: expected {expected} bytes, got {output.tell()}")
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise FetchError(f"{url}: {error}") from None
    return digest.hexdigest()


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack; return the folder that holds ``config.json``."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")  # refuses what would land outside, links too
    if (folder / "config.json").exists():
        return folder
    inner = list(folder.iterdir())
    if len(inner) == 1 and (inner[0] / "config.json").exists():
        return inner[0]
    raise FetchError("expected config.json at the archive's top or in its only folder")
