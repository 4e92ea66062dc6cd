"""Interface of the cache write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sala_kernels.cache_write import torch_impl
from sala_kernels.checks import require_cpu
from sala_kernels.paged import check_packed

if TYPE_CHECKING:
    from torch import Tensor

    from sala_kernels.paged import PagedBatch, PagedCache


def write_cache(k: Tensor, v: Tensor, cache: PagedCache, batch: PagedBatch) -> None:
    """Write new keys and values to their pages, and the mean of every window they complete.

    A window is written when its last token is: exactly the windows that end in
    [context, seq_len), whatever the chunking. Their keys are read back from the pages, so nothing is
    carried from step to step.

    Args:
        k: [tokens, kv_heads, dim] in the cache's dtype; sequences packed as ``batch`` says.
        v: as ``k``.
        cache: one layer's pages; updated in place.
        batch: sequences of this step.

    Raises:
        ValueError: a shape or dtype does not fit the cache.
        NotImplementedError: not on the CPU.
    """
    tokens, kv_heads = k.shape[0], cache.keys.shape[1]
    check_packed("k", k, tokens, kv_heads, cache)
    check_packed("v", v, tokens, kv_heads, cache)
    require_cpu("write_cache", k)
    torch_impl.write_cache(k, v, cache, batch)
