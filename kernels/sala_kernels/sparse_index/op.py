"""Interface of the block selection over the paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sala_kernels.checks import implementation
from sala_kernels.paged import check_packed

if TYPE_CHECKING:
    from torch import Tensor

    from sala_kernels.paged import PagedBatch, PagedCache
    from sala_kernels.spec import SparseSpec


def select_blocks(q: Tensor, cache: PagedCache, batch: PagedBatch, sparse: SparseSpec) -> Tensor:
    """Choose the key blocks that each (sparse token, KV head) attends, from the stored key means.

    A block's score is the best of the fine windows that touch it; a window's score is
    exp(q.K1) normalised per head by the log-sum-exp over the coarse windows, summed over the heads
    that share the KV head and rounded to the dtype of ``q``, saturating. Windows count once their last
    token is at or before the query. Initial and local blocks are always taken; equal scores go to the
    lower block.

    Args:
        q: [tokens, heads, dim] in the cache's dtype; sequences packed as ``batch`` says.
        cache: one layer's pages, this step's tokens already written.
        batch: sequences of this step.
        sparse: the selection's parameters.

    Returns:
        [tokens, kv_heads, sparse.num_selected_blocks] int32: block numbers of the sequence in ascending
        order, then -1. Rows of dense tokens (position + 1 < dense_len) are all -1.

    Raises:
        ValueError: a shape or dtype does not fit the cache.
        NotImplementedError: neither on the CPU nor on a CUDA device.
    """
    tokens, heads = q.shape[:2]
    check_packed("q", q, tokens, heads, cache)
    if heads % cache.keys.shape[1]:
        raise ValueError(
            f"q: expected a multiple of {cache.keys.shape[1]} KV heads, got {heads} heads"
        )
    return implementation(__package__, "select_blocks", q)(q, cache, batch, sparse)
