"""The two mixing operations over packed documents, in plain PyTorch; no document sees another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sala_kernels.lightning.reference import lightning_chunked
from sala_kernels.sparse_attend.reference import attend_blocks
from sala_kernels.sparse_index.reference import select_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from sala_kernels.spec import SparseSpec
    from sala_training.batch import CuSeqlens

_SPARSE_QUERY_TILE_TOKENS = 2048
"""Queries scored at once in a sparse layer; bounds memory, never changes a result."""


def lightning(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, cu_seqlens: CuSeqlens
) -> Tensor:
    """Linear attention with constant decay, each document from a zero state.

    Args:
        q: [tokens, heads, dim], any float dtype.
        k: as ``q``.
        v: as ``q``.
        slopes: [heads] float32, 1/token, positive.
        scale: factor on the output.
        cu_seqlens: where the documents begin and end.

    Returns:
        [tokens, heads, dim] float32.
    """

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning_chunked(q, k, v, slopes, scale)

    return _by_document(rows, q, k, v, cu_seqlens)


def attend(
    q: Tensor, k: Tensor, v: Tensor, sparse: SparseSpec | None, cu_seqlens: CuSeqlens
) -> Tensor:
    """Causal softmax attention over grouped keys, each document by itself.

    Args:
        q: [tokens, heads, dim].
        k: [tokens, kv_heads, dim].
        v: as ``k``.
        sparse: tokens past its ``dense_len`` attend the blocks it selects, without a gradient through
            the selection; None attends everything.
        cu_seqlens: where the documents begin and end.

    Returns:
        [tokens, heads, dim] in the dtype of ``q``; softmax scale 1/sqrt(dim).
    """

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[1]
        # token i is dense iff i + 1 < dense_len
        num_dense = tokens if sparse is None else min(tokens, max(sparse.dense_len - 1, 0))
        mixed = _attend_dense(q[:, :num_dense], k[:, :num_dense], v[:, :num_dense])
        if sparse is None or num_dense == tokens:
            return mixed
        rest = [_attend_sparse(*qkv, num_dense, sparse) for qkv in zip(q, k, v, strict=True)]
        return torch.cat((mixed, torch.stack(rest)), dim=1)

    return _by_document(rows, q, k, v, cu_seqlens)


def _by_document(
    rows: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: CuSeqlens,
) -> Tensor:
    """Apply ``rows``, which mixes [rows, tokens, heads, dim], to each document.

    Documents of one length are the rows of one call; others are computed one after the other.
    """
    if cu_seqlens.equal_length is not None:
        shape = (-1, cu_seqlens.equal_length)
        return rows(q.unflatten(0, shape), k.unflatten(0, shape), v.unflatten(0, shape)).flatten(
            0, 1
        )
    documents = zip(*(x.split(cu_seqlens.lengths) for x in (q, k, v)), strict=True)
    return torch.cat([rows(q[None], k[None], v[None])[0] for q, k, v in documents])


def _attend_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [rows, tokens, heads, dim] queries over grouped keys from position 0."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@torch.compiler.disable  # data-dependent tiles: compiling would unroll them all
def _attend_sparse(q: Tensor, k: Tensor, v: Tensor, first: int, sparse: SparseSpec) -> Tensor:
    """Attend positions ``first`` and later of one document; no gradient through the selection."""
    tokens = q.shape[0]
    outputs = []
    for start in range(first, tokens, _SPARSE_QUERY_TILE_TOKENS):
        end = min(start + _SPARSE_QUERY_TILE_TOKENS, tokens)
        positions = torch.arange(start, end, device=q.device)
        # float32 scores from the model's own q and k, as released
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            selected = select_blocks(q[start:end], k[:end], positions, sparse)
        outputs.append(attend_blocks(q[start:end], k[:end], v[:end], positions, selected))
    return torch.cat(outputs)
