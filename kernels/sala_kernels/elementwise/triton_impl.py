"""The elementwise operations in Triton; :mod:`sala_kernels.elementwise.op` documents them.

All are limited by bandwidth: a program holds a whole row in registers and reads and writes it once. Products
and sums are never contracted to fused multiply-adds (``enable_fp_fusion``), which would skip a rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS_PER_PROGRAM = 32
"""Heads of q and k that a program of norm_rope takes: 8 KiB of a token at the released shape.

64 are 3 % faster in a prompt, but 2 us slower for one token: 1 % of a decode step of 24 layers.
"""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Implement :func:`sala_kernels.elementwise.op.rms_norm`."""
    tokens, width = x.shape
    normed = _empty(x)
    block, num_warps = _row_shape(width)
    _rms_norm_kernel[(tokens,)](
        x,
        weight,
        normed,
        x.stride(0),
        eps,
        width=width,
        block=block,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return normed


def add_rms_norm(
    hidden: Tensor, branch: Tensor, scale: float, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Implement :func:`sala_kernels.elementwise.op.add_rms_norm`."""
    tokens, width = hidden.shape
    total, normed = _empty(hidden), _empty(hidden)
    block, num_warps = _row_shape(width)
    _add_rms_norm_kernel[(tokens,)](
        hidden,
        branch,
        weight,
        total,
        normed,
        hidden.stride(0),
        branch.stride(0),
        scale,
        eps,
        width=width,
        block=block,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return total, normed


def norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> None:
    """Implement :func:`sala_kernels.elementwise.op.norm_rope`."""
    (tokens, width), (dim,) = qkv.shape, q_weight.shape
    heads = width // (3 * dim)
    block_heads = min(triton.next_power_of_2(2 * heads), HEADS_PER_PROGRAM)
    _norm_rope_kernel[(tokens, triton.cdiv(2 * heads, block_heads))](
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        qkv.stride(0),
        eps,
        heads=heads,
        dim=dim,
        block_heads=block_heads,
        block_half=triton.next_power_of_2(dim // 2),
        num_warps=8,
        enable_fp_fusion=False,
    )


def mean_square(x: Tensor) -> Tensor:
    """Implement :func:`sala_kernels.elementwise.op.mean_square`."""
    tokens, width = x.shape
    mean = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block, num_warps = _row_shape(width)
    _mean_square_kernel[(tokens,)](
        x, mean, x.stride(0), width=width, block=block, num_warps=num_warps, enable_fp_fusion=False
    )
    return mean


def norm_gate(
    x: Tensor, weight: Tensor, gate: Tensor, eps: float, mean_square: Tensor | None = None
) -> Tensor:
    """Implement :func:`sala_kernels.elementwise.op.norm_gate`."""
    tokens, width = x.shape
    gated = _empty(x)
    block, num_warps = _row_shape(width)
    _norm_gate_kernel[(tokens,)](
        x,
        weight,
        gate,
        mean_square,
        gated,
        x.stride(0),
        gate.stride(0),
        eps,
        width=width,
        block=block,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return gated


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Implement :func:`sala_kernels.elementwise.op.sigmoid_gate`."""
    tokens, width = x.shape
    gated = _empty(x)
    block, num_warps = _row_shape(width)
    _sigmoid_gate_kernel[(tokens,)](
        x,
        gate,
        gated,
        x.stride(0),
        gate.stride(0),
        width=width,
        block=block,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return gated


def _empty(x: Tensor) -> Tensor:
    """Allocate a contiguous result; ``x`` may be a slice."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _row_shape(width: int) -> tuple[int, int]:
    """Return the padded width and the warps of a program that holds one row, 16 elements a thread."""
    block = triton.next_power_of_2(width)
    return block, max(1, min(block // 512, 16))


@triton.jit
def _mean_square(wide, width: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(wide * wide) / width


@triton.jit
def _scale(x, mean, weight, eps):  # type: ignore[no-untyped-def]
    """Divide by the root mean square, round, and only then multiply by the weight."""
    normed = (x.to(tl.float32) * tl.rsqrt(mean + eps)).to(x.dtype)
    return (weight.to(tl.float32) * normed.to(tl.float32)).to(x.dtype)


@triton.jit
def _gate(x, gate):  # type: ignore[no-untyped-def]
    """Multiply by the rounded sigmoid."""
    opened = tl.sigmoid(gate.to(tl.float32)).to(x.dtype)
    return (x.to(tl.float32) * opened.to(tl.float32)).to(x.dtype)


@triton.jit
def _load_either(q_ptr, k_ptr, is_q, mask):  # type: ignore[no-untyped-def]
    return tl.where(is_q, tl.load(q_ptr, mask=mask, other=0), tl.load(k_ptr, mask=mask, other=0))


@triton.jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, normed_ptr, x_stride, eps, width: tl.constexpr, block: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    mask = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0)
    weight = tl.load(weight_ptr + column, mask=mask, other=0)
    normed = _scale(x, _mean_square(x.to(tl.float32), width), weight, eps)
    tl.store(normed_ptr + row * width + column, normed, mask=mask)


@triton.jit
def _add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,
    branch_ptr,
    weight_ptr,
    total_ptr,
    normed_ptr,
    hidden_stride,
    branch_stride,
    scale,
    eps,
    width: tl.constexpr,
    block: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    mask = column < width
    hidden = tl.load(hidden_ptr + row * hidden_stride + column, mask=mask, other=0)
    branch = tl.load(branch_ptr + row * branch_stride + column, mask=mask, other=0)
    weight = tl.load(weight_ptr + column, mask=mask, other=0)
    scaled = (branch.to(tl.float32) * scale).to(hidden.dtype)
    total = (hidden.to(tl.float32) + scaled.to(tl.float32)).to(hidden.dtype)
    tl.store(total_ptr + row * width + column, total, mask=mask)
    normed = _scale(total, _mean_square(total.to(tl.float32), width), weight, eps)
    tl.store(normed_ptr + row * width + column, normed, mask=mask)


@triton.jit
def _norm_rope_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    qkv_stride,
    eps,
    heads: tl.constexpr,
    dim: tl.constexpr,
    block_heads: tl.constexpr,
    block_half: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = dim // 2
    # the heads of k follow those of q
    head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)[:, None]
    column = tl.arange(0, block_half)[None, :]
    in_half = column < half
    mask = (head < 2 * heads) & in_half
    first_ptr = qkv_ptr + token * qkv_stride + head * dim + column
    first = tl.load(first_ptr, mask=mask, other=0)
    second = tl.load(first_ptr + half, mask=mask, other=0)
    cos = tl.load(cos_ptr + token * half + column, mask=in_half, other=0)
    sin = tl.load(sin_ptr + token * half + column, mask=in_half, other=0)
    is_q = head < heads
    first_weight = _load_either(q_weight_ptr + column, k_weight_ptr + column, is_q, in_half)
    column += half
    second_weight = _load_either(q_weight_ptr + column, k_weight_ptr + column, is_q, in_half)

    first_wide, second_wide = first.to(tl.float32), second.to(tl.float32)
    squares = first_wide * first_wide + second_wide * second_wide
    mean = tl.sum(squares, axis=1, keep_dims=True) / dim
    first_wide = _scale(first, mean, first_weight, eps).to(tl.float32)
    second_wide = _scale(second, mean, second_weight, eps).to(tl.float32)
    turned = first_wide * cos - second_wide * sin
    tl.store(first_ptr, turned.to(first.dtype), mask=mask)
    turned = second_wide * cos + first_wide * sin
    tl.store(first_ptr + half, turned.to(first.dtype), mask=mask)


@triton.jit
def _mean_square_kernel(  # type: ignore[no-untyped-def]
    x_ptr, mean_ptr, x_stride, width: tl.constexpr, block: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < width, other=0)
    tl.store(mean_ptr + row, _mean_square(x.to(tl.float32), width))


@triton.jit
def _norm_gate_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    gate_ptr,
    mean_ptr,
    gated_ptr,
    x_stride,
    gate_stride,
    eps,
    width: tl.constexpr,
    block: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    mask = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0)
    weight = tl.load(weight_ptr + column, mask=mask, other=0)
    if mean_ptr is None:
        mean = _mean_square(x.to(tl.float32), width)
    else:
        mean = tl.load(mean_ptr + row)
    gated = _gate(_scale(x, mean, weight, eps), gate)
    tl.store(gated_ptr + row * width + column, gated, mask=mask)


@triton.jit
def _sigmoid_gate_kernel(  # type: ignore[no-untyped-def]
    x_ptr, gate_ptr, gated_ptr, x_stride, gate_stride, width: tl.constexpr, block: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    mask = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0)
    tl.store(gated_ptr + row * width + column, _gate(x, gate), mask=mask)
