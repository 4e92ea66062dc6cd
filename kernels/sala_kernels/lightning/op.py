"""Interface of lightning attention over packed sequences with a state per sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sala_kernels.checks import expect_dtype, expect_shape, require_cpu
from sala_kernels.lightning import torch_impl


@dataclass(frozen=True)
class StateBatch:
    """The sequences of one step and where their states lie."""

    query_start_loc: Tensor
    """[seqs + 1] int32; sequence i is packed tokens query_start_loc[i]:query_start_loc[i + 1]."""
    state_slots: Tensor
    """[seqs, columns] int32; where each sequence's states lie, negative for a padding row. Column 0 receives the
    state after the last new token, except that a decode's new token j writes column j, so that drafts
    can be rejected."""
    has_context: Tensor
    """[seqs] bool; false = the sequence starts here, from a zero state whatever its slot holds."""
    max_query_len: int
    """Bound on the new tokens of one sequence, for launch grids."""
    initial_column: Tensor | None = None
    """[seqs] int32; column that holds the state before the first new token; None = column 0."""
    num_decodes: int = 0
    """Leading sequences with at most ``columns`` new tokens, a state kept after each."""
    num_decode_tokens: int = 0
    """New tokens of those sequences; packed first."""

    def __post_init__(self) -> None:
        num_seqs = self.state_slots.shape[0]
        expect_shape("state_slots", self.state_slots, (num_seqs, self.state_slots.shape[-1]))
        expect_shape("query_start_loc", self.query_start_loc, (num_seqs + 1,))
        expect_shape("has_context", self.has_context, (num_seqs,))
        expect_dtype("query_start_loc", self.query_start_loc, torch.int32)
        expect_dtype("state_slots", self.state_slots, torch.int32)
        expect_dtype("has_context", self.has_context, torch.bool)


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, state: Tensor, batch: StateBatch
) -> Tensor:
    """Compute linear attention with constant decay, continuing each sequence's state.

    Args:
        q: [tokens, heads, dim], any float dtype; sequences packed as ``batch`` says.
        k: as ``q``.
        v: as ``q``.
        slopes: [heads] float32, 1/token, positive.
        scale: factor on the output.
        state: [slots, heads, dim, dim] float32, key-major; updated in place. Slots may have any stride.
        batch: sequences of this step.

    Returns:
        [tokens, heads, dim] in the dtype of ``q``, computed in float32; rows of no sequence are 0.

    Raises:
        ValueError: a shape or dtype is not the above.
        NotImplementedError: not on the CPU.
    """
    tokens, heads, dim = q.shape
    for name, tensor in (("k", k), ("v", v)):
        expect_shape(name, tensor, (tokens, heads, dim))
        expect_dtype(name, tensor, q.dtype)
    expect_shape("slopes", slopes, (heads,))
    expect_shape("state", state, (state.shape[0], heads, dim, dim))
    expect_dtype("slopes", slopes, torch.float32)
    expect_dtype("state", state, torch.float32)
    require_cpu("lightning_attention", q)
    return torch_impl.lightning_attention(q, k, v, slopes, scale, state, batch)
