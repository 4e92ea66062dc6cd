"""Block selection in vectorised PyTorch, over tiles of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from sala_kernels.paged import FINE_PER_PAGE
from sala_kernels.spec import (
    BLOCK_TOKENS,
    K1_STRIDE_TOKENS,
    K1_WINDOW_TOKENS,
    K2_STRIDE_TOKENS,
    K2_WINDOW_TOKENS,
)

if TYPE_CHECKING:
    from sala_kernels.paged import PagedBatch, PagedCache
    from sala_kernels.spec import SparseSpec

TILE_SCORES = 1 << 23
"""Scores (queries x heads x fine windows) held at a time: 32 MiB."""


def select_blocks(q: Tensor, cache: PagedCache, batch: PagedBatch, sparse: SparseSpec) -> Tensor:
    """Implement :func:`sala_kernels.sparse_index.op.select_blocks`."""
    num_tokens, heads = q.shape[:2]
    num_selected = sparse.num_selected_blocks
    blocks = q.new_full((num_tokens, cache.keys.shape[1], num_selected), -1, dtype=torch.int32)
    for row in batch.host_rows():
        # a query with no more blocks than it may select takes them all: no scores needed
        first_sparse = max(row.context_tokens, sparse.dense_len - 1)
        first_scored = max(first_sparse, num_selected * BLOCK_TOKENS)
        to_token = row.first_token - row.context_tokens
        if first_sparse < (end := min(first_scored, row.seq_len)):
            own = torch.arange(first_sparse, end)[:, None, None] // BLOCK_TOKENS
            every = torch.arange(num_selected)
            chosen = torch.where(every <= own, every, -1)
            blocks[first_sparse + to_token : end + to_token] = chosen.to(torch.int32)
        if first_scored >= row.seq_len:
            continue

        page = batch.block_table[row.sequence, : -(-row.seq_len // BLOCK_TOKENS)].long()
        fine = _windows(cache.fine_means, page, row.seq_len, K1_WINDOW_TOKENS, K1_STRIDE_TOKENS)
        coarse = _windows(cache.coarse_means, page, row.seq_len, K2_WINDOW_TOKENS, K2_STRIDE_TOKENS)
        tile_queries = max(1, TILE_SCORES // (heads * fine.shape[1]))
        for start in range(first_scored, row.seq_len, tile_queries):
            position = torch.arange(start, min(start + tile_queries, row.seq_len))
            tile = slice(start + to_token, start + to_token + len(position))
            scores = _group_scores(q[tile], fine, coarse, position)
            blocks[tile] = _best_blocks(scores, position, sparse).to(torch.int32)
    return blocks


def _windows(means: Tensor, page: Tensor, seq_len: int, window_tokens: int, stride: int) -> Tensor:
    """Gather a sequence's complete windows: [kv_heads, windows, dim] float32.

    Args:
        means: [pages, kv_heads, rows, dim].
        page: [blocks] int64, the sequence's pages.
        seq_len: tokens of the sequence.
        window_tokens: tokens a window.
        stride: distance between windows, tokens.
    """
    num_windows = max(0, (seq_len - window_tokens) // stride + 1)
    # window c ends in row c + 1, for both kinds; the other rows were never written
    rows = means[page].transpose(0, 1).flatten(1, 2)
    return rows[:, 1 : num_windows + 1].float()


def _group_scores(q: Tensor, fine: Tensor, coarse: Tensor, position: Tensor) -> Tensor:
    """Score the fine windows: [queries, kv_heads, fine windows seen] float32, rounded to q's dtype.

    Args:
        q: [queries, heads, dim], the positions consecutive.
        fine: [kv_heads, fine windows, dim] float32.
        coarse: [kv_heads, coarse windows, dim] float32.
        position: [queries] int64.
    """
    queries, heads, dim = q.shape
    kv_heads = fine.shape[0]
    num_fine = _num_visible(position, K1_WINDOW_TOKENS, K1_STRIDE_TOKENS)
    num_coarse = _num_visible(position, K2_WINDOW_TOKENS, K2_STRIDE_TOKENS)
    # windows that no query of the tile sees are left out
    fine, coarse = fine[:, : int(num_fine[-1])], coarse[:, : int(num_coarse[-1])]
    hidden_fine = torch.arange(fine.shape[1]) >= num_fine[:, None]
    hidden_coarse = torch.arange(coarse.shape[1]) >= num_coarse[:, None]

    grouped = (q.float() * dim**-0.5).view(queries, kv_heads, -1, dim)
    grouped = grouped.transpose(0, 1).flatten(1, 2)  # [kv_heads, queries * group, dim]
    coarse_logits = (grouped @ coarse.transpose(1, 2)).view(kv_heads, queries, -1, coarse.shape[1])
    log_normaliser = coarse_logits.masked_fill_(hidden_coarse[:, None], -torch.inf).logsumexp(-1)
    scores = (grouped @ fine.transpose(1, 2)).view(kv_heads, queries, -1, fine.shape[1])
    scores = scores.sub_(log_normaliser.unsqueeze(-1)).exp_().sum(2)
    # no coarse window seen: nothing to normalise by, so nothing scores
    hidden = hidden_fine | (num_coarse == 0)[:, None]
    # saturated, not infinite: an infinite score would compete with the forced blocks
    scores = scores.masked_fill_(hidden, 0.0).clamp_(max=torch.finfo(q.dtype).max)
    return scores.to(q.dtype).float().transpose(0, 1)


def _best_blocks(scores: Tensor, position: Tensor, sparse: SparseSpec) -> Tensor:
    """Pool the window scores to blocks and take the best; every query has more blocks than it takes.

    Args:
        scores: [queries, kv_heads, fine windows] float32.
        position: [queries] int64, consecutive.
        sparse: the selection's parameters.

    Returns:
        [queries, kv_heads, sparse.num_selected_blocks] int64, ascending.
    """
    num_blocks = int(position[-1]) // BLOCK_TOKENS + 1
    # windows 4b - 1 to 4b + 3 touch block b
    after = num_blocks * FINE_PER_PAGE - scores.shape[-1]
    windows = pad(scores, (1, after), value=-torch.inf).unfold(-1, FINE_PER_PAGE + 1, FINE_PER_PAGE)
    block_scores = windows.amax(-1)

    block = torch.arange(num_blocks)
    own = (position // BLOCK_TOKENS)[:, None]
    # inclusive on both ends: the query's own block and `local_blocks` whole ones before it
    forced = (block < sparse.init_blocks) | (block >= own - sparse.local_blocks)
    block_scores = block_scores.masked_fill_(forced[:, None], torch.inf)
    block_scores = block_scores.masked_fill_((block > own)[:, None], -torch.inf)
    # stable: among equals the lower block stays first (torch.topk promises no order)
    order = block_scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., : sparse.num_selected_blocks].sort(dim=-1).values


def _num_visible(position: Tensor, window_tokens: int, stride_tokens: int) -> Tensor:
    """Count the windows that end at or before each query: [queries] int64."""
    return ((position + 1 - window_tokens) // stride_tokens + 1).clamp(min=0)
