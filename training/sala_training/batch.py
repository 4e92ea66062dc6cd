"""What the loop trains on: documents packed into one row of tokens, and where they begin and end."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class CuSeqlens:
    """Where the documents of a packed row begin and end; every mixer asks for it.

    The boundaries are held twice: on the device for kernels, and on the host so that choosing a path
    waits for no device.
    """

    offsets: Tensor
    """[documents + 1] int32, from 0 to the number of tokens; document i is ``offsets[i]:offsets[i + 1]``."""
    positions: Tensor
    """[tokens] int64, 0-based position of each token in its document."""
    lengths: tuple[int, ...]
    """Tokens of each document, all at least 1."""
    equal_length: int | None = field(init=False)
    """The length that all documents share, so that they can be computed as a batch; None if none."""

    def __post_init__(self) -> None:
        lengths = set(self.lengths)
        object.__setattr__(self, "equal_length", lengths.pop() if len(lengths) == 1 else None)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> CuSeqlens:
        """Build from the documents' lengths in tokens.

        Raises:
            ValueError: there is no document, or an empty one.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"expected documents of at least one token, got {list(lengths)}")
        length = lengths[0]
        if all(other == length for other in lengths):
            positions = torch.arange(length, device=device).repeat(len(lengths))
        else:
            positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(offsets, positions, tuple(lengths))

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> CuSeqlens:
        """Return the same boundaries on ``device``."""
        return CuSeqlens(
            self.offsets.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.lengths,
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed documents with what is to be predicted; there is no padding."""

    tokens: Tensor
    """[tokens] int64."""
    targets: Tensor
    """[tokens] int64, the token after each one in its document."""
    weights: Tensor
    """[tokens] float32, weight of each prediction in the loss; 0 = not scored."""
    cu_seqlens: CuSeqlens

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on ``device``."""
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.weights.to(device, non_blocking=True),
            self.cu_seqlens.to(device),
        )

    def pin_memory(self) -> Batch:
        """Return a copy in page-locked memory, for copies that do not wait."""
        cu = self.cu_seqlens
        pinned = CuSeqlens(cu.offsets.pin_memory(), cu.positions.pin_memory(), cu.lengths)
        return Batch(
            self.tokens.pin_memory(), self.targets.pin_memory(), self.weights.pin_memory(), pinned
        )


def pack(documents: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Pack whole documents one after the other.

    Args:
        documents: pairs of tokens [n + 1] int64 and weights [n + 1] float32, where a weight is that of
            predicting the token at the same index; n >= 1. The first token is only read and the last
            one only predicted, so a document takes n places.

    Raises:
        ValueError: a document has fewer than two tokens, or not one weight for each token.
    """
    for tokens, weights in documents:
        if len(tokens) < 2 or tokens.shape != weights.shape:
            raise ValueError(
                "expected documents of at least two tokens with a weight each, "
                f"got {len(tokens)} tokens and {len(weights)} weights"
            )
    return Batch(
        torch.cat([tokens[:-1] for tokens, _ in documents]),
        torch.cat([tokens[1:] for tokens, _ in documents]),
        torch.cat([weights[1:] for _, weights in documents]),
        CuSeqlens.of([len(tokens) - 1 for tokens, _ in documents]),
    )


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Put packed rows one after the other; their documents stay apart."""
    if len(batches) == 1:
        return batches[0]
    return Batch(
        torch.cat([batch.tokens for batch in batches]),
        torch.cat([batch.targets for batch in batches]),
        torch.cat([batch.weights for batch in batches]),
        CuSeqlens.of([n for batch in batches for n in batch.cu_seqlens.lengths]),
    )


@dataclass(frozen=True)
class StepPosition:
    """Which step of a run is asked for; the whole data position of a checkpoint."""

    stage_idx: int
    step: int
    """0-based, over all stages."""
    stage_step: int
    """0-based, within the stage."""


class DataSource(Protocol):
    """Rows of packed documents as a pure function of the position.

    The order of rows is global: it knows nothing of ranks, so that a run may go on with another number
    of them. The loop hands each rank its rows.
    """

    def batch(self, position: StepPosition, rows: range) -> Batch:
        """Return rows ``rows`` of a step, each of the stage's ``length_tokens`` tokens, concatenated.

        Args:
            position: of the step.
            rows: indices into the step's rows, counted over all ranks.
        """
        ...
