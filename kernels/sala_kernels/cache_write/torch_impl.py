"""Cache write in vectorised PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sala_kernels.spec import (
    BLOCK_TOKENS,
    K1_STRIDE_TOKENS,
    K1_WINDOW_TOKENS,
    K2_STRIDE_TOKENS,
    K2_WINDOW_TOKENS,
)

if TYPE_CHECKING:
    from sala_kernels.paged import PagedBatch, PagedCache, SequenceRow


def write_cache(k: Tensor, v: Tensor, cache: PagedCache, batch: PagedBatch) -> None:
    """Implement :func:`sala_kernels.cache_write.op.write_cache`."""
    for row in batch.host_rows():
        page_of_block = batch.block_table[row.sequence].long()
        position = torch.arange(row.context_tokens, row.seq_len)
        new = slice(row.first_token, row.first_token + len(position))
        page, cell = page_of_block[position // BLOCK_TOKENS], position % BLOCK_TOKENS
        cache.keys[page, :, cell] = k[new]
        cache.values[page, :, cell] = v[new]
        _write_means(
            cache.fine_means, cache.keys, page_of_block, row, K1_WINDOW_TOKENS, K1_STRIDE_TOKENS
        )
        _write_means(
            cache.coarse_means, cache.keys, page_of_block, row, K2_WINDOW_TOKENS, K2_STRIDE_TOKENS
        )


def _write_means(
    means: Tensor,
    keys: Tensor,
    page_of_block: Tensor,
    row: SequenceRow,
    window_tokens: int,
    stride_tokens: int,
) -> None:
    """Write the means of the windows that end in [context, seq_len).

    Args:
        means: [pages, kv_heads, rows, dim]; updated in place.
        keys: [pages, kv_heads, 64, dim].
        page_of_block: [blocks] int64.
        row: the sequence.
        window_tokens: tokens a window.
        stride_tokens: distance between windows.
    """
    first = max(0, -(-(row.context_tokens - window_tokens + 1) // stride_tokens))
    num_whole = max(0, (row.seq_len - window_tokens) // stride_tokens + 1)
    if first >= num_whole:
        return
    start = torch.arange(first, num_whole) * stride_tokens
    token = start[:, None] + torch.arange(window_tokens)
    window = keys[page_of_block[token // BLOCK_TOKENS], :, token % BLOCK_TOKENS]
    end = start + window_tokens - 1
    page, mean_row = page_of_block[end // BLOCK_TOKENS], end % BLOCK_TOKENS // stride_tokens
    means[page, :, mean_row] = window.float().mean(1).to(means.dtype)
