"""Interface of the attention over selected blocks of the paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sala_kernels.checks import expect_dtype, expect_shape, require_cpu
from sala_kernels.paged import check_packed
from sala_kernels.sparse_attend import torch_impl

if TYPE_CHECKING:
    from torch import Tensor

    from sala_kernels.paged import PagedBatch, PagedCache


def attend_blocks(
    q: Tensor, cache: PagedCache, batch: PagedBatch, blocks: Tensor, dense_len: int
) -> Tensor:
    """Attend the tokens of the selected blocks, at or before each query; dense tokens attend all.

    Whether a token is dense depends on its position alone, so one chunk may hold both kinds and
    chunking cannot change a result.

    Args:
        q: [tokens, heads, dim] in the cache's dtype; sequences packed as ``batch`` says.
        cache: one layer's pages, this step's tokens already written.
        batch: sequences of this step.
        blocks: [tokens, kv_heads, selected] int32 from ``select_blocks``; -1 = none.
        dense_len: a token is dense iff its position + 1 < dense_len.

    Returns:
        [tokens, heads, dim] in the dtype of ``q``, computed in float32, softmax scale 1/sqrt(dim);
        rows of no sequence are 0.

    Raises:
        ValueError: a shape or dtype does not fit the cache.
        NotImplementedError: not on the CPU.
    """
    tokens, heads = q.shape[:2]
    kv_heads = cache.keys.shape[1]
    check_packed("q", q, tokens, heads, cache)
    expect_shape("blocks", blocks, (tokens, kv_heads, blocks.shape[-1]))
    expect_dtype("blocks", blocks, torch.int32)
    if heads % kv_heads:
        raise ValueError(f"q: expected a multiple of {kv_heads} KV heads, got {heads} heads")
    require_cpu("attend_blocks", q)
    return torch_impl.attend_blocks(q, cache, batch, blocks, dense_len)
