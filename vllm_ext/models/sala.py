"""MiniCPM-SALA in vLLM layers.

Rounding follows the released code: each branch is rounded to the model's dtype, scaled, rounded, added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsMambaPrefixCaching,
)
from vllm.model_executor.models.utils import maybe_prefix

from sala_kernels.elementwise.op import norm_rope, sigmoid_gate
from sala_kernels.spec import LayerKind, SalaSpec
from vllm_ext.attention.lightning import LightningState
from vllm_ext.attention.sparse import SparseAttention
from vllm_ext.layers.norm import GatedNorm, NormWeight, ResidualNorm
from vllm_ext.layers.rope import RotaryAngles

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig
    from vllm.sequence import IntermediateTensors

_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_QKV_SHARDS: dict[str, tuple[str, str | int]] = {
    f"{part}_proj": ("qkv_proj", part) for part in ("q", "k", "v")
}
_QKVZ_SHARDS: dict[str, tuple[str, str | int]] = {
    f"{part}_proj": ("qkvz_proj", index) for index, part in enumerate(("q", "k", "v", "z"))
}
_MLP_SHARDS: dict[str, tuple[str, str | int]] = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""Released projection -> the layer that holds it, and its shard there."""
Rotation = tuple[Tensor, Tensor]
"""cos and sin of the step's positions, each [tokens, dim / 2] float32."""


class SalaMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, spec: SalaSpec, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        inner, quant = spec.intermediate_size, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            spec.hidden_size,
            [inner, inner],
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            inner, spec.hidden_size, bias=False, quant_config=quant, prefix=f"{prefix}.down_proj"
        )
        self.activation = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        """Map [tokens, hidden] to the same."""
        gate_up, _ = self.gate_up_proj(x)
        output, _ = self.down_proj(self.activation(gate_up))
        return output


