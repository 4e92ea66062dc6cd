"""The elementwise operations in PyTorch; :mod:`sala_kernels.elementwise.op` documents them."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Implement :func:`sala_kernels.elementwise.op.rms_norm`, for any leading axes."""
    wide = x.float()
    return _scale(x, weight, wide.square().mean(-1, keepdim=True), eps)


def add_rms_norm(
    hidden: Tensor, branch: Tensor, scale: float, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Implement :func:`sala_kernels.elementwise.op.add_rms_norm`."""
    hidden = hidden + branch * scale
    return hidden, rms_norm(hidden, weight, eps)


def norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> None:
    """Implement :func:`sala_kernels.elementwise.op.norm_rope`."""
    q, k, _ = (part.unflatten(-1, (-1, len(q_weight))) for part in qkv.chunk(3, dim=-1))
    for heads, weight in ((q, q_weight), (k, k_weight)):
        first, second = rms_norm(heads, weight, eps).float().chunk(2, dim=-1)
        cos_t, sin_t = cos[:, None], sin[:, None]
        rotated = (first * cos_t - second * sin_t, second * cos_t + first * sin_t)
        heads.copy_(torch.cat(rotated, dim=-1))


def mean_square(x: Tensor) -> Tensor:
    """Implement :func:`sala_kernels.elementwise.op.mean_square`."""
    return x.float().square().mean(-1)


def norm_gate(
    x: Tensor, weight: Tensor, gate: Tensor, eps: float, mean_square: Tensor | None = None
) -> Tensor:
    """Implement :func:`sala_kernels.elementwise.op.norm_gate`."""
    if mean_square is None:
        return rms_norm(x, weight, eps) * gate.sigmoid()
    return _scale(x, weight, mean_square[:, None], eps) * gate.sigmoid()


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Implement :func:`sala_kernels.elementwise.op.sigmoid_gate`."""
    return x * gate.sigmoid()


def _scale(x: Tensor, weight: Tensor, mean_square: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square, round, and only then multiply by the weight."""
    return weight * (x.float() * torch.rsqrt(mean_square + eps)).to(x.dtype)
