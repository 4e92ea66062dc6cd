"""Argument checks shared by the ops: what was expected, what came, and of which tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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


def require_cpu(op: str, tensor: Tensor) -> None:
    """Refuse a device without an implementation, rather than compute somewhere else.

    Raises:
        NotImplementedError: ``tensor`` is not on the CPU.
    """
    if tensor.device.type != "cpu":
        raise NotImplementedError(
            f"{op} runs on the CPU only, got a tensor on {tensor.device}: its Triton kernel is not there yet"
        )
