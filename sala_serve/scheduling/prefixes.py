"""Which engine holds which prefixes, as far as the gateway can know: 64 bits a block, kept apart by tenant.

A prompt is a chain: each block's hash covers all blocks before it. So of a chain that is held, every beginning is
held, and the longest shared beginning is found by bisection. What is forgotten first is what was used longest
ago, ends of chains before their beginnings, which is also how the engine evicts.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from sala_serve.tokens.prompt import PREFIX_BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sala_serve.scheduling.settings import SchedulingSettings

Chain = array
"""Unsigned 64-bit keys of a prompt's blocks, from its beginning."""


def chain_of(block_hashes: Sequence[bytes], tenant_key: int) -> array[int]:
    """Return the keys of a prompt: equal only for the same blocks of the same tenant."""
    return array("Q", [int.from_bytes(each[:8], "little") ^ tenant_key for each in block_hashes])


def num_shared_blocks(one: array[int], other: array[int]) -> int:
    """Return how many blocks two prompts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    if not high or one[0] != other[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixIndex:
    """The prefixes that one engine holds."""

    def __init__(self, settings: SchedulingSettings, max_tokens: int | None = None) -> None:
        self._interval_blocks = max(settings.state_interval_tokens // PREFIX_BLOCK_TOKENS, 1)
        self._engine_block_tokens = settings.engine_block_tokens
        self._max_blocks = (max_tokens or settings.max_prefix_tokens) // PREFIX_BLOCK_TOKENS
        # whether a state is kept at the block's end; in order of last use, oldest first
        self._has_state: dict[int, bool] = {}

    def __len__(self) -> int:
        return len(self._has_state)

    def clear(self) -> None:
        """Forget everything: the engine has restarted."""
        self._has_state.clear()

    def held_tokens(self, chain: array[int]) -> int:
        """Return how many tokens of a prompt's beginning the engine should have keys for."""
        return self._held_blocks(chain) * PREFIX_BLOCK_TOKENS

    def cached_tokens(self, chain: array[int], num_tokens: int) -> int:
        """Return how many tokens of a prompt of ``num_tokens`` the engine should not compute again.

        Less than it has keys for: a hit ends where a state is kept, which is at every interval, at the end of an
        earlier prompt and one engine block before that.
        """
        num_held = self._held_blocks(chain)
        at_interval = num_held // self._interval_blocks * self._interval_blocks
        for num_blocks in range(num_held, at_interval, -1):
            if self._has_state[chain[num_blocks - 1]]:
                at_interval = num_blocks
                break
        # the last token is always computed
        return min(at_interval * PREFIX_BLOCK_TOKENS, num_tokens - 1)

    def add(self, chain: array[int], computed_tokens: int, num_tokens: int) -> None:
        """Note that the engine has computed ``computed_tokens`` of a prompt of ``num_tokens``."""
        num_blocks = min(computed_tokens // PREFIX_BLOCK_TOKENS, len(chain), self._max_blocks)
        has_state = self._has_state
        # deepest first, so that they are forgotten first
        for key in reversed(chain[:num_blocks]):
            has_state[key] = has_state.pop(key, False)
        if computed_tokens >= num_tokens and num_blocks:
            block = self._engine_block_tokens
            one_before = ((num_tokens - 1) // block - 1) * block // PREFIX_BLOCK_TOKENS
            for end in (num_blocks, one_before):
                if 0 < end <= num_blocks:
                    has_state[chain[end - 1]] = True
        while len(has_state) > self._max_blocks:
            del has_state[next(iter(has_state))]

    def _held_blocks(self, chain: array[int]) -> int:
        low, high = 0, len(chain)
        if not high or chain[0] not in self._has_state:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            if chain[middle - 1] in self._has_state:
                low = middle
            else:
                high = middle - 1
        return low


class Pins:
    """Which engine the requests of one ``prompt_cache_key`` went to; the latest used are remembered."""

    def __init__(self, max_pins: int) -> None:
        self._max_pins = max_pins
        self._engine_ids: OrderedDict[tuple[str, str], str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._engine_ids)

    def get(self, tenant_id: str, pin_key: str | None) -> str | None:
        """Return the engine's id, if there is one."""
        return None if pin_key is None else self._engine_ids.get((tenant_id, pin_key))

    def set(self, tenant_id: str, pin_key: str | None, engine_id: str) -> None:
        """Remember the engine."""
        if pin_key is None:
            return
        self._engine_ids[tenant_id, pin_key] = engine_id
        self._engine_ids.move_to_end((tenant_id, pin_key))
        if len(self._engine_ids) > self._max_pins:
            self._engine_ids.popitem(last=False)
