"""The paged cache of the sparse layers, and the packed batch that reads and writes it.

A page holds 64 tokens of one layer: for each KV head ``K | V | fine means | coarse mean``, contiguous. The
means live in the page where their window *ends*, so whatever shares, moves or drops a page takes the
right means with it (docs/decisions/0003).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sala_kernels.checks import expect_dtype, expect_shape
from sala_kernels.spec import BLOCK_TOKENS, K1_STRIDE_TOKENS, K2_STRIDE_TOKENS

FINE_PER_PAGE = BLOCK_TOKENS // K1_STRIDE_TOKENS
"""Fine windows (K1) that end in one page; window c ends in row c + 1 of the sequence."""
COARSE_PER_PAGE = BLOCK_TOKENS // K2_STRIDE_TOKENS
"""Coarse windows (K2) that end in one page; window c ends in row c + 1 of the sequence."""


class PagedCache(NamedTuple):
    """Views of one layer's cache; cells that were never written may hold any bits, NaN included."""

    keys: Tensor
    """[pages, kv_heads, 64, dim] in the model's dtype."""
    values: Tensor
    """[pages, kv_heads, 64, dim]."""
    fine_means: Tensor
    """[pages, kv_heads, 4, dim]: means of the 32-token windows that end in the page."""
    coarse_means: Tensor
    """[pages, kv_heads, 1, dim]: means of the 128-token windows that end in the page."""


def cell_elements(dim: int) -> int:
    """Count the elements a token takes per KV head: K, V and its share of the page's means."""
    return 2 * dim + -(-(FINE_PER_PAGE + COARSE_PER_PAGE) * dim // BLOCK_TOKENS)


def view_pages(cells: Tensor, dim: int) -> PagedCache:
    """Name the parts of the pages.

    Args:
        cells: [pages, kv_heads, 64, cell_elements(dim)]; the last two axes contiguous, the others
            of any stride.
        dim: head width.

    Returns:
        Views of ``cells``.
    """
    pages, kv_heads = cells.shape[:2]
    expect_shape("cells", cells, (pages, kv_heads, BLOCK_TOKENS, cell_elements(dim)))
    rows = (BLOCK_TOKENS, BLOCK_TOKENS, FINE_PER_PAGE, COARSE_PER_PAGE)
    flat = cells.view(pages, kv_heads, -1)[..., : sum(rows) * dim]
    parts = flat.split([n * dim for n in rows], dim=-1)
    return PagedCache(*(part.unflatten(-1, (n, dim)) for part, n in zip(parts, rows, strict=True)))


class SequenceRow(NamedTuple):
    """One sequence of a batch, as host integers."""

    sequence: int
    first_token: int
    """Where its queries start in the packed tokens."""
    context_tokens: int
    """Tokens in the cache before this step; also the position of its first query."""
    seq_len: int
    """Tokens after this step."""


@dataclass(frozen=True)
class PagedBatch:
    """The sequences of one step: their new tokens are packed, their history lies in pages.

    Rows may be padding (no new tokens). Everything a kernel needs is on the device; the host integers
    shape launch grids.
    """

    query_start_loc: Tensor
    """[seqs + 1] int32; sequence i is packed tokens query_start_loc[i]:query_start_loc[i + 1]."""
    seq_lens: Tensor
    """[seqs] int32; tokens of each sequence after this step."""
    block_table: Tensor
    """[seqs, pages a sequence] int32; page of each 64-token block."""
    max_query_len: int
    """Bound on the new tokens of one sequence."""
    max_seq_len: int
    """Bound on ``seq_lens``."""
    num_decodes: int = 0
    """Leading sequences with few new tokens. On a GPU the keys of each of their tokens are split over programs,
    whereas the tokens of the others are tiled; a result does not depend on which way it was computed."""
    num_decode_tokens: int = 0
    """New tokens of those sequences; packed first."""

    def __post_init__(self) -> None:
        num_seqs = self.seq_lens.shape[0]
        expect_shape("query_start_loc", self.query_start_loc, (num_seqs + 1,))
        expect_shape("block_table", self.block_table, (num_seqs, self.block_table.shape[-1]))
        for name in ("query_start_loc", "seq_lens", "block_table"):
            expect_dtype(name, getattr(self, name), torch.int32)

    def host_rows(self) -> list[SequenceRow]:
        """Return the sequences that have new tokens; waits for the device."""
        starts = self.query_start_loc.tolist()
        rows = []
        for sequence, seq_len in enumerate(self.seq_lens.tolist()):
            num_queries = starts[sequence + 1] - starts[sequence]
            if num_queries > 0:
                rows.append(SequenceRow(sequence, starts[sequence], seq_len - num_queries, seq_len))
        return rows


def check_packed(name: str, tensor: Tensor, tokens: int, heads: int, cache: PagedCache) -> None:
    """Check a packed q, k or v against the cache it belongs to.

    Raises:
        ValueError: not [tokens, heads, dim] in the dtype of ``cache``.
    """
    expect_shape(name, tensor, (tokens, heads, cache.keys.shape[-1]))
    expect_dtype(name, tensor, cache.keys.dtype)
