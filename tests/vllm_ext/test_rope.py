from __future__ import annotations

import pytest
import torch

from vllm_ext.layers.rope import RotaryAngles


@pytest.mark.parametrize("position", [0, 1, 4095, 524_288, 2_000_000])
def test_angles_at_any_position(position: int) -> None:
    cos, sin = RotaryAngles(32, 10000.0)(torch.tensor([position, 7]))
    assert cos.dtype == sin.dtype == torch.float32
    # the angle itself is float32, as in the released table
    frequency = 1.0 / 10000.0 ** (torch.arange(0, 32, 2, dtype=torch.float32) / 32)
    angle = (torch.tensor(float(position)) * frequency).double()
    torch.testing.assert_close(cos[0].double(), angle.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[0].double(), angle.sin(), rtol=0, atol=1e-6)


def test_frequencies_are_made_on_the_cpu_and_kept_where_the_model_is() -> None:
    with torch.device("meta"):
        assert RotaryAngles(32, 10000.0).inv_freq.device.type == "meta"
