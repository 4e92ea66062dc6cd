"""Block selection in Triton: tiles of queries in prefill, shares of the keys in decode, then top-k.

Costs of one call, for ``T`` scored tokens that see ``F`` fine and ``C = F / 4`` coarse windows on average:
``2 T heads dim (F + C)`` operations and ``T heads (F + C)`` exponentials. Prefill with ``Q`` queries a tile reads
``T / Q kv_heads (F + C) dim`` elements of the means, mostly from L2, and writes and reads ``T kv_heads F / 2``
pooled scores; decode reads ``T kv_heads (F + C) dim`` elements and writes as many scores.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from sala_kernels.checks import expect_head_dim
from sala_kernels.sparse_index import triton_kernels as kernels
from sala_kernels.spec import BLOCK_TOKENS

if TYPE_CHECKING:
    from sala_kernels.paged import PagedBatch, PagedCache
    from sala_kernels.spec import SparseSpec


class Tiling(NamedTuple):
    """Sizes of one matrix kernel."""

    columns: int
    """(head, query) pairs a program; ignored in decode, where it is one query's heads."""
    rows: int
    """Windows an iteration, a multiple of 16."""
    num_warps: int
    num_stages: int
    """Every second one adds a tile in flight: a page's number is loaded one iteration before its rows."""


PREFILL_STATS = Tiling(columns=128, rows=64, num_warps=4, num_stages=3)
PREFILL_SCORES = Tiling(columns=256, rows=64, num_warps=4, num_stages=3)
DECODE_STATS = Tiling(columns=0, rows=64, num_warps=4, num_stages=5)
DECODE_SCORES = Tiling(columns=0, rows=64, num_warps=4, num_stages=5)
FLOAT32 = Tiling(columns=32, rows=32, num_warps=4, num_stages=1)
"""For all four: float32 has no exact matrix instruction, and its operands fill the registers."""
WORKSPACE_BYTES = 1 << 28
"""Pooled scores held at a time in prefill."""
DECODE_PROGRAMS = 512
"""Programs wanted in decode, before the splits are rounded to a power of two."""
MAX_SPLITS = 128
"""Shares of the keys of one (token, KV head)."""
SHORT_BLOCKS = 2048
"""Blocks of a sequence that the top-k treats as short: fewer are not worth a kernel of their own."""
MAX_BLOCKS = 1 << 16
"""Blocks of a sequence; the top-k holds their scores in registers."""


def select_blocks(q: Tensor, cache: PagedCache, batch: PagedBatch, sparse: SparseSpec) -> Tensor:
    """Implement :func:`sala_kernels.sparse_index.op.select_blocks`; rows of padding are -1.

    Args:
        q: [tokens, heads, dim] bfloat16, float16 or float32, last axis contiguous.
        cache: one layer's pages, parts of the same cells.
        batch: sequences of this step.
        sparse: the selection's parameters.

    Returns:
        [tokens, kv_heads, sparse.num_selected_blocks] int32.

    Raises:
        ValueError: ``dim`` is not a power of two from 16 to 256, a KV head has more than 64 heads, a
            sequence may exceed 4,194,304 tokens, or there is no local block.
    """
    _check(q, cache, batch, sparse)
    tokens, kv_heads = q.shape[0], cache.keys.shape[1]
    shape = (tokens, kv_heads, sparse.num_selected_blocks)
    blocks = torch.empty(shape, dtype=torch.int32, device=q.device)
    run = _Run(q, cache, batch, sparse, blocks)
    if batch.num_decode_tokens:
        run.decode(batch.num_decode_tokens)
    if tokens > batch.num_decode_tokens:
        run.prefill(batch.num_decode_tokens, tokens)
    return blocks


