"""Cache write in Triton: one launch that copies keys and values and stores the finished means.

A program takes one page of one sequence and KV head. Keys of this step are read from the packed input and
only older ones from the pages, so no program waits for what another one writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sala_kernels.checks import expect_head_dim
from sala_kernels.paged import COARSE_PER_PAGE, FINE_PER_PAGE
from sala_kernels.spec import (
    BLOCK_TOKENS,
    K1_STRIDE_TOKENS,
    K1_WINDOW_TOKENS,
    K2_STRIDE_TOKENS,
    K2_WINDOW_TOKENS,
)
from sala_kernels.triton_search import find_sequence

if TYPE_CHECKING:
    from torch import Tensor

    from sala_kernels.paged import PagedBatch, PagedCache

PAGE = tl.constexpr(BLOCK_TOKENS)
FINE_ROWS = tl.constexpr(FINE_PER_PAGE)
FINE_WINDOW = tl.constexpr(K1_WINDOW_TOKENS)
FINE_STRIDE = tl.constexpr(K1_STRIDE_TOKENS)
COARSE_ROWS = tl.constexpr(COARSE_PER_PAGE)
COARSE_WINDOW = tl.constexpr(K2_WINDOW_TOKENS)
# a coarse window ends where its page does, and none reaches back further than the page before
assert K2_STRIDE_TOKENS == BLOCK_TOKENS
assert K1_WINDOW_TOKENS <= K2_WINDOW_TOKENS == 2 * BLOCK_TOKENS


def write_cache(k: Tensor, v: Tensor, cache: PagedCache, batch: PagedBatch) -> None:
    """Implement :func:`sala_kernels.cache_write.op.write_cache`.

    Moves ``(4 + 1 + 5/64) tokens kv_heads dim`` elements: K and V read and written, the keys of the page
    before read once more, the means written; windows that overlap are read again from L1.

    Args:
        k: [tokens, kv_heads, dim], last axis contiguous.
        v: as ``k``.
        cache: one layer's pages, parts of the same cells; updated in place.
        batch: sequences of this step.

    Raises:
        ValueError: ``dim`` is not a power of two from 16 to 256.
    """
    tokens, kv_heads, dim = k.shape
    expect_head_dim(dim)
    num_seqs = batch.seq_lens.shape[0]
    one_token = batch.max_query_len == 1
    num_tiles = num_seqs if one_token else tokens // BLOCK_TOKENS + 2 * num_seqs
    # the same number of warps for one token and for many: the means are sums in the same order
    _write_cache_kernel[(num_tiles, kv_heads)](
        k,
        v,
        *cache,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        num_seqs,
        *k.stride()[:2],
        *v.stride()[:2],
        *cache.keys.stride()[:2],
        batch.block_table.stride(0),
        dim=dim,
        one_token=one_token,
        num_warps=8 if dim <= 128 else 16,
    )


@triton.jit(do_not_specialize=["num_seqs"])
def _write_cache_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    fine_ptr,
    coarse_ptr,
    query_start_ptr,
    seq_lens_ptr,
    block_table_ptr,
    num_seqs,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    page_stride,
    head_stride,
    table_stride,
    dim: tl.constexpr,
    one_token: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if one_token:
        sequence, page_of_step = tile, 0
    else:
        sequence, page_of_step = _find_page(tile, query_start_ptr, num_seqs)
    first_token = tl.load(query_start_ptr + sequence)
    num_new = tl.load(query_start_ptr + sequence + 1) - first_token
    seq_len = tl.load(seq_lens_ptr + sequence)
    context = seq_len - num_new
    block = context // PAGE + page_of_step
    start = block * PAGE
    if (num_new <= 0) | (start >= seq_len):
        return

    table = block_table_ptr + sequence * table_stride
    cells = tl.load(table + block).to(tl.int64) * page_stride + head * head_stride
    # packed key of position 0, whether or not that is a key of this step
    k_origin = k_ptr + head * k_head_stride + (first_token - context).to(tl.int64) * k_token_stride
    v_origin = v_ptr + head * v_head_stride + (first_token - context).to(tl.int64) * v_token_stride

    cell = tl.arange(0, PAGE)[:, None]
    column = tl.arange(0, dim)
    position = start + cell
    is_new = (position >= context) & (position < seq_len)
    row = position.to(tl.int64)
    new_k = tl.load(k_origin + row * k_token_stride + column, mask=is_new, other=0)
    new_v = tl.load(v_origin + row * v_token_stride + column, mask=is_new, other=0)
    tl.store(keys_ptr + cells + cell * dim + column, new_k, mask=is_new)
    tl.store(values_ptr + cells + cell * dim + column, new_v, mask=is_new)

    # windows end in the last token of each stride; most decoded tokens end none
    first_end = tl.maximum(start, context) // FINE_STRIDE * FINE_STRIDE + FINE_STRIDE - 1
    if first_end < tl.minimum(start + PAGE, seq_len):
        before = tl.load(table + block - 1, mask=block > 0, other=0)
        page_before = keys_ptr + before.to(tl.int64) * page_stride + head * head_stride
        _store_means(
            fine_ptr + cells,
            FINE_ROWS,
            FINE_WINDOW,
            k_origin,
            k_token_stride,
            keys_ptr + cells,
            page_before,
            start,
            context,
            seq_len,
            dim,
        )
        if seq_len >= start + PAGE:
            _store_means(
                coarse_ptr + cells,
                COARSE_ROWS,
                COARSE_WINDOW,
                k_origin,
                k_token_stride,
                keys_ptr + cells,
                page_before,
                start,
                context,
                seq_len,
                dim,
            )


@triton.jit
def _find_page(tile, query_start_ptr, num_seqs):  # type: ignore[no-untyped-def]
    """Return the sequence that owns a tile, and which of its tiles it is.

    n tokens touch at most n // 64 + 2 pages.
    """
    sequence = find_sequence(query_start_ptr, 0, num_seqs, tile, 0, PAGE, 2)
    return sequence, tile - tl.load(query_start_ptr + sequence) // PAGE - 2 * sequence


@triton.jit
def _store_means(  # type: ignore[no-untyped-def]
    means_ptr,
    rows: tl.constexpr,
    window: tl.constexpr,
    k_origin,
    k_token_stride,
    page_ptr,
    page_before_ptr,
    start,
    context,
    seq_len,
    dim: tl.constexpr,
):
    """Store the means of the windows that end in one page, and in [context, seq_len).

    Args:
        means_ptr: [rows, dim], the page's means.
        rows: windows that end in a page, evenly spaced.
        window: tokens a window.
        k_origin: packed key of position 0, for keys from ``context`` on.
        k_token_stride: distance between packed keys.
        page_ptr: [64, dim], keys of the page, for those before ``context``.
        page_before_ptr: as ``page_ptr``, of the page before.
        start: position of the page's first token.
        context: position of the first new token.
        seq_len: tokens of the sequence after this step.
        dim: head width.
    """
    row, column = tl.arange(0, rows), tl.arange(0, dim)
    end = start + (row + 1) * (PAGE // rows) - 1
    finished = (end >= context) & (end < seq_len) & (end >= window - 1)
    position = ((end - window + 1)[:, None] + tl.arange(0, window))[:, :, None]
    new = k_origin + position.to(tl.int64) * k_token_stride
    in_page = page_ptr + (position - start) * dim
    in_page_before = page_before_ptr + (position - start + PAGE) * dim
    old = tl.where(position >= start, in_page, in_page_before)
    keys_at = tl.where(position >= context, new, old) + column
    keys = tl.load(keys_at, mask=finished[:, None, None], other=0)
    mean = tl.sum(keys.to(tl.float32), axis=1) / window
    to = means_ptr + row[:, None] * dim + column
    tl.store(to, mean.to(means_ptr.dtype.element_ty), mask=finished[:, None])
