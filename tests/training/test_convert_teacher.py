"""The teacher computes what transformers computes, and refuses what it cannot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sala_kernels.testing import relative_rms
from sala_training.batch import CuSeqlens
from sala_training.checkpoint import CheckpointError
from sala_training.convert import teacher
from sala_training.convert.rope import TeacherError
from sala_training.convert.spec import TeacherSpec

if TYPE_CHECKING:
    from pathlib import Path

# float32 against float32, through three layers
BOUND = 2e-5
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 500.0, "rope_type": "default"},
    "linear": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_theta": 500.0, "rope_type": "llama3", "factor": 8.0}
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_theta": 1e3, "rope_type": "yarn", "factor": 4.0}
    | {"original_max_position_embeddings": 64},
    "yarn with scales": {"rope_theta": 1e3, "rope_type": "yarn", "factor": 4.0, "truncate": False}
    | {"original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.3},
    "longrope": {"rope_theta": 1e3, "rope_type": "longrope", "original_max_position_embeddings": 64}
    | {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]},
}
TOKENS = torch.randint(0, 96, (100,), generator=torch.Generator().manual_seed(2))


def hugging_face(config: Any) -> Any:
    """A model of transformers with random weights, its norms' too."""
    torch.manual_seed(1)
    model = (Qwen3ForCausalLM if isinstance(config, Qwen3Config) else LlamaForCausalLM)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


@torch.no_grad()
def expected_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None]).logits[0]


@torch.no_grad()
def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    return teacher.load(folder)(tokens[None])[0]


@pytest.mark.parametrize("rope", sorted(ROPES))
def test_llama_with_rotation_equals_transformers(rope: str, tmp_path: Path) -> None:
    model = hugging_face(LlamaConfig(**SHAPE, rope_parameters=ROPES[rope]))
    model.save_pretrained(tmp_path)
    # longrope has other frequencies past its trained 64 tokens
    for length in (50, 100):
        actual, expected = (
            logits(tmp_path, TOKENS[:length]),
            expected_logits(model, TOKENS[:length]),
        )
        assert relative_rms(actual, expected) < BOUND
    plain = {"rope_theta": ROPES[rope]["rope_theta"], "rope_type": "default"}
    if rope != "default":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": plain}))
        assert relative_rms(logits(tmp_path, TOKENS), expected) > 100 * BOUND


@pytest.mark.parametrize("is_tied", [True, False])
def test_qwen3_equals_transformers(is_tied: bool, tmp_path: Path) -> None:
    config = Qwen3Config(**SHAPE, tie_word_embeddings=is_tied, sliding_window=4096)
    model = hugging_face(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert teacher.load(tmp_path).spec.tie_word_embeddings is is_tied
    assert relative_rms(logits(tmp_path, TOKENS), expected_logits(model, TOKENS)) < BOUND


def test_minicpm_is_llama_with_its_scalings_folded_in(tmp_path: Path) -> None:
    model = hugging_face(LlamaConfig(**SHAPE))
    config = LlamaConfig(**SHAPE).to_dict() | {"model_type": "minicpm", "rope_theta": 10000.0}
    config |= {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 8}
    config |= {"rope_parameters": None, "rope_scaling": None}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    actual = logits(tmp_path, TOKENS)
    assert relative_rms(actual, expected_logits(model, TOKENS)) > 100 * BOUND
    for name in weights:
        if "embed_tokens" in name:
            weights[name] *= 12
        elif "o_proj" in name or "down_proj" in name:
            weights[name] *= 1.4 / 3**0.5
        elif "lm_head" in name:
            weights[name] /= 32 / 8
    model.load_state_dict(weights)
    assert relative_rms(actual, expected_logits(model, TOKENS)) < BOUND


def test_packed_documents_equal_the_documents_alone(tmp_path: Path) -> None:
    hugging_face(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    model = teacher.load(tmp_path)
    for lengths in ([30, 1, 69], [25, 25, 25, 25]):
        with torch.no_grad():
            packed = model(TOKENS, CuSeqlens.of(lengths))
            alone = torch.cat([model(part[None])[0] for part in TOKENS.split(lengths)])
            assert relative_rms(packed, alone) < BOUND
            assert relative_rms(packed, model(TOKENS[None])[0]) > 100 * BOUND


def test_a_teacher_trained_here_is_one_that_transformers_loads(tmp_path: Path) -> None:
    config = SHAPE | {
        "model_type": "llama",
        "rope_theta": 1e4,
        "architectures": ["LlamaForCausalLM"],
    }
    model = teacher.TeacherForCausalLM(TeacherSpec.from_config(config))
    model.initialise(seed=0)
    teacher.save(model, config, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert relative_rms(model(TOKENS[None])[0], expected_logits(theirs, TOKENS)) < BOUND
    with pytest.raises(TeacherError, match="another model|does not describe"):
        teacher.save(model, config | {"vocab_size": 97}, tmp_path)


LLAMA = SHAPE | {"model_type": "llama", "rope_theta": 1e4}
QWEN3 = SHAPE | {"model_type": "qwen3", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"model_type": "gpt2"}, "model_type: expected one of"),
        (LLAMA | {"attention_bias": True}, "attention_bias: a teacher cannot have it, got True"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias"),
        (LLAMA | {"model_type": "mistral", "sliding_window": 4096}, "sliding_window.*4096"),
        (QWEN3 | {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        (QWEN3 | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        (QWEN3 | {"num_experts": 8}, "num_experts.*got 8"),
        (LLAMA | {"kv_lora_rank": 64}, "kv_lora_rank"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
        (LLAMA | {"rope_scaling": {"type": "yarn"}}, "kind 'yarn': factor is missing"),
        (
            LLAMA | {"rope_scaling": ROPES["longrope"] | {"short_factor": [1.0]}},
            "expected 8 values",
        ),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA | {"rope_theta": "high"}, "rope_theta"),
        (LLAMA | {"num_key_value_heads": 3}, "multiple of num_key_value_heads 3"),
        (LLAMA | {"head_dim": 7}, "head_dim"),
        (LLAMA | {"vocab_size": None}, "vocab_size: expected a positive integer, got None"),
        (LLAMA | {"model_type": "minicpm"}, "scale_emb: expected a positive number, got None"),
    ],
)
def test_what_cannot_be_a_teacher_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        TeacherSpec.from_config(config)


def test_weights_that_the_configuration_does_not_know_are_refused(tmp_path: Path) -> None:
    hugging_face(LlamaConfig(**SHAPE, attention_bias=True)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    with pytest.raises(CheckpointError, match=r"unexpected: model.layers.0.self_attn.*bias"):
        teacher.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TeacherError, match="is not JSON"):
        teacher.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(TeacherError, match="does not exist"):
        teacher.load(tmp_path)
