"""Files: written and read in pieces, so that none is ever in memory as a whole."""

from __future__ import annotations

import json
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from sala_serve.errors import (
    BodyTooLarge,
    GatewayError,
    InsufficientQuota,
    InvalidRequest,
    NotFound,
    UploadTimeout,
)
from sala_serve.jobs import shelf_scripts as scripts
from sala_serve.jobs.model import dump
from sala_serve.jobs.shelf import Shelf
from sala_serve.jobs.store import LeaseLost

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from sala_serve.jobs.model import Lease
    from sala_serve.jobs.settings import JobsSettings
    from sala_serve.state import State

PIECE_BYTES = 512 * 1024
"""How a file is cut, whatever is inside."""
_PENDING_MS = 3_600_000
"""A file that nobody goes on writing is forgotten after this."""
_RECORDS_PER_READ = 500


@dataclass(frozen=True)
class StoredFile:
    """A file that is whole."""

    file_id: str
    document: Mapping[str, Any]
    """OpenAI's file object."""
    num_pieces: int


class Files:
    """Files of all tenants, shared by all replicas.

    Args:
        state: where they are kept.
        settings: bounds and retention.
        wall_clock: Unix seconds.
    """

    def __init__(
        self, state: State, settings: JobsSettings, *, wall_clock: Callable[[], float]
    ) -> None:
        self.settings = settings
        self._state = state
        self._wall_clock = wall_clock
        self._shelf = Shelf(state, "file")
        redis = state.redis
        self._append = redis.register_script(scripts.FILE_APPEND)
        self._publish = redis.register_script(scripts.FILE_PUBLISH)
        self._remove = redis.register_script(scripts.FILE_REMOVE)

    def writer(self, tenant_id: str, file_id: str, *, lease: Lease | None = None) -> FileWriter:
        """Return what writes a file.

        Args:
            tenant_id: its owner.
            file_id: nobody can read it before :meth:`FileWriter.publish`.
            lease: of the job whose result it is, which alone may write it; such a file is stored
                however much its tenant has. ``None``: it is an upload.
        """
        return FileWriter(self, tenant_id, file_id, lease)

    async def find(self, tenant_id: str, file_id: str) -> StoredFile:
        """Return a tenant's file; raises NotFound."""
        (found,) = await self._read(tenant_id, [file_id])
        if found is None:
            raise file_not_found(file_id)
        return found

    async def page(
        self,
        tenant_id: str,
        *,
        after: str | None,
        limit: int,
        newest_first: bool = True,
        purpose: str | None = None,
    ) -> list[StoredFile]:
        """Return a tenant's files in order of creation; raises InvalidRequest if there is none ``after``."""
        files: list[StoredFile] = []
        while len(files) < limit:
            ids = await self._shelf.page(
                tenant_id, after=after, limit=_RECORDS_PER_READ, newest_first=newest_first
            )
            if ids is None:
                raise InvalidRequest("There is no such file.", param="after")
            found = await self._read(tenant_id, ids)
            files += [
                each
                for each in found
                if each is not None and purpose in (None, each.document["purpose"])
            ]
            if len(ids) < _RECORDS_PER_READ:
                break
            after = ids[-1]
        return files[:limit]

    async def delete(self, tenant_id: str, file_id: str) -> None:
        """Remove a file; raises NotFound."""
        await self.find(tenant_id, file_id)
        with self._state.guarded():
            await self._remove(args=[file_id, self._shelf.key(tenant_id), "", ""])

    async def pieces(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """Yield the content; raises NotFound if it is deleted meanwhile."""
        for index in range(file.num_pieces):
            with self._state.guarded():
                piece = await cast(
                    "Any", self._state.redis.lindex(f"sala:file:{file.file_id}:pieces", index)
                )
            if piece is None:
                raise file_not_found(file.file_id)
            yield piece

    async def lines(
        self, file: StoredFile, *, max_line_bytes: int
    ) -> AsyncGenerator[list[tuple[int, bytes]]]:
        """Yield the lines with their numbers from 1, some at a time; empty ones are left out.

        A line that is too long comes as its first ``max_line_bytes + 1`` bytes.
        """
        rest, number = b"", 1

        def line(raw: bytes) -> list[tuple[int, bytes]]:
            raw = raw[: max_line_bytes + 1].strip()
            return [(number, raw)] if raw else []

        async with aclosing(self.pieces(file)) as pieces:
            async for piece in pieces:
                *whole, last = piece.split(b"\n")
                lines = []
                for each in whole:
                    lines += line(rest + each)
                    rest, number = b"", number + 1
                if len(rest) <= max_line_bytes:
                    rest += last
                if lines:
                    yield lines
        if lines := line(rest):
            yield lines

    async def _read(self, tenant_id: str, file_ids: list[str]) -> list[StoredFile | None]:
        with self._state.guarded():
            pipeline = self._state.redis.pipeline(transaction=False)
            for file_id in file_ids:
                pipeline.hmget(f"sala:file:{file_id}", ["tenant", "doc", "pieces"])
            records = await pipeline.execute() if file_ids else []
        return [
            StoredFile(file_id, json.loads(document), int(num_pieces))
            if owner == tenant_id.encode()
            else None
            for file_id, (owner, document, num_pieces) in zip(file_ids, records, strict=True)
        ]


class FileWriter:
    """Writes one file; see :meth:`Files.writer`."""

    def __init__(self, files: Files, tenant_id: str, file_id: str, lease: Lease | None) -> None:
        self._files = files
        self._tenant_id = tenant_id
        self._file_id = file_id
        self._is_upload = lease is None
        self._fence = ("", "") if lease is None else (lease.job_id, lease.token)
        self._shelf_key = files._shelf.key(tenant_id)
        self._buffer = bytearray()
        self._num_pieces = 0
        self.num_bytes = 0

    async def write(self, data: bytes) -> None:
        """Add to the content.

        Raises:
            BodyTooLarge: the upload is larger than a file may be.
            InsufficientQuota: its tenant has too much stored.
            UploadTimeout: it came so slowly that its beginning is gone.
            LeaseLost: the result is somebody else's to write.
            StateUnavailable: the store is away.
        """
        self.num_bytes += len(data)
        if self._is_upload and self.num_bytes > self._files.settings.max_file_bytes:
            raise too_large(self._files.settings)
        self._buffer += data
        while len(self._buffer) >= PIECE_BYTES:
            await self._append(bytes(self._buffer[:PIECE_BYTES]))
            del self._buffer[:PIECE_BYTES]

    async def publish(self, *, filename: str, purpose: str, keep_s: float) -> dict[str, Any]:
        """End the file, which can be read from now on; return its object. Raises like :meth:`write`."""
        if self._buffer:
            await self._append(bytes(self._buffer))
            self._buffer.clear()
        files, now_s = self._files, int(self._files._wall_clock())
        document = {
            "id": self._file_id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": now_s,
            "expires_at": now_s + int(keep_s),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
            "status_details": None,
        }
        with files._state.guarded():
            is_ours = await cast(
                "Any",
                files._publish(
                    args=[
                        *(self._file_id, self._shelf_key, self._tenant_id, dump(document)),
                        *(self._num_pieces, "", int(keep_s * 1000), *self._fence),
                    ]
                ),
            )
        self._check_ours(is_ours)
        return document

    async def discard(self) -> None:
        """Forget what is written so far, by this writer or an earlier one; raises like :meth:`write`."""
        with self._files._state.guarded():
            is_ours = await cast(
                "Any", self._files._remove(args=[self._file_id, self._shelf_key, *self._fence])
            )
        self._check_ours(is_ours)
        self._buffer.clear()
        self._num_pieces = self.num_bytes = 0

    async def give_up(self) -> None:
        """Forget what is written, if the store answers; else it is forgotten after a while."""
        with suppress(GatewayError, LeaseLost):
            await self.discard()

    async def _append(self, piece: bytes) -> None:
        files = self._files
        limit = files.settings.file_bytes_per_tenant
        with files._state.guarded():
            outcome = await cast(
                "Any",
                files._append(
                    args=[
                        *(self._file_id, self._shelf_key, piece, self._num_pieces),
                        *(limit if self._is_upload else "", scripts.FILE_OVERHEAD_BYTES),
                        *("", _PENDING_MS, *self._fence),
                    ]
                ),
            )
        if outcome < 0:
            raise InsufficientQuota(
                f"Your files would be larger than {limit} bytes together; delete some first."
            )
        self._check_ours(outcome)
        self._num_pieces += 1

    def _check_ours(self, answer: int) -> None:
        if answer:
            return
        if self._is_upload:
            raise UploadTimeout("The file did not arrive in time.")
        raise LeaseLost


def too_large(settings: JobsSettings) -> BodyTooLarge:
    """Return the error for an upload that is larger than a file may be."""
    return BodyTooLarge(f"A file may have {settings.max_file_bytes} bytes at most.")


def file_not_found(file_id: str, param: str | None = None) -> NotFound:
    """Return the error for a file that a tenant does not have."""
    shown = file_id if len(file_id) <= 80 and file_id.isprintable() else "..."
    return NotFound(f"There is no file with the id '{shown}'.", param=param)
