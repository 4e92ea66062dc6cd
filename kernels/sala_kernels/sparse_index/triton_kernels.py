"""Triton kernels of the block selection: coarse log-sum-exp, fine scores pooled to blocks, top-k.

Rows of means are counted per sequence: row r of the fine means lies in block r // 4 and holds window
r - 1, so that block b is touched by rows 4b to 4b + 4: its own four and the first of the next page. The
scores therefore come in two planes, the maximum of a page's rows and the page's first row moved one block
down; a block's score is the larger of the two. Row 0 holds no window and was never written.

Columns of the score products are (head of the group, query), heads outermost: on Hopper one thread then
holds all heads of its queries and sums them without exchange.
"""

# kernel arguments are pointers, scalars and constants of the launch; Triton reads no other annotation
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from sala_kernels.paged import FINE_PER_PAGE as _FINE_PER_PAGE
from sala_kernels.spec import BLOCK_TOKENS as _BLOCK_TOKENS
from sala_kernels.triton_search import find_sequence

BLOCK_TOKENS = tl.constexpr(_BLOCK_TOKENS)
FINE_PER_PAGE = tl.constexpr(_FINE_PER_PAGE)
NO_LOGIT = tl.constexpr(-1.0e30)
"""A maximum below every logit, finite so that differences are defined."""


# ------------------------------------------------------------------------------------ shared parts


@triton.jit
def _ceil_div(dividend, divisor):
    return (dividend + divisor - 1) // divisor


@triton.jit
def _find_token(token, query_start_loc, seq_lens, num_seqs, one_token_each: tl.constexpr):
    """Return (sequence, position) of a packed token; position -1 for padding."""
    if one_token_each:
        seq = token
    else:
        seq = find_sequence(query_start_loc, 0, num_seqs, token, 0, 1, 0)
    end = tl.load(query_start_loc + seq + 1)
    position = tl.load(seq_lens + seq) - (end - token)
    return seq, tl.where(token < end, position, -1)


