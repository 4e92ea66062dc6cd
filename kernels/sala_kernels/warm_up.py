"""Compile the prompt kernels before the first request: the first long prompt would wait seconds for each.

Triton compiles a kernel when it is first launched, once for each combination of constants. The launches here are of
a few tokens and have every combination that prompts can have; decodes are compiled when their graphs are captured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sala_kernels.cache_write.op import write_cache
from sala_kernels.lightning.op import StateBatch, lightning_attention
from sala_kernels.paged import PagedBatch, cell_elements, view_pages
from sala_kernels.sparse_attend.op import attend_blocks
from sala_kernels.sparse_index.op import select_blocks
from sala_kernels.spec import BLOCK_TOKENS

if TYPE_CHECKING:
    from sala_kernels.spec import SparseSpec

MIN_BOUND_TOKENS = 128 * 1024
"""The selection has one kernel up to here and one for each doubling."""
LONG_PROMPT_TOKENS = 1025
"""More than one segment of the lightning kernels."""


def warm_up_sparse(
    sparse: SparseSpec,
    heads: int,
    kv_heads: int,
    dim: int,
    max_seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Run cache write, selection and attention of prompts for every bound up to ``max_seq_len``.

    Args:
        sparse: the selection's parameters.
        heads: query heads.
        kv_heads: KV heads.
        dim: head width.
        max_seq_len: the longest sequence that will be served, tokens.
        dtype: of queries and cache.
        device: a GPU.
    """
    cells = (1, kv_heads, BLOCK_TOKENS, cell_elements(dim))
    cache = view_pages(torch.zeros(cells, dtype=dtype, device=device), dim)
    packed = torch.zeros(2, (heads + 2 * kv_heads) * dim, dtype=dtype, device=device)
    q, k, v = (
        part.unflatten(-1, (-1, dim))
        for part in packed.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    )
    table = torch.zeros(1, -(-max_seq_len // BLOCK_TOKENS), dtype=torch.int32, device=device)
    starts, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 2], [2]))
    # in a step of short sequences nothing is scored
    bounds = [BLOCK_TOKENS, min(MIN_BOUND_TOKENS, max_seq_len)]
    while bounds[-1] < max_seq_len:
        bounds.append(min(2 * bounds[-1], max_seq_len))
    for bound in bounds:
        batch = PagedBatch(starts, lens, table, max_query_len=2, max_seq_len=bound)
        write_cache(k, v, cache, batch)
        attend_blocks(q, cache, batch, select_blocks(q, cache, batch, sparse), sparse)


def warm_up_lightning(heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Run lightning attention of a prompt of one segment and of one of several.

    Args:
        heads: lightning heads.
        dim: head width.
        dtype: of queries, keys and values.
        device: a GPU.
    """
    state = torch.zeros(1, heads, dim, dim, device=device)
    slopes = torch.ones(heads, device=device)
    for tokens in (2, LONG_PROMPT_TOKENS):
        packed = torch.zeros(tokens, 3, heads, dim, dtype=dtype, device=device)
        batch = StateBatch(
            query_start_loc=torch.tensor([0, tokens], dtype=torch.int32, device=device),
            state_slots=torch.zeros(1, 1, dtype=torch.int32, device=device),
            has_context=torch.zeros(1, dtype=torch.bool, device=device),
            max_query_len=tokens,
        )
        q, k, v = packed.unbind(1)
        lightning_attention(q, k, v, slopes, 1.0, state, batch)
