"""Bounded label values: the tenants that matter most by name, the rest together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

OTHER = "other"
HALF_LIFE_S = 3600.0
"""After an idle hour a tenant's weight has halved."""
_PROMOTION = 2.0
"""A newcomer must weigh more than this many times the lightest one named, or two would change places for ever."""
_WATCHED_PER_LABEL = 4


class TopLabels:
    """At most ``max_labels`` values at a time: those with the most recent weight.

    While there is room everybody is named. Then a value that becomes heavy takes the place of the lightest,
    whose series the caller removes: its later counts go to ``other``, so no series ever goes back.
    """

    def __init__(
        self, max_labels: int, *, on_demoted: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self._max_labels = max_labels
        self._on_demoted = on_demoted
        self._clock = clock
        self._started_at_s = clock()
        self._weights: dict[str, float] = {}
        """Of named and watched values; new amounts grow with time instead of old ones being halved."""
        self._inherited: dict[str, float] = {}
        """The part of a watched value's weight that came with its place."""
        self._named: set[str] = set()

    def __len__(self) -> int:
        return len(self._named)

    def of(self, value: str) -> str:
        """Return the label for ``value`` without weighing it."""
        return value if value in self._named else OTHER

    def weigh(self, value: str, amount: float) -> str:
        """Add ``amount`` to ``value``'s weight and return its label."""
        if value == OTHER:
            return OTHER
        age = (self._clock() - self._started_at_s) / HALF_LIFE_S
        if age > 512:  # 2 ** 1024 is the end of a float
            self._rebase(age)
            age = 0.0
        if value not in self._weights and len(self._weights) >= self._max_labels * (
            1 + _WATCHED_PER_LABEL
        ):
            # as in the Space-Saving algorithm: the newcomer takes the place, and the weight, of the lightest
            lightest = min(
                (each for each in self._weights if each not in self._named),
                key=self._weights.__getitem__,
            )
            self._inherited.pop(lightest, None)
            self._inherited[value] = self._weights[value] = self._weights.pop(lightest)
        self._weights[value] = self._weights.get(value, 0.0) + amount * 2.0**age
        if value not in self._named:
            self._promote(value)
        return self.of(value)

    def _promote(self, value: str) -> None:
        if len(self._named) >= self._max_labels:
            lightest = min(self._named, key=self._weights.__getitem__)
            own = self._weights[value] - self._inherited.get(value, 0.0)
            if own <= _PROMOTION * self._weights[lightest]:
                return
            self._named.remove(lightest)
            self._on_demoted(lightest)
        self._named.add(value)
        self._weights[value] -= self._inherited.pop(value, 0.0)

    def _rebase(self, age: float) -> None:
        for weights in (self._weights, self._inherited):
            weights.update({key: weight * 2.0**-age for key, weight in weights.items()})
        self._started_at_s = self._clock()
