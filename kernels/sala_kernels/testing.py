"""Building blocks of kernel tests: error measure, poisoned memory, packed batches over shuffled pages."""

from __future__ import annotations

import torch
from torch import Tensor

from sala_kernels.paged import PagedBatch, PagedCache, cell_elements, view_pages
from sala_kernels.spec import BLOCK_TOKENS


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Return rms(actual - expected) / rms(expected) in float64; infinite when ``actual`` has NaN."""
    if actual.isnan().any():
        return torch.inf
    error = actual.double() - expected.double()
    return float(error.square().mean().sqrt() / expected.double().square().mean().sqrt())


def poisoned_cache(num_pages: int, kv_heads: int, dim: int, dtype: torch.dtype) -> PagedCache:
    """Allocate pages full of NaN, as recycled memory may be."""
    shape = (num_pages, kv_heads, BLOCK_TOKENS, cell_elements(dim))
    return view_pages(torch.full(shape, torch.nan, dtype=dtype), dim)


def shuffled_block_table(max_seq_lens: list[int], seed: int) -> Tensor:
    """Give each sequence its own pages in random order: [seqs, pages] int32, -1 past its end."""
    num_pages = [-(-tokens // BLOCK_TOKENS) for tokens in max_seq_lens]
    order = torch.randperm(sum(num_pages), generator=torch.Generator().manual_seed(seed))
    table = torch.full((len(num_pages), max(num_pages)), -1, dtype=torch.int32)
    for row, pages in zip(table, order.split(num_pages), strict=True):
        row[: len(pages)] = pages
    return table


def paged_batch(query_lens: list[int], seq_lens: list[int], block_table: Tensor) -> PagedBatch:
    """Describe one step: each sequence's new tokens and its length after them."""
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return PagedBatch(starts, lens, block_table, max(query_lens), max(seq_lens))
