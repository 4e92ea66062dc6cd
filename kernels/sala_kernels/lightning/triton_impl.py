"""Lightning attention in Triton: decodes token by token, prompts in segments of chunks.

A decode reads its state once and writes it once a token, in float32 arithmetic: its time is the memory's.

A prompt's state would be a scan over its chunks, too few programs to fill a GPU. It is cut into segments:

1. ``_sum_segments``: what each segment but the last adds to the state, all segments at once.
2. ``_scan_segments``: the state before each segment, elementwise.
3. ``_attend_segments``: from there the outputs, chunk by chunk; the last segment stores the final state.

Segments start with the sequence, so a result does not depend on the rest of the batch, and a sequence of one
segment needs the third kernel only.

Rounding of 16-bit inputs: everything accumulates in float32 and states are float32 between chunks, segments
and steps. The masked scores are rounded to the input's dtype before they meet the values, as in softmax
attention. The two products with a float32 factor (state, decayed values) keep 16 bits of its mantissa with
bfloat16 inputs, TF32's 11 bits with float16. Emulated for bfloat16, relative RMS against the recurrence: state
3e-6, output 1e-3 before and 2e-3 after it is rounded to bfloat16 (1.7e-3 when nothing else is).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from sala_kernels.checks import expect_head_dim
from sala_kernels.triton_search import find_sequence

if TYPE_CHECKING:
    from torch import Tensor

    from sala_kernels.lightning.op import StateBatch

SEGMENT_TOKENS = 512
"""Tokens that one program takes in sequence; a multiple of every chunk."""
SCAN_ELEMENTS = 1024
"""Elements of a state that one program of the scan carries, or all of a smaller state."""
DECODE_PROGRAMS = 256
"""Programs that a decode should have at least: two a streaming multiprocessor of an H200."""


class _Tiling(NamedTuple):
    chunk_tokens: int
    value_columns: int
    num_warps: int
    num_stages: int


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, state: Tensor, batch: StateBatch
) -> Tensor:
    """Implement :func:`sala_kernels.lightning.op.lightning_attention`.

    Raises:
        ValueError: no kernel for this dtype or head width.
    """
    dim = q.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q: expected bfloat16, float16 or float32, got {q.dtype}")
    expect_head_dim(dim)
    output = q.new_empty(q.shape)
    if batch.num_decodes > 0:
        _decode(q, k, v, output, slopes, scale, state, batch)
    if batch.num_decodes < batch.state_slots.shape[0]:
        _prefill(q, k, v, output, slopes, scale, state, batch)
    return output


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    batch: StateBatch,
) -> None:
    """Run the leading ``num_decodes`` sequences."""
    _, heads, dim = q.shape
    # a row of 32 columns is a whole cache line; half of it where programs are few
    columns = 32 if batch.num_decodes * heads * dim >= 32 * DECODE_PROGRAMS else 16
    columns = min(columns, dim)
    _decode_kernel[(batch.num_decodes, heads, dim // columns)](
        q,
        k,
        v,
        output,
        slopes,
        scale,
        state,
        batch.query_start_loc,
        batch.state_slots,
        batch.initial_column,
        batch.has_context,
        *_row_strides(q, k, v, output, state, batch.state_slots),
        dim=dim,
        value_columns=columns,
        num_warps=4,
    )


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    batch: StateBatch,
) -> None:
    """Run the sequences after the leading ``num_decodes``."""
    _, heads, dim = q.shape
    tiling = _tiling(q.dtype, dim)
    num_tokens = q.shape[0] - batch.num_decode_tokens
    num_seqs = batch.state_slots.shape[0] - batch.num_decodes
    # bounds: a sequence's last segment may be short
    num_segments = num_tokens // SEGMENT_TOKENS + num_seqs
    grid = (num_segments, heads, dim // tiling.value_columns)
    slots = batch.state_slots
    # whole tensors and the first sequence, not slices: those may lie on addresses for which Triton compiles anew
    sequences = (batch.query_start_loc, slots, batch.initial_column, batch.has_context)
    which = (batch.num_decodes, slots.shape[0])
    constants = {
        "dim": dim,
        "value_columns": tiling.value_columns,
        "chunk_tokens": tiling.chunk_tokens,
        "segment_tokens": SEGMENT_TOKENS,
        "precision": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }
    # None: no sequence has two segments
    before = None
    if batch.max_query_len > SEGMENT_TOKENS:
        # see _first_row for the bound
        rows = max(1, 2 * num_tokens // SEGMENT_TOKENS)
        before = torch.empty((rows, heads, dim, dim), dtype=torch.float32, device=q.device)
        _sum_segments[grid](
            k,
            v,
            slopes,
            before,
            batch.query_start_loc,
            slots,
            *which,
            *_row_strides(k, v),
            slots.stride(0),
            **constants,
        )
        scan_elements = min(SCAN_ELEMENTS, dim * dim)
        _scan_segments[(num_seqs, heads, dim * dim // scan_elements)](
            slopes,
            state,
            before,
            *sequences,
            batch.num_decodes,
            *_row_strides(state, slots),
            dim=dim,
            elements=scan_elements,
            segment_tokens=SEGMENT_TOKENS,
        )
    _attend_segments[grid](
        q,
        k,
        v,
        output,
        slopes,
        scale,
        state,
        before,
        *sequences,
        *which,
        *_row_strides(q, k, v, output, state, slots),
        **constants,
    )


def _tiling(dtype: torch.dtype, dim: int) -> _Tiling:
    if dtype == torch.float32:
        # no tensor cores: small tiles that stay in registers
        return _Tiling(chunk_tokens=32, value_columns=16, num_warps=4, num_stages=1)
    # 4 warps spill 304 bytes a thread and are still 1.27 times as fast: two programs fit a multiprocessor
    return _Tiling(chunk_tokens=64, value_columns=min(dim, 64), num_warps=4, num_stages=2)


def _row_strides(*tensors: Tensor) -> tuple[int, ...]:
    """Return the strides of the first two axes of each: those that need not be contiguous."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


