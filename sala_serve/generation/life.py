"""The life of one generation, from its call to its settled end."""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sala_serve.errors import (
    EngineLost,
    EngineStuck,
    EngineTimeout,
    EngineUnavailable,
    FirstTokenTimeout,
    GatewayError,
    InvalidRequest,
    PromptDoesNotFit,
    QueueTimeout,
    TotalTimeout,
)
from sala_serve.events import DONE, event_data, split_events
from sala_serve.generation.answers import Meter, parse_chunk, parse_whole, usage_of
from sala_serve.generation.call import PROMPT_FIELDS, Chunk, Prefilling, Quiet, Reserved, Whole
from sala_serve.generation.updates import Updates, beside
from sala_serve.running import RunningRequest
from sala_serve.scheduling.work import Waiting, Work
from sala_serve.telemetry import Phase
from sala_serve.tenants.limits import Claim
from sala_serve.tenants.model import check_scopes
from sala_serve.tokens.prompt import Prompt

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

    from sala_serve.engine.http import EngineReply
    from sala_serve.engine.pool import Engine, EnginePool
    from sala_serve.generation.call import Call, Update
    from sala_serve.scheduling.scheduler import Scheduler, Turn
    from sala_serve.telemetry import Metrics, Usage
    from sala_serve.tenants.limits import Limiter, Reservation
    from sala_serve.tenants.model import Tier
    from sala_serve.tenants.settings import TenantsSettings
    from sala_serve.tokens.prompt import PromptCounter

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.4
"""Between two looks at how far the engine is."""
ASSUMED_OUTPUT_TOKENS = 1024
"""Of each choice, where the client sets no bound."""
DEADLINES = (EngineTimeout, FirstTokenTimeout, QueueTimeout, TotalTimeout)
"""Ends after which what was computed is charged; other errors give everything back."""
MAX_TRIES = 3
"""Engines that one request is sent to, each of which had not begun with it."""
REQUEST_ID_HEADER = "X-Request-Id"


