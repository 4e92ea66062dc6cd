"""How far a score may be off by chance: 95 % intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

_Z = 1.959964  # the standard normal's 97.5 % point
_NUM_RESAMPLES = 2000


def wilson(num_right: int, num: int) -> tuple[float, float]:
    """Return Wilson's interval of a share: never outside [0, 1], and not empty at 0 or at 1.

    Args:
        num_right: successes.
        num: trials, at least 1.
    """
    share = num_right / num
    centre = share + _Z**2 / (2 * num)
    half = _Z * math.sqrt(share * (1 - share) / num + _Z**2 / (4 * num**2))
    scale = 1 + _Z**2 / num
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap interval of a sum over a sum, resampling whole units (documents, windows).

    Tokens of one text are not independent; units are what may be drawn again.

    Args:
        numerators: of each unit, such as its bits.
        denominators: of each unit, such as its bytes.
        seed: of the resampling, so that equal values give equal intervals.

    Raises:
        ValueError: there are no units.
    """
    if not len(numerators):
        raise ValueError("expected at least one unit, got none")
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    drawn = np.random.default_rng(seed).integers(len(above), size=(_NUM_RESAMPLES, len(above)))
    ratios = above[drawn].sum(1) / below[drawn].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def mean(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap interval of a mean over units; see :func:`ratio`."""
    return ratio(values, [1.0] * len(values), seed)