def _check(q: Tensor, cache: PagedCache, batch: PagedBatch, sparse: SparseSpec) -> None:
    _, heads, dim = q.shape
    expect_head_dim(dim)
    if (group := heads // cache.keys.shape[1]) > 64:
        raise ValueError(f"q: expected at most 64 heads a KV head, got {group}")
    if batch.max_seq_len > MAX_BLOCKS * BLOCK_TOKENS:
        raise ValueError(
            f"max_seq_len: expected at most {MAX_BLOCKS * BLOCK_TOKENS} tokens, got {batch.max_seq_len}"
        )
    if sparse.local_blocks < 1:
        raise ValueError(
            f"window_tokens: expected at least {BLOCK_TOKENS}, got {sparse.window_tokens}"
        )


class _Bound(NamedTuple):
    """What the longest sequence that a launch must take asks for."""

    any_scored: bool
    max_blocks: int
    """Width of the top-k, a power of two; 0 = it reads no scores."""
    row_blocks: int
    """Blocks of a row of the workspace."""


class _Run:
    """One call's tensors and the constants that its launches share."""

    def __init__(
        self, q: Tensor, cache: PagedCache, batch: PagedBatch, sparse: SparseSpec, blocks: Tensor
    ) -> None:
        self.q, self.fine, self.coarse = q, cache.fine_means, cache.coarse_means
        self.batch, self.sparse, self.blocks = batch, sparse, blocks
        _, heads, self.dim = q.shape
        self.kv_heads = cache.keys.shape[1]
        self.group = heads // self.kv_heads
        self.num_seqs = batch.seq_lens.shape[0]
        # a query with no more blocks than it may select takes them all: no scores needed
        self.first_scored = max(sparse.dense_len - 1, sparse.num_selected_blocks * BLOCK_TOKENS)
        self.is_float32 = q.dtype == torch.float32
        self.scale = self.dim**-0.5 * math.log2(math.e)
        self.common = {
            "kv_heads": self.kv_heads,
            "group_heads": self.group,
            "dim": self.dim,
            "precision": "ieee" if self.is_float32 else "tf32",
        }

    def prefill(self, first_token: int, end_token: int) -> None:
        """Select for the packed tokens [first_token, end_token), tiles of queries of one sequence."""
        first_seq, num_prefills = self.batch.num_decodes, self.num_seqs - self.batch.num_decodes
        bound = self._bound(self.batch.max_seq_len)
        if not (bound.any_scored and num_prefills):
            bound = bound._replace(max_blocks=0)
            self._select(self.blocks, first_token, end_token, bound, one_token_each=False)
            return
        log_normaliser = torch.empty(
            (end_token - first_token, self.kv_heads * self.group),
            dtype=torch.float32,
            device=self.q.device,
        )
        heads = triton.next_power_of_2(self.group)
        tiling, queries = self._prefill_tiling(PREFILL_STATS, heads)
        rows = (self.batch.query_start_loc, self.batch.seq_lens)
        grid = ((end_token - first_token) // queries + num_prefills, self.kv_heads)
        kernels.prefill_stats_kernel[grid](
            log_normaliser,
            self.q,
            self.coarse,
            self.batch.block_table,
            *rows,
            first_token,
            end_token,
            first_seq,
            self.num_seqs,
            self.first_scored,
            self.scale,
            *self.q.stride()[:2],
            *self.coarse.stride()[:2],
            self.batch.block_table.stride(0),
            **self.common,
            num_columns=heads * queries,
            tile_queries=queries,
            tile_rows=tiling.rows,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )

        tiling, queries = self._prefill_tiling(PREFILL_SCORES, heads)
        token_bytes = 2 * self.kv_heads * bound.row_blocks * self.q.element_size()
        slice_tokens = min(end_token - first_token, max(queries, WORKSPACE_BYTES // token_bytes))
        scores = self._workspace(slice_tokens, bound)
        for start in range(first_token, end_token, slice_tokens):
            end = min(start + slice_tokens, end_token)
            grid = ((end - start) // queries + num_prefills, self.kv_heads)
            kernels.prefill_scores_kernel[grid](
                scores,
                self.q,
                self.fine,
                log_normaliser,
                self.batch.block_table,
                *rows,
                start,
                end,
                first_seq,
                self.num_seqs,
                self.first_scored,
                first_token,
                self.scale,
                *self.q.stride()[:2],
                *self.fine.stride()[:3],
                self.batch.block_table.stride(0),
                scores.stride(0),
                scores.stride(2),
                **self.common,
                **self._score_constants(heads),
                tile_queries=queries,
                tile_rows=tiling.rows,
                num_warps=tiling.num_warps,
                num_stages=tiling.num_stages,
            )
            self._select(scores, start, end, bound, one_token_each=False)

    def decode(self, num_tokens: int) -> None:
        """Select for the first packed tokens, the keys of each split over programs."""
        one_token_each = num_tokens == self.batch.num_decodes
        # by what the tables hold, not by the step: the kernels of captured graphs then serve every step
        bound = self._bound(self.batch.block_table.shape[-1] * BLOCK_TOKENS)
        if not bound.any_scored:
            bound = bound._replace(max_blocks=0)
            self._select(self.blocks, 0, num_tokens, bound, one_token_each)
            return
        heads = max(16, triton.next_power_of_2(self.group))
        splits = triton.next_power_of_2(-(-DECODE_PROGRAMS // (num_tokens * self.kv_heads)))
        splits = min(max(splits, 4), MAX_SPLITS)
        stats_splits = max(splits // 2, 2)
        partial = torch.empty(
            (num_tokens, self.kv_heads, stats_splits, heads),
            dtype=torch.float32,
            device=self.q.device,
        )
        scores = self._workspace(num_tokens, bound)
        stats = FLOAT32 if self.is_float32 else DECODE_STATS
        tiling = FLOAT32 if self.is_float32 else DECODE_SCORES
        rows = (
            self.batch.block_table,
            self.batch.query_start_loc,
            self.batch.seq_lens,
            self.num_seqs,
            self.first_scored,
            self.scale,
        )
        kernels.decode_stats_kernel[(num_tokens, self.kv_heads, stats_splits)](
            partial,
            self.q,
            self.coarse,
            *rows,
            *self.q.stride()[:2],
            *self.coarse.stride()[:2],
            self.batch.block_table.stride(0),
            **self.common,
            num_heads=heads,
            tile_rows=stats.rows,
            num_splits=stats_splits,
            one_token_each=one_token_each,
            num_warps=stats.num_warps,
            num_stages=stats.num_stages,
        )
        kernels.decode_scores_kernel[(num_tokens, self.kv_heads, splits)](
            scores,
            self.q,
            self.fine,
            partial,
            *rows,
            *self.q.stride()[:2],
            *self.fine.stride()[:3],
            self.batch.block_table.stride(0),
            scores.stride(0),
            scores.stride(2),
            **self.common,
            **self._score_constants(heads),
            tile_rows=tiling.rows,
            num_splits=splits,
            stats_tile_rows=stats.rows,
            stats_splits=stats_splits,
            one_token_each=one_token_each,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
        self._select(scores, 0, num_tokens, bound, one_token_each)

    def _prefill_tiling(self, tiling: Tiling, heads: int) -> tuple[Tiling, int]:
        """Return the tiling for these inputs and its queries a program."""
        if self.is_float32:
            tiling = FLOAT32
        # the queries stay in shared memory beside the stages of the keys
        columns = max(min(tiling.columns, tiling.columns * 128 // self.dim), heads)
        return tiling, columns // heads

    def _score_constants(self, heads: int) -> dict[str, int | float]:
        return {
            "num_heads": heads,
            "halvings": heads.bit_length() - 1,
            "local_blocks": self.sparse.local_blocks,
            "max_score": torch.finfo(self.q.dtype).max,
        }

    def _bound(self, max_seq_len: int) -> _Bound:
        num_blocks = -(-max_seq_len // BLOCK_TOKENS)
        return _Bound(
            any_scored=max_seq_len > self.first_scored,
            max_blocks=max(triton.next_power_of_2(num_blocks), SHORT_BLOCKS),
            # shares of a tile of 64 pages at most, so that stores past the end stay inside the row
            row_blocks=max(-(-num_blocks // 64) * 64, 128),
        )

    def _workspace(self, tokens: int, bound: _Bound) -> Tensor:
        """Allocate page scores, [2, tokens, kv_heads, blocks]: the two planes of a block's score."""
        shape = (2, tokens, self.kv_heads, bound.row_blocks)
        return torch.empty(shape, dtype=self.q.dtype, device=self.q.device)

    def _select(
        self, scores: Tensor, start: int, end: int, bound: _Bound, one_token_each: bool
    ) -> None:
        """Write the rows [start, end); ``scores`` is any tensor when none of them is scored."""
        selected, max_blocks = self.sparse.num_selected_blocks, bound.max_blocks
        kernels.select_kernel[((end - start) * self.kv_heads,)](
            self.blocks,
            scores,
            self.batch.query_start_loc,
            self.batch.seq_lens,
            start,
            self.num_seqs,
            self.sparse.dense_len,
            scores.stride(0),
            scores.stride(2),
            kv_heads=self.kv_heads,
            init_blocks=self.sparse.init_blocks,
            local_blocks=self.sparse.local_blocks,
            num_selected=selected,
            selected_padded=triton.next_power_of_2(selected),
            max_blocks=max_blocks,
            short_blocks=min(max_blocks, SHORT_BLOCKS),
            key_bits=31 if self.is_float32 else 15,
            one_token_each=one_token_each,
            num_warps=min(max(max_blocks // 1024, 4), 16),
            # a few bytes spill, and two programs of 8 warps fit a multiprocessor
            maxnreg=128,
        )
