"""How fast the simulated engine is: as fast as the real one was in the stored run of ``make bench-gpu``."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

WHOLE_STEP_TOKENS = 16_384
"""Of a step of stage ``sala``, whose times these are."""
LONG_STEP_TOKENS = 8448
"""Of a step of stage ``serving``, while a long prompt is alone."""
SMALL_STEP_TOKENS = 1024
"""Of a long prompt's, while it is not."""
SHORT_STEPS = 2
"""That a short prompt takes: its last tokens are a step of their own."""


@dataclass(frozen=True)
class Speeds:
    """How long steps take."""

    prompt_tokens: tuple[int, ...]
    prefill_s: tuple[float, ...]
    """Seconds of work on prompts of those lengths; between them a straight line."""
    token_step_s: float
    """Of a step that only generates."""
    step_overhead_s: float = 0.0
    """Of each step with a prompt in it, beside the work."""
    min_prompt_step_s: float = 0.0
    """Least time of a step with a prompt in it: launching its kernels takes as long."""

    def step_s(self, chunks: Iterable[tuple[int, int]]) -> float:
        """Return how long a step takes.

        Args:
            chunks: of each prompt in it: tokens that were computed before, and those of this step.
        """
        works = [self._until_s(start + num) - self._until_s(start) for start, num in chunks]
        if not works:
            return self.token_step_s
        prompt_s = max(self.step_overhead_s + sum(works), self.min_prompt_step_s)
        return max(prompt_s, self.token_step_s)

    def _until_s(self, num_tokens: int) -> float:
        points, times = (0, *self.prompt_tokens), (0.0, *self.prefill_s)
        idx = min(max(bisect_right(points, num_tokens), 1), len(points) - 1)
        slope = (times[idx] - times[idx - 1]) / (points[idx] - points[idx - 1])
        return times[idx - 1] + slope * (num_tokens - points[idx - 1])


@dataclass(frozen=True)
class Measured:
    """What the real engine took: seconds, of the stages ``sala`` and ``serving`` of ``make bench-gpu``."""

    device: str
    commit: str
    alone_s: dict[int, float]
    """By prompt length, one prompt at a time."""
    token_step_s: float
    short_idle_s: float
    """First token of a 500-token prompt, nothing else being there."""
    short_beside_s: float
    """The same beside a million-token prefill: median."""
    short_beside_max_s: float
    token_beside_s: float
    """Between two tokens of such an answer: median."""
    long_tokens: int
    long_alone_s: float
    long_beside_s: float
    """The million-token prefill, with short requests beside it."""
    num_arrivals: int
    interval_s: float
    """Between two of these."""

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read ``results.jsonl``; the last line of each kind counts."""
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

        def last(stage: str, name: str) -> dict[str, Any]:
            found: dict[str, Any]
            *_, found = (line for line in lines if (line["stage"], line["name"]) == (stage, name))
            return found

        latency = [line for line in lines if (line["stage"], line["name"]) == ("sala", "latency")]
        idle, beside = last("serving", "short_idle"), last("serving", "short_beside")
        long, start = last("serving", "long_prefill"), last("serving", "start")
        return cls(
            device=start["device"],
            commit=start["commit"],
            alone_s={line["prompt_tokens"]: line["ttft_s"]["median"] for line in latency},
            token_step_s=latency[-1]["tpot_s"]["median"],
            short_idle_s=idle["ttft_s"]["median"],
            short_beside_s=beside["ttft_s"]["median"],
            short_beside_max_s=beside["max_ttft_s"],
            token_beside_s=beside["tpot_s"]["median"],
            long_tokens=long["prompt_tokens"],
            long_alone_s=long["alone_s"],
            long_beside_s=long["beside_s"],
            num_arrivals=beside["ttft_s"]["repeats"],
            interval_s=beside["interval_s"],
        )

    def speeds(self) -> Speeds:
        """Return speeds at which the simulated engine takes these times.

        Two of them are inferred. All of a short prompt's time is taken to be the engine's (it may be the host's
        in part, but then the engine would have more time for others). And what a long prefill lost beside short ones,
        less their own time, is the overhead of its smaller steps.
        """
        lost_s = self.long_beside_s - self.long_alone_s - self.num_arrivals * self.short_idle_s
        num_more = ceil(self.long_tokens / SMALL_STEP_TOKENS) - ceil(
            self.long_tokens / LONG_STEP_TOKENS
        )
        overhead_s, least_s = max(lost_s, 0.0) / num_more, self.short_idle_s / SHORT_STEPS
        lengths = tuple(sorted(self.alone_s))
        overheads = [overhead_s * ceil(n / WHOLE_STEP_TOKENS) + least_s for n in lengths]
        return Speeds(
            lengths,
            tuple(self.alone_s[n] - each for n, each in zip(lengths, overheads, strict=True)),
            token_step_s=self.token_step_s,
            step_overhead_s=overhead_s,
            min_prompt_step_s=least_s,
        )
