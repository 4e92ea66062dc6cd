"""The results of a batch's lines, until they are in files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sala_serve.jobs import scripts
from sala_serve.jobs.store import LeaseLost

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sala_serve.jobs.model import Lease
    from sala_serve.state import State


class LineResults:
    """Results by line number; each is written once, whoever runs the batch."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._line = state.redis.register_script(scripts.LINE)

    async def write(
        self, lease: Lease, line_number: int, result: bytes, counts: Mapping[str, int]
    ) -> None:
        """Store a result, unless there is one; add ``counts`` to those of the batch.

        Raises:
            LeaseLost: the batch is somebody else's, or over; nothing was stored.
            StateUnavailable: the store is away; it may be stored all the same.
        """
        pairs = [part for pair in counts.items() for part in pair]
        with self._state.guarded():
            is_held = await cast(
                "Any", self._line(args=[lease.job_id, lease.token, line_number, result, *pairs])
            )
        if not is_held:
            raise LeaseLost

    async def numbers(self, batch_id: str) -> list[int]:
        """Return the lines that have a result, in order."""
        with self._state.guarded():
            fields = await cast("Any", self._state.redis.hkeys(f"sala:job:{batch_id}:lines"))
        return sorted(map(int, fields))

    async def read(self, batch_id: str, line_numbers: Sequence[int]) -> list[bytes]:
        """Return the results of lines that have one."""
        names = [str(each) for each in line_numbers]
        with self._state.guarded():
            found = await cast("Any", self._state.redis.hmget(f"sala:job:{batch_id}:lines", names))
        if None in found:  # only when the batch is over: somebody else has ended it
            raise LeaseLost
        return list(found)
