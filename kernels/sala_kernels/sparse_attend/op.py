"""Interface of the attention over selected blocks of the paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sala_kernels.checks import expect_dtype, expect_shape, implementation
from sala_kernels.paged import check_packed

if TYPE_CHECKING:
    from torch import Tensor

    from sala_kernels.paged import PagedBatch, PagedCache
    from sala_kernels.spec import SparseSpec


def attend_blocks(
    q: Tensor,
    cache: PagedCache,
    batch: PagedBatch,
    blocks: Tensor,
    sparse: SparseSpec,
    output: Tensor | None = None,
) -> Tensor:
    """Attend the tokens of the selected blocks, at or before each query; dense tokens attend all.

    Whether a token is dense depends on its position alone, so one chunk may hold both kinds and
    chunking cannot change a result.

    Args:
        q: [tokens, heads, dim] in the cache's dtype; sequences packed as ``batch`` says.
        cache: one layer's pages, this step's tokens already written.
        batch: sequences of this step.
        blocks: [tokens, kv_heads, selected] int32 as from ``select_blocks``: ascending, then -1. The list
            of a sparse token must hold its initial, local and own blocks; that of a dense token is not read.
        sparse: the selection's parameters; a token is dense iff its position + 1 < dense_len.
        output: [tokens, heads, dim] in the dtype of ``q``, to write into; None = a new tensor.

    Returns:
        ``output``: softmax in float32, scale 1/sqrt(dim). Rows of no sequence hold anything.

    Raises:
        ValueError: a shape or dtype does not fit the cache; on a GPU also: dim is no power of two from 16
            to 256, or over 64 heads share a KV head.
        NotImplementedError: neither on the CPU nor on a CUDA GPU.
    """
    tokens, heads = q.shape[:2]
    kv_heads = cache.keys.shape[1]
    check_packed("q", q, tokens, heads, cache)
    expect_shape("blocks", blocks, (tokens, kv_heads, blocks.shape[-1]))
    expect_dtype("blocks", blocks, torch.int32)
    if heads % kv_heads:
        raise ValueError(f"q: expected a multiple of {kv_heads} KV heads, got {heads} heads")
    if output is not None:
        expect_shape("output", output, tuple(q.shape))
        expect_dtype("output", output, q.dtype)
    run = implementation(__package__, "attend_blocks", q)
    return run(q, cache, batch, blocks, sparse, output)
