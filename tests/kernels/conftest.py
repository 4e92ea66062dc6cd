"""Triton kernels run on the GPU when there is one; elsewhere Triton interprets them."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Triton's own functions (tl.sum) are decorated when it is imported, ours when they are; other processes that
    # the tests start must not inherit it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton
    triton.knobs.runtime.interpret = True
    os.environ.pop("TRITON_INTERPRET")


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors of Triton kernels live."""
    return DEVICE
