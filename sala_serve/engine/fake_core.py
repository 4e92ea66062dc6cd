"""The inside of the fake engine: counts tokens, remembers prefixes, prefills and decodes at a set speed."""

from __future__ import annotations

import asyncio
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from sala_serve.bodies import TEXT_PARTS
from sala_serve.engine.progress import Phase, RequestProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

CACHE_BLOCK_TOKENS = 16
_STEP_S = 0.02
"""Of a prefill whose speed is set."""


class Ending(StrEnum):
    """How an answer ends."""

    COMPLETE = "complete"
    CONNECTION_LOST = "connection lost"
    """The connection closes after the last token, as when the process dies."""
    SILENT_END = "silent end"
    """The stream ends in order but without its closing event."""
    ERROR_EVENT = "error event"
    """vLLM's error event, then its closing event."""


class Fault(StrEnum):
    """What befalls the whole engine."""

    KILLED = "killed"
    """It is gone from one moment to the next."""
    OUT_OF_MEMORY = "out of memory"
    """All requests get vLLM's error of a dead engine core, then it exits."""
    FROZEN = "frozen"
    """The engine core stops; the API server still answers ``/health``."""


@dataclass
class Behaviour:
    """How the engine behaves; may be changed while it runs."""

    model: str = "sala"
    max_model_len: int = 4096
    health_status: int = 200
    ttft_s: float = 0.0
    """Silence before the first token; the prefill."""
    prefill_tokens_per_s: float | None = None
    """If set, the prefill of the tokens that are not cached takes its time, shared by all requests."""
    itl_s: float = 0.0
    """Between two tokens."""
    num_tokens: int = 3
    num_padding_chars: int = 0
    """Added to each token, to fill buffers soon."""
    num_prompt_tokens: int | None = 7
    """None: counted, a token for each word."""
    num_cached_tokens: int | None = 4
    """None: the longest prefix that was computed before under the same ``cache_salt``, in whole blocks."""
    max_num_seqs: int = 256
    """Further requests wait."""
    kv_capacity_tokens: int = 1_000_000
    has_progress: bool = True
    """Serves ``/sala/progress``."""
    calls_tools: bool = False
    """Answers with a call of the first tool, if the request has tools."""
    num_keep_alives: int = 0
    """Comments sent before the first token of a stream."""
    ending: Ending = Ending.COMPLETE
    error: tuple[int, Mapping[str, Any]] | None = None
    """Status and ``error`` object to answer every request with."""
    fault: tuple[Phase, Fault] | None = None
    """Befalls the engine as soon as a request is in that phase."""


class CoreDied(Exception):  # noqa: N818 - named for what happened
    """The engine core ran out of memory."""


@dataclass(eq=False)
class Job:
    """One request inside."""

    request_id: str
    salt: str
    num_prompt_tokens: int
    blocks: Sequence[int]
    """Chained hash of each whole block."""
    num_answers: int = 1
    phase: Phase = "waiting"
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_tokens: int = 0

    def progress(self) -> RequestProgress:
        """Tell how far it has got."""
        return RequestProgress(
            phase=self.phase,
            num_prompt_tokens=self.num_prompt_tokens,
            num_computed_tokens=self.num_computed_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
        )


