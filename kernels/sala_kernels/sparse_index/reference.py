"""InfLLM-V2 block selection by brute force, as the released kernels compute it.

Source: the released modelling code and its CUDA kernels, with three rules fixed so that chunking,
batching and prefix reuse cannot change a result (docs/decisions/0002): a window is visible iff it ends
at or before the query, group scores are rounded to the model's dtype, equal scores go to the lower block.
Scores beyond that dtype saturate, so that forced blocks are never displaced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sala_kernels.spec import (
    BLOCK_TOKENS,
    K1_STRIDE_TOKENS,
    K1_WINDOW_TOKENS,
    K2_STRIDE_TOKENS,
    K2_WINDOW_TOKENS,
    SparseSpec,
)


def compress_keys(keys: Tensor, window_tokens: int, stride_tokens: int) -> Tensor:
    """Average every whole window of keys.

    Args:
        keys: [tokens, kv_heads, dim] in the model's dtype.
        window_tokens: tokens a window.
        stride_tokens: distance between window starts.

    Returns:
        [windows, kv_heads, dim] in the dtype of ``keys``, accumulated in float32; windows may be 0.
    """
    if keys.shape[0] < window_tokens:
        return keys.new_empty(0, *keys.shape[1:])
    return keys.float().unfold(0, window_tokens, stride_tokens).mean(-1).to(keys.dtype)


def group_scores(q: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """Score the fine windows for each query: exp(q.K1) normalised per head by the coarse windows.

    Not a softmax over the fine windows: the normaliser counts about a quarter as many terms, and that
    weighting of the heads is part of the released function.

    Args:
        q: [queries, heads, dim] in the model's dtype.
        keys: [tokens, kv_heads, dim], all keys up to the last query.
        positions: [queries] int64, 0-based position of each query.

    Returns:
        [queries, kv_heads, fine windows] float32, rounded to the dtype of ``q``; invisible windows 0.
    """
    queries, heads, dim = q.shape
    kv_heads = keys.shape[1]
    fine = compress_keys(keys, K1_WINDOW_TOKENS, K1_STRIDE_TOKENS)
    coarse = compress_keys(keys, K2_WINDOW_TOKENS, K2_STRIDE_TOKENS)
    grouped = q.float().view(queries, kv_heads, heads // kv_heads, dim) * dim**-0.5
    fine_logits = torch.einsum("qghd,cgd->qghc", grouped, fine.float())
    coarse_logits = torch.einsum("qghd,cgd->qghc", grouped, coarse.float())

    fine_visible = _visible(positions, fine.shape[0], K1_WINDOW_TOKENS, K1_STRIDE_TOKENS)
    coarse_visible = _visible(positions, coarse.shape[0], K2_WINDOW_TOKENS, K2_STRIDE_TOKENS)
    log_normaliser = coarse_logits.masked_fill(
        ~coarse_visible[:, None, None], -torch.inf
    ).logsumexp(-1)
    scored = fine_visible & coarse_visible.any(-1, keepdim=True)
    probability = torch.exp(fine_logits - log_normaliser[..., None])
    probability = probability.masked_fill(~scored[:, None, None], 0.0)
    # saturated, not infinite: an infinite score would compete with the forced blocks
    return probability.sum(2).clamp(max=torch.finfo(q.dtype).max).to(q.dtype).float()


def select_blocks(q: Tensor, keys: Tensor, positions: Tensor, sparse: SparseSpec) -> Tensor:
    """Choose the key blocks that each (query, KV head) attends.

    Args:
        q: [queries, heads, dim] in the model's dtype.
        keys: [tokens, kv_heads, dim], all keys up to the last query.
        positions: [queries] int64, 0-based position of each query.
        sparse: the selection's parameters.

    Returns:
        [queries, kv_heads, blocks] bool; true = attended; blocks = ceil(tokens / 64).
    """
    scores = group_scores(q, keys, positions)
    num_blocks = -(-keys.shape[0] // BLOCK_TOKENS)
    scores = _pool_to_blocks(scores, num_blocks)
    block = torch.arange(num_blocks, device=q.device)
    own = (positions // BLOCK_TOKENS)[:, None]
    # the test is inclusive on both ends: the query's own block and `local_blocks` whole ones before it
    forced = (block < sparse.init_blocks) | (block >= own - sparse.local_blocks)
    scores = scores.masked_fill(forced[:, None], torch.inf)
    scores = scores.masked_fill((block > own)[:, None], -torch.inf)
    # a stable descending sort keeps the lower block first among equals
    best = scores.sort(dim=-1, descending=True, stable=True).indices[
        ..., : sparse.num_selected_blocks
    ]
    selected = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return selected & (block <= own)[:, None]


def _visible(positions: Tensor, num_windows: int, window_tokens: int, stride_tokens: int) -> Tensor:
    """Tell which windows end at or before each query: [queries, windows] bool."""
    last_token = (
        torch.arange(num_windows, device=positions.device) * stride_tokens + window_tokens - 1
    )
    return last_token <= positions[:, None]


def _pool_to_blocks(scores: Tensor, num_blocks: int) -> Tensor:
    """Take the maximum over the windows that touch each block, 4b-1 to 4b+3; none = -inf.

    Args:
        scores: [queries, kv_heads, windows] float32.
        num_blocks: blocks to return.

    Returns:
        [queries, kv_heads, blocks] float32.
    """
    per_block = BLOCK_TOKENS // K1_STRIDE_TOKENS
    before = K1_WINDOW_TOKENS // K1_STRIDE_TOKENS - 1
    after = num_blocks * per_block - scores.shape[-1]
    padded = torch.nn.functional.pad(scores, (before, after), value=-torch.inf)
    return padded.unfold(-1, per_block + before, per_block).amax(-1)
