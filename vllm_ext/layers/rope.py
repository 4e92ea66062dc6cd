"""Rotary position embedding of the lightning layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryAngles(nn.Module):
    """cos and sin of a step's positions, computed once for all layers.

    Computed instead of looked up: a float32 table of a million positions would take 512 MiB, and
    a fixed one would bound the context. The values are those of the released table.
    """

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        self.register_buffer("inv_freq", 1.0 / theta**exponent, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [tokens, 1, dim / 2] float32, of positions [tokens] int64."""
        angle = positions.float()[:, None, None] * self.inv_freq
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [tokens, heads, dim], pairing i with i + dim / 2; float32 inside, x's dtype outside."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
