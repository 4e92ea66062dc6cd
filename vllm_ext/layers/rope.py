"""Angles of the rotary position embedding of the lightning layers."""

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
        # on the CPU whatever the device: a power that is off by one unit turns the millionth token by 0.1
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
        inv_freq = (1.0 / theta**exponent).to(torch.get_default_device())
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [tokens, dim / 2] float32, of positions [tokens] int64."""
        angle = positions.float()[:, None] * self.inv_freq
        return angle.cos(), angle.sin()
