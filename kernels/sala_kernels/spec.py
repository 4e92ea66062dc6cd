"""What a SALA checkpoint is: its configuration, layer kinds, weight names and sizes (stdlib only).

The source of every field is the released MiniCPM-SALA ``config.json``. The engine, the trainer and the
gateway all read a checkpoint through :class:`SalaSpec`, so that they cannot disagree about it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

ARCHITECTURE = "MiniCPMSALAForCausalLM"
MODEL_TYPE = "minicpm_sala"

BLOCK_TOKENS = 64
"""Tokens in one selectable key block."""
K1_WINDOW_TOKENS = 32
K1_STRIDE_TOKENS = 16
"""A fine compressed key is the mean of 32 keys; one starts every 16 tokens."""
K2_WINDOW_TOKENS = 128
K2_STRIDE_TOKENS = 64
"""A coarse compressed key is the mean of 128 keys; one starts every 64 tokens."""


class SpecError(ValueError):
    """A ``config.json`` that is not a SALA model we can compute; says what was expected."""


class LayerKind(StrEnum):
    """Token mixer of one layer, by its name in ``mixer_types``."""

    SPARSE = "minicpm4"
    LIGHTNING = "lightning-attn"


@dataclass(frozen=True)
class SparseSpec:
    """InfLLM-V2 block selection, as ``sparse_config`` states it."""

    topk: int
    """Blocks per (token, KV head) beyond the local window, the initial blocks counted inside."""
    window_tokens: int
    """Local window that is always attended, a multiple of 64."""
    init_blocks: int
    """Blocks at the start of the sequence that are always attended."""
    dense_len: int
    """A token is dense iff its position + 1 < ``dense_len``, else sparse; 0 = always sparse."""

    @property
    def local_blocks(self) -> int:
        """Whole blocks before the query's own that are forced (32 as released; 33 with its own)."""
        return self.window_tokens // BLOCK_TOKENS

    @property
    def num_selected_blocks(self) -> int:
        """Blocks attended per (token, KV head), forced ones counted inside (96 as released)."""
        return self.topk + self.local_blocks


