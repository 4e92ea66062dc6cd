"""Loss by position: whether a model makes use of, or is harmed by, what lies further back than it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sala_training.eval import intervals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from sala_training.eval.scorer import Scorer

FIRST_EDGE_TOKENS = 64


@dataclass(frozen=True)
class Bin:
    """Mean loss of the positions in [start, end)."""

    start: int
    end: int
    nats: float
    low: float
    high: float
    """95 % interval over documents."""


def edges(length_tokens: int) -> list[int]:
    """Return 0, 64, 128, 256 ... up to ``length_tokens``, which ends the last bin."""
    marks = [0]
    mark = FIRST_EDGE_TOKENS
    while mark < length_tokens:
        marks.append(mark)
        mark *= 2
    return [*marks, length_tokens]


def loss_by_position(
    score: Scorer, documents: Sequence[NDArray[np.int64]], length_tokens: int
) -> list[Bin]:
    """Average the loss in geometric bins of position.

    Only documents of at least ``length_tokens`` predicted tokens count, cut there: every bin is of the
    same texts, so that bins can be compared.

    Args:
        score: the model.
        documents: [tokens + 1] int64 each, the first token only read.
        length_tokens: end of the last bin.

    Raises:
        ValueError: no document is long enough.
    """
    long_enough = [d[: length_tokens + 1] for d in documents if len(d) > length_tokens]
    if not long_enough:
        longest = max((len(d) for d in documents), default=0)
        raise ValueError(
            f"expected a document of {length_tokens + 1} tokens, the longest has {longest}"
        )
    losses = np.stack([-score(document).log_probs for document in long_enough])
    marks = edges(length_tokens)
    bins = []
    for start, end in zip(marks[:-1], marks[1:], strict=True):
        means = losses[:, start:end].mean(1)
        bins.append(Bin(start, end, float(means.mean()), *intervals.mean(means.tolist())))
    return bins
