"""Interface of the cache write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sala_kernels.checks import implementation
from sala_kernels.paged import check_packed

if TYPE_CHECKING:
    from torch import Tensor

    from sala_kernels.paged import PagedBatch, PagedCache


def write_cache(k: Tensor, v: Tensor, cache: PagedCache, batch: PagedBatch) -> None:
    """Write new keys and values to their pages, and the mean of every window they complete.

    A window is written when its last token is: exactly the windows that end in
    [context, seq_len), whatever the chunking. Those of their keys that are older than the step are read
    back from the pages, so nothing is carried from step to step.

    Args:
        k: [tokens, kv_heads, dim] in the cache's dtype, last axis contiguous; sequences packed as
            ``batch`` says.
        v: as ``k``.
        cache: one layer's pages; updated in place.
        batch: sequences of this step.

    Raises:
        ValueError: a shape or dtype does not fit the cache.
        NotImplementedError: on neither the CPU nor a CUDA device.
    """
    tokens, kv_heads = k.shape[0], cache.keys.shape[1]
    check_packed("k", k, tokens, kv_heads, cache)
    check_packed("v", v, tokens, kv_heads, cache)
    implementation(__package__, "write_cache", k)(k, v, cache, batch)
