"""Runs a batch: looks at its lines, runs them, puts their results into files."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from enum import Enum
from typing import TYPE_CHECKING, Any

from sala_serve.errors import NotFound, StateUnavailable
from sala_serve.jobs.batch_lines import (
    InputCheck,
    LineProblem,
    LineReader,
    expiry,
    unpack,
)
from sala_serve.jobs.lines import LineResults
from sala_serve.jobs.model import Status

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from sala_serve.bodies import BodySettings
    from sala_serve.errors import GatewayError
    from sala_serve.jobs.batch_lines import LineResult
    from sala_serve.jobs.batch_work import LineRunner, LineTask
    from sala_serve.jobs.files import Files
    from sala_serve.jobs.model import Lease
    from sala_serve.jobs.store import JobStore
    from sala_serve.jobs.worker import Held
    from sala_serve.state import State

_RESULTS_PER_READ = 32


class _End(Enum):
    """Why no more lines are run."""

    ALL_DONE = Status.COMPLETED
    CANCELLED = Status.CANCELLED
    EXPIRED = Status.EXPIRED
    STOPPING = None
    """This gateway stops; another one goes on."""


class BatchRunner:
    """Runs batches; see :class:`~sala_serve.jobs.worker.Runner`.

    Whatever it writes carries the number of its lease, and names nothing that a next attempt would name
    differently: who takes a batch over goes on after the last line that has a result.
    """

    def __init__(
        self,
        store: JobStore,
        files: Files,
        lines: LineRunner,
        *,
        state: State,
        bounds: BodySettings,
        max_line_bytes: int,
        wall_clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._settings = store.settings
        self._files = files
        self._results = LineResults(state)
        self._lines = lines
        self._bounds = bounds
        self._max_line_bytes = max_line_bytes
        self._wall_clock = wall_clock

    async def run(self, held: Held) -> None:
        """Run one attempt, from where the last one came to."""
        lease = held.lease
        held.has_begun = True  # it gives back by itself what no engine works on
        job = await self._store.find(lease.tenant_id, lease.job_id, "batch")
        if job.cancel_asked_unix_s is not None:
            held.is_cancel_asked.set()
        document = dict(job.document)
        reader = LineReader(
            lease.spec["endpoint"], self._bounds, max_line_bytes=self._max_line_bytes
        )
        try:
            if document["status"] == "validating" and not held.is_cancel_asked.is_set():
                num_lines, problems = await self._check(lease, reader)
                if problems:
                    await self._fail(lease, document, problems)
                    return
                document |= {"status": "in_progress", "in_progress_at": self._now_s()}
                document["request_counts"] = {"total": num_lines}
                await self._store.update(lease, document=document)
            end = _End.ALL_DONE
            if document["status"] != "finalizing":
                end = await self._run_lines(held, document, reader)
        except LineProblem as problem:  # its file is gone, or it was checked under other bounds
            await self._fail(lease, document, [problem.entry(None)])
            return
        if end is _End.STOPPING:
            await self._store.release(lease, is_attempt=False)
            return
        if end is _End.ALL_DONE and document["status"] != "finalizing":
            document |= {"status": "finalizing", "finalizing_at": self._now_s()}
            await self._store.update(lease, document=document)
        await self._end(lease, end.value, document)

    async def fail(self, lease: Lease, error: GatewayError, *, dead: str | None) -> None:
        """End a batch with an error; what it has is kept."""
        job = await self._store.find(lease.tenant_id, lease.job_id, "batch")
        problem = LineProblem(error.code, error.message).entry(None)
        await self._fail(lease, dict(job.document), [problem], dead=dead)

    async def _fail(
        self,
        lease: Lease,
        document: dict[str, Any],
        problems: list[dict[str, Any]],
        *,
        dead: str | None = None,
    ) -> None:
        document["errors"] = {"object": "list", "data": problems}
        await self._end(lease, Status.FAILED, document, dead=dead)

    async def _end(
        self, lease: Lease, status: Status, document: dict[str, Any], *, dead: str | None = None
    ) -> None:
        """Put the results into files and end the batch; a next attempt would write the same files."""
        document |= await self._assemble(lease)
        document |= {"status": status.value, f"{status.value}_at": self._now_s()}
        await self._store.finish(lease, status, document, dead=dead)

    async def _check(self, lease: Lease, reader: LineReader) -> tuple[int, list[dict[str, Any]]]:
        check = InputCheck(reader, max_lines=self._settings.max_batch_requests)
        async with aclosing(self._input(lease)) as groups:
            async for group in groups:
                await asyncio.to_thread(check.take, group)
                if check.is_hopeless:
                    break
        return check.num_lines, check.finish()

    async def _input(self, lease: Lease) -> AsyncGenerator[list[tuple[int, bytes]]]:
        """Yield the lines of the input; raises LineProblem."""
        try:
            file = await self._files.find(lease.tenant_id, lease.spec["input_file_id"])
            lines = self._files.lines(file, max_line_bytes=self._max_line_bytes)
            async with aclosing(lines) as groups:
                async for group in groups:
                    yield group
        except NotFound:
            message = "The input file was deleted or has expired."
            raise LineProblem("input_file_gone", message) from None

    async def _pending(self, lease: Lease) -> AsyncGenerator[tuple[int, bytes]]:
        """Yield the lines that have no result."""
        done = set(await self._results.numbers(lease.job_id))
        async with aclosing(self._input(lease)) as groups:
            async for group in groups:
                for number, raw in group:
                    if number not in done:
                        yield number, raw

    async def _run_lines(self, held: Held, document: Mapping[str, Any], reader: LineReader) -> _End:
        """Run the lines that have no result, until there is none or a reason to stop."""
        lease = held.lease
        running: dict[asyncio.Task[None], LineTask] = {}
        is_read = False
        try:
            async with aclosing(self._pending(lease)) as pending:
                while True:
                    if (end := self._reason(held, document)) is not None:
                        break
                    while not is_read and len(running) < self._settings.batch_concurrency:
                        if (numbered := await anext(pending, None)) is None:
                            is_read = True
                            break
                        line = await asyncio.to_thread(reader.read, *numbered)
                        work = self._lines.task(held, line)
                        running[asyncio.create_task(self._run_line(lease, work))] = work
                    if not running:
                        return await self._end_of_lines(lease)
                    await self._wait(running)
            if end is _End.STOPPING:
                for task, work in running.items():
                    if not work.has_begun:
                        task.cancel()
                while running:
                    await self._wait(running)
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
        if end is _End.EXPIRED:
            await self._expire(lease)
        return end

    async def _wait(self, running: dict[asyncio.Task[None], LineTask]) -> None:
        """Wait until a line ends, not for long; raises what it raises."""
        done, _ = await asyncio.wait(
            running,
            timeout=self._settings.heartbeat_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for task in done:
            del running[task]
            if not task.cancelled():
                task.result()

    async def _end_of_lines(self, lease: Lease) -> _End:
        """Tell how a batch ends whose lines all have results, which an earlier attempt may have known."""
        job = await self._store.find(lease.tenant_id, lease.job_id, "batch")
        return _End.EXPIRED if job.counts.get("expired") else _End.ALL_DONE

    def _reason(self, held: Held, document: Mapping[str, Any]) -> _End | None:
        if held.is_cancel_asked.is_set():
            return _End.CANCELLED
        if self._wall_clock() >= document["expires_at"]:
            return _End.EXPIRED
        return _End.STOPPING if held.is_stopping.is_set() else None

    async def _run_line(self, lease: Lease, work: LineTask) -> None:
        result = await work.run()
        await self._write(lease, work.line.number, result)

    async def _write(self, lease: Lease, number: int, result: LineResult) -> None:
        """Store a result; what was computed is not given up while the lease may hold."""
        while True:
            try:
                await self._results.write(lease, number, result.packed(), result.counts)
                return
            except StateUnavailable:
                # the heartbeat ends this when the lease can no longer be renewed
                await asyncio.sleep(self._settings.heartbeat_s)

    async def _expire(self, lease: Lease) -> None:
        async with aclosing(self._pending(lease)) as pending:
            async for number, raw in pending:
                await self._write(lease, number, await asyncio.to_thread(expiry, raw))

    async def _assemble(self, lease: Lease) -> dict[str, Any]:
        """Write the results into files, in the order of the input; return the fields that name them."""
        spec, batch_id = lease.spec, lease.job_id
        names = ("error", "output")
        writers = {
            name: self._files.writer(lease.tenant_id, spec[f"{name}_file_id"], lease=lease)
            for name in names
        }
        for writer in writers.values():
            await writer.discard()
        numbers = await self._results.numbers(batch_id)
        for first in range(0, len(numbers), _RESULTS_PER_READ):
            group = numbers[first : first + _RESULTS_PER_READ]
            for packed in await self._results.read(batch_id, group):
                is_success, line = unpack(packed)
                await writers[names[is_success]].write(line)
        fields = {}
        for name, writer in writers.items():
            if writer.num_bytes:
                await writer.publish(
                    filename=f"{batch_id}_{name}.jsonl",
                    purpose="batch_output",
                    keep_s=spec["keep_output_s"],
                )
                fields[f"{name}_file_id"] = spec[f"{name}_file_id"]
        return fields

    def _now_s(self) -> int:
        return int(self._wall_clock())
