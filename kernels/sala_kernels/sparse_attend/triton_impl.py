"""Attention over selected blocks on a GPU: queries of decodes split their blocks, the others are tiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sala_kernels.checks import expect_head_dim
from sala_kernels.sparse_attend.triton_decode import attend_decodes
from sala_kernels.sparse_attend.triton_prefill import attend_prefill

if TYPE_CHECKING:
    from torch import Tensor

    from sala_kernels.paged import PagedBatch, PagedCache
    from sala_kernels.spec import SparseSpec

MAX_GROUP = 64
"""Query heads a KV head."""


def attend_blocks(
    q: Tensor,
    cache: PagedCache,
    batch: PagedBatch,
    blocks: Tensor,
    sparse: SparseSpec,
    output: Tensor | None = None,
) -> Tensor:
    """Implement :func:`sala_kernels.sparse_attend.op.attend_blocks`.

    Raises:
        ValueError: a head width, group size or memory layout the kernels do not have.
    """
    tokens, heads, dim = q.shape
    group = heads // cache.keys.shape[1]
    expect_head_dim(dim)
    if group > MAX_GROUP:
        raise ValueError(f"q: expected at most {MAX_GROUP} heads a KV head, got {group}")
    if output is None:
        output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for name, tensor in (("q", q), ("output", output), ("blocks", blocks)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: expected a contiguous last axis, got {tensor.stride()}")
    if batch.num_decode_tokens:
        attend_decodes(q, cache, batch, blocks, sparse, output)
    if tokens > batch.num_decode_tokens and batch.seq_lens.shape[0] > batch.num_decodes:
        attend_prefill(q, cache, batch, blocks, sparse, output)
    return output
