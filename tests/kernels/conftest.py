"""Triton kernels run on the GPU when there is one; elsewhere Triton interprets them."""

from __future__ import annotations

import pytest
import torch
import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# set here, not in the environment: it is read when a kernel module is imported, and other processes that the
# tests start must not inherit it
triton.knobs.runtime.interpret = DEVICE == "cpu"


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors of Triton kernels live."""
    return DEVICE
