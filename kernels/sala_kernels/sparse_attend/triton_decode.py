"""Attention of single queries: their blocks are split over programs, the partial results combined."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

TARGET_PROGRAMS = 264
"""Programs that fill a GPU of 132 multiprocessors twice."""
MIN_SPLIT_BLOCKS = 4
"""Fewer blocks a program than this do not repay its start and the combination."""


def attend_decodes(
    q: Tensor,
    cache: PagedCache,
    batch: PagedBatch,
    blocks: Tensor,
    sparse: SparseSpec,
    output: Tensor,
    *,
    num_splits: int | None = None,
    num_warps: int = 4,
    stages: int | None = None,
) -> None:
    """Attend the tokens of the batch's decodes.

    Args:
        q: [tokens, heads, dim], the last axis contiguous.
        cache: one layer's pages.
        batch: sequences of this step.
        blocks: [tokens, kv_heads, selected] int32.
        sparse: the selection's parameters.
        output: as ``q``; written.
        num_splits: programs a (token, KV head), a power of two; None = by shape.
        num_warps: of a program.
        stages: blocks in flight in a program; None = by shape.
    """
    tokens = batch.num_decode_tokens
    _, heads, dim = q.shape
    kv_heads = cache.keys.shape[1]
    group = heads // kv_heads
    num_splits = num_splits or _num_splits(tokens * kv_heads, blocks.shape[-1], sparse.dense_len)
    partial = torch.empty(tokens, heads, num_splits, dim, dtype=torch.float32, device=q.device)
    log_sum_exp = partial.new_empty(tokens, heads, num_splits)
    is_single = batch.num_decode_tokens == batch.num_decodes
    _attend_split[tokens, kv_heads, num_splits](
        q,
        q.stride(0),
        q.stride(1),
        partial,
        log_sum_exp,
        cache.keys,
        cache.values,
        cache.keys.stride(0),
        cache.keys.stride(1),
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        batch.block_table.stride(0),
        batch.num_decodes,
        blocks,
        blocks.stride(0),
        blocks.stride(1),
        sparse.dense_len,
        dim**-0.5 * LOG2_E,
        is_single=is_single,
        num_selected=blocks.shape[-1],
        padded_selected=triton.next_power_of_2(max(1, blocks.shape[-1])),
        group=group,
        padded_group=max(16, triton.next_power_of_2(group)),
        dim=dim,
        block_tokens=BLOCK_TOKENS,
        precision="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=num_warps,
        num_stages=stages or num_stages(dim, q.element_size()),
    )
    _combine[tokens, heads](
        partial,
        log_sum_exp,
        output,
        output.stride(0),
        output.stride(1),
        batch.query_start_loc,
        batch.num_decodes,
        num_splits=num_splits,
        dim=dim,
        num_warps=4,
    )


def _num_splits(num_programs: int, num_selected: int, dense_len: int) -> int:
    """Fill the GPU, unless a split would get too few of the most blocks a token attends."""
    most_blocks = max(num_selected, triton.cdiv(dense_len, BLOCK_TOKENS))
    wanted = min(TARGET_PROGRAMS // num_programs, triton.cdiv(most_blocks, MIN_SPLIT_BLOCKS), 64)
    # a power of two: few variants to compile
    return 1 << max(0, wanted.bit_length() - 1)


@triton.jit(do_not_specialize=["num_seqs", "dense_len"])
def _attend_split(  # type: ignore[no-untyped-def]
    q,
    q_token_stride,
    q_head_stride,
    partial,
    log_sum_exp,
    keys,
    values,
    page_stride,
    head_stride,
    query_start_loc,
    seq_lens,
    block_table,
    table_stride,
    num_seqs,
    blocks,
    blocks_token_stride,
    blocks_head_stride,
    dense_len,
    score_scale,
    is_single: tl.constexpr,
    num_selected: tl.constexpr,
    padded_selected: tl.constexpr,
    group: tl.constexpr,
    padded_group: tl.constexpr,
    dim: tl.constexpr,
    block_tokens: tl.constexpr,
    precision: tl.constexpr,
):
    """Attend one token's share of its blocks; log_sum_exp of an empty share is -inf."""
    token = tl.program_id(0)
    if is_single:
        sequence = token
    else:
        sequence = find_sequence(query_start_loc, 0, num_seqs, token, 0, 1, 0)
    after_token = tl.load(query_start_loc + sequence + 1) - token
    if after_token <= 0:
        return
    position = tl.load(seq_lens + sequence) - after_token
    is_dense = position + 1 < dense_len
    listed = (
        blocks + token.to(tl.int64) * blocks_token_stride + tl.program_id(1) * blocks_head_stride
    )
    column = tl.arange(0, padded_selected)
    listed_blocks = tl.load(listed + column, mask=column < num_selected, other=-1)
    num_listed = tl.sum((listed_blocks >= 0).to(tl.int32), 0)
    num_blocks = tl.where(is_dense, position // block_tokens + 1, num_listed)
    share = (num_blocks + tl.num_programs(2) - 1) // tl.num_programs(2)
    first = tl.program_id(2) * share
    end = tl.minimum(first + share, num_blocks)

    member = tl.arange(0, padded_group)
    head = tl.program_id(1) * group + member
    exists = member < group
    heads = tl.num_programs(1) * group
    part = (token.to(tl.int64) * heads + head) * tl.num_programs(2) + tl.program_id(2)
    if first >= end:
        tl.store(
            log_sum_exp + part, tl.full([padded_group], float("-inf"), tl.float32), mask=exists
        )
        return
    element = tl.arange(0, dim)
    q_rows = token.to(tl.int64) * q_token_stride + head * q_head_stride
    query = tl.load(q + q_rows[:, None] + element[None, :], mask=exists[:, None], other=0.0)
    head_offset = tl.program_id(1).to(tl.int64) * head_stride
    pages = block_table + sequence.to(tl.int64) * table_stride
    weighted = tl.full([padded_group, dim], 0.0, tl.float32)
    row_max = tl.full([padded_group], NO_MAX, tl.float32)
    row_sum = tl.full([padded_group], 0.0, tl.float32)
    block = tl.load(listed + first, mask=(first < num_selected) & (not is_dense), other=first)
    page = tl.load(pages + block)
    for index in range(first + 1, end + 1):
        # looked up a step ahead, so that it costs no stage of the pipeline
        ahead = tl.minimum(index, end - 1)
        next_block = tl.load(
            listed + ahead, mask=(ahead < num_selected) & (not is_dense), other=ahead
        )
        next_page = tl.load(pages + next_block)
        # tokens after the query are hidden; cells past the sequence were never written
        visible = block * block_tokens + tl.arange(0, block_tokens) <= position
        key = tl.load(
            page_cells(keys + head_offset, page, page_stride, block_tokens, dim),
            mask=visible[:, None],
            other=0.0,
        )
        value = tl.load(
            page_cells(values + head_offset, page, page_stride, block_tokens, dim),
            mask=visible[:, None],
            other=0.0,
        )
        scores = tl.dot(query, tl.trans(key), input_precision=precision) * score_scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        weighted, row_max, row_sum = accumulate(
            scores, value, exists, weighted, row_max, row_sum, precision
        )
        block = next_block
        page = next_page
    row_sum = tl.where(exists, row_sum, 1.0)
    tl.store(
        partial + part[:, None] * dim + element[None, :],
        weighted / row_sum[:, None],
        mask=exists[:, None],
    )
    tl.store(log_sum_exp + part, row_max + tl.log2(row_sum), mask=exists)


@triton.jit(do_not_specialize=["num_seqs"])
def _combine(  # type: ignore[no-untyped-def]
    partial,
    log_sum_exp,
    output,
    output_token_stride,
    output_head_stride,
    query_start_loc,
    num_seqs,
    num_splits: tl.constexpr,
    dim: tl.constexpr,
):
    """Weight the normalised parts of one (token, head) by their share of the softmax's sum."""
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(query_start_loc + num_seqs):
        return
    head = tl.program_id(1)
    split = tl.arange(0, num_splits)
    element = tl.arange(0, dim)
    part = (token * tl.num_programs(1) + head) * num_splits + split
    part_sum = tl.load(log_sum_exp + part)
    # an empty part was not written
    weighted = tl.load(
        partial + part[:, None] * dim + element[None, :],
        mask=(part_sum > float("-inf"))[:, None],
        other=0.0,
    )
    weight = tl.exp2(part_sum - tl.max(part_sum, 0))
    result = tl.sum(weighted * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(
        output + token * output_token_stride + head * output_head_stride + element,
        result.to(output.dtype.element_ty),
    )