@dataclass
class FakeCore:
    """Computes nothing, in the time and order of an engine."""

    behaviour: Behaviour
    on_death: Callable[[], None] = lambda: None
    step: int = 0
    num_prefilled_tokens: int = 0
    """Ever, without those that were cached."""
    num_decoded_tokens: int = 0
    jobs: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._computed: dict[str, set[int]] = {}
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._freed = asyncio.Event()
        self._step_lock = asyncio.Lock()
        self._death = asyncio.Event()

    def freeze(self) -> None:
        """Stop all computation, as a hung GPU does."""
        self._thawed.clear()

    def thaw(self) -> None:
        """Go on."""
        self._thawed.set()

    def job(self, body: Mapping[str, Any], request_id: str) -> Job:
        """Make a request out of its body; several prompts of one completion count as one."""
        behaviour = self.behaviour
        blocks, before, token_ids = [], 0, []
        if None in (behaviour.num_prompt_tokens, behaviour.num_cached_tokens):
            token_ids = [token for prompt in prompt_tokens(body) for token in prompt]
        for end in range(CACHE_BLOCK_TOKENS, len(token_ids) + 1, CACHE_BLOCK_TOKENS):
            before = hash((before, tuple(token_ids[end - CACHE_BLOCK_TOKENS : end])))
            blocks.append(before)
        return Job(
            request_id=request_id,
            salt=body.get("cache_salt") or "",
            num_prompt_tokens=behaviour.num_prompt_tokens or len(token_ids),
            blocks=blocks,
            num_answers=body.get("n") or 1,
        )

    @contextmanager
    def holding(self, job: Job) -> Iterator[None]:
        """Hold the job's memory for the length of the block."""
        self.jobs.append(job)
        try:
            yield
        finally:
            self.jobs.remove(job)
            self._freed.set()

    async def prefill(self, job: Job) -> None:
        """Wait for a place, then compute the prompt.

        Raises:
            CoreDied: the engine ran out of memory.
        """
        behaviour = self.behaviour
        await self._enter(job, "waiting")
        while self._num_running() >= behaviour.max_num_seqs:
            self._freed.clear()
            await self._freed.wait()
        computed = self._computed.setdefault(job.salt, set())
        job.num_cached_tokens = self._num_cached(job, computed)
        job.num_computed_tokens = job.num_cached_tokens
        await self._enter(job, "prefilling")
        if behaviour.prefill_tokens_per_s is None:
            await self._compute(behaviour.ttft_s)
            self._prefilled(job, job.num_prompt_tokens - job.num_computed_tokens)
        while (num_left := job.num_prompt_tokens - job.num_computed_tokens) > 0:
            async with self._step_lock:
                speed = behaviour.prefill_tokens_per_s or float("inf")
                chunk = max(1, int(min(num_left, speed * _STEP_S)))
                await self._compute(chunk / speed)
                self._prefilled(job, chunk)
                # also of a prefill that is not carried on
                computed.update(job.blocks[: job.num_computed_tokens // CACHE_BLOCK_TOKENS])
        computed.update(job.blocks)
        await self._enter(job, "decoding")

    async def decode(self, job: Job) -> None:
        """Compute one more token of each answer; raises like :meth:`prefill`."""
        job.num_output_tokens += job.num_answers
        self.num_decoded_tokens += job.num_answers
        await self._compute(self.behaviour.itl_s)

    def progress(self) -> dict[str, Any]:
        """Return what ``/sala/progress`` says."""
        return {
            "instance": str(id(self)),
            "step": self.step,
            "requests": {job.request_id: asdict(job.progress()) for job in self.jobs},
            "kv": {
                "capacity_tokens": self.behaviour.kv_capacity_tokens,
                "used_tokens": self._num_used_tokens(),
            },
            "max_num_seqs": self.behaviour.max_num_seqs,
        }

    def metrics(self) -> str:
        """Return those of vLLM's metrics that the gateway reads."""
        capacity = self.behaviour.kv_capacity_tokens
        num_blocks = capacity // CACHE_BLOCK_TOKENS
        values = {
            "kv_cache_usage_perc{engine=": self._num_used_tokens() / capacity,
            "num_requests_running{engine=": self._num_running(),
            "num_requests_waiting{engine=": len(self.jobs) - self._num_running(),
            "generation_tokens_total{engine=": self.num_decoded_tokens,
            "prompt_tokens_total{engine=": 0,
            f'cache_config_info{{block_size="{CACHE_BLOCK_TOKENS}",num_gpu_blocks="{num_blocks}",'
            "engine=": 1,
        }
        return "".join(f'vllm:{name}"0"}} {value}\n' for name, value in values.items())

    @property
    def is_dead(self) -> bool:
        """Whether every request fails; the process exits when all have been told."""
        return self._death.is_set()

    def die(self) -> None:
        """Fail all requests with the error of a dead engine core."""
        self._death.set()
        self._thawed.set()

    async def _enter(self, job: Job, phase: Phase) -> None:
        job.phase = phase
        match self.behaviour.fault:
            case (at, Fault.KILLED) if at == phase:
                self.on_death()
            case (at, Fault.OUT_OF_MEMORY) if at == phase:
                self.die()
            case (at, Fault.FROZEN) if at == phase:
                self.freeze()
        await self._compute(0)

    async def _compute(self, duration_s: float) -> None:
        """Let time pass, for ever while frozen."""
        if duration_s == 0:
            await asyncio.sleep(0)
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(duration_s):
                    await self._death.wait()
        await self._thawed.wait()
        if self._death.is_set():
            raise CoreDied
        self.step += 1

    def _prefilled(self, job: Job, num_tokens: int) -> None:
        job.num_computed_tokens += num_tokens
        self.num_prefilled_tokens += num_tokens

    def _num_running(self) -> int:
        return sum(job.phase != "waiting" for job in self.jobs)

    def _num_used_tokens(self) -> int:
        return sum(job.num_computed_tokens + job.num_output_tokens for job in self.jobs)

    def _num_cached(self, job: Job, computed: set[int]) -> int:
        if self.behaviour.num_cached_tokens is not None:
            return min(self.behaviour.num_cached_tokens, job.num_prompt_tokens)
        num_blocks = next(
            (at for at, block in enumerate(job.blocks) if block not in computed), len(job.blocks)
        )
        # an engine computes at least the last token of a prompt
        return min(num_blocks * CACHE_BLOCK_TOKENS, job.num_prompt_tokens - 1)


def tokens_of(text: str) -> list[int]:
    """Return a token for each word."""
    return [zlib.crc32(word.encode()) & 0xFFFF for word in text.split()]


def prompt_tokens(body: Mapping[str, Any]) -> list[list[int]]:
    """Return the prompts of a request's body: one of a chat, one or more of a completion."""
    if "messages" in body:
        words = []
        for message in body["messages"]:
            content = message.get("content") or ""
            parts = [content] if isinstance(content, str) else content
            words += [message["role"], *map(_text_of, parts)]
        return [tokens_of(" ".join(words))]
    prompt = body["prompt"]
    if isinstance(prompt, str):
        return [tokens_of(prompt)]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return [tokens_of(each) if isinstance(each, str) else each for each in prompt]


def _text_of(part: str | Mapping[str, str]) -> str:
    return part if isinstance(part, str) else part[TEXT_PARTS[part["type"]]]
