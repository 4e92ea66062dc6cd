"""Quantised checkpoints give the logits of the same weights written out, but for the engine's bfloat16."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

# fixtures in conftest.py; their classes are not importable from here
Engine = Oracle = Any

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
LEFT_OUT = ("o_gate", "z_proj")


def round_to_4_bits(weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight [out, in] in groups of inputs to values 0..15: (values, zeros, scales), transposed."""
    groups = weight.T.unflatten(0, (-1, GROUP))  # [groups, group, out]
    low, high = groups.amin(1), groups.amax(1)
    if symmetric:
        zeros = torch.full_like(low, 8)
        scales = torch.maximum(-low / 8, high / 7)
    else:
        scales = (high.clamp(min=0) - low.clamp(max=0)) / 15
        zeros = (-low.clamp(max=0) / scales).round()
    scales = scales.bfloat16().float()
    values = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return values.flatten(0, 1).int(), zeros.int(), scales


def pack(values: Tensor, dim: int, order: list[int]) -> Tensor:
    """Pack eight 4-bit values along ``dim`` into an int32, ``order[i]`` in nibble i."""
    eights = values.movedim(dim, -1).unflatten(-1, (-1, 8))[..., order].long()
    packed = (eights << torch.arange(0, 32, 4)).sum(-1)
    return (
        torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
        .int()
        .movedim(-1, dim)
        .contiguous()
    )


def gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return a projection's tensors as GPTQ stores them, and the weight they stand for."""
    values, zeros, scales = round_to_4_bits(weight, symmetric=True)
    in_order = list(range(8))
    tensors = {
        "qweight": pack(values, 0, in_order),
        "qzeros": pack(zeros - 1, 1, in_order),
        "scales": scales.bfloat16(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return tensors, written_out(values, zeros, scales)


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The same for AWQ."""
    values, zeros, scales = round_to_4_bits(weight, symmetric=False)
    tensors = {
        "qweight": pack(values, 1, AWQ_ORDER),
        "qzeros": pack(zeros, 1, AWQ_ORDER),
        "scales": scales.bfloat16(),
    }
    return tensors, written_out(values, zeros, scales)


def compressed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The same for compressed-tensors."""
    values, zeros, scales = round_to_4_bits(weight, symmetric=True)
    tensors = {
        "weight_packed": pack(values.T, 1, list(range(8))),
        "weight_scale": scales.T.bfloat16().contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, written_out(values, zeros, scales)


def written_out(values: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    zeros, scales = (x.repeat_interleave(GROUP, 0) for x in (zeros, scales))
    return ((values - zeros) * scales).T.contiguous()


FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    ),
    "awq": (
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "modules_to_not_convert": list(LEFT_OUT),
        },
    ),
    "compressed-tensors": (
        compressed,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head", *(f"re:.*{name}" for name in LEFT_OUT)],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": GROUP,
                    },
                }
            },
        },
    ),
}


@pytest.fixture(params=FORMATS)
def quantised(
    request: pytest.FixtureRequest, oracle: Oracle, config: dict[str, Any], tmp_path: Path
) -> tuple[Path, Oracle]:
    """A checkpoint, and the model with its weights written out; gates stay as they are, as published."""
    quantise, fields = FORMATS[request.param]
    model = copy.deepcopy(oracle.model)
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            module = name.removesuffix(".weight")
            if module.endswith("_proj") and not module.endswith(LEFT_OUT):
                packed, rounded = quantise(weight)
                tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in packed.items()}
                weight.copy_(rounded)
            else:
                tensors[name] = weight
    folder = tmp_path / "quantised"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))
    save_file(tensors, folder / "model.safetensors")
    return folder, type(oracle)(model)


def test_log_probabilities(engine: Engine, oracle: Oracle, quantised: tuple[Path, Oracle]) -> None:
    path, rounded = quantised
    if not torch.cpu._is_avx512_supported():
        with pytest.raises(AssertionError, match="needs a GPU or a CPU with AVX-512"):
            engine.generate([[3]], model=str(path), dtype="bfloat16")
        pytest.skip("vLLM's operators for 4-bit weights need AVX-512; refused, as it should be")
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 499, (900,), generator=generator).tolist()
    run = engine.generate(
        [prompt], model=str(path), max_tokens=1, prompt_logprobs=True, dtype="bfloat16"
    )
    exact = rounded.log_probability(prompt)
    plain = type(oracle)(copy.deepcopy(rounded.model).bfloat16()).log_probability(prompt)

    def error(log_probability: Tensor) -> float:
        return (log_probability - exact).square().mean().item()

    # about 0.007, root mean square, where the weights before rounding are 0.06 away
    assert error(torch.tensor(run.batches[0][0]["prompt_logprobs"])) < 1.5 * error(plain)
    assert error(oracle.log_probability(prompt)) > 30 * error(plain)
