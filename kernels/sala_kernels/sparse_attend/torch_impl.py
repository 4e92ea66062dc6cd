"""Attention over selected blocks in vectorised PyTorch, over tiles of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sala_kernels.spec import BLOCK_TOKENS

if TYPE_CHECKING:
    from sala_kernels.paged import PagedBatch, PagedCache
    from sala_kernels.spec import SparseSpec

TILE_QUERIES = 32
"""Consecutive queries that share one gather: the union of their blocks is read once."""


def attend_blocks(
    q: Tensor,
    cache: PagedCache,
    batch: PagedBatch,
    blocks: Tensor,
    sparse: SparseSpec,
    output: Tensor | None = None,
) -> Tensor:
    """Implement :func:`sala_kernels.sparse_attend.op.attend_blocks`."""
    output = torch.zeros_like(q) if output is None else output
    for row in batch.host_rows():
        page_of_block = batch.block_table[row.sequence].long()
        for start in range(row.context_tokens, row.seq_len, TILE_QUERIES):
            position = torch.arange(start, min(start + TILE_QUERIES, row.seq_len))
            first_token = row.first_token + start - row.context_tokens
            tile = slice(first_token, first_token + len(position))
            attended = _attended(blocks[tile], position, sparse.dense_len)
            output[tile] = _attend_tile(q[tile], cache, page_of_block, attended, position)
    return output


def _attended(blocks: Tensor, position: Tensor, dense_len: int) -> Tensor:
    """Mark the blocks each query attends: [kv_heads, queries, blocks up to the last query] bool.

    Args:
        blocks: [queries, kv_heads, selected] int32, -1 = none.
        position: [queries] int64.
        dense_len: a query attends every block iff its position + 1 < dense_len.
    """
    num_blocks = int(position[-1]) // BLOCK_TOKENS + 1
    # -1 lands in an extra column that is cut off
    column = torch.where(blocks < 0, num_blocks, blocks).long()
    marked = torch.zeros(*blocks.shape[:2], num_blocks + 1, dtype=torch.bool)
    marked.scatter_(-1, column, True)
    dense = position + 1 < dense_len
    return (marked[..., :num_blocks] | dense[:, None, None]).transpose(0, 1)


def _attend_tile(
    q: Tensor, cache: PagedCache, page_of_block: Tensor, attended: Tensor, position: Tensor
) -> Tensor:
    """Attend a tile of one sequence's queries, gathering the union of their blocks once.

    Args:
        q: [queries, heads, dim].
        cache: one layer's pages.
        page_of_block: [blocks] int64.
        attended: [kv_heads, queries, blocks] bool.
        position: [queries] int64, consecutive.

    Returns:
        [queries, heads, dim] in the dtype of ``q``.
    """
    grouped = q.float().unflatten(1, (len(attended), -1)).transpose(0, 1)
    num_queries, num_tokens_after = (
        len(position),
        BLOCK_TOKENS - 1 - int(position[-1]) % BLOCK_TOKENS,
    )
    later = torch.ones(num_queries, num_queries, dtype=torch.bool).triu(1)
    outputs = []
    for head, head_attended in enumerate(attended):
        block = head_attended.any(0).nonzero().squeeze(1)
        # each query attends its own block, so the tile's tokens are the last of the union; the cells
        # after them may be unwritten, and NaN times a zero probability is NaN
        num_tokens = len(block) * BLOCK_TOKENS - num_tokens_after
        page = page_of_block[block]
        key, value = (
            cells[page, head].flatten(0, 1)[:num_tokens].float()
            for cells in (cache.keys, cache.values)
        )
        hidden = ~head_attended[:, block]
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        bias = bias.repeat_interleave(BLOCK_TOKENS, 1)[:, :num_tokens]
        bias[:, -num_queries:].masked_fill_(later, -torch.inf)
        query = grouped[head].transpose(0, 1)  # [group, queries, dim]
        outputs.append(
            scaled_dot_product_attention(
                query[None],
                key.expand(1, len(query), -1, -1),
                value.expand(1, len(query), -1, -1),
                attn_mask=bias,
            )[0].transpose(0, 1)
        )
    return torch.stack(outputs, dim=1).flatten(1, 2).to(q.dtype)