@triton.jit
def _find_tile(
    tile,
    query_start_loc,
    seq_lens,
    first_token,
    end_token,
    first_seq,
    num_seqs,
    tile_queries: tl.constexpr,
):
    """Return (sequence, first token, queries, position of the first) of a tile of one sequence.

    Sequence s starts at tile (its first token here) // tile_queries + s: at most one tile too many each.
    """
    low = first_seq
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        start = tl.minimum(tl.maximum(tl.load(query_start_loc + middle), first_token), end_token)
        if (start - first_token) // tile_queries + middle - first_seq <= tile:
            low = middle
        else:
            high = middle
    seq_end = tl.load(query_start_loc + low + 1)
    start = tl.minimum(tl.maximum(tl.load(query_start_loc + low), first_token), end_token)
    end = tl.minimum(tl.maximum(seq_end, first_token), end_token)
    token = (
        start + (tile - ((start - first_token) // tile_queries + low - first_seq)) * tile_queries
    )
    position = tl.load(seq_lens + low) - (seq_end - token)
    return low, token, tl.minimum(end - token, tile_queries), position


@triton.jit
def _load_queries(
    q, token, num_queries, head, stride_token, stride_head,
    group_heads: tl.constexpr, num_columns: tl.constexpr, tile_queries: tl.constexpr, dim: tl.constexpr,
):  # fmt: skip
    """Load [num_columns, dim] queries, column = head * tile_queries + query; what does not exist is 0."""
    column = tl.arange(0, num_columns)
    member, query = column // tile_queries, column % tile_queries
    exists = (member < group_heads) & (query < num_queries)
    offset = (token + query).to(tl.int64) * stride_token + (
        head * group_heads + member
    ) * stride_head
    pointer = q + offset[:, None] + tl.arange(0, dim)[None, :]
    return tl.load(pointer, mask=exists[:, None], other=0.0)


@triton.jit
def _row_of_tile(tile_rows: tl.constexpr):
    """Return (page of the tile, row of the page) of each row of a tile of fine means.

    The order is that of :func:`_pool`: the four rows of a page lie in one thread or in its neighbour.
    """
    row = tl.arange(0, tile_rows)
    return row // 16 * 4 + row % 8 // 2, row % 2 * 2 + row // 8 % 2


@triton.jit
def _pool(scores, tile_rows: tl.constexpr, tile_queries: tl.constexpr):
    """Return the maximum over each page's rows: [tile_rows, tile_queries] -> [tile_rows / 4, tile_queries]."""
    scores = tl.max(tl.reshape(scores, [tile_rows // 16, 2, 8, tile_queries]), axis=1)
    return tl.max(tl.reshape(scores, [tile_rows // 4, 2, tile_queries]), axis=1)


@triton.jit
def _sum_heads(
    scores,
    tile_rows: tl.constexpr,
    num_heads: tl.constexpr,
    tile_queries: tl.constexpr,
    halvings: tl.constexpr,
):
    """Return the sum over heads: [tile_rows, num_heads * tile_queries] -> [tile_rows, tile_queries].

    Pairs are added in a fixed order, whatever the layout: prefill and decode then round alike.
    """
    for step in tl.static_range(halvings):
        halves = tl.reshape(scores, [tile_rows, 2, (num_heads >> (step + 1)) * tile_queries])
        scores = tl.sum(halves, axis=1)
    return scores


@triton.jit
def _page_scores(
    fine, table, tile, num_pages, queries_t, log_normaliser, scale,
    stride_page, stride_row,
    tile_rows: tl.constexpr, num_heads: tl.constexpr, tile_queries: tl.constexpr, halvings: tl.constexpr,
    dim: tl.constexpr, max_score: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Score one tile of pages: (maximum of each page's rows, its first row), [tile_rows / 4, tile_queries].

    Invisible windows need no mask: the blocks they touch are forced, and a NaN stays in its row.
    """
    page_of_tile, row_of_page = _row_of_tile(tile_rows)
    block = tile * (tile_rows // FINE_PER_PAGE) + page_of_tile
    # past the end the last page again: written memory, and nobody reads the score
    page = tl.load(table + tl.minimum(block, num_pages - 1)).to(tl.int64)
    offset = page * stride_page + row_of_page * stride_row
    rows = tl.load(fine + offset[:, None] + tl.arange(0, dim)[None, :])
    logits = tl.dot(rows, queries_t, input_precision=precision)
    scores = tl.exp2(logits * scale - log_normaliser[None, :])
    scores = _sum_heads(scores, tile_rows, num_heads, tile_queries, halvings)
    scores = tl.where((block * FINE_PER_PAGE + row_of_page > 0)[:, None], scores, 0.0)
    # rounding is monotone, so pooling first gives the same; saturated, not infinite
    best = tl.minimum(_pool(scores, tile_rows, tile_queries), max_score)
    first = tl.where((row_of_page == 0)[:, None], scores, 0.0)
    return best, tl.minimum(_pool(first, tile_rows, tile_queries), max_score)


@triton.jit
def _store_planes(out, plane_stride, row, exists, tile, best, first, tile_pages: tl.constexpr):
    """Store [tile_pages, queries] page scores; ``row`` is the offset of each query's scores."""
    block = tile * tile_pages + tl.arange(0, tile_pages)
    pointer = out + row[None, :] + block[:, None]
    tl.store(pointer, best.to(out.dtype.element_ty), mask=exists[None, :])
    below = exists[None, :] & (block > 0)[:, None]
    tl.store(pointer + plane_stride - 1, first.to(out.dtype.element_ty), mask=below)


# ----------------------------------------------------------------------------------------- prefill


@triton.jit
def _stats_step(
    coarse, table, queries, row, limit, top, total, scale, stride_page, last_row,
    dim: tl.constexpr, masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Fold one tile of coarse windows into the running maximum (raw logits) and sum of each column."""
    page = tl.load(table + tl.minimum(row, last_row)).to(tl.int64) * stride_page
    keys = tl.load(coarse + page[:, None] + tl.arange(0, dim)[None, :])
    logits = tl.dot(queries, tl.trans(keys), input_precision=precision)
    if masked:
        logits = tl.where(row[None, :] < limit[:, None], logits, -float("inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    weight = tl.exp2(logits * scale - (new_top * scale)[:, None])
    total = total * tl.exp2((top - new_top) * scale) + tl.sum(weight, axis=1)
    return new_top, total


@triton.jit(do_not_specialize=["first_token", "end_token", "first_seq", "num_seqs"])
def prefill_stats_kernel(
    log_normaliser, q, coarse, block_table, query_start_loc, seq_lens,
    first_token, end_token, first_seq, num_seqs, first_scored, scale,
    stride_q_token, stride_q_head, stride_page, stride_kv_head, stride_table,
    kv_heads: tl.constexpr, group_heads: tl.constexpr, num_columns: tl.constexpr, tile_queries: tl.constexpr,
    dim: tl.constexpr, tile_rows: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write log2(sum exp2(logit)) over the visible coarse windows, [tokens, heads] float32."""
    head = tl.program_id(1)
    seq, token, num_queries, position = _find_tile(
        tl.program_id(0), query_start_loc, seq_lens,
        first_token, end_token, first_seq, num_seqs, tile_queries,
    )  # fmt: skip
    if (num_queries <= 0) | (position + num_queries <= first_scored):
        return
    queries = _load_queries(
        q,
        token,
        num_queries,
        head,
        stride_q_token,
        stride_q_head,
        group_heads,
        num_columns,
        tile_queries,
        dim,
    )
    coarse += head.to(tl.int64) * stride_kv_head
    table = block_table + seq.to(tl.int64) * stride_table
    column = tl.arange(0, num_columns)
    member, query = column // tile_queries, column % tile_queries
    # row r (window r - 1) ends at token 64 r + 63; row 0 holds no window
    limit = (position + tl.minimum(query, num_queries - 1) + 1) // BLOCK_TOKENS
    end = (position + num_queries) // BLOCK_TOKENS
    full_end = 1 + tl.maximum((position + 1) // BLOCK_TOKENS - 1, 0) // tile_rows * tile_rows
    top = tl.full([num_columns], NO_LOGIT, tl.float32)
    total = tl.full([num_columns], 0.0, tl.float32)
    for start in range(1, full_end, tile_rows):
        top, total = _stats_step(
            coarse, table, queries, start + tl.arange(0, tile_rows), limit, top, total, scale,
            stride_page, end - 1, dim, False, precision,
        )  # fmt: skip
    for start in range(full_end, end, tile_rows):
        top, total = _stats_step(
            coarse, table, queries, start + tl.arange(0, tile_rows), limit, top, total, scale,
            stride_page, end - 1, dim, True, precision,
        )  # fmt: skip
    pointer = (token - first_token + query) * (kv_heads * group_heads) + head * group_heads + member
    exists = (member < group_heads) & (query < num_queries)
    tl.store(log_normaliser + pointer, top * scale + tl.log2(total), mask=exists)


@triton.jit(
    do_not_specialize=["first_token", "end_token", "first_seq", "num_seqs", "first_stats_token"]
)
def prefill_scores_kernel(
    out, q, fine, log_normaliser, block_table, query_start_loc, seq_lens,
    first_token, end_token, first_seq, num_seqs, first_scored, first_stats_token, scale,
    stride_q_token, stride_q_head, stride_page, stride_kv_head, stride_row, stride_table,
    plane_stride, stride_out,
    kv_heads: tl.constexpr, group_heads: tl.constexpr, num_heads: tl.constexpr, halvings: tl.constexpr,
    tile_queries: tl.constexpr, dim: tl.constexpr, tile_rows: tl.constexpr, local_blocks: tl.constexpr,
    max_score: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write the page scores of tokens [first_token, end_token): [2, tokens, kv_heads, blocks]."""
    head = tl.program_id(1)
    seq, token, num_queries, position = _find_tile(
        tl.program_id(0), query_start_loc, seq_lens,
        first_token, end_token, first_seq, num_seqs, tile_queries,
    )  # fmt: skip
    if (num_queries <= 0) | (position + num_queries <= first_scored):
        return
    columns: tl.constexpr = num_heads * tile_queries
    queries_t = tl.trans(
        _load_queries(
            q,
            token,
            num_queries,
            head,
            stride_q_token,
            stride_q_head,
            group_heads,
            columns,
            tile_queries,
            dim,
        )
    )
    column = tl.arange(0, columns)
    member, query = column // tile_queries, column % tile_queries
    pointer = (
        (token - first_stats_token + query) * (kv_heads * group_heads) + head * group_heads + member
    )
    exists = (member < group_heads) & (query < num_queries)
    # a head that does not exist weighs exp2(-inf) = 0
    normaliser = tl.load(log_normaliser + pointer, mask=exists, other=float("inf"))
    fine += head.to(tl.int64) * stride_kv_head
    table = block_table + seq.to(tl.int64) * stride_table
    # up to the first row of the first local block: beyond it every block is forced
    num_pages = (position + num_queries - 1) // BLOCK_TOKENS - local_blocks + 1
    pages: tl.constexpr = tile_rows // FINE_PER_PAGE
    each = tl.arange(0, tile_queries)
    row = ((token - first_token + each) * kv_heads + head).to(tl.int64) * stride_out
    for tile in range(0, _ceil_div(num_pages, pages)):
        best, first = _page_scores(
            fine, table, tile, num_pages, queries_t, normaliser, scale, stride_page, stride_row,
            tile_rows, num_heads, tile_queries, halvings, dim, max_score, precision,
        )  # fmt: skip
        _store_planes(out, plane_stride, row, each < num_queries, tile, best, first, pages)


# ------------------------------------------------------------------------------------------ decode


@triton.jit(do_not_specialize=["num_seqs"])
def decode_stats_kernel(
    partial, q, coarse, block_table, query_start_loc, seq_lens, num_seqs, first_scored, scale,
    stride_q_token, stride_q_head, stride_page, stride_kv_head, stride_table,
    kv_heads: tl.constexpr, group_heads: tl.constexpr, num_heads: tl.constexpr, dim: tl.constexpr,
    tile_rows: tl.constexpr, num_splits: tl.constexpr, one_token_each: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Write the log2-sum-exp2 of one share of the coarse windows: [tokens, kv_heads, num_splits, num_heads]."""
    token, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, position = _find_token(token, query_start_loc, seq_lens, num_seqs, one_token_each)
    end = (position + 1) // BLOCK_TOKENS
    start, stop = _share(_ceil_div(end - 1, tile_rows), split, num_splits)
    if (position < first_scored) | (start >= stop):
        return
    queries_t = tl.trans(
        _load_queries(
            q, token, 1, head, stride_q_token, stride_q_head, group_heads, num_heads, 1, dim
        )
    )
    coarse += head.to(tl.int64) * stride_kv_head
    table = block_table + seq.to(tl.int64) * stride_table
    # a running maximum per cell: nothing crosses threads until the end
    top = tl.full([tile_rows, num_heads], NO_LOGIT, tl.float32)
    total = tl.full([tile_rows, num_heads], 0.0, tl.float32)
    for tile in range(start, stop):
        row = 1 + tile * tile_rows + tl.arange(0, tile_rows)
        page = tl.load(table + tl.minimum(row, end - 1)).to(tl.int64) * stride_page
        keys = tl.load(coarse + page[:, None] + tl.arange(0, dim)[None, :])
        logits = tl.dot(keys, queries_t, input_precision=precision) * scale
        logits = tl.where((row < end)[:, None], logits, -float("inf"))
        new_top = tl.maximum(top, logits)
        total = total * tl.exp2(top - new_top) + tl.exp2(logits - new_top)
        top = new_top
    best = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp2(top - best[None, :]), axis=0)
    pointer = ((token * kv_heads + head) * num_splits + split) * num_heads + tl.arange(0, num_heads)
    tl.store(partial + pointer, best + tl.log2(total))


@triton.jit
def _share(num_tiles, split, num_splits: tl.constexpr):
    """Return the tiles [start, stop) of one split; the first splits are full, the last may be empty."""
    tiles_a_split = _ceil_div(num_tiles, num_splits)
    start = split * tiles_a_split
    return start, tl.minimum(start + tiles_a_split, num_tiles)


@triton.jit(do_not_specialize=["num_seqs"])
def decode_scores_kernel(
    out, q, fine, partial, block_table, query_start_loc, seq_lens, num_seqs, first_scored, scale,
    stride_q_token, stride_q_head, stride_page, stride_kv_head, stride_row, stride_table,
    plane_stride, stride_out,
    kv_heads: tl.constexpr, group_heads: tl.constexpr, num_heads: tl.constexpr, halvings: tl.constexpr,
    dim: tl.constexpr, tile_rows: tl.constexpr, num_splits: tl.constexpr, stats_tile_rows: tl.constexpr,
    stats_splits: tl.constexpr, one_token_each: tl.constexpr, local_blocks: tl.constexpr,
    max_score: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write one share of a token's page scores: [2, tokens, kv_heads, blocks]."""
    token, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, position = _find_token(token, query_start_loc, seq_lens, num_seqs, one_token_each)
    num_pages = position // BLOCK_TOKENS - local_blocks + 1
    pages: tl.constexpr = tile_rows // FINE_PER_PAGE
    start, stop = _share(_ceil_div(num_pages, pages), split, num_splits)
    if (position < first_scored) | (start >= stop):
        return
    coarse_tiles = _ceil_div((position + 1) // BLOCK_TOKENS - 1, stats_tile_rows)
    used_splits = _ceil_div(coarse_tiles, _ceil_div(coarse_tiles, stats_splits))
    share, member = tl.arange(0, stats_splits), tl.arange(0, num_heads)
    pointer = ((token * kv_heads + head) * stats_splits + share[:, None]) * num_heads + member[
        None, :
    ]
    parts = tl.load(partial + pointer, mask=(share < used_splits)[:, None], other=-float("inf"))
    top = tl.max(parts, axis=0)
    normaliser = top + tl.log2(tl.sum(tl.exp2(parts - top[None, :]), axis=0))
    # a head that does not exist weighs exp2(-inf) = 0
    normaliser = tl.where(member < group_heads, normaliser, float("inf"))

    queries_t = tl.trans(
        _load_queries(
            q, token, 1, head, stride_q_token, stride_q_head, group_heads, num_heads, 1, dim
        )
    )
    fine += head.to(tl.int64) * stride_kv_head
    table = block_table + seq.to(tl.int64) * stride_table
    each = tl.arange(0, 1)
    row = ((token + each) * kv_heads + head).to(tl.int64) * stride_out
    for tile in range(start, stop):
        best, first = _page_scores(
            fine, table, tile, num_pages, queries_t, normaliser, scale, stride_page, stride_row,
            tile_rows, num_heads, 1, halvings, dim, max_score, precision,
        )  # fmt: skip
        _store_planes(out, plane_stride, row, each == 0, tile, best, first, pages)


# ------------------------------------------------------------------------------------------- top-k


@triton.jit
def _store_best(
    out, scores, plane_stride, own,
    init_blocks: tl.constexpr, local_blocks: tl.constexpr, num_selected: tl.constexpr,
    max_blocks: tl.constexpr, key_bits: tl.constexpr,
):  # fmt: skip
    """Store the num_selected best of the blocks 0..own in ascending order, at most max_blocks of them.

    Scores are not negative, so their bits order as they do: the threshold is found bit by bit.
    """
    block = tl.arange(0, max_blocks)
    scored = (block >= init_blocks) & (block < own - local_blocks)
    best = tl.load(scores + block, mask=scored, other=0.0)
    first = tl.load(scores + plane_stride + block, mask=scored, other=0.0)
    bits: tl.constexpr = tl.int16 if key_bits == 15 else tl.int32
    key = tl.maximum(best.to(bits, bitcast=True), first.to(bits, bitcast=True)).to(tl.int32)
    key = tl.where(scored, key, (1 << key_bits) - 1)  # forced: above every finite score
    key = tl.where(block <= own, key, -1)

    threshold = 0
    for step in tl.static_range(key_bits):
        candidate = threshold | (1 << (key_bits - 1 - step))
        count = tl.sum((key >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(count >= num_selected, candidate, threshold)
    # one scan counts both: blocks above the threshold in the low half, equal ones in the high half
    above, equal = key > threshold, key == threshold
    counts = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    before = tl.cumsum(counts, axis=0) - counts
    above_before, equal_before = before & 0xFFFF, (before >> 16) & 0xFFFF
    room = num_selected - tl.sum(above.to(tl.int32), axis=0)
    # among equals the lower block
    taken = above | (equal & (equal_before < room))
    tl.store(out + above_before + tl.minimum(equal_before, room), block, mask=taken)


@triton.jit(do_not_specialize=["first_token", "num_seqs", "dense_len"])
def select_kernel(
    out, scores, query_start_loc, seq_lens, first_token, num_seqs, dense_len,
    plane_stride, stride_scores,
    kv_heads: tl.constexpr, init_blocks: tl.constexpr, local_blocks: tl.constexpr,
    num_selected: tl.constexpr, selected_padded: tl.constexpr, max_blocks: tl.constexpr,
    short_blocks: tl.constexpr, key_bits: tl.constexpr, one_token_each: tl.constexpr,
):  # fmt: skip
    """Write the selection of one (token, KV head)."""
    row = tl.program_id(0)
    token = first_token + row // kv_heads
    _, position = _find_token(token, query_start_loc, seq_lens, num_seqs, one_token_each)
    out += (first_token * kv_heads + row).to(tl.int64) * num_selected
    scores += row.to(tl.int64) * stride_scores
    own = position // BLOCK_TOKENS
    is_sparse = (position >= 0) & (position + 1 >= dense_len)
    if (max_blocks > 0) and (is_sparse & (own >= num_selected)):
        # a captured graph is sized for the longest sequence and replayed with any
        if own < short_blocks:
            _store_best(
                out, scores, plane_stride, own,
                init_blocks, local_blocks, num_selected, short_blocks, key_bits,
            )  # fmt: skip
        elif max_blocks > short_blocks:
            _store_best(
                out, scores, plane_stride, own,
                init_blocks, local_blocks, num_selected, max_blocks, key_bits,
            )  # fmt: skip
    else:
        slot = tl.arange(0, selected_padded)
        chosen = tl.where(is_sparse & (slot <= own), slot, -1)
        tl.store(out + slot, chosen, mask=slot < num_selected)