@triton.jit
def _initial_slot(state_slots, initial_column, seq, slots_seq, slots_column):  # type: ignore[no-untyped-def]
    """Slot of the state before a sequence's first new token."""
    column = 0
    if initial_column is not None:
        column = tl.load(initial_column + seq)
    return tl.load(state_slots + seq * slots_seq + column * slots_column)


@triton.jit(do_not_specialize=["slots_seq", "slots_column"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    output,
    slopes,
    scale,
    state,
    query_start_loc,
    state_slots,
    initial_column,
    has_context,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    output_token,
    output_head,
    state_slot,
    state_head,
    slots_seq,
    slots_column,
    dim: tl.constexpr,
    value_columns: tl.constexpr,
):
    seq, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_start_loc + seq)
    num_new = tl.load(query_start_loc + seq + 1) - start
    is_padding = tl.load(state_slots + seq * slots_seq) < 0
    if is_padding | (num_new <= 0):
        return
    slot = _initial_slot(state_slots, initial_column, seq, slots_seq, slots_column).to(tl.int64)
    d = tl.arange(0, dim)
    columns = tl.program_id(2) * value_columns + tl.arange(0, value_columns)
    tile = head * state_head + d[:, None] * dim + columns[None, :]
    # the whole initial state is in registers before a column is written, which may be the same one
    current = tl.full((dim, value_columns), 0.0, dtype=tl.float32)
    if tl.load(has_context + seq):
        current = tl.load(state + slot * state_slot + tile)
    decay = tl.exp(-tl.load(slopes + head))
    for column in range(num_new):
        token = (start + column).to(tl.int64)
        q_t = tl.load(q + token * q_token + head * q_head + d).to(tl.float32)
        k_t = tl.load(k + token * k_token + head * k_head + d).to(tl.float32)
        v_t = tl.load(v + token * v_token + head * v_head + columns).to(tl.float32)
        slot = tl.load(state_slots + seq * slots_seq + column * slots_column).to(tl.int64)
        current = decay * current + k_t[:, None] * v_t[None, :]
        tl.store(state + slot * state_slot + tile, current)
        out = scale * tl.sum(q_t[:, None] * current, axis=0)
        tl.store(
            output + token * output_token + head * output_head + columns,
            out.to(output.dtype.element_ty),
        )


@triton.jit
def _find_segment(  # type: ignore[no-untyped-def]
    query_start_loc, first_seq, num_seqs, program, segment_tokens: tl.constexpr
):
    """Map a program to (sequence, its first token, its tokens, segment), the last past its end if idle.

    The i-th sequence from ``first_seq`` has the programs from ``tokens of those before it // segment_tokens
    + i``, which leaves room for a partial last segment of each.
    """
    origin = tl.load(query_start_loc + first_seq)
    index = program + first_seq
    seq = find_sequence(query_start_loc, first_seq, num_seqs, index, origin, segment_tokens, 1)
    start = tl.load(query_start_loc + seq)
    num_tokens = tl.load(query_start_loc + seq + 1) - start
    return seq, start, num_tokens, index - (start - origin) // segment_tokens - seq


