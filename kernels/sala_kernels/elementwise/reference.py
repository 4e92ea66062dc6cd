"""The elementwise operations one released step at a time: float64 inside a step, rounded where the model rounds.

``rounded`` is the only thing that ties them to a dtype: it maps float64 to the nearest value of the model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    Rounding = Callable[[Tensor], Tensor]


def to_dtype(dtype: torch.dtype) -> Rounding:
    """Return the rounding of float64 values to ``dtype`` and back."""
    return lambda x: x.to(dtype).double()


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, rounded: Rounding, mean_square: Tensor | None = None
) -> Tensor:
    """Normalise the last axis of x [..., width] by its own mean square, or by one that is given [...]."""
    if mean_square is None:
        mean_square = (x * x).mean(-1)
    return rounded(weight * rounded(x / (mean_square + eps).sqrt()[..., None]))


def add(hidden: Tensor, branch: Tensor, scale: float, rounded: Rounding) -> Tensor:
    """Add a scaled branch to the residual stream; the scale itself is float32."""
    return rounded(hidden + rounded(branch * float(torch.tensor(scale))))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rounded: Rounding) -> Tensor:
    """Rotate x [tokens, heads, dim] by angles [tokens, dim / 2]: numbers i and i + dim / 2 are one complex number."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[:, None]
    return rounded(torch.cat((turned.real, turned.imag), dim=-1))


def gate(x: Tensor, gate: Tensor, rounded: Rounding) -> Tensor:
    """Multiply by a rounded sigmoid."""
    return rounded(x * rounded(1 / (1 + torch.exp(-gate))))
