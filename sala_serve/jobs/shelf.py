"""What one tenant has stored of one kind: its order, its bytes, its bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sala_serve.errors import InsufficientQuota
from sala_serve.jobs import shelf_scripts as scripts

if TYPE_CHECKING:
    from collections.abc import Callable

    from sala_serve.state import State


class Shelf:
    """Objects of one kind, each tenant's apart.

    Args:
        state: where it is counted.
        kind: names the keys.
        max_bytes: of one tenant.
        may_evict: whether the finished objects that expire first give way to a new one.
        now_ms: another clock than Redis' own.
    """

    def __init__(
        self,
        state: State,
        kind: str,
        *,
        max_bytes: int,
        may_evict: bool,
        now_ms: Callable[[], int] | None = None,
    ) -> None:
        self._state = state
        self._kind = kind
        self._max_bytes = max_bytes
        self._may_evict = may_evict
        self._now_ms = now_ms
        self._put = state.redis.register_script(scripts.SHELF_PUT)
        self._set = state.redis.register_script(scripts.SHELF_SET)
        self._remove = state.redis.register_script(scripts.SHELF_REMOVE)
        self._list = state.redis.register_script(scripts.SHELF_LIST)

    async def put(self, tenant_id: str, object_id: str, num_bytes: int) -> list[str]:
        """Count a new object.

        Returns:
            Objects that no longer count, to make room; the caller deletes them.

        Raises:
            InsufficientQuota: it does not fit beside what must stay.
        """
        bound, evicts = self._max_bytes, int(self._may_evict)
        arguments = (self.key(tenant_id), object_id, num_bytes, self._now(), bound, evicts)
        with self._state.guarded():
            fits, evicted = await cast("Any", self._put(args=arguments))
        if not fits:
            raise InsufficientQuota(
                f"Your stored {self._kind} objects would be larger than {bound} bytes together; delete some "
                "first."
            )
        return [each.decode() for each in evicted]

    async def keep(
        self, tenant_id: str, object_id: str, num_bytes: int | None = None, *, keep_s: float
    ) -> None:
        """Note that an object may go after ``keep_s``, and its final size if that is new."""
        size = "" if num_bytes is None else num_bytes
        with self._state.guarded():
            await self._set(
                args=[self.key(tenant_id), object_id, size, self._now(), int(keep_s * 1000)]
            )

    async def remove(self, tenant_id: str, object_id: str) -> None:
        """Stop counting an object."""
        with self._state.guarded():
            await self._remove(args=[self.key(tenant_id), object_id])

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
