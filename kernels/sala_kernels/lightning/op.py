"""Interface of lightning attention over packed sequences with a state per sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sala_kernels.checks import expect_dtype, expect_shape, implementation


@dataclass(frozen=True)
class StateBatch:
    """The sequences of one step and where their states lie.

    The leading ``num_decodes`` sequences keep the state after each of their new tokens, so that drafts can be
    rejected: new token j writes column j, and the next step starts from the column of the last accepted one. All
    other sequences write the state after their last new token to column 0.
    """

    query_start_loc: Tensor
    """[seqs + 1] int32; sequence i is packed tokens query_start_loc[i]:query_start_loc[i + 1]."""
    state_slots: Tensor
    """[seqs, columns] int32, any strides; where each sequence's states lie. A negative slot in column 0 makes the row
    padding: nothing of it is read or written. Columns of one sequence may share a slot; it keeps the last state."""
    has_context: Tensor
    """[seqs] bool; false = the sequence starts here, from a zero state whatever its slot holds."""
    max_query_len: int
    """Bound on the new tokens of one sequence, for launch grids."""
    initial_column: Tensor | None = None
    """[seqs] int32; column that holds the state before the first new token; None = column 0. Always a column, also
    where there is no state."""
    num_decodes: int = 0
    """Leading sequences with at most ``columns`` new tokens, a state kept after each."""
    num_decode_tokens: int = 0
    """New tokens of those sequences; packed first."""

    def __post_init__(self) -> None:
        num_seqs, columns = self.state_slots.shape[0], self.state_slots.shape[-1]
        expect_shape("state_slots", self.state_slots, (num_seqs, columns))
        expect_shape("query_start_loc", self.query_start_loc, (num_seqs + 1,))
        expect_shape("has_context", self.has_context, (num_seqs,))
        expect_dtype("query_start_loc", self.query_start_loc, torch.int32)
        expect_dtype("state_slots", self.state_slots, torch.int32)
        expect_dtype("has_context", self.has_context, torch.bool)
        if self.initial_column is not None:
            expect_shape("initial_column", self.initial_column, (num_seqs,))
            expect_dtype("initial_column", self.initial_column, torch.int32)
        if not 0 <= self.num_decodes <= num_seqs:
            raise ValueError(f"num_decodes: expected 0 to {num_seqs}, got {self.num_decodes}")
        if not 0 <= self.num_decode_tokens <= self.num_decodes * columns:
            raise ValueError(
                f"num_decode_tokens: expected 0 to {self.num_decodes * columns}, got {self.num_decode_tokens}"
            )


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, state: Tensor, batch: StateBatch
) -> Tensor:
    """Compute linear attention with constant decay, continuing each sequence's state.

    Args:
        q: [tokens, heads, dim], any float dtype; sequences packed as ``batch`` says. The last axis is
            contiguous, the others have any stride: a slice of a packed projection needs no copy. On a GPU:
            bfloat16, float16 or float32 and dim a power of two from 16 to 256.
        k: as ``q``.
        v: as ``q``.
        slopes: [heads] float32, 1/token, positive.
        scale: factor on the output.
        state: [slots, heads, dim, dim] float32, key-major; updated in place. The last two axes are contiguous,
            slots and heads have any stride.
        batch: sequences of this step.

    Returns:
        [tokens, heads, dim] contiguous, in the dtype of ``q``; rows of no sequence are unspecified. Sums
        and states are float32; on a GPU, products of 16-bit inputs are rounded as ``triton_impl`` says.

    Raises:
        ValueError: a shape, dtype or stride is not the above.
        NotImplementedError: neither on the CPU nor on a CUDA device.
    """
    tokens, heads, dim = q.shape
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect_shape(name, tensor, (tokens, heads, dim))
        expect_dtype(name, tensor, q.dtype)
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a contiguous last axis, got strides {tensor.stride()}"
            )
    expect_shape("slopes", slopes, (heads,))
    expect_shape("state", state, (state.shape[0], heads, dim, dim))
    expect_dtype("slopes", slopes, torch.float32)
    expect_dtype("state", state, torch.float32)
    if state.stride()[2:] != (dim, 1):
        raise ValueError(f"state: expected contiguous matrices, got strides {state.stride()}")
    run = implementation(__package__, "lightning_attention", q)
    return run(q, k, v, slopes, scale, state, batch)
