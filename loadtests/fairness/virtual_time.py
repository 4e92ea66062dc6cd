"""An event loop that never sleeps: hours of waiting are played in seconds, with the code of production."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Never sleeps: when nothing is ready, its clock jumps to the next timer."""

    def __init__(self) -> None:
        self._selector_of_time = _JumpingSelector(self)
        self.now_s = 0.0
        super().__init__(self._selector_of_time)

    def time(self) -> float:
        """Return virtual seconds."""
        return self.now_s


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("everything waits and no timer is set")
        self._loop.now_s += max(timeout, 0.0)
        return super().select(0)


def run_virtual(main: Callable[[Callable[[], float]], Coroutine[Any, Any, T]]) -> T:
    """Run ``main(clock)`` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        loop = runner.get_loop()
        return runner.run(main(loop.time))
