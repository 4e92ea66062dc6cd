"""Argument checks shared by the ops: what was expected, what came, and of which tensor."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

_MODULE_OF_DEVICE = {"cpu": "torch_impl", "cuda": "triton_impl"}


def expect_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Check a tensor's shape.

    Raises:
        ValueError: the shape is not ``expected``.
    """
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")


def expect_dtype(name: str, tensor: Tensor, *expected: torch.dtype) -> None:
    """Check a tensor's dtype.

    Raises:
        ValueError: the dtype is none of ``expected``.
    """
    if tensor.dtype not in expected:
        allowed = " or ".join(str(dtype) for dtype in expected)
        raise ValueError(f"{name}: expected {allowed}, got {tensor.dtype}")


def expect_head_dim(dim: int) -> None:
    """Check that the Triton kernels have a head's width.

    Raises:
        ValueError: it is not a power of two from 16 to 256.
    """
    if dim not in (16, 32, 64, 128, 256):
        raise ValueError(f"head_dim: expected a power of two from 16 to 256, got {dim}")


def implementation(package: str, op: str, tensor: Tensor) -> Callable[..., Any]:
    """Return what computes an operator on a tensor's device.

    Args:
        package: folder of the operator, as ``__package__`` in its op.py.
        op: the operator.
        tensor: any of its inputs.

    Raises:
        NotImplementedError: neither on the CPU nor on a CUDA GPU; nothing is computed somewhere else instead.
    """
    module = _MODULE_OF_DEVICE.get(tensor.device.type)
    if module is None:
        raise NotImplementedError(f"{op}: expected tensors on cpu or cuda, got {tensor.device}")
    # imported when needed: hosts without a GPU may lack Triton
    return getattr(import_module(f"{package}.{module}"), op)
