from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sala_kernels.spec import LayerKind, SalaSpec, SpecError, decay_slopes

RELEASED: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden/released_config.json").read_text()
)


def test_the_released_model_has_its_published_size() -> None:
    spec = SalaSpec.from_config(RELEASED)
    assert sum(math.prod(shape) for shape in spec.weight_shapes().values()) == 9_477_203_968
    assert spec.layer_kinds.count(LayerKind.SPARSE) == 8
    # K and V take 8 KiB a token, the key means 5/128 more; a state is 2 MiB a layer
    assert spec.kv_bytes_per_token(element_bytes=2) == 8192 * (1 + 5 / 128)
    assert spec.state_bytes_per_request() == 48 << 20
    assert spec.sparse.num_selected_blocks == 96


def test_slopes_fall_from_head_to_head() -> None:
    slopes = decay_slopes(32)
    assert slopes[0] == pytest.approx(0.8409, abs=1e-4)
    assert slopes[31] == 2.0**-8


def test_tied_embeddings_have_one_table() -> None:
    spec = SalaSpec.from_config(RELEASED | {"tie_word_embeddings": True})
    assert "lm_head.weight" not in spec.weight_shapes()


@pytest.mark.parametrize(
    "parameters",
    [{"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}],
)
def test_theta_may_stand_in_rope_parameters(parameters: dict[str, Any]) -> None:
    # where transformers 5 writes it
    config = RELEASED | {"rope_theta": None, "rope_parameters": parameters}
    assert SalaSpec.from_config(config).rope_theta == 5e5


YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": YARN}, "rope_parameters: only the default type"),
        ({"rope_theta": None, "rope_parameters": YARN}, "rope_parameters: only the default type"),
        ({"rope_parameters": {"type": "yarn"}}, "rope_parameters: only the default type"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta: got both 10000.0 and 500000.0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: only None is supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0 is supported"),
        ({"lightning_nh": 12, "lightning_nkv": 12}, "a power of two of heads, got 12"),
        ({"lightning_nkv": 2}, "expected lightning_nkv 32, got 2"),
        ({"lightning_scale": "1/d^2"}, "lightning_scale: expected one of"),
        ({"num_key_value_heads": 5}, "must be a multiple of num_key_value_heads"),
        ({"mixer_types": ["minicpm4"]}, "a list of num_hidden_layers = 32 names"),
        ({"hidden_size": True}, "hidden_size: expected a positive integer, got True"),
        ({"scale_depth": math.nan}, "scale_depth: expected a positive number, got nan"),
        ({"sparse_config": None}, "sparse_config: missing"),
        ({"attn_use_rope": True}, "attn_use_rope: only False is supported"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SalaSpec.from_config(RELEASED | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 128}, "sparse_config.block_size: only 64 is supported, got 128"),
        ({"use_nope": True}, "use_nope: only False is supported"),
        ({"window_size": 0}, "sparse_config.window_size: expected a positive integer, got 0"),
        ({"window_size": 100}, "window_size: expected a multiple of 64, got 100"),
        ({"topk": 1}, r"topk: expected at least init_blocks \+ 1 = 2"),
        ({"init_blocks": -1}, "init_blocks: expected a non-negative integer, got -1"),
        ({"dense_len": None}, "sparse_config.dense_len: missing"),
    ],
)
def test_a_selection_without_a_definition_is_refused(changes: dict[str, Any], message: str) -> None:
    section = RELEASED["sparse_config"] | changes
    with pytest.raises(SpecError, match=message):
        SalaSpec.from_config(RELEASED | {"sparse_config": section})


@pytest.mark.parametrize(
    ("text", "message"), [(None, "does not exist"), ("{", "is not JSON"), ("[]", "JSON object")]
)
def test_a_file_that_is_no_configuration_is_refused(
    text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(SpecError, match=message):
        SalaSpec.from_file(tmp_path)


def test_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    assert SalaSpec.from_file(tmp_path) == SalaSpec.from_config(RELEASED)
