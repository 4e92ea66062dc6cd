"""What an ordinary Transformer's ``config.json`` says, as far as a teacher may have it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sala_kernels.spec import read_config
from sala_training.convert.rope import Rope, TeacherError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MODEL_TYPES = ("llama", "mistral", "minicpm", "qwen3")

_REFUSED: dict[str, tuple[object, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "qkv_bias": (None, False),
    "use_sliding_window": (None, False),
    "quantization_config": (None,),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "kv_lora_rank": (None, 0),
    "q_lora_rank": (None, 0),
    "pretraining_tp": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "no_rope_layers": (None, []),
}
"""Field -> values without an effect; any other changes the function into one that is not computed here."""


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """A decoder of pre-norm softmax attention and SwiGLU; build it with :meth:`from_config`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope | None
    """None: no positions at all, which no checkpoint says; a test compares it with SALA's NoPE layers."""
    has_qk_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    scale_emb: float = 1.0
    scale_depth: float | None = None
    """MuP factor over the root of the number of layers on each branch; None: branches are not scaled."""
    dim_model_base: float | None = None
    """MuP width that divides ``hidden_size`` into the divisor of the last state; None: no divisor."""

    @property
    def residual_scale(self) -> float:
        """Factor on each branch before it is added to the residual stream."""
        return 1.0 if self.scale_depth is None else self.scale_depth / math.sqrt(self.num_layers)

    @property
    def logit_divisor(self) -> float:
        """Divisor of the last hidden state, before the output projection."""
        return 1.0 if self.dim_model_base is None else self.hidden_size / self.dim_model_base

    @classmethod
    def from_file(cls, folder: Path) -> TeacherSpec:
        """Read ``config.json`` in ``folder``.

        Raises:
            TeacherError: the file is missing, not JSON, or describes what cannot be a teacher.
        """
        path = folder / "config.json"
        return cls.from_config(read_config(path, "a checkpoint folder", TeacherError))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TeacherSpec:
        """Build the spec from the fields of ``config.json``.

        A ``sparse_config`` (MiniCPM4.1) is left out: everything is attended, as that model does below
        its ``dense_len``.

        Raises:
            TeacherError: a field is missing, or asks for what cannot be converted.
        """
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise TeacherError(f"model_type: expected one of {list(MODEL_TYPES)}, got {kind!r}")
        for name, harmless in _REFUSED.items():
            if (value := config.get(name)) not in harmless:
                raise TeacherError(f"{name}: a teacher cannot have it, got {value!r}")
        if config.get("hidden_act", "silu") != "silu":
            raise TeacherError(f"hidden_act: expected 'silu', got {config['hidden_act']!r}")
        # Qwen3 states a window that use_sliding_window, checked above, has switched off
        if kind != "qwen3" and config.get("sliding_window") is not None:
            raise TeacherError(
                f"sliding_window: a teacher attends everything, got {config['sliding_window']!r}"
            )
        if others := set(config.get("layer_types") or ()) - {"full_attention"}:
            raise TeacherError(f"layer_types: expected full_attention alone, got {sorted(others)}")
        hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
        kv_heads = _whole(config, "num_key_value_heads", heads)
        head_dim = _whole(config, "head_dim", hidden // heads)
        if heads % kv_heads:
            raise TeacherError(
                f"num_attention_heads: expected a multiple of num_key_value_heads {kv_heads}, got {heads}"
            )
        if head_dim % 2:
            raise TeacherError(f"head_dim: expected an even number (RoPE pairs), got {head_dim}")
        is_mup = kind == "minicpm"
        return cls(
            vocab_size=_whole(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_whole(config, "intermediate_size"),
            num_layers=_whole(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_positive(config, "rms_norm_eps"),
            rope=Rope.from_config(config, head_dim),
            has_qk_norm=kind == "qwen3",
            # what the configuration classes of these models say where the file is silent
            tie_word_embeddings=bool(config.get("tie_word_embeddings", is_mup)),
            max_position_embeddings=_whole(config, "max_position_embeddings"),
            scale_emb=_positive(config, "scale_emb") if is_mup else 1.0,
            scale_depth=_positive(config, "scale_depth") if is_mup else None,
            dim_model_base=_positive(config, "dim_model_base") if is_mup else None,
        )

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint: Hugging Face's name -> shape, [out, in] for projections."""
        hidden, inner = self.hidden_size, self.intermediate_size
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (width, hidden),
            "self_attn.k_proj": (kv_width, hidden),
            "self_attn.v_proj": (kv_width, hidden),
            "self_attn.o_proj": (hidden, width),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        if self.has_qk_norm:
            layer |= {f"self_attn.{name}": (self.head_dim,) for name in ("q_norm", "k_norm")}
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for index in range(self.num_layers):
            shapes |= {f"model.layers.{index}.{name}.weight": s for name, s in layer.items()}
        return shapes


def _whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TeacherError(f"{name}: expected a positive integer, got {value!r}")
    return value


def _positive(config: Mapping[str, Any], name: str) -> float:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise TeacherError(f"{name}: expected a positive number, got {value!r}")
    return float(value)
