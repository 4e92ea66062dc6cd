"""How programs of a packed batch find their sequence."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_sequence(  # type: ignore[no-untyped-def]
    query_start_loc,
    first,
    last,
    index,
    origin,
    tile_tokens: tl.constexpr,
    spare_tiles: tl.constexpr,
):
    """Return the last sequence in [first, last) whose tiles start at or before ``index``.

    Those of sequence i start at (query_start_loc[i] - origin) // tile_tokens + spare_tiles * i.
    """
    low = first
    high = last
    while high - low > 1:
        middle = (low + high) // 2
        start = tl.load(query_start_loc + middle) - origin
        if start // tile_tokens + spare_tiles * middle <= index:
            low = middle
        else:
            high = middle
    return low
