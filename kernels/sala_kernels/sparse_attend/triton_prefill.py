"""Attention of tiles of queries: first the blocks they share, then the blocks each chose by score.

The initial and local blocks are the same for all queries of one key block, so they are attended like a
dense sequence, by tiles with full matrix instructions. The other blocks differ between queries: a few
neighbouring queries read the union of theirs, and each query ignores what only others chose.

Queries that choose independently read every page many times. All tiles walk their blocks in ascending order, so
those that run together read from one region of the sequence, and the L2 cache serves most of it. The first pass
hands on normalised float32 output and its log-sum-exp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from sala_kernels.sparse_attend.triton_softmax import (
    LOG2_E,
    NO_MAX,
    accumulate,
    num_stages,
    page_cells,
)
from sala_kernels.spec import BLOCK_TOKENS
from sala_kernels.triton_search import find_sequence

if TYPE_CHECKING:
    from torch import Tensor

    from sala_kernels.paged import PagedBatch, PagedCache
    from sala_kernels.spec import SparseSpec


class Tiling(NamedTuple):
    """How a pass is cut into programs."""

    queries: int
    """Neighbouring queries of one program, a power of two up to 64."""
    num_warps: int
    num_stages: int


def attend_prefill(
    q: Tensor,
    cache: PagedCache,
    batch: PagedBatch,
    blocks: Tensor,
    sparse: SparseSpec,
    output: Tensor,
    *,
    shared: Tiling | None = None,
    chosen: Tiling | None = None,
) -> None:
    """Attend the tokens after the batch's decodes.

    Computes ``4 tokens heads dim 64`` FLOP a block: (init + local + 1) blocks a token in the first pass, in
    the second the union of its tile's. Each program reads ``128 dim`` elements a block, from L2 at best.

    Args:
        q: [tokens, heads, dim], the last axis contiguous.
        cache: one layer's pages.
        batch: sequences of this step.
        blocks: [tokens, kv_heads, selected] int32.
        sparse: the selection's parameters.
        output: as ``q``; written.
        shared: tiling of the pass over initial and local blocks; None = by shape.
        chosen: tiling of the pass over the other blocks; None = by shape.
    """
    tokens, heads, dim = q.shape
    kv_heads = cache.keys.shape[1]
    group = heads // kv_heads
    padded_group = triton.next_power_of_2(group)
    num_seqs = batch.seq_lens.shape[0]
    shared = shared or _shared_tiling(padded_group, dim, q.element_size())
    chosen = chosen or _chosen_tiling(padded_group, dim, q.element_size())
    num_selected = blocks.shape[-1]
    has_chosen = batch.max_seq_len >= sparse.dense_len and num_selected > 0
    # the passes meet here
    log_sum_exp = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    partial = torch.empty(q.shape, dtype=torch.float32, device=q.device) if has_chosen else output
    rows = (batch.query_start_loc, batch.seq_lens, batch.block_table, batch.block_table.stride(0))
    where = (batch.num_decodes, num_seqs)
    selection = (sparse.dense_len, sparse.init_blocks, sparse.local_blocks)
    paged = (cache.keys, cache.values, cache.keys.stride(0), cache.keys.stride(1))
    queries = (q, q.stride(0), q.stride(1))
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    constants = {"group": group, "dim": dim, "block_tokens": BLOCK_TOKENS, "precision": precision}
    score_scale = dim**-0.5 * LOG2_E

    first, num_tiles = _tiles(batch, tokens, shared.queries)
    _attend_shared[num_tiles, kv_heads](
        *queries,
        partial,
        partial.stride(0),
        partial.stride(1),
        log_sum_exp,
        *paged,
        *rows,
        *where,
        first,
        *selection,
        score_scale,
        tile_queries=shared.queries,
        padded_group=max(padded_group, 16 // shared.queries),
        num_warps=shared.num_warps,
        num_stages=shared.num_stages,
        **constants,
    )
    if not has_chosen:
        return
    first, num_tiles = _tiles(batch, tokens, chosen.queries)
    lists = blocks.new_empty(num_tiles, kv_heads, chosen.queries * num_selected)
    counts = blocks.new_empty(num_tiles, kv_heads)
    _list_chosen[num_tiles, kv_heads](
        blocks,
        blocks.stride(0),
        blocks.stride(1),
        lists,
        counts,
        *rows,
        *where,
        first,
        *selection,
        tile_queries=chosen.queries,
        num_selected=num_selected,
        padded_selected=triton.next_power_of_2(num_selected),
        search_steps=(num_selected - 1).bit_length(),
        block_tokens=BLOCK_TOKENS,
        num_warps=4,
    )
    _attend_chosen[num_tiles, kv_heads](
        *queries,
        partial,
        output,
        output.stride(0),
        output.stride(1),
        log_sum_exp,
        *paged,
        lists,
        lists.stride(0),
        lists.stride(1),
        counts,
        batch.query_start_loc,
        batch.seq_lens,
        *where,
        first,
        score_scale,
        tile_queries=chosen.queries,
        padded_group=max(padded_group, 16 // chosen.queries),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        **constants,
    )


def _shared_tiling(padded_group: int, dim: int, element_bytes: int) -> Tiling:
    rows = 32 if element_bytes == 4 else 64 if dim == 256 else 128
    queries = max(1, min(BLOCK_TOKENS, rows // padded_group))
    return Tiling(queries, rows // 16 if rows > 32 else 4, num_stages(dim, element_bytes))


def _chosen_tiling(padded_group: int, dim: int, element_bytes: int) -> Tiling:
    # four queries of 16 heads fill a matrix instruction of 64 rows
    return Tiling(max(1, min(4, 64 // padded_group)), 4, num_stages(dim, element_bytes))


def _tiles(batch: PagedBatch, tokens: int, queries: int) -> tuple[int, int]:
    """Return the number of the first tile and a bound on how many there are.

    Tiles are aligned to positions, so that one lies in one key block: n tokens touch at most
    n // queries + 2. Sequence i owns the numbers from query_start_loc[i] // queries + 2 * i.
    """
    first = batch.num_decode_tokens // queries + 2 * batch.num_decodes
    return first, tokens // queries + 2 * batch.seq_lens.shape[0] - first


@triton.jit
def _locate_tile(  # type: ignore[no-untyped-def]
    query_start_loc, seq_lens, first_sequence, num_seqs, first_tile, tile_queries: tl.constexpr
):
    """Return this program's sequence and tile.

    Returns:
        sequence; its first packed token; its tokens before this step and after it; position of the tile's
        first query, which may lie before the step's first or past the last.
    """
    tile = first_tile + tl.program_id(0)
    sequence = find_sequence(query_start_loc, first_sequence, num_seqs, tile, 0, tile_queries, 2)
    first_token = tl.load(query_start_loc + sequence)
    num_queries = tl.load(query_start_loc + sequence + 1) - first_token
    seq_len = tl.load(seq_lens + sequence)
    context = seq_len - num_queries
    index = tile - (first_token // tile_queries + 2 * sequence)
    # a sequence without new tokens has no tile: its first one starts at or past its end
    start = tl.where(num_queries > 0, (context // tile_queries + index) * tile_queries, seq_len)
    return sequence, first_token, context, seq_len, start


@triton.jit
def _tile_rows(  # type: ignore[no-untyped-def]
    start,
    first_token,
    context,
    seq_len,
    tile_queries: tl.constexpr,
    group: tl.constexpr,
    padded_group: tl.constexpr,
):
    """Return position, packed token, query head and existence of each row of a tile, query by query."""
    row = tl.arange(0, tile_queries * padded_group)
    position = start + row // padded_group
    member = row % padded_group
    exists = (position >= context) & (position < seq_len) & (member < group)
    token = (first_token + position - context).to(tl.int64)
    return position, token, tl.program_id(1) * group + member, exists


@triton.jit(do_not_specialize=["first_sequence", "num_seqs", "first_tile", "dense_len"])
def _attend_shared(  # type: ignore[no-untyped-def]
    q,
    q_token_stride,
    q_head_stride,
    output,
    output_token_stride,
    output_head_stride,
    log_sum_exp,
    keys,
    values,
    page_stride,
    head_stride,
    query_start_loc,
    seq_lens,
    block_table,
    table_stride,
    first_sequence,
    num_seqs,
    first_tile,
    dense_len,
    init_blocks,
    local_blocks,
    score_scale,
    tile_queries: tl.constexpr,
    group: tl.constexpr,
    padded_group: tl.constexpr,
    dim: tl.constexpr,
    block_tokens: tl.constexpr,
    precision: tl.constexpr,
):
    """Attend the initial and local blocks, and for dense queries all."""
    sequence, first_token, context, seq_len, start = _locate_tile(
        query_start_loc, seq_lens, first_sequence, num_seqs, first_tile, tile_queries
    )
    if start >= seq_len:
        return
    position, token, head, exists = _tile_rows(
        start, first_token, context, seq_len, tile_queries, group, padded_group
    )
    element = tl.arange(0, dim)
    q_rows = token * q_token_stride + head * q_head_stride
    query = tl.load(q + q_rows[:, None] + element[None, :], mask=exists[:, None], other=0.0)
    head_offset = tl.program_id(1).to(tl.int64) * head_stride
    pages = block_table + sequence.to(tl.int64) * table_stride

    own = start // block_tokens
    local_start = tl.maximum(own - local_blocks, 0)
    is_dense = position + 1 < dense_len
    # positions ascend, so a tile with any dense query has its first one dense
    has_dense = tl.maximum(start, context) + 1 < dense_len
    run_start = tl.where(has_dense, 0, local_start)
    num_init = tl.minimum(init_blocks, run_start)
    weighted = tl.full([tile_queries * padded_group, dim], 0.0, tl.float32)
    row_max = tl.full([tile_queries * padded_group], NO_MAX, tl.float32)
    row_sum = tl.full([tile_queries * padded_group], 0.0, tl.float32)
    block = tl.where(num_init > 0, 0, run_start)
    page = tl.load(pages + block)
    for index in range(1, num_init + own - run_start + 1):
        # the next page is looked up a step ahead, so that the look-up costs no stage of the pipeline
        next_block = tl.where(index < num_init, index, index - num_init + run_start)
        next_page = tl.load(pages + next_block)
        key = tl.load(page_cells(keys + head_offset, page, page_stride, block_tokens, dim))
        value = tl.load(page_cells(values + head_offset, page, page_stride, block_tokens, dim))
        scores = tl.dot(query, tl.trans(key), input_precision=precision) * score_scale
        # only where dense and sparse queries meet in one tile does a row skip a block
        attended = is_dense | (block < init_blocks) | (block >= local_start)
        weighted, row_max, row_sum = accumulate(
            scores, value, attended, weighted, row_max, row_sum, precision
        )
        block = next_block
        page = next_page

    # the last is the own block: it holds tokens after the query, and cells that were never written
    key_position = own * block_tokens + tl.arange(0, block_tokens)
    written = (key_position < seq_len)[:, None]
    key = tl.load(
        page_cells(keys + head_offset, page, page_stride, block_tokens, dim),
        mask=written,
        other=0.0,
    )
    value = tl.load(
        page_cells(values + head_offset, page, page_stride, block_tokens, dim),
        mask=written,
        other=0.0,
    )
    scores = tl.dot(query, tl.trans(key), input_precision=precision) * score_scale
    visible = key_position[None, :] <= position[:, None]
    scores = tl.where(visible, scores, float("-inf"))
    weighted, row_max, row_sum = accumulate(
        scores, value, exists, weighted, row_max, row_sum, precision
    )

    row_sum = tl.where(exists, row_sum, 1.0)
    output_rows = token * output_token_stride + head * output_head_stride
    tl.store(
        output + output_rows[:, None] + element[None, :],
        (weighted / row_sum[:, None]).to(output.dtype.element_ty),
        mask=exists[:, None],
    )
    heads = tl.num_programs(1) * group
    tl.store(log_sum_exp + token * heads + head, row_max + tl.log2(row_sum), mask=exists)


@triton.jit(do_not_specialize=["first_sequence", "num_seqs", "first_tile", "dense_len"])
def _list_chosen(  # type: ignore[no-untyped-def]
    blocks,
    blocks_token_stride,
    blocks_head_stride,
    lists,
    counts,
    query_start_loc,
    seq_lens,
    block_table,
    table_stride,
    first_sequence,
    num_seqs,
    first_tile,
    dense_len,
    init_blocks,
    local_blocks,
    tile_queries: tl.constexpr,
    num_selected: tl.constexpr,
    padded_selected: tl.constexpr,
    search_steps: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """List the pages that a tile's sparse queries chose beyond the shared blocks, each once, in block order.

    Entries are page * 2**tile_queries + a bit for each query that chose it, 31 bits in all; ``counts``
    says how many.
    """
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    sequence, first_token, context, seq_len, start = _locate_tile(
        query_start_loc, seq_lens, first_sequence, num_seqs, first_tile, tile_queries
    )
    if start >= seq_len:
        tl.store(counts + program, 0)
        return
    entry = tl.arange(0, tile_queries * padded_selected)
    query = entry // padded_selected
    column = entry % padded_selected
    first_sparse = tl.maximum(context, dense_len - 1)
    head_blocks = blocks + tl.program_id(1) * blocks_head_stride
    position = start + query
    token = (first_token + position - context).to(tl.int64)
    block = tl.load(
        head_blocks + token * blocks_token_stride + column,
        mask=(position >= first_sparse) & (position < seq_len) & (column < num_selected),
        other=-1,
    )
    is_chosen = (block >= init_blocks) & (block < start // block_tokens - local_blocks)
    bits = 1 << query
    if tile_queries > 1:
        for other in tl.static_range(tile_queries):
            is_listed = (start + other >= first_sparse) & (start + other < seq_len)
            other_selected = tl.where(is_listed, num_selected, 0)
            other_token = (first_token + start + other - context).to(tl.int64)
            other_blocks = head_blocks + other_token * blocks_token_stride
            # first column whose block is not lower; -1 ends a list and counts as higher
            low = tl.full([tile_queries * padded_selected], 0, tl.int32)
            for step in tl.static_range(search_steps):
                probe = low + (padded_selected >> (step + 1)) - 1
                found = tl.load(other_blocks + probe, mask=probe < other_selected, other=-1)
                low = tl.where((found >= 0) & (found < block), probe + 1, low)
            found = tl.load(other_blocks + low, mask=low < other_selected, other=-1)
            shared = is_chosen & (found == block)
            bits |= tl.where(shared, 1 << other, 0)
            # the first query that chose a block lists it for all
            is_chosen &= (other >= query) | (found != block)
    none: tl.constexpr = 0x7FFFFFFF
    key = tl.sort(tl.where(is_chosen, (block << tile_queries) | bits, none))
    is_chosen = key != none
    page = tl.load(
        block_table + sequence.to(tl.int64) * table_stride + (key >> tile_queries),
        mask=is_chosen,
        other=0,
    )
    tl.store(
        lists + program * (tile_queries * num_selected) + entry,
        (page << tile_queries) | (key & ((1 << tile_queries) - 1)),
        mask=is_chosen,
    )
    tl.store(counts + program, tl.sum(is_chosen.to(tl.int32), 0))


@triton.jit(do_not_specialize=["first_sequence", "num_seqs", "first_tile"])
def _attend_chosen(  # type: ignore[no-untyped-def]
    q,
    q_token_stride,
    q_head_stride,
    partial,
    output,
    output_token_stride,
    output_head_stride,
    log_sum_exp,
    keys,
    values,
    page_stride,
    head_stride,
    lists,
    list_tile_stride,
    list_head_stride,
    counts,
    query_start_loc,
    seq_lens,
    first_sequence,
    num_seqs,
    first_tile,
    score_scale,
    tile_queries: tl.constexpr,
    group: tl.constexpr,
    padded_group: tl.constexpr,
    dim: tl.constexpr,
    block_tokens: tl.constexpr,
    precision: tl.constexpr,
):
    """Continue ``partial`` with the listed pages, which all lie before the tile, and round the result."""
    count = tl.load(counts + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))
    sequence, first_token, context, seq_len, start = _locate_tile(
        query_start_loc, seq_lens, first_sequence, num_seqs, first_tile, tile_queries
    )
    if start >= seq_len:
        return
    _, token, head, exists = _tile_rows(
        start, first_token, context, seq_len, tile_queries, group, padded_group
    )
    heads = tl.num_programs(1) * group
    element = tl.arange(0, dim)
    q_rows = token * q_token_stride + head * q_head_stride
    query = tl.load(q + q_rows[:, None] + element[None, :], mask=exists[:, None], other=0.0)
    # normalised output and log-sum-exp are the state of a softmax whose sum is 1
    partial_cells = partial + ((token * heads + head) * dim)[:, None] + element[None, :]
    weighted = tl.load(partial_cells, mask=exists[:, None], other=0.0)
    row_max = tl.load(log_sum_exp + token * heads + head, mask=exists, other=0.0)
    row_sum = tl.full([tile_queries * padded_group], 1.0, tl.float32)

    head_offset = tl.program_id(1).to(tl.int64) * head_stride
    entries = lists + tl.program_id(0).to(tl.int64) * list_tile_stride
    entries += tl.program_id(1) * list_head_stride
    bit = tl.arange(0, tile_queries * padded_group) // padded_group
    # an empty range reads an entry that it does not use
    entry = tl.load(entries, mask=count > 0, other=0)
    for index in range(1, count + 1):
        next_entry = tl.load(entries + tl.minimum(index, count - 1))
        page = entry >> tile_queries
        key = tl.load(page_cells(keys + head_offset, page, page_stride, block_tokens, dim))
        value = tl.load(page_cells(values + head_offset, page, page_stride, block_tokens, dim))
        scores = tl.dot(query, tl.trans(key), input_precision=precision) * score_scale
        attended = ((entry >> bit) & 1) == 1
        weighted, row_max, row_sum = accumulate(
            scores, value, attended, weighted, row_max, row_sum, precision
        )
        entry = next_entry
    output_rows = token * output_token_stride + head * output_head_stride
    tl.store(
        output + output_rows[:, None] + element[None, :],
        (weighted / row_sum[:, None]).to(output.dtype.element_ty),
        mask=exists[:, None],
    )