@dataclass(frozen=True)
class SalaSpec:
    """One SALA model: shapes, scalings and selection; build it with :meth:`from_config`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_kinds: tuple[LayerKind, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Query heads, KV heads and head width of the sparse layers."""
    lightning_num_heads: int
    lightning_head_dim: int
    """Heads and head width of the lightning layers (as many KV heads as heads)."""
    rms_norm_eps: float
    rope_theta: float
    scale_emb: float
    scale_depth: float
    dim_model_base: int
    lightning_scale: float
    """Factor on the lightning output, from ``lightning_scale`` ("1/sqrt(d)", "1/d" or "1")."""
    sparse: SparseSpec
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def num_layers(self) -> int:
        """Number of decoder layers of both kinds."""
        return len(self.layer_kinds)

    @property
    def residual_scale(self) -> float:
        """MuP factor on each branch before it is added to the residual stream."""
        return self.scale_depth / math.sqrt(self.num_layers)

    @property
    def logit_divisor(self) -> float:
        """MuP divisor of the last hidden state, before the output projection."""
        return self.hidden_size / self.dim_model_base

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head in a sparse layer."""
        return self.num_heads // self.num_kv_heads

    def kv_bytes_per_token(self, element_bytes: int) -> float:
        """Paged cache bytes a token, all sparse layers: K, V and the K1 and K2 means."""
        means = 1 / K1_STRIDE_TOKENS + 1 / K2_STRIDE_TOKENS
        per_layer = self.num_kv_heads * self.head_dim * (2 + means) * element_bytes
        return self.layer_kinds.count(LayerKind.SPARSE) * per_layer

    def state_bytes_per_request(self) -> int:
        """Bytes of linear state a request holds whatever its length (float32)."""
        per_layer = self.lightning_num_heads * self.lightning_head_dim**2 * 4
        return self.layer_kinds.count(LayerKind.LIGHTNING) * per_layer

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint: released name -> shape, [out, in] for projections."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for index, kind in enumerate(self.layer_kinds):
            layer = f"model.layers.{index}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{layer}.{norm}.weight"] = (hidden,)
            shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
            shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
            shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
            for name, shape in self._mixer_shapes(kind).items():
                shapes[f"{layer}.self_attn.{name}.weight"] = shape
        return shapes

    def _mixer_shapes(self, kind: LayerKind) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        if kind is LayerKind.SPARSE:
            width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
            return {
                "q_proj": (width, hidden),
                "k_proj": (kv_width, hidden),
                "v_proj": (kv_width, hidden),
                "o_proj": (hidden, width),
                "o_gate": (width, hidden),
            }
        width = self.lightning_num_heads * self.lightning_head_dim
        return {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj", "z_proj"), (width, hidden)),
            "o_proj": (hidden, width),
            "q_norm": (self.lightning_head_dim,),
            "k_norm": (self.lightning_head_dim,),
            "o_norm": (width,),
        }

    @classmethod
    def from_file(cls, path: Path) -> SalaSpec:
        """Read ``config.json`` at ``path`` (or in the folder ``path``).

        Raises:
            SpecError: the file is missing, not JSON, or not a SALA configuration we compute.
        """
        path = path / "config.json" if path.is_dir() else path
        return cls.from_config(read_config(path, "a SALA checkpoint", SpecError))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SalaSpec:
        """Build the spec from the fields of ``config.json``.

        Raises:
            SpecError: a field is missing, of the wrong type, or asks for what SALA does not compute.
        """
        fields = _Fields(config)
        hidden = fields.positive_int("hidden_size")
        num_heads = fields.positive_int("num_attention_heads")
        num_kv_heads = fields.positive_int("num_key_value_heads")
        head_dim = fields.positive_int("head_dim", hidden // num_heads)
        lightning_heads = fields.positive_int("lightning_nh", num_heads)
        lightning_dim = fields.positive_int("lightning_head_dim", head_dim)
        layer_kinds = fields.layer_kinds()
        if num_heads % num_kv_heads:
            raise SpecError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got {num_heads} and {num_kv_heads}"
            )
        if (
            lightning_kv := fields.positive_int("lightning_nkv", lightning_heads)
        ) != lightning_heads:
            raise SpecError(
                f"lightning layers have as many KV heads as heads: expected lightning_nkv {lightning_heads}, got {lightning_kv}"
            )
        if lightning_dim % 2:
            raise SpecError(f"lightning_head_dim must be even (RoPE pairs), got {lightning_dim}")
        decay_slopes(lightning_heads)
        # each flag changes the function; the released values are the only ones with a definition
        for name, expected in _FIXED.items():
            fields.require(name, expected)
        return cls(
            vocab_size=fields.positive_int("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.positive_int("intermediate_size"),
            layer_kinds=layer_kinds,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            lightning_num_heads=lightning_heads,
            lightning_head_dim=lightning_dim,
            rms_norm_eps=fields.positive_float("rms_norm_eps"),
            rope_theta=fields.rope_theta(),
            scale_emb=fields.positive_float("scale_emb"),
            scale_depth=fields.positive_float("scale_depth"),
            dim_model_base=fields.positive_int("dim_model_base"),
            lightning_scale=fields.lightning_scale(lightning_dim),
            sparse=fields.sparse(),
            max_position_embeddings=fields.positive_int("max_position_embeddings"),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )


_FIXED: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attn_use_rope": False,
    "lightning_use_rope": True,
    "qk_norm": True,
    "use_output_norm": True,
    "use_output_gate": True,
    "attn_use_output_gate": True,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
}

_FIXED_SPARSE = {
    "kernel_size": K1_WINDOW_TOKENS,
    "kernel_stride": K1_STRIDE_TOKENS,
    "block_size": BLOCK_TOKENS,
}


def read_config(path: Path, what: str, error_type: type[ValueError]) -> dict[str, Any]:
    """Read a ``config.json``.

    Args:
        path: of the file.
        what: was expected where it is missing, for the message.
        error_type: what is raised.

    Raises:
        ValueError: of ``error_type``: the file is missing, or holds no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error_type(f"expected {what}: {path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise error_type(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise error_type(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def decay_slopes(num_heads: int) -> tuple[float, ...]:
    """Decay rate of each lightning head, 1/token: ``2^(-8 (h + 1) / num_heads)``, the same in every layer.

    Args:
        num_heads: heads of the whole model, never of one tensor-parallel rank; a power of two.

    Raises:
        SpecError: ``num_heads`` is no power of two (the released formula defines no other).
    """
    if num_heads < 1 or num_heads & (num_heads - 1):
        raise SpecError(f"decay slopes are defined for a power of two of heads, got {num_heads}")
    return tuple(2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads))


