from __future__ import annotations

import pytest
import torch

from vllm_ext.layers.rope import RotaryAngles, rotate


@pytest.mark.parametrize("position", [0, 1, 4095, 524_288, 2_000_000])
def test_rotation_matches_complex_numbers_at_any_position(position: int) -> None:
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x, *RotaryAngles(32, 10000.0)(torch.tensor([position])))
    # the angle itself is float32, as in the released table
    frequency = 1.0 / 10000.0 ** (torch.arange(0, 32, 2, dtype=torch.float32) / 32)
    angle = (torch.tensor(float(position)) * frequency).double()
    pairs = torch.complex(x[..., :16].double(), x[..., 16:].double()) * torch.exp(1j * angle)
    expected = torch.cat((pairs.real, pairs.imag), dim=-1)
    torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=1e-5)


def test_rotation_rounds_once() -> None:
    x = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = RotaryAngles(32, 10000.0)(torch.arange(5))
    assert cos.dtype == torch.float32
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())