class Generations:
    """Runs generations on the engines of one gateway."""

    def __init__(
        self,
        pool: EnginePool,
        counter: PromptCounter,
        limiter: Limiter,
        scheduler: Scheduler[Engine],
        *,
        tenants: TenantsSettings,
        long_prompt_tokens: int,
        progress_interval_s: float,
        metrics: Metrics,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._pool = pool
        self._counter = counter
        self._limiter = limiter
        self._scheduler = scheduler
        self._tenants = tenants
        self._long_prompt_tokens = long_prompt_tokens
        self._progress_interval_s = progress_interval_s
        self._metrics = metrics
        self._clock = clock
        self._sleep = sleep

    async def run(self, call: Call) -> AsyncGenerator[Update]:
        """Yield what happens; the answer is complete when this ends without an error.

        Closing it early stops the engine, gives back what was reserved and settles what was used.

        Raises:
            GatewayError: as docs/api.md lists them. What was yielded before is then not an answer.
        """
        updates: Updates[Update] = Updates()
        life = _Life(self, call, updates)
        async with beside(life.live()) as task:
            task.add_done_callback(lambda _: updates.end())
            while True:
                try:
                    async with asyncio.timeout(self._progress_interval_s):
                        update = await updates.read()
                except TimeoutError:
                    update = life.quiet()
                if update is None:
                    break
                if not isinstance(update, Chunk | Whole):
                    call.record.note = update
                yield update
            await task


class _Life:
    """One call on its way."""

    def __init__(self, parts: Generations, call: Call, updates: Updates[Update]) -> None:
        self._parts = parts
        self._call = call
        self._updates = updates
        self._record = call.record
        # clients may repeat their ids, and two tenants may choose the same one
        self._engine_request_id = f"{call.request_id}.{uuid.uuid4().hex[:8]}"
        self._started_at_s = parts._clock()
        self._told: Update | None = None
        self._has_waited = False

    def quiet(self) -> Update:
        """Return what can be said when nothing has happened for a while: what was said last."""
        match self._record.phase:
            case Phase.DECODE:
                return Quiet("decoding")
            case Phase.QUEUE | Phase.PREFILL if isinstance(self._told, Waiting | Prefilling):
                return self._told
        return Quiet("counting")

    def _tell(self, update: Waiting | Prefilling) -> None:
        self._told = update
        self._has_waited |= isinstance(update, Waiting)
        self._updates.note(update)

    async def live(self) -> None:
        """Run the call to its end."""
        parts, call = self._parts, self._call
        async with call.scope or RunningRequest() as scope:
            message = "The answer was not complete within the deadline of the whole request."
            with _cut_after(scope, call.deadlines.total_s, TotalTimeout(message)):
                self._record.enter(Phase.COUNT)
                prompt, output_tokens, tier = await self._admitted()
                work = self._work(prompt, output_tokens, tier)
                claim = Claim(
                    input_tokens=prompt.num_tokens,
                    predicted_cached_tokens=parts._scheduler.predicted_cached_tokens(work),
                    output_tokens=output_tokens,
                    is_long=prompt.num_tokens > parts._long_prompt_tokens,
                )
                async with parts._limiter.reserve(
                    call.principal, claim, request_id=self._engine_request_id
                ) as reservation:
                    self._updates.note(Reserved(reservation.headers))
                    meter = Meter(prompt.num_tokens)
                    try:
                        await self._take_turns(work, meter)
                    except Exception as error:
                        # a client that leaves and a deadline, which a client can shorten, are no failure
                        if not isinstance(error, DEADLINES):
                            meter.give_back()
                        raise
                    except asyncio.CancelledError:
                        if not call.is_charged_when_cut():
                            meter.give_back()
                        raise
                    finally:
                        await self._settle(reservation, meter.usage())

    async def _admitted(self) -> tuple[Prompt, int, Tier]:
        """Count the prompt and refuse what cannot be served, before anything is spent on it."""
        parts, call, generation = self._parts, self._call, self._call.generation
        parts._pool.require_ready()
        model = parts._pool.require_model(generation.model)
        tier = self._tier()
        check_scopes(call.principal, model=model.name, tier=generation.service_tier)
        if call.path == "/v1/chat/completions":
            prompts = [await parts._counter.count_chat(generation.document)]
        else:
            prompts = await parts._counter.count_completion(generation.document)
        longest = max(prompts, key=lambda prompt: prompt.num_tokens)
        total = sum(prompt.num_tokens for prompt in prompts)
        self._record.num_prompt_tokens, self._record.tier = total, tier.name
        asked = generation.max_output_tokens
        if model.max_model_len is not None:
            _require_fit(longest.num_tokens, asked, model.max_model_len, self._prompt_field)
            room = model.max_model_len - longest.num_tokens
            each = min(ASSUMED_OUTPUT_TOKENS if asked is None else asked, room)
        else:
            each = ASSUMED_OUTPUT_TOKENS if asked is None else asked
        check_scopes(call.principal, context_tokens=longest.num_tokens + each)
        output_tokens = each * generation.num_choices * len(prompts)
        return Prompt(total, longest.block_hashes), output_tokens, tier

    @property
    def _prompt_field(self) -> str:
        return PROMPT_FIELDS[self._call.path]

    def _tier(self) -> Tier:
        tenants, call = self._parts._tenants, self._call
        asked = call.tier or call.generation.service_tier
        if asked is not None and asked not in tenants.tiers:
            names = ", ".join(sorted({"auto", *tenants.tiers}))
            message = f"service_tier: expected one of {names}."
            raise InvalidRequest(message, param="service_tier")
        return tenants.tier(asked or call.principal.tenant.tier)

    def _work(self, prompt: Prompt, output_tokens: int, tier: Tier) -> Work:
        call = self._call
        return Work(
            request_id=self._engine_request_id,
            tenant_id=call.principal.tenant.tenant_id,
            tier=tier,
            prompt=prompt,
            output_tokens=output_tokens,
            model=call.generation.model,
            arrived_at_s=self._started_at_s,
            deadline_s=call.deadlines.queue_s,
            pin_key=call.generation.prompt_cache_key,
        )

    async def _take_turns(self, work: Work, meter: Meter) -> None:
        """Wait for a turn and run on its engine; again if that engine had not begun, or gives way."""
        num_tries = 1
        while True:
            self._record.enter(Phase.QUEUE)
            async with self._parts._scheduler.turn(work, self._tell) as turn:
                try:
                    await self._dispatch(turn, meter)
                    return
                except _GiveWay:
                    meter.give_way()
                except (EngineUnavailable, EngineLost, EngineStuck) as error:
                    if isinstance(error, EngineUnavailable):
                        turn.engine.note_unreachable()
                    else:
                        # one that dies answers each request with an error before it is gone
                        turn.engine.note_broken()
                        if meter.has_started:
                            raise
                    others = [
                        engine
                        for engine in self._parts._pool.ready(work.model)
                        if engine is not turn.engine
                    ]
                    if num_tries >= MAX_TRIES or not (others or self._has_waited):
                        raise
                    if not others:  # whoever did not wait is told to come back, and can be told so
                        self._parts._scheduler.keep_place(work)
                    num_tries += 1
                    meter.progress = None
                    where = "goes to another engine" if others else "waits again"
                    logger.warning("%s %s: %s", work.request_id, where, error.code)

    async def _dispatch(self, turn: Turn[Engine], meter: Meter) -> None:
        call = self._call
        self._record.engine_id = turn.engine.engine_id
        self._record.enter(Phase.PREFILL)
        message = "The first token did not come within its deadline."
        headers = {REQUEST_ID_HEADER: self._engine_request_id, **call.trace_headers}
        async with RunningRequest() as scope:
            timer = _Timer(scope)
            timer.start(call.deadlines.first_token_s, FirstTokenTimeout(message))
            try:
                async with (
                    beside(self._watch(turn, meter, scope, timer)),
                    turn.engine.client.post(
                        call.path,
                        _dressed(call.generation.body, turn),
                        headers=headers,
                        prompt_field=self._prompt_field,
                    ) as reply,
                ):
                    if call.generation.is_stream:
                        await self._relay(reply, turn, meter, timer)
                    else:
                        body = await reply.read()
                        document = parse_whole(body)
                        meter.reported = usage_of(document)
                        await self._updates.piece(Whole(body, document))
            finally:
                timer.stop()
        turn.finished(meter.reported)

    async def _relay(
        self, reply: EngineReply, turn: Turn[Engine], meter: Meter, timer: _Timer
    ) -> None:
        between_tokens_s = self._call.deadlines.between_tokens_s
        async for event in split_events(reply.chunks()):
            data = event_data(event)
            if data is None:  # its keep-alive; ours say more
                continue
            if data == DONE:
                if meter.num_chunks == 0 or meter.open_choices:
                    break
                return
            chunk = parse_chunk(data, prompt_field=self._prompt_field)
            usage = usage_of(chunk)
            if usage is not None:
                meter.reported = usage
            if chunk.get("choices"):
                timer.stop()
                if meter.num_chunks == 0:
                    turn.first_token()
                meter.take(chunk)
                if (gap_s := self._record.token()) is not None:
                    self._parts._metrics.token_gap(self._record.tier, gap_s)
            elif usage is not None and not self._call.generation.client_wants_usage:
                continue
            await self._updates.piece(Chunk(event, chunk))
            # started only now: a slow reader is not the engine's fault
            timer.start(between_tokens_s, EngineTimeout("The engine did not go on in time."))
        raise EngineLost("The engine's stream ended before the answer was complete.")

    async def _watch(
        self, turn: Turn[Engine], meter: Meter, scope: RunningRequest, timer: _Timer
    ) -> None:
        """Look at the engine again and again: report, pace, notice that it is stuck."""
        first_look: tuple[float, int] | None = None
        while True:
            if turn.engine.is_stuck:
                scope.cut(EngineStuck("The engine does not move any more."))
                return
            progress = turn.engine.progress.get(self._engine_request_id)
            expected_s = None
            if progress is not None:
                meter.progress = progress
                turn.prefill_progress(progress)
                if turn.must_give_way and meter.may_give_way:
                    scope.cut(_GiveWay())
                    return
                if progress.phase == "decoding" and not self._call.generation.is_stream:
                    timer.stop()
                    turn.first_token()
                now_s, done = self._parts._clock(), progress.num_computed_tokens
                first_at_s, first_done = first_look = first_look or (now_s, done)
                if done > first_done:
                    left = progress.num_prompt_tokens - done
                    expected_s = left * (now_s - first_at_s) / (done - first_done)
            if not meter.has_first_token:
                self._tell(
                    Prefilling(
                        done_tokens=None if progress is None else progress.num_computed_tokens,
                        total_tokens=meter.num_prompt_tokens,
                        cached_tokens=None if progress is None else progress.num_cached_tokens,
                        expected_first_token_s=expected_s,
                    )
                )
            await self._parts._sleep(min(LOOK_INTERVAL_S, self._parts._progress_interval_s))

    async def _settle(self, reservation: Reservation, usage: Usage | None) -> None:
        """Charge what was used; without that, leaving the reservation gives all of it back."""
        self._record.enter(Phase.SETTLE)
        self._record.usage = usage
        if usage is None:
            return
        await reservation.settle(usage)


class _GiveWay(Exception):  # noqa: N818 - named for what is asked
    """The turn is over although the answer is not."""


class _Timer:
    """One deadline at a time, which cuts ``scope``."""

    def __init__(self, scope: RunningRequest) -> None:
        self._scope = scope
        self._handle: asyncio.TimerHandle | None = None

    def start(self, timeout_s: float | None, cause: GatewayError) -> None:
        """Replace the deadline."""
        self.stop()
        if timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._handle = loop.call_later(timeout_s, self._scope.cut, cause)

    def stop(self) -> None:
        """Have no deadline."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


@contextmanager
def _cut_after(
    scope: RunningRequest, timeout_s: float | None, cause: GatewayError
) -> Iterator[None]:
    timer = _Timer(scope)
    timer.start(timeout_s, cause)
    try:
        yield
    finally:
        timer.stop()


def _require_fit(
    num_prompt_tokens: int, asked: int | None, max_model_len: int, prompt_field: str
) -> None:
    """Refuse what the engine would refuse: the prompt and at least one token must fit."""
    if num_prompt_tokens + (asked or 1) <= max_model_len:
        return
    is_prompt = num_prompt_tokens >= max_model_len or asked is None
    wanted = "" if asked is None else f" and {asked} in the answer"
    raise PromptDoesNotFit(
        f"This model's maximum context length is {max_model_len} tokens. Your request has "
        f"{num_prompt_tokens} tokens in its prompt{wanted}.",
        param=prompt_field if is_prompt else "max_tokens",
    )


def _dressed(body: bytes, turn: Turn[Engine]) -> bytes:
    """Return the body with what only the gateway may set; it is a JSON object with a field at least."""
    fields = f',"cache_salt":"{turn.cache_salt}"'
    if turn.vllm_priority:
        fields += f',"priority":{turn.vllm_priority}'
    return body[:-1] + fields.encode() + b"}"
