from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GenerationConfig
from vllm.transformers_utils.config import patch_rope_parameters

from sala_kernels.spec import SpecError
from vllm_ext.hf_config import SalaConfig

RELEASED: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden/released_config.json").read_text()
)


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


def test_an_override_of_the_rotation_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write(tmp_path))
    # how vLLM applies --hf-overrides, and what it does to every configuration afterwards
    config.update({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}})
    with pytest.raises(SpecError, match="rope_parameters: only the default type"):
        _ = config.spec
    config.update({"rope_parameters": None})
    patch_rope_parameters(config)
    assert config.spec.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer_types": ["minicpm4"] * 31 + ["mamba2"]}, "mixer_types: supported are"),
        ({"qk_norm": False}, "qk_norm: only True is supported, got False"),
        ({"hidden_size": None}, "hidden_size: missing from config.json"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: only None"),
    ],
)
def test_a_model_we_do_not_compute_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        AutoConfig.from_pretrained(write(tmp_path, **changes))
