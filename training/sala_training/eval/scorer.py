"""A model as the evaluations see it: the log-probability of every token of a sequence, and whether it was likeliest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Predictions:
    """Of the tokens after the first."""

    log_probs: NDArray[np.float64]
    """[length] natural logarithms."""
    is_right: NDArray[np.bool_]
    """[length]; whether greedy decoding would have chosen the token."""


Scorer = Callable[[NDArray[np.int64]], Predictions]
"""[length + 1] int64 -> predictions of each token after the first, given those before it."""
