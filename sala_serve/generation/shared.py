"""Answers that are not streamed, each computed once: a client that asks again gets the running one.

Only one that asks *again*: with the same ``Idempotency-Key``, or, with the same body, when it says that it is a
retry or when nobody waits for the running answer any more. Two clients that ask the same at the same time want two
answers, since the model may give two.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sala_serve.errors import EngineLost, IdempotencyConflict, ShuttingDown, TotalTimeout
from sala_serve.generation.call import Reserved, Whole
from sala_serve.telemetry import RequestTrace
from sala_serve.tenants.model import Scopes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sala_serve.generation.call import Call, Update
    from sala_serve.generation.life import Generations
    from sala_serve.telemetry import Phase, RequestRecord
    from sala_serve.tenants.model import Principal

Identity = tuple[str, Scopes, str, str | bytes]


@dataclass(frozen=True)
class Asked:
    """How two requests are known to be the same one."""

    principal: Principal
    path: str
    body_digest: bytes
    idempotency_key: str | None
    is_retry: bool = False
    """Whether the client says that it asks again."""

    @property
    def identity(self) -> Identity:
        """Equal for a request and its retry; another key of the tenant must reach as much."""
        tenant_id, scopes = self.principal.tenant.tenant_id, self.principal.scopes
        return tenant_id, scopes, self.path, self.idempotency_key or self.body_digest


@dataclass
class _Running:
    asked: Asked
    record: RequestRecord
    trace: _WhileWatched
    note: Callable[[Update], None]
    outcome: asyncio.Future[Whole]
    task: asyncio.Task[None] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    num_readers: int = 0
    is_accounted: bool = False
    """Whether some reader has taken the usage into its record."""
    end: asyncio.TimerHandle | None = None

    def show(self, update: Update) -> None:
        """Let those who look at the request that began see how far it is."""
        if (record := self.trace.record) is not None:
            record.note = update
            self.copy_to(record)

    def copy_to(self, record: RequestRecord) -> None:
        """Note in a reader's record where and what was computed."""
        for name in ("tier", "engine_id", "num_prompt_tokens"):
            setattr(record, name, getattr(self.record, name))


class SharedAnswers:
    """The answers being computed, by who asked for what."""

    def __init__(self, generations: Generations, *, retry_grace_s: float) -> None:
        self._generations = generations
        self._retry_grace_s = retry_grace_s
        self._running: dict[Identity, list[_Running]] = {}
        self._group: asyncio.TaskGroup | None = None

    def __len__(self) -> int:
        return sum(map(len, self._running.values()))

    async def run(self) -> None:
        """Own the computations; cancel to stop them."""
        async with asyncio.TaskGroup() as self._group:
            await asyncio.Event().wait()

    async def answer(
        self,
        call: Call,
        asked: Asked,
        *,
        comes_back: Callable[[], bool],
        note: Callable[[Update], None],
    ) -> tuple[Whole, Mapping[str, str]]:
        """Return the answer and the headers of its reservation.

        Cancelled, it stops the computation unless another reader waits for it. If ``comes_back()`` says that
        the client will ask again, the computation first waits ``retry_grace_s`` for that.

        Args:
            call: run if nobody has asked this yet; its record gets the outcome either way.
            asked: what the request is recognised by.
            comes_back: asked when the client has left.
            note: told each update of the computation that ``call`` starts.

        Raises:
            IdempotencyConflict: the key came before with another body, and that still runs.
            GatewayError: as :meth:`Generations.run`.
        """
        running = self._found(asked)
        if running is None:
            running = self._start(call, asked, note)
        elif running.asked.body_digest != asked.body_digest:
            raise IdempotencyConflict(
                "This Idempotency-Key belongs to a request with another body."
            )
        if running.end is not None:
            running.end.cancel()
            running.end = None
        running.num_readers += 1
        has_left = False
        limit = asyncio.timeout(call.deadlines.total_s)
        try:
            async with limit:
                whole = await asyncio.shield(running.outcome)
        except TimeoutError:
            if not limit.expired():
                raise
            raise TotalTimeout(
                "The answer was not complete within the deadline of the whole request."
            ) from None
        except asyncio.CancelledError:
            has_left = True
            raise
        finally:
            running.num_readers -= 1
            self._account(running, call.record)
            if not running.num_readers:
                grace_s = self._retry_grace_s if has_left and comes_back() else 0.0
                self._end_after(running, grace_s)
        return whole, running.headers

    def _found(self, asked: Asked) -> _Running | None:
        for running in self._running.get(asked.identity, ()):
            if asked.idempotency_key is not None or asked.is_retry or not running.num_readers:
                return running
        return None

    def _start(self, call: Call, asked: Asked, note: Callable[[Update], None]) -> _Running:
        assert self._group is not None
        # a record of its own: the one of the request is reported when its client leaves
        trace = _WhileWatched(call.record)
        record = replace(call.record, trace=trace, phases_s={}, phase=None)
        outcome: asyncio.Future[Whole] = asyncio.get_running_loop().create_future()
        running = _Running(asked, record, trace, note, outcome)
        self._running.setdefault(asked.identity, []).append(running)
        running.task = self._group.create_task(self._finish(replace(call, record=record), running))
        return running

    async def _finish(self, call: Call, running: _Running) -> None:
        """Compute the answer; its error is for the readers, never for the group."""
        try:
            whole = await self._compute(call, running)
        except asyncio.CancelledError:
            running.outcome.set_exception(
                ShuttingDown("The server stopped before the answer came.")
            )
            raise
        except Exception as error:  # noqa: BLE001 - readers raise it
            running.outcome.set_exception(error)
            self._forget(running)
        else:
            running.outcome.set_result(whole)
        finally:
            if running.outcome.done():
                running.outcome.exception()  # seen, also where no reader is left

    async def _compute(self, call: Call, running: _Running) -> Whole:
        whole: Whole | None = None
        async with aclosing(self._generations.run(call)) as updates:
            async for update in updates:
                running.note(update)
                running.show(update)
                if isinstance(update, Reserved):
                    running.headers = update.headers
                elif isinstance(update, Whole):
                    whole = update
        if whole is None:
            raise EngineLost("The engine's answer is not complete.")
        return whole

    def _account(self, running: _Running, record: RequestRecord) -> None:
        """Copy what is known of the computation into a reader's record; its usage counts once."""
        if running.trace.record is record:
            running.trace.record = None
        running.copy_to(record)
        usage = running.record.usage
        if usage is not None and not running.is_accounted:
            running.is_accounted = True
            record.usage = usage

    def _end_after(self, running: _Running, grace_s: float) -> None:
        """Forget the answer, stopping its computation, unless somebody asks again in time."""
        if grace_s:
            loop = asyncio.get_running_loop()
            running.end = loop.call_later(grace_s, self._end, running)
        else:
            self._end(running)

    def _end(self, running: _Running) -> None:
        self._forget(running)
        assert running.task is not None
        running.task.cancel()

    def _forget(self, running: _Running) -> None:
        identity = running.asked.identity
        others = [each for each in self._running.get(identity, ()) if each is not running]
        if others:
            self._running[identity] = others
        else:
            self._running.pop(identity, None)


class _WhileWatched(RequestTrace):
    """Passes phases on to the request that began, until that is over."""

    def __init__(self, record: RequestRecord) -> None:
        self.record: RequestRecord | None = record
        self.trace_id = record.trace.trace_id

    def enter(self, phase: Phase) -> None:
        """Begin ``phase`` there too."""
        if self.record is not None:
            self.record.enter(phase)
