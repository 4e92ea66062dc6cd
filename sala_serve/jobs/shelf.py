"""What one tenant has stored of one kind, in order; the scripts that store and remove it keep the count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sala_serve.jobs import shelf_scripts as scripts

if TYPE_CHECKING:
    from collections.abc import Callable

    from sala_serve.state import State


class Shelf:
    """Objects of one kind, each tenant's apart.

    Args:
        state: where they are counted.
        kind: names the keys.
        now_ms: another clock than Redis' own.
    """

    def __init__(self, state: State, kind: str, *, now_ms: Callable[[], int] | None = None) -> None:
        self._state = state
        self._kind = kind
        self._now_ms = now_ms
        self._list = state.redis.register_script(scripts.SHELF_LIST)

    async def page(
        self, tenant_id: str, *, after: str | None, limit: int, newest_first: bool
    ) -> list[str] | None:
        """Return identities in order of creation; ``None`` if ``after`` is not among them."""
        arguments = (self.key(tenant_id), self._now(), after or "", limit, int(newest_first))
        with self._state.guarded():
            found = await cast("Any", self._list(args=arguments))
        return None if found is None else [each.decode() for each in found]

    def key(self, tenant_id: str) -> str:
        """Return what the names of the keys of a tenant's objects begin with."""
        return f"sala:shelf:{self._kind}:{tenant_id}"

    def _now(self) -> str | int:
        return "" if self._now_ms is None else self._now_ms()