class SparseMixer(nn.Module):
    """Block-sparse attention without positions, then a sigmoid gate."""

    def __init__(self, spec: SalaSpec, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden, width, quant = (
            spec.hidden_size,
            spec.num_heads * spec.head_dim,
            vllm_config.quant_config,
        )
        tp_size = get_tensor_model_parallel_world_size()
        num_heads, num_kv_heads = spec.num_heads // tp_size, max(1, spec.num_kv_heads // tp_size)
        self.split_sizes = [n * spec.head_dim for n in (num_heads, num_kv_heads, num_kv_heads)]
        self.qkv_proj = QKVParallelLinear(
            hidden,
            spec.head_dim,
            spec.num_heads,
            spec.num_kv_heads,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_gate = ColumnParallelLinear(
            hidden, width, bias=False, quant_config=quant, prefix=f"{prefix}.o_gate"
        )
        self.o_proj = RowParallelLinear(
            width, hidden, bias=False, quant_config=quant, prefix=f"{prefix}.o_proj"
        )
        self.attention = SparseAttention(
            sparse=spec.sparse,
            ranks_per_kv_head=max(1, tp_size // spec.num_kv_heads),
            num_heads=num_heads,
            head_size=spec.head_dim,
            scale=spec.head_dim**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant,
            prefix=f"{prefix}.attention",
        )

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Map [tokens, hidden] to the same; ``rotation`` is for the other kind."""
        qkv, _ = self.qkv_proj(x)
        gate, _ = self.o_gate(x)
        q, k, v = qkv.split(self.split_sizes, dim=-1)
        output, _ = self.o_proj(sigmoid_gate(self.attention(q, k, v), gate))
        return output


class LightningMixer(nn.Module):
    """Linear attention with rotated, normalised q and k, then a norm over all heads and a gate."""

    def __init__(self, spec: SalaSpec, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden, heads, dim = spec.hidden_size, spec.lightning_num_heads, spec.lightning_head_dim
        quant = vllm_config.quant_config
        self.head_dim, self.eps = dim, spec.rms_norm_eps
        # one product of four reads the weights of a decode faster; a quantisation may leave the gate out
        self.is_gate_fused = quant is None
        if self.is_gate_fused:
            self.qkvz_proj = MergedColumnParallelLinear(
                hidden, 4 * [heads * dim], bias=False, prefix=f"{prefix}.qkvz_proj"
            )
        else:
            self.qkv_proj = QKVParallelLinear(
                hidden,
                dim,
                heads,
                heads,
                bias=False,
                quant_config=quant,
                prefix=f"{prefix}.qkv_proj",
            )
            self.z_proj = ColumnParallelLinear(
                hidden, heads * dim, bias=False, quant_config=quant, prefix=f"{prefix}.z_proj"
            )
        self.o_proj = RowParallelLinear(
            heads * dim, hidden, bias=False, quant_config=quant, prefix=f"{prefix}.o_proj"
        )
        self.q_norm = NormWeight(dim)
        self.k_norm = NormWeight(dim)
        self.o_norm = GatedNorm(heads * dim, spec.rms_norm_eps)
        self.state = LightningState(spec, prefix=f"{prefix}.state")

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Map [tokens, hidden] to the same."""
        if self.is_gate_fused:
            qkvz, _ = self.qkvz_proj(x)
            width = qkvz.shape[-1] // 4
            qkv, gate = qkvz.split([3 * width, width], dim=-1)
        else:
            qkv, _ = self.qkv_proj(x)
            gate, _ = self.z_proj(x)
        norm_rope(qkv, self.q_norm.weight, self.k_norm.weight, *rotation, self.eps)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.chunk(3, dim=-1))
        output, _ = self.o_proj(self.o_norm(self.state(q, k, v).flatten(1), gate))
        return output


class SalaDecoderLayer(nn.Module):
    """Mixer and MLP, each scaled before it joins the residual stream (muP)."""

    def __init__(
        self, spec: SalaSpec, kind: LayerKind, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        mixer = SparseMixer if kind is LayerKind.SPARSE else LightningMixer
        self.self_attn = mixer(spec, vllm_config, prefix=f"{prefix}.self_attn")
        self.mlp = SalaMLP(spec, vllm_config, prefix=f"{prefix}.mlp")
        norm = (spec.hidden_size, spec.rms_norm_eps, spec.residual_scale)
        self.input_layernorm = ResidualNorm(*norm)
        self.post_attention_layernorm = ResidualNorm(*norm)

    def forward(
        self, hidden: Tensor, branch: Tensor | None, rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        """Run the layer; each branch is added by the norm that follows it, the last by the next layer's.

        Args:
            hidden: [tokens, hidden], the residual stream.
            branch: as ``hidden``, what the layer before leaves to add; None in the first.
            rotation: of the step's positions.

        Returns:
            The residual stream and the branch to add to it.
        """
        hidden, normed = self.input_layernorm(hidden, branch)
        mixed = self.self_attn(normed, rotation)
        hidden, normed = self.post_attention_layernorm(hidden, mixed)
        return hidden, self.mlp(normed)


class SalaModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, spec: SalaSpec, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.scale_emb = spec.scale_emb
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.hidden_size)
        self.rotary = RotaryAngles(spec.lightning_head_dim, spec.rope_theta)
        self.layers = nn.ModuleList(
            SalaDecoderLayer(spec, kind, vllm_config, prefix=f"{prefix}.layers.{index}")
            for index, kind in enumerate(spec.layer_kinds)
        )
        self.norm = ResidualNorm(spec.hidden_size, spec.rms_norm_eps, spec.residual_scale)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed tokens [tokens] as [tokens, hidden], muP scale included."""
        return self.embed_tokens(input_ids) * self.scale_emb

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Map embeddings [tokens, hidden] at ``positions`` [tokens] to normalised hidden states."""
        rotation, branch = self.rotary(positions), None
        for layer in self.layers:
            hidden, branch = layer(hidden, branch, rotation)
        _, normed = self.norm(hidden, branch)
        return normed


class SalaForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """The model vLLM runs for architecture ``MiniCPMSALAForCausalLM``."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "qkvz_proj": ["q_proj", "k_proj", "v_proj", "z_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.spec: SalaSpec = vllm_config.model_config.hf_config.spec
        self.model = SalaModel(self.spec, vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.spec.vocab_size, self.spec.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if self.spec.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.spec.vocab_size)
        self._mixers = {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, LightningMixer | SparseMixer)
        }

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed tokens [tokens] as [tokens, hidden]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Compute the hidden states of a step's packed tokens.

        Args:
            input_ids: [tokens] int; unused when ``inputs_embeds`` is given.
            positions: [tokens] int64, position in each sequence.
            intermediate_tensors: always None, there is no pipeline parallelism.
            inputs_embeds: [tokens, hidden], used as they are, as in the released model.

        Returns:
            [tokens, hidden].
        """
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.model(hidden, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits [tokens, vocab] of hidden states [tokens, hidden]; None off rank 0."""
        return self.logits_processor(self.lm_head, hidden_states / self.spec.logit_divisor)

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, int, int]]:
        """Return the shape of one lightning layer's state on one rank."""
        spec = vllm_config.model_config.hf_config.spec
        num_heads = spec.lightning_num_heads // vllm_config.parallel_config.tensor_parallel_size
        return ((num_heads, spec.lightning_head_dim, spec.lightning_head_dim),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype]:
        """Return the dtype of the lightning states, float32 always."""
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[object, ...]:
        """Return how vLLM copies a state to another slot: as one contiguous piece."""
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint, all of it and nothing else.

        Args:
            weights: released name and tensor, in any order. A quantised projection brings, instead of or beside
                its ``weight``, what its method stores (``qweight``, ``scales``, ``weight_scale``, ...).

        Returns:
            Names of the parameters that were loaded.

        Raises:
            ValueError: a weight is missing, unexpected, of the wrong shape or dtype; names them all.
        """
        parameters = dict(self.named_parameters())
        missing = self._expected_weights()
        loaded, problems = set(), []
        for name, tensor in weights:
            parameter_name, shard = self._fused_name(name)
            if name.endswith(".g_idx") and parameter_name not in parameters:
                # GPTQ's order of input channels: the identity, other orders are refused by vLLM
                continue
            if name not in missing:
                problems.append(f"unexpected {name}")
                continue
            expected = missing.pop(name)
            parameter = parameters[parameter_name]
            if expected is not None and tuple(tensor.shape) != expected:
                problems.append(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
            elif parameter.dtype in _WEIGHT_DTYPES and tensor.dtype not in _WEIGHT_DTYPES:
                # copying would take integers or 8-bit floats for the values themselves
                problems.append(f"{name}: expected a float dtype, got {tensor.dtype}")
            elif parameter.dtype not in _WEIGHT_DTYPES and tensor.dtype != parameter.dtype:
                problems.append(f"{name}: expected dtype {parameter.dtype}, got {tensor.dtype}")
            else:
                loader = getattr(parameter, "weight_loader", default_weight_loader)
                loader(parameter, tensor, *shard)
                loaded.add(parameter_name)
        problems += [f"missing {name}" for name in missing]
        if problems:
            raise ValueError("the checkpoint does not fit its config.json: " + "; ".join(problems))
        return loaded

    def _expected_weights(self) -> dict[str, tuple[int, ...] | None]:
        """Name the checkpoint's weights: shapes of the released ones, None for those of a quantisation."""
        expected: dict[str, tuple[int, ...] | None] = {}
        for name, shape in self.spec.weight_shapes().items():
            module = name.rpartition(".")[0]
            fused_module = self._fused_name(name)[0].rpartition(".")[0]
            for leaf, _ in self.get_submodule(fused_module).named_parameters(recurse=False):
                expected[f"{module}.{leaf}"] = shape if leaf == "weight" else None
        return expected

    def _fused_name(self, name: str) -> tuple[str, tuple[str | int, ...]]:
        """Return the parameter that holds a weight, and which shard of it when several are fused."""
        *path, module, leaf = name.split(".")
        mixer = self._mixers.get(".".join(path))
        if mixer is None:
            shards = _MLP_SHARDS
        elif isinstance(mixer, LightningMixer) and mixer.is_gate_fused:
            shards = _QKVZ_SHARDS
        else:
            shards = _QKV_SHARDS
        if module not in shards:
            return name, ()
        fused, shard = shards[module]
        return ".".join([*path, fused, leaf]), (shard,)