@triton.jit
def _first_row(query_start_loc, first_seq, start, segment_tokens: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row of the workspace that holds the state before a sequence's first segment.

    Only sequences of two or more segments have rows. x > 1 segments take ceil(x) <= floor(2 x) rows, so this
    leaves room whatever the number of sequences.
    """
    return (2 * (start - tl.load(query_start_loc + first_seq)) // segment_tokens).to(tl.int64)


@triton.jit
def _dot_float32(exact, factor, precision: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply a tile of inputs by a float32 tile, without rounding that to the inputs' dtype."""
    if exact.dtype == tl.bfloat16:
        high = factor.to(tl.bfloat16)
        low = (factor - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(exact, high, tl.dot(exact, low))
    else:
        return tl.dot(exact.to(tl.float32), factor, input_precision=precision)


@triton.jit(do_not_specialize=["first_seq", "num_seqs", "slots_seq"])
def _sum_segments(  # type: ignore[no-untyped-def]
    k,
    v,
    slopes,
    before,
    query_start_loc,
    state_slots,
    first_seq,
    num_seqs,
    k_token,
    k_head,
    v_token,
    v_head,
    slots_seq,
    dim: tl.constexpr,
    value_columns: tl.constexpr,
    chunk_tokens: tl.constexpr,
    segment_tokens: tl.constexpr,
    precision: tl.constexpr,
):
    seq, start, num_tokens, segment = _find_segment(
        query_start_loc, first_seq, num_seqs, tl.program_id(0), segment_tokens
    )
    head = tl.program_id(1)
    is_padding = tl.load(state_slots + seq * slots_seq) < 0
    # the segments summed are whole: the last one is not, and idle programs come after it
    if is_padding | ((segment + 1) * segment_tokens >= num_tokens):
        return
    d = tl.arange(0, dim)
    columns = tl.program_id(2) * value_columns + tl.arange(0, value_columns)
    position = tl.arange(0, chunk_tokens)
    first_token = (start + segment * segment_tokens).to(tl.int64)
    k_tile = k + first_token * k_token + head * k_head + position[:, None] * k_token + d[None, :]
    v_tile = (
        v + first_token * v_token + head * v_head + position[:, None] * v_token + columns[None, :]
    )
    slope = tl.load(slopes + head)
    to_end = tl.exp(-slope * (chunk_tokens - 1 - position))
    chunk_decay = tl.exp(-slope * chunk_tokens)
    total = tl.full((dim, value_columns), 0.0, dtype=tl.float32)
    for offset in range(0, segment_tokens, chunk_tokens):
        k_c = tl.load(k_tile + offset * k_token)
        v_c = tl.load(v_tile + offset * v_token).to(tl.float32) * to_end[:, None]
        total = chunk_decay * total + _dot_float32(tl.trans(k_c), v_c, precision)
    row = _first_row(query_start_loc, first_seq, start, segment_tokens) + segment + 1
    tile = head * dim * dim + d[:, None] * dim + columns[None, :]
    tl.store(before + row * tl.num_programs(1) * dim * dim + tile, total)


@triton.jit(do_not_specialize=["first_seq", "slots_seq", "slots_column"])
def _scan_segments(  # type: ignore[no-untyped-def]
    slopes,
    state,
    before,
    query_start_loc,
    state_slots,
    initial_column,
    has_context,
    first_seq,
    state_slot,
    state_head,
    slots_seq,
    slots_column,
    dim: tl.constexpr,
    elements: tl.constexpr,
    segment_tokens: tl.constexpr,
):
    seq, head = first_seq + tl.program_id(0), tl.program_id(1)
    start = tl.load(query_start_loc + seq)
    num_tokens = tl.load(query_start_loc + seq + 1) - start
    is_padding = tl.load(state_slots + seq * slots_seq) < 0
    if is_padding | (num_tokens <= segment_tokens):
        return
    slot = _initial_slot(state_slots, initial_column, seq, slots_seq, slots_column).to(tl.int64)
    element = tl.program_id(2) * elements + tl.arange(0, elements)
    current = tl.full((elements,), 0.0, dtype=tl.float32)
    if tl.load(has_context + seq):
        current = tl.load(state + slot * state_slot + head * state_head + element)
    decay = tl.exp(-tl.load(slopes + head) * segment_tokens)
    row_elements = tl.num_programs(1) * dim * dim
    rows = before + _first_row(query_start_loc, first_seq, start, segment_tokens) * row_elements
    rows += head * dim * dim + element
    # copied, because the last segment overwrites the slot while the first one runs
    tl.store(rows, current)
    for _ in range(1, (num_tokens + segment_tokens - 1) // segment_tokens):
        rows += row_elements
        current = decay * current + tl.load(rows)
        tl.store(rows, current)


@triton.jit(do_not_specialize=["first_seq", "num_seqs", "slots_seq", "slots_column"])
def _attend_segments(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    output,
    slopes,
    scale,
    state,
    before,
    query_start_loc,
    state_slots,
    initial_column,
    has_context,
    first_seq,
    num_seqs,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    output_token,
    output_head,
    state_slot,
    state_head,
    slots_seq,
    slots_column,
    dim: tl.constexpr,
    value_columns: tl.constexpr,
    chunk_tokens: tl.constexpr,
    segment_tokens: tl.constexpr,
    precision: tl.constexpr,
):
    seq, start, num_tokens, segment = _find_segment(
        query_start_loc, first_seq, num_seqs, tl.program_id(0), segment_tokens
    )
    head = tl.program_id(1)
    final_slot = tl.load(state_slots + seq * slots_seq).to(tl.int64)
    remaining = num_tokens - segment * segment_tokens
    if (final_slot < 0) | (remaining <= 0):
        return
    d = tl.arange(0, dim)
    columns = tl.program_id(2) * value_columns + tl.arange(0, value_columns)
    tile = d[:, None] * dim + columns[None, :]
    state_tile = head * state_head + tile
    initial_slot = _initial_slot(state_slots, initial_column, seq, slots_seq, slots_column)
    initial = state + initial_slot.to(tl.int64) * state_slot + state_tile
    has_initial = tl.load(has_context + seq)
    if before is not None:  # noqa: SIM102 - decided by the compiler; the other on the device
        if num_tokens > segment_tokens:
            row = _first_row(query_start_loc, first_seq, start, segment_tokens) + segment
            initial = before + (row * tl.num_programs(1) + head) * dim * dim + tile
            has_initial = has_initial | True
    current = tl.full((dim, value_columns), 0.0, dtype=tl.float32)
    if has_initial:
        current = tl.load(initial)

    position = tl.arange(0, chunk_tokens)
    first_token = (start + segment * segment_tokens).to(tl.int64)
    q_tile = q + first_token * q_token + head * q_head + position[:, None] * q_token + d[None, :]
    k_tile = k + first_token * k_token + head * k_head + position[:, None] * k_token + d[None, :]
    v_tile = (
        v + first_token * v_token + head * v_head + position[:, None] * v_token + columns[None, :]
    )
    output_tile = output + first_token * output_token + head * output_head
    output_tile += position[:, None] * output_token + columns[None, :]
    slope = tl.load(slopes + head)
    since_start = tl.exp(-slope * (position + 1))
    # formed under the mask: split into exp(-s i) exp(s j) it overflows float32
    distance = position[:, None] - position[None, :]
    decay = tl.where(distance >= 0, tl.exp(-slope * tl.maximum(distance, 0)), 0.0)
    for offset in range(0, tl.minimum(remaining, segment_tokens), chunk_tokens):
        size = tl.minimum(remaining - offset, chunk_tokens)
        is_token = position < size
        q_c = tl.load(q_tile + offset * q_token, mask=is_token[:, None], other=0.0)
        k_c = tl.load(k_tile + offset * k_token, mask=is_token[:, None], other=0.0)
        v_c = tl.load(v_tile + offset * v_token, mask=is_token[:, None], other=0.0)
        out = _dot_float32(q_c, current, precision) * since_start[:, None]
        scores = tl.dot(q_c, tl.trans(k_c), input_precision=precision) * decay
        out += tl.dot(scores.to(v_c.dtype), v_c, input_precision=precision)
        tl.store(
            output_tile + offset * output_token,
            (scale * out).to(output.dtype.element_ty),
            mask=is_token[:, None],
        )
        # rows past the end hold zero values; the exponent must not grow there
        to_end = tl.exp(-slope * tl.maximum(size - 1 - position, 0))
        written = _dot_float32(tl.trans(k_c), v_c.to(tl.float32) * to_end[:, None], precision)
        current = tl.exp(-slope * size) * current + written
    if remaining <= segment_tokens:
        tl.store(state + final_slot * state_slot + state_tile, current)
