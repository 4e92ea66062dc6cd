"""The two token mixers of SALA; parameter names are the released checkpoint's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sala_kernels.spec import SalaSpec, decay_slopes
from sala_training.model import ops

if TYPE_CHECKING:
    from sala_training.batch import CuSeqlens


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis: float32 inside, rounded before the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., width]."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Apply RoPE with half-split (NeoX) pairs over all dims, in float32.

    Args:
        x: [tokens, heads, dim].
        positions: [tokens] int64.
        theta: base of the geometric frequencies.

    Returns:
        [tokens, heads, dim] in the dtype of ``x``.
    """
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=torch.float32) / half
    # the reciprocal of the power, as released: at large positions the last bit matters
    angle = positions[:, None].float() * (1.0 / theta**exponent)
    return rotate_pairs(x, angle.cos()[:, None], angle.sin()[:, None])


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate half-split (NeoX) pairs over all dims, in float32.

    Args:
        x: [..., heads, dim].
        cos: [..., 1, dim / 2] float32.
        sin: as ``cos``.

    Returns:
        As ``x``.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def lightning_slopes(spec: SalaSpec) -> Tensor:
    """Return the decay rate of each lightning head: [heads] float32, 1/token."""
    return torch.tensor(decay_slopes(spec.lightning_num_heads), dtype=torch.float32, device="cpu")


class LightningMixer(nn.Module):
    """Linear attention with constant decay: QK-norm, RoPE, recurrence, output norm, then gate."""

    slopes: Tensor

    def __init__(self, spec: SalaSpec) -> None:
        super().__init__()
        self.num_heads, self.head_dim = spec.lightning_num_heads, spec.lightning_head_dim
        self.scale, self.rope_theta = spec.lightning_scale, spec.rope_theta
        width = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, width, bias=False)
        self.z_proj = nn.Linear(spec.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, spec.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, spec.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, spec.rms_norm_eps)
        self.o_norm = RMSNorm(width, spec.rms_norm_eps)
        self.register_buffer("slopes", lightning_slopes(spec), persistent=False)

    def forward(self, x: Tensor, cu_seqlens: CuSeqlens) -> Tensor:
        """Mix the tokens of each document, from a zero state: [tokens, hidden] -> [tokens, hidden]."""
        shape = (*x.shape[:-1], self.num_heads, self.head_dim)
        positions = cu_seqlens.positions
        q = rotate(self.q_norm(self.q_proj(x).view(shape)), positions, self.rope_theta)
        k = rotate(self.k_norm(self.k_proj(x).view(shape)), positions, self.rope_theta)
        v = self.v_proj(x).view(shape)
        # the recurrence is float32 whatever the surrounding precision, as released
        with torch.autocast(x.device.type, enabled=False):
            mixed = ops.lightning(q, k, v, self.slopes, self.scale, cu_seqlens)
        mixed = self.o_norm(mixed.flatten(-2).to(v.dtype))
        return self.o_proj(mixed * torch.sigmoid(self.z_proj(x)))


class SparseMixer(nn.Module):
    """InfLLM-V2 attention: no RoPE, no QK-norm; dense below ``dense_len``, selected blocks after."""

    def __init__(self, spec: SalaSpec) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = spec.num_heads, spec.num_kv_heads
        self.head_dim, self.sparse = spec.head_dim, spec.sparse
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, spec.hidden_size, bias=False)
        self.o_gate = nn.Linear(spec.hidden_size, width, bias=False)

    def forward(self, x: Tensor, cu_seqlens: CuSeqlens, dense: bool = False) -> Tensor:
        """Mix the tokens of each document: [tokens, hidden] -> [tokens, hidden].

        Args:
            x: [tokens, hidden], documents packed.
            cu_seqlens: where the documents begin and end.
            dense: attend everything whatever the position (the training stages before sparsity).
        """
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        mixed = ops.attend(q, k, v, None if dense else self.sparse, cu_seqlens)
        return self.o_proj(mixed.flatten(-2) * torch.sigmoid(self.o_gate(x)))
