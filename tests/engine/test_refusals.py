"""What the engine cannot do, it says before or while it starts."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

EXPECTED = {
    "fp8_cache": "kv_cache_dtype: expected 'auto' (torch.float32), got 'fp8': block selection",
    "three_ranks": "tensor_parallel_size: expected a divisor of 8 query heads, got 3",
    "ranks_between_kv_heads": "expected a divisor or a multiple of 3 KV heads, got 4",
    "pipeline": "Pipeline parallelism is not supported for this model",
    "draft_model": "speculative_config: expected method 'ngram' or 'ngram_gpu', got 'draft_model'",
    "drafts_beside_cached_prefixes": "speculative_config: expected no prefix caching beside drafts on a CPU",
    "too_long": "max_model_len (5000) is greater than the derived max_model_len",
    "too_little_memory": "Try increasing `gpu_memory_utilization`",
    "longer_than_memory": "the estimated maximum model length is",
    "unknown_mixer": "mixer_types: supported are ['minicpm4', 'lightning-attn'], got ['mamba2']",
    "missing_field": "scale_emb: missing from config.json",
    "wrong_override": "always_sparse: expected true or false, got 'yes'",
    "missing_weights": "missing model.norm.weight; missing model.layers.3.self_attn.o_gate.weight",
    "unexpected_weight": "unexpected model.layers.3.self_attn.q_norm.weight",
    "unknown_quantisation": "or none, got 'int8_per_channel_weight_only'",
    "fp8_weights": "quantization: 'fp8' needs a GPU",
    "float16_states": "mamba_ssm_cache_dtype: expected 'auto' or 'float32', got 'float16'",
    "pooling": "runner: expected 'generate', got 'pooling'",
    "odd_mlp": "tensor_parallel_size: expected a divisor of 255 MLP channels, got 2",
    "adapters": "does not support LoRA",
    "misspelt": "Model architectures ['MiniCPMSalaForCausalLM'] are not supported",
    "stretched_rotation": "rope_parameters: only the default type is supported",
    "integer_weight": "model.layers.0.mlp.up_proj.weight: expected a float dtype, got torch.int8",
    "wrong_shape": "model.layers.1.self_attn.o_norm.weight: expected shape (256,), got (32,)",
}


@pytest.fixture(scope="module")
def errors(
    config: dict[str, Any],
    model: torch.nn.Module,
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    engine_environment: dict[str, str],
    run_job: Any,
) -> dict[str, str | None]:
    """The error of each attempt to start, in one process."""
    folder = tmp_path_factory.mktemp("refusals")

    def arguments(path: Path = checkpoint, **more: Any) -> dict[str, Any]:
        memory_bytes = 64 << 20
        common = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": memory_bytes}
        return {"model": str(path), **common, **more}

    def variant(name: str, edit_config: Any = None, edit_weights: Any = None) -> Path:
        fields, weights = copy.deepcopy(config), dict(model.state_dict())
        if edit_config:
            edit_config(fields)
        if edit_weights:
            edit_weights(weights)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(fields))
        save_file(weights, folder / name / "model.safetensors")
        return folder / name

    def drop_two(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.norm.weight"], weights["model.layers.3.self_attn.o_gate.weight"]

    def add_norm(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.3.self_attn.q_norm.weight"] = torch.ones(32)

    def shrink_norm(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.self_attn.o_norm.weight"] = torch.ones(32)

    def quantise(weights: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        weights[name] = weights[name].to(torch.int8)

    def with_fields(name: str, **fields: Any) -> Path:
        return variant(name, lambda config: config.update(fields))

    def rename_mixer(fields: dict[str, Any]) -> None:
        fields["mixer_types"][1] = "mamba2"

    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    draft_model = {
        "method": "draft_model",
        "model": str(checkpoint),
        "num_speculative_tokens": 2,
    }
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    misspelt = ["MiniCPMSalaForCausalLM"]
    jobs = {
        "fp8_cache": arguments(kv_cache_dtype="fp8"),
        "three_ranks": arguments(tensor_parallel_size=3),
        "ranks_between_kv_heads": arguments(
            with_fields("three_kv_heads", num_attention_heads=12, num_key_value_heads=3),
            tensor_parallel_size=4,
        ),
        "pipeline": arguments(pipeline_parallel_size=2),
        "draft_model": arguments(speculative_config=draft_model),
        "drafts_beside_cached_prefixes": arguments(speculative_config=drafts),
        "too_long": arguments(max_model_len=5000),
        "too_little_memory": arguments(max_model_len=4096, kv_cache_memory_bytes=1 << 20),
        "longer_than_memory": arguments(max_model_len=4096, kv_cache_memory_bytes=5 << 20),
        "unknown_mixer": arguments(variant("unknown_mixer", edit_config=rename_mixer)),
        "missing_field": arguments(
            variant("missing_field", lambda fields: fields.pop("scale_emb"))
        ),
        "wrong_override": arguments(hf_overrides={"always_sparse": "yes"}),
        "missing_weights": arguments(variant("missing_weights", edit_weights=drop_two)),
        "unexpected_weight": arguments(variant("unexpected_weight", edit_weights=add_norm)),
        "unknown_quantisation": arguments(quantization="int8_per_channel_weight_only"),
        "fp8_weights": arguments(quantization="fp8", dtype="bfloat16"),
        "float16_states": arguments(mamba_ssm_cache_dtype="float16"),
        "pooling": arguments(runner="pooling"),
        "odd_mlp": arguments(with_fields("odd_mlp", intermediate_size=255), tensor_parallel_size=2),
        "adapters": arguments(enable_lora=True),
        "misspelt": arguments(with_fields("misspelt", architectures=misspelt)),
        "stretched_rotation": arguments(hf_overrides={"rope_parameters": yarn}),
        "integer_weight": arguments(variant("integer_weight", edit_weights=quantise)),
        "wrong_shape": arguments(variant("wrong_shape", edit_weights=shrink_norm)),
        "nothing_wrong": arguments(load_format="dummy"),
    }
    found, _ = run_job("try_to_start.py", jobs, folder, engine_environment)
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_is_refused_with_a_reason(name: str, errors: dict[str, str | None]) -> None:
    assert EXPECTED[name] in str(errors[name])


def test_nothing_else_is_refused(errors: dict[str, str | None]) -> None:
    assert errors.pop("nothing_wrong") is None
    assert set(errors) == set(EXPECTED)


def test_a_device_without_kernels_is_refused(
    tmp_path: Path, engine_environment: dict[str, str], run_job: Any
) -> None:
    error, _ = run_job("try_other_device.py", "xpu", tmp_path, engine_environment)
    assert "device: expected 'cuda' or 'cpu', got 'xpu'" in error
