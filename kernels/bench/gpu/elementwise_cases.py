"""The operations between the matrix products: each is one pass, so its traffic is its time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from gpu.operators import BOUND, Call, Case, Shapes
from sala_kernels.elementwise import op as ours
from sala_kernels.elementwise import torch_impl as unfused
from sala_kernels.testing import relative_rms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

EPS = 1e-6
NAMES = ("rms_norm", "add_rms_norm", "norm_rope", "norm_gate", "sigmoid_gate")
FLOPS_PER_ELEMENT = 8
"""About what a norm or a sigmoid takes; never the limit."""


def elementwise_cases(shapes: Shapes, tokens: int) -> Iterator[Case]:
    """Every operation on ``tokens`` rows of the model's width, against PyTorch's own operations."""
    spec = shapes.spec
    heads, dim = spec.lightning_num_heads, spec.lightning_head_dim
    width = heads * dim
    element_bytes = shapes.dtype.itemsize
    weight = 1 + 0.1 * shapes.randn(width)
    copies = shapes.num_copies(2 * tokens * width * element_bytes)
    rows = [tuple(shapes.randn(tokens, width) for _ in range(2)) for _ in range(copies)]
    projections = [shapes.randn(tokens, 3 * width) for _ in range(copies)]
    angles = torch.rand(tokens, dim // 2, device=shapes.device)
    cos, sin = angles.cos(), angles.sin()
    # name -> arguments of each input set, and how many elements the operation moves a row
    operations: dict[str, tuple[list[tuple[object, ...]], int]] = {
        "rms_norm": ([(x, weight, EPS) for x, _ in rows], 2 * width),
        "add_rms_norm": (
            [(x, y, spec.residual_scale, weight, EPS) for x, y in rows],
            4 * width,
        ),
        "norm_rope": (
            [(qkv, weight[:dim], weight[:dim], cos, sin, EPS) for qkv in projections],
            4 * width,
        ),
        "norm_gate": ([(x, weight, y, EPS) for x, y in rows], 3 * width),
        "sigmoid_gate": ([(x, y) for x, y in rows], 3 * width),
    }
    for name, (inputs, moved) in operations.items():
        yield Case(
            name,
            "elementwise",
            {"new_tokens": tokens, "width": width},
            _calls(ours, name, inputs),
            tokens * moved * element_bytes,
            tokens * moved * FLOPS_PER_ELEMENT,
            partial(_gate, shapes, name, inputs[0]),
            rivals={"PyTorch, unfused": _calls(unfused, name, inputs)},
        )


def _calls(module: object, name: str, inputs: list[tuple[object, ...]]) -> list[Call]:
    return [partial(getattr(module, name), *arguments) for arguments in inputs]


def _gate(shapes: Shapes, name: str, arguments: tuple[object, ...]) -> tuple[float, float]:
    results: list[Tensor] = []
    for module in (ours, unfused):
        copied = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        output = getattr(module, name)(*copied)
        first = copied[0] if output is None else output[-1] if isinstance(output, tuple) else output
        assert isinstance(first, torch.Tensor)
        results.append(first)
    return relative_rms(*results), BOUND[shapes.dtype]
