"""What a stage minimises: an objective turns a model and a batch into sums that add up over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sala_training.batch import Batch


@dataclass
class Terms:
    """Sums over one batch. The step's loss is the sum of ``loss_sum`` over that of ``weight_sum``.

    Sums, not means, so that micro-batches and ranks with unequal numbers of scored tokens add up to
    exactly the loss of the whole batch.
    """

    loss_sum: Tensor
    """[] float32, with gradient."""
    weight_sum: Tensor
    """[] float32."""
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Name in the log -> (numerator, denominator), both [] float32 and detached; 0 / 0 is left out."""
    token_losses: Tensor | None = None
    """[tokens] float32, detached, for the loss by position; None where a token has no loss of its own."""


class Objective(Protocol):
    """Pre-training, alignment, distillation and fine-tuning differ in this alone."""

    def __call__(self, model: nn.Module, batch: Batch, *, sparse: bool) -> Terms:
        """Compute the sums of one micro-batch.

        Args:
            model: the trained one, possibly sharded: only its ``forward`` may be called, and what
                parameters are read must be read inside it.
            batch: on the model's device.
            sparse: whether the stage selects blocks past ``dense_len``.
        """
        ...
