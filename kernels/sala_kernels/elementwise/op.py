"""Interface of the operations between the matrix products, with the released model's rounding.

The released model rounds to its own dtype after every step but inside a norm's division, a rotation and a
sigmoid. Each function here rounds at those places and nowhere else, so that fusing does not change a value.
Source: the released MiniCPM-SALA modelling code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sala_kernels.checks import expect_dtype, expect_shape, implementation


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute ``weight * round(x / sqrt(mean(x²) + eps))``.

    Moves ``2 tokens width`` elements.

    Args:
        x: [tokens, width], any float dtype, last axis contiguous (so for all inputs here).
        weight: [width] in the dtype of ``x``.
        eps: added to the mean square.

    Returns:
        [tokens, width] in the dtype of ``x``.

    Raises:
        ValueError: a shape or dtype is not the above.
        NotImplementedError: on neither the CPU nor a CUDA device.
    """
    _check_rows(x, weight)
    return implementation(__package__, "rms_norm", x)(x, weight, eps)


def add_rms_norm(
    hidden: Tensor, branch: Tensor, scale: float, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add ``round(scale * branch)`` to the residual stream and normalise the sum, which is rounded first.

    Moves ``4 tokens width`` elements.

    Args:
        hidden: [tokens, width], any float dtype.
        branch: as ``hidden``.
        scale: factor on the branch.
        weight: [width] in the same dtype.
        eps: added to the mean square.

    Returns:
        The sum and the normalised sum, each as ``hidden``.

    Raises:
        ValueError: a shape or dtype is not the above.
        NotImplementedError: on neither the CPU nor a CUDA device.
    """
    _check_rows(hidden, weight, branch=branch)
    run = implementation(__package__, "add_rms_norm", hidden)
    return run(hidden, branch, scale, weight, eps)


def norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> None:
    """Normalise and rotate each head of q and k, in place; v stays as it is.

    The norm is that of :func:`rms_norm`; the rotation pairs i with i + dim / 2, in float32, and is rounded once.
    Moves ``4 tokens heads dim`` elements and the angles.

    Args:
        qkv: [tokens, 3 * heads * dim], any float dtype: all of q, then k, then v; updated in place.
        q_weight: [dim] in the same dtype.
        k_weight: as ``q_weight``.
        cos: [tokens, dim / 2] float32, contiguous.
        sin: as ``cos``.
        eps: added to the mean square.

    Raises:
        ValueError: a shape or dtype is not the above.
        NotImplementedError: on neither the CPU nor a CUDA device.
    """
    (tokens, width), (dim,) = qkv.shape, q_weight.shape
    if dim % 2 or width % (3 * dim):
        raise ValueError(f"qkv: expected q, k and v of heads of {dim} (even), got width {width}")
    expect_shape("k_weight", k_weight, (dim,))
    expect_dtype("q_weight", q_weight, qkv.dtype)
    expect_dtype("k_weight", k_weight, qkv.dtype)
    for name, angles in (("cos", cos), ("sin", sin)):
        expect_shape(name, angles, (tokens, dim // 2))
        expect_dtype(name, angles, torch.float32)
    implementation(__package__, "norm_rope", qkv)(qkv, q_weight, k_weight, cos, sin, eps)


def mean_square(x: Tensor) -> Tensor:
    """Compute the mean square of each row, for a norm whose width is split over ranks.

    Moves ``tokens width`` elements.

    Args:
        x: [tokens, width], any float dtype.

    Returns:
        [tokens] float32.

    Raises:
        NotImplementedError: on neither the CPU nor a CUDA device.
    """
    return implementation(__package__, "mean_square", x)(x)


def norm_gate(
    x: Tensor, weight: Tensor, gate: Tensor, eps: float, mean_square: Tensor | None = None
) -> Tensor:
    """Compute ``rms_norm(x) * round(sigmoid(gate))``.

    Moves ``3 tokens width`` elements.

    Args:
        x: [tokens, width], any float dtype.
        weight: [width] in the same dtype.
        gate: as ``x``.
        eps: added to the mean square.
        mean_square: [tokens] float32, contiguous, to divide by instead of the row's own: when the norm
            spans more than ``x`` has of its width.

    Returns:
        As ``x``.

    Raises:
        ValueError: a shape or dtype is not the above.
        NotImplementedError: on neither the CPU nor a CUDA device.
    """
    _check_rows(x, weight, gate=gate)
    if mean_square is not None:
        expect_shape("mean_square", mean_square, (x.shape[0],))
        expect_dtype("mean_square", mean_square, torch.float32)
    return implementation(__package__, "norm_gate", x)(x, weight, gate, eps, mean_square)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Compute ``x * round(sigmoid(gate))``.

    Moves ``3 tokens width`` elements.

    Args:
        x: [tokens, width], any float dtype.
        gate: as ``x``.

    Returns:
        As ``x``.

    Raises:
        ValueError: a shape or dtype is not the above.
        NotImplementedError: on neither the CPU nor a CUDA device.
    """
    _check_rows(x, gate=gate)
    return implementation(__package__, "sigmoid_gate", x)(x, gate)


def _check_rows(x: Tensor, weight: Tensor | None = None, **others: Tensor) -> None:
    for name, other in others.items():
        expect_shape(name, other, tuple(x.shape))
        expect_dtype(name, other, x.dtype)
    if weight is not None:
        expect_shape("weight", weight, (x.shape[1],))
        expect_dtype("weight", weight, x.dtype)