class _Fields:
    """Typed reads of ``config.json`` that name the field and what was expected of it."""

    def __init__(self, config: Mapping[str, Any], section: str = "") -> None:
        self._config = config
        self._prefix = f"{section}." if section else ""

    def positive_int(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SpecError(f"{self._prefix}{name}: expected a positive integer, got {value!r}")
        return value

    def positive_float(self, name: str) -> float:
        value = self._get(name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise SpecError(f"{self._prefix}{name}: expected a positive number, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise SpecError(f"{self._prefix}{name}: expected true or false, got {value!r}")
        return value

    def require(self, name: str, expected: object) -> None:
        value = self._config.get(name, expected)
        if value != expected:
            raise SpecError(f"{self._prefix}{name}: only {expected!r} is supported, got {value!r}")

    def layer_kinds(self) -> tuple[LayerKind, ...]:
        num_layers = self.positive_int("num_hidden_layers")
        names = self._get("mixer_types")
        if not isinstance(names, list | tuple) or len(names) != num_layers:
            raise SpecError(
                f"mixer_types: expected a list of num_hidden_layers = {num_layers} names"
            )
        supported = [kind.value for kind in LayerKind]
        if unknown := sorted({str(name) for name in names} - set(supported)):
            raise SpecError(f"mixer_types: supported are {supported}, got {unknown}")
        return tuple(LayerKind(name) for name in names)

    def rope_theta(self) -> float:
        # transformers 5 moves the released top-level field into rope_parameters, or copies it there
        parameters = self._config.get("rope_parameters")
        if not isinstance(parameters, Mapping):
            return self.positive_float("rope_theta")
        if parameters.get("rope_type", parameters.get("type", "default")) != "default":
            raise SpecError(
                f"rope_parameters: only the default type is supported, got {parameters!r}"
            )
        found = {
            fields.positive_float("rope_theta")
            for fields in (self, _Fields(parameters, "rope_parameters"))
            if fields._config.get("rope_theta") is not None
        }
        if len(found) > 1:
            raise SpecError(f"rope_theta: got both {' and '.join(map(str, sorted(found)))}")
        return found.pop() if found else self.positive_float("rope_theta")

    def lightning_scale(self, head_dim: int) -> float:
        scales = {"1/sqrt(d)": head_dim**-0.5, "1/d": 1 / head_dim, "1": 1.0}
        name = self._get("lightning_scale", "1/sqrt(d)")
        if name not in scales:
            raise SpecError(f"lightning_scale: expected one of {list(scales)}, got {name!r}")
        return scales[name]

    def sparse(self) -> SparseSpec:
        section = self._get("sparse_config")
        if not isinstance(section, Mapping):
            raise SpecError(f"sparse_config: expected an object, got {section!r}")
        fields = _Fields(section, "sparse_config")
        for name, expected in _FIXED_SPARSE.items():
            fields.require(name, expected)
        fields.require("use_nope", False)
        window = fields.positive_int("window_size")
        topk = fields.positive_int("topk")
        init_blocks = fields._get("init_blocks", 1)
        dense_len = fields._get("dense_len")
        for name, value in (("init_blocks", init_blocks), ("dense_len", dense_len)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise SpecError(
                    f"{fields._prefix}{name}: expected a non-negative integer, got {value!r}"
                )
        if window % BLOCK_TOKENS:
            raise SpecError(
                f"sparse_config.window_size: expected a multiple of {BLOCK_TOKENS}, got {window}"
            )
        if topk < init_blocks + 1:
            raise SpecError(
                f"sparse_config.topk: expected at least init_blocks + 1 = {init_blocks + 1} (the forced blocks count inside), got {topk}"
            )
        always_sparse = self.flag("always_sparse", False)
        return SparseSpec(topk, window, init_blocks, 0 if always_sparse else dense_len)

    def _get(self, name: str, default: Any = None) -> Any:
        value = self._config.get(name)
        value = default if value is None else value
        if value is None:
            raise SpecError(f"{self._prefix}{name}: missing from config.json")
        return value
