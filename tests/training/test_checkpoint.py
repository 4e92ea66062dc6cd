from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sala_kernels.spec import SalaSpec
from sala_training import checkpoint
from sala_training.checkpoint import INDEX_NAME, CheckpointError
from sala_training.model.sala import SalaForCausalLM
from sala_training.recipes import demo_model, tiny

if TYPE_CHECKING:
    from collections.abc import Callable

RELEASED = Path(__file__).parents[1] / "golden/released_config.json"
CONFIG = tiny().model | {"vocab_size": 64}


@pytest.fixture
def model() -> SalaForCausalLM:
    model = SalaForCausalLM(SalaSpec.from_config(CONFIG))
    model.initialise(seed=1)
    return model


@pytest.mark.parametrize("max_shard_bytes", [1, 40_000, 1 << 30])
def test_a_saved_model_loads_again(
    model: SalaForCausalLM, tmp_path: Path, max_shard_bytes: int
) -> None:
    checkpoint.save(model, CONFIG, tmp_path, max_shard_bytes=max_shard_bytes)
    loaded = checkpoint.load(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    tokens = torch.arange(200)[None] % 64
    with torch.no_grad():
        # the decay rates are no weights: they must have come back too
        assert torch.equal(loaded(tokens), model(tokens))
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert all(
        path.stat().st_size < max_shard_bytes + 10_000 or len(load_file(path)) == 1
        for path in shards
    )
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.state_dict().values())


def test_weights_are_stored_and_loaded_in_the_asked_dtype(
    model: SalaForCausalLM, tmp_path: Path
) -> None:
    checkpoint.save(model, CONFIG, tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in checkpoint.load(tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in checkpoint.load(tmp_path, torch.float32).parameters()} == {
        torch.float32
    }


def test_one_file_without_index_loads(model: SalaForCausalLM, tmp_path: Path) -> None:
    checkpoint.write_json(tmp_path / "config.json", CONFIG)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert torch.equal(checkpoint.load(tmp_path).lm_head.weight, model.lm_head.weight)


def _edit(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model-00001-of-00001.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda w: w.update(extra=torch.ones(1)), "unexpected: extra"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(65)}),
            "model.norm.weight: expected shape [64], got [65]",
        ),
        (lambda w: [w.pop(n) for n in list(w)[:20]], "20 weights do not fit"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    model: SalaForCausalLM, tmp_path: Path, edit: Callable[..., Any], message: str
) -> None:
    checkpoint.save(model, CONFIG, tmp_path)
    _edit(tmp_path, edit)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, 20_000])
def test_a_truncated_file_is_named(model: SalaForCausalLM, tmp_path: Path, num_bytes: int) -> None:
    checkpoint.save(model, CONFIG, tmp_path)
    file = tmp_path / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match=f"{file.name}: not a readable safetensors file"):
        checkpoint.load(tmp_path)


def test_a_missing_shard_is_named(model: SalaForCausalLM, tmp_path: Path) -> None:
    checkpoint.save(model, CONFIG, tmp_path, max_shard_bytes=40_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        checkpoint.load(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    checkpoint.write_json(tmp_path / "config.json", CONFIG)
    with pytest.raises(CheckpointError, match="found none"):
        checkpoint.load(tmp_path)


def test_saving_under_another_configuration_is_refused(
    model: SalaForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="does not describe"):
        checkpoint.save(model, CONFIG | {"scale_emb": 1}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_released_model_has_the_released_weights() -> None:
    spec = SalaSpec.from_config(json.loads(RELEASED.read_text()))
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in SalaForCausalLM(spec).state_dict().items()}
    hidden, inner, vocab = 4096, 16384, 73448
    expected = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(32):
        is_sparse = layer in (0, 9, 16, 17, 22, 29, 30, 31)
        key_width = 256 if is_sparse else hidden
        mixer: dict[str, tuple[int, ...]] = {
            "q_proj": (hidden, hidden),
            "k_proj": (key_width, hidden),
            "v_proj": (key_width, hidden),
            "o_proj": (hidden, hidden),
            "o_gate" if is_sparse else "z_proj": (hidden, hidden),
        }
        if not is_sparse:
            mixer |= {"q_norm": (128,), "k_norm": (128,), "o_norm": (hidden,)}
        rest = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        expected |= {f"model.layers.{layer}.{n}.weight": s for n, s in rest.items()}
        expected |= {f"model.layers.{layer}.self_attn.{n}.weight": s for n, s in mixer.items()}
    assert shapes == expected
    assert spec.weight_shapes() == expected


@pytest.mark.parametrize("tied", [False, True])
def test_the_spec_names_what_the_model_has(tied: bool) -> None:
    spec = SalaSpec.from_config(demo_model() | {"tie_word_embeddings": tied})
    with torch.device("meta"):
        state = SalaForCausalLM(spec).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == spec.weight_shapes()
