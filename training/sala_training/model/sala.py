"""The SALA decoder; its ``state_dict`` is the released checkpoint, name for name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from sala_kernels.spec import LayerKind, SalaSpec
from sala_training.batch import CuSeqlens
from sala_training.model.mixers import LightningMixer, RMSNorm, SparseMixer


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of ``x`` [..., hidden]."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm mixer and MLP; each branch is scaled before it joins the residual stream (muP)."""

    self_attn: SparseMixer | LightningMixer

    def __init__(self, spec: SalaSpec, kind: LayerKind) -> None:
        super().__init__()
        self.residual_scale = spec.residual_scale
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = SparseMixer(spec) if kind is LayerKind.SPARSE else LightningMixer(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec.hidden_size, spec.intermediate_size)

    def forward(self, hidden: Tensor, cu_seqlens: CuSeqlens, dense: bool = False) -> Tensor:
        """Transform the residual stream [tokens, hidden]; ``dense`` reaches sparse mixers."""
        x = self.input_layernorm(hidden)
        mixer = self.self_attn
        is_sparse = isinstance(mixer, SparseMixer)
        mixed = mixer(x, cu_seqlens, dense) if is_sparse else mixer(x, cu_seqlens)
        hidden = hidden + mixed * self.residual_scale
        return hidden + self.mlp(self.post_attention_layernorm(hidden)) * self.residual_scale


class SalaModel(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, spec: SalaSpec) -> None:
        super().__init__()
        self.scale_emb = spec.scale_emb
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(spec, kind) for kind in spec.layer_kinds)
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(self, tokens: Tensor, cu_seqlens: CuSeqlens, dense: bool = False) -> Tensor:
        """Return the normalised last hidden states [tokens, hidden] of packed documents."""
        hidden = self.embed_tokens(tokens) * self.scale_emb
        for layer in self.layers:
            hidden = layer(hidden, cu_seqlens, dense)
        return self.norm(hidden)


Head = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]
"""(hidden [tokens, hidden], divided by the muP divisor; table [vocab, hidden]) -> what is asked for."""


class SalaForCausalLM(nn.Module):
    """SALA with its output projection.

    The whole sequence is computed in one pass without a cache: this is the function that the engine
    must reproduce however it chunks, batches or caches.
    """

    def __init__(self, spec: SalaSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = SalaModel(spec)
        if not spec.tie_word_embeddings:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    @overload
    def forward(
        self, tokens: Tensor, cu_seqlens: CuSeqlens | None = None, dense: bool = False
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: CuSeqlens | None = None,
        dense: bool = False,
        *,
        head: Head,
    ) -> Any: ...

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: CuSeqlens | None = None,
        dense: bool = False,
        head: Head | None = None,
    ) -> Any:
        """Compute logits, or what ``head`` makes of the last hidden states.

        Args:
            tokens: [tokens] int64, packed documents; or, without ``cu_seqlens``, [batch, tokens] int64,
                each row one document from position 0, no padding.
            cu_seqlens: where the packed documents begin and end.
            dense: sparse layers attend everything (the training stages before sparsity).
            head: called with the last hidden states and the output table instead of computing logits;
                inside this function, where a sharded table is whole. Returns tensors or a tuple of them.

        Returns:
            [tokens, vocab] or [batch, tokens, vocab] float32; or what ``head`` returned.
        """
        shape = tokens.shape
        if cu_seqlens is None:
            batch, length = shape
            cu_seqlens = CuSeqlens.of([length] * batch, tokens.device)
        hidden = self.model(tokens.flatten(), cu_seqlens, dense)
        if head is not None:
            return head(hidden / self.spec.logit_divisor, self.output_table())
        return self.logits(hidden).view(*shape, -1)

    def output_table(self) -> Tensor:
        """Return the weights of the output projection: [vocab, hidden]."""
        return (self.model.embed_tokens if self.spec.tie_word_embeddings else self.lm_head).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Project last hidden states [..., hidden] to float32 logits [..., vocab]."""
        return linear(hidden / self.spec.logit_divisor, self.output_table()).float()

    def initialise(self, seed: int) -> None:
        """Draw random weights; see :func:`draw_weights`."""
        draw_weights(self, seed)


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw random weights: 0.1 on the vocabulary tables, ``fan_in ** -0.5`` elsewhere, 1 in norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        is_table = "embed_tokens" in name or "lm_head" in name
        std = 0.1 if is_table else parameter.shape[1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
