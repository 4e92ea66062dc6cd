from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoConfig, GenerationConfig

from sala_kernels.spec import SpecError
from vllm_ext.hf_config import SalaConfig

if TYPE_CHECKING:
    from pathlib import Path

RELEASED: dict[str, Any] = {
    "architectures": ["MiniCPMSALAForCausalLM"],
    "model_type": "minicpm_sala",
    "vocab_size": 73448,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "lightning_nh": 32,
    "lightning_nkv": 32,
    "lightning_head_dim": 128,
    "lightning_scale": "1/sqrt(d)",
    "lightning_use_rope": True,
    "mixer_types": [
        "minicpm4" if layer in (0, 9, 16, 17, 22, 29, 30, 31) else "lightning-attn"
        for layer in range(32)
    ],
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 524288,
    "attn_use_rope": False,
    "attn_use_output_gate": True,
    "qk_norm": True,
    "use_output_norm": True,
    "use_output_gate": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "mup_denominator": 32,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": [2, 73440],
    "pad_token_id": 2,
    "sparse_config": {
        "kernel_size": 32,
        "kernel_stride": 16,
        "init_blocks": 1,
        "block_size": 64,
        "window_size": 2048,
        "topk": 64,
        "use_nope": False,
        "dense_len": 8192,
    },
}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(RELEASED | changes))
    return folder


@pytest.fixture(autouse=True)
def _registered() -> None:
    AutoConfig.register("minicpm_sala", SalaConfig, exist_ok=True)


def test_every_released_field_survives(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write(tmp_path))
    assert isinstance(config, SalaConfig)
    assert {name: getattr(config, name) for name in RELEASED} == RELEASED
    again = SalaConfig.from_dict(json.loads(config.to_json_string()))
    assert again.spec == config.spec


def test_it_describes_the_released_model(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write(tmp_path))
    assert config.layers_block_type.count("attention") == 8
    assert config.layers_block_type[8:10] == ["linear_attention", "attention"]
    assert config.spec.sparse.num_selected_blocks == 96
    assert config.spec.sparse.dense_len == 8192
    # both stop ids reach the sampler from config.json alone
    assert GenerationConfig.from_model_config(config).eos_token_id == [2, 73440]


def test_always_sparse_has_no_dense_tokens(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write(tmp_path))
    # how vLLM applies --hf-overrides
    config.update({"always_sparse": True})
    assert config.spec.sparse.dense_len == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer_types": ["minicpm4"] * 31 + ["mamba2"]}, "mixer_types: supported are"),
        ({"qk_norm": False}, "qk_norm: only True is supported, got False"),
        ({"hidden_size": None}, "hidden_size: missing from config.json"),
    ],
)
def test_a_model_we_do_not_compute_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        AutoConfig.from_pretrained(write(tmp_path, **changes))
