"""An ordinary softmax Transformer in plain PyTorch; its ``state_dict`` is the checkpoint, name for name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sala_training.batch import CuSeqlens
from sala_training.checkpoint import check_weights, read_weights, save_weights, write_json
from sala_training.convert.rope import TeacherError, rotate
from sala_training.convert.spec import TeacherSpec
from sala_training.model import ops
from sala_training.model.mixers import RMSNorm
from sala_training.model.sala import MLP, draw_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


class SoftmaxMixer(nn.Module):
    """Causal attention with rotary positions, grouped keys and, for Qwen3, norms on queries and keys."""

    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = spec.num_heads, spec.num_kv_heads
        self.head_dim, self.rope, self.has_qk_norm = spec.head_dim, spec.rope, spec.has_qk_norm
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, spec.hidden_size, bias=False)
        self._kept: dict[Any, tuple[Tensor, float]] = {}
        if self.has_qk_norm:
            self.q_norm = RMSNorm(self.head_dim, spec.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, spec.rms_norm_eps)

    def _frequencies(self, num_tokens: int, device: torch.device) -> tuple[Tensor, float]:
        """Return those of the longest document, kept on its device."""
        assert self.rope is not None
        key = (num_tokens if self.rope.kind == "longrope" else 0, device)
        if key not in self._kept:
            frequencies, factor = self.rope.frequencies(self.head_dim, num_tokens)
            self._kept = {key: (frequencies.to(device), factor)}
        return self._kept[key]

    def forward(self, x: Tensor, cu_seqlens: CuSeqlens) -> Tensor:
        """Mix the tokens of each document: [tokens, hidden] -> [tokens, hidden]."""
        q = self.q_proj(x).view(len(x), self.num_heads, self.head_dim)
        k = self.k_proj(x).view(len(x), self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).view(len(x), self.num_kv_heads, self.head_dim)
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            frequencies, factor = self._frequencies(max(cu_seqlens.lengths), x.device)
            q = rotate(q, cu_seqlens.positions, frequencies, factor)
            k = rotate(k, cu_seqlens.positions, frequencies, factor)
        return self.o_proj(ops.attend(q, k, v, None, cu_seqlens).flatten(-2))


class TeacherLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__()
        self.residual_scale = spec.residual_scale
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn: nn.Module = SoftmaxMixer(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec.hidden_size, spec.intermediate_size)

    def forward(
        self, hidden: Tensor, cu_seqlens: CuSeqlens, seen: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        """Transform the residual stream [tokens, hidden].

        Args:
            hidden: [tokens, hidden].
            cu_seqlens: the documents.
            seen: gets the mixer's input and output, [tokens, hidden] each.
        """
        x = self.input_layernorm(hidden)
        mixed = self.self_attn(x, cu_seqlens)
        if seen is not None:
            seen.append((x, mixed))
        hidden = hidden + mixed * self.residual_scale
        return hidden + self.mlp(self.post_attention_layernorm(hidden)) * self.residual_scale


class TeacherModel(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__()
        self.scale_emb = spec.scale_emb
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(TeacherLayer(spec) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: CuSeqlens,
        seen: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Return the normalised last hidden states [tokens, hidden]; ``seen`` reaches every layer."""
        hidden = self.embed_tokens(tokens) * self.scale_emb
        for layer in self.layers:
            hidden = layer(hidden, cu_seqlens, seen)
        return self.norm(hidden)


class TeacherForCausalLM(nn.Module):
    """The Transformer that is converted; also trained here, by the same loop as SALA."""

    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = TeacherModel(spec)
        if not spec.tie_word_embeddings:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def output_table(self) -> Tensor:
        """Return the weights of the output projection: [vocab, hidden]."""
        return (self.model.embed_tokens if self.spec.tie_word_embeddings else self.lm_head).weight

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: CuSeqlens | None = None,
        dense: bool = True,
        head: Callable[[Tensor, Tensor], Any] | None = None,
        seen: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Any:
        """Compute logits, or what ``head`` makes of the last states; SALA's signature.

        Args:
            tokens: [tokens] int64 with ``cu_seqlens``, or [batch, tokens] of one document a row.
            cu_seqlens: the documents.
            dense: attention is dense whatever this says.
            head: called with the last states over the divisor [tokens, hidden] and the table
                [vocab, hidden]; None: their product, float32.
            seen: gets every layer's mixer's input and output, [tokens, hidden] each.
        """
        shape = tokens.shape
        if cu_seqlens is None:
            batch, length = shape
            cu_seqlens = CuSeqlens.of([length] * batch, tokens.device)
        hidden = self.model(tokens.flatten(), cu_seqlens, seen) / self.spec.logit_divisor
        if head is not None:
            return head(hidden, self.output_table())
        return linear(hidden, self.output_table()).float().view(*shape, -1)

    def initialise(self, seed: int) -> None:
        """Draw random weights; see :func:`sala_training.model.sala.draw_weights`."""
        draw_weights(self, seed)


def load(folder: Path, dtype: torch.dtype | None = torch.float32) -> TeacherForCausalLM:
    """Load a Hugging Face folder of Llama, Mistral, Qwen3 or MiniCPM, one file or sharded, on the CPU.

    Args:
        folder: with ``config.json`` and ``*.safetensors``.
        dtype: dtype of the weights; None keeps the stored one.

    Raises:
        TeacherError: ``config.json`` is missing or describes what cannot be converted.
        CheckpointError: a weight is missing, unexpected (a bias, say) or of another shape.
    """
    spec = TeacherSpec.from_file(folder)
    weights = {
        name: tensor
        for name, tensor in read_weights(folder).items()
        if not name.endswith("rotary_emb.inv_freq")  # a buffer that old checkpoints carry
    }
    if spec.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # the same table once more
    check_weights(folder, weights, spec.weight_shapes())
    with torch.device("meta"):
        model = TeacherForCausalLM(spec)
    model.load_state_dict({k: v.to(dtype or v.dtype) for k, v in weights.items()}, assign=True)
    return model


def save(
    model: TeacherForCausalLM,
    config: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a Hugging Face folder: ``config.json`` and sharded safetensors.

    Raises:
        TeacherError: ``config`` describes another model than ``model``.
    """
    if TeacherSpec.from_config(config) != model.spec:
        raise TeacherError("config does not describe the model that is being saved")
    save_weights(model.state_dict(), folder, dtype)
    write_json(folder / "config.json", dict(config))
