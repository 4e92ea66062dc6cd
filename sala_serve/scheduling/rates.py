"""How fast an engine is, learned from what it reports."""

from __future__ import annotations

MEMORY_S = 60.0
"""Busy seconds after which an observation has lost most of its weight."""
SEED_S = 5.0
"""Busy seconds that the seed is worth."""


class Rate:
    """Tokens a second over the seconds in which there was something to do, the latest ones most."""

    def __init__(self, seed_tokens_per_s: float) -> None:
        self._tokens = seed_tokens_per_s * SEED_S
        self._busy_s = SEED_S

    @property
    def tokens_per_s(self) -> float:
        """The estimate."""
        return self._tokens / self._busy_s

    def observe(self, tokens: float, busy_s: float) -> None:
        """Note that ``tokens`` were done in ``busy_s``."""
        keep = max(1.0 - busy_s / MEMORY_S, 0.0)
        self._tokens = self._tokens * keep + tokens
        self._busy_s = self._busy_s * keep + busy_s


class LaneRate(Rate):
    """The rate of work that runs side by side on one engine: its sum, over the time in which any of it ran."""

    def __init__(self, seed_tokens_per_s: float) -> None:
        super().__init__(seed_tokens_per_s)
        self._num_running = 0
        self._since_s = 0.0
        self._pending_tokens = 0.0

    def started(self, now_s: float) -> None:
        """Note that one more runs."""
        if not self._num_running:
            self._since_s = now_s
        self._num_running += 1

    def done(self, tokens: float, now_s: float) -> None:
        """Note that ``tokens`` more are done."""
        self._pending_tokens += tokens
        if self._pending_tokens > 0 and now_s > self._since_s:
            self.observe(self._pending_tokens, now_s - self._since_s)
            self._pending_tokens, self._since_s = 0.0, now_s

    def stopped(self, now_s: float) -> None:
        """Note that one has ended."""
        self._num_running -= 1
        if not self._num_running:
            # time without a report belongs to what is reported next, unless nothing runs any more
            self._since_s, self._pending_tokens = now_s, 0.0
