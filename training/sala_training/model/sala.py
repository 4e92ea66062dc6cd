"""The SALA decoder; its ``state_dict`` is the released checkpoint, name for name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from sala_kernels.spec import LayerKind, SalaSpec
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

    def forward(self, hidden: Tensor, dense: bool = False) -> Tensor:
        """Transform the residual stream [batch, tokens, hidden]; ``dense`` reaches sparse mixers."""
        x = self.input_layernorm(hidden)
        mixer = self.self_attn
        mixed = mixer(x, dense) if isinstance(mixer, SparseMixer) else mixer(x)
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

    def forward(self, tokens: Tensor, dense: bool = False) -> Tensor:
        """Return the normalised last hidden state [batch, tokens, hidden]."""
        hidden = self.embed_tokens(tokens) * self.scale_emb
        for layer in self.layers:
            hidden = layer(hidden, dense)
        return self.norm(hidden)


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

    def forward(self, tokens: Tensor, dense: bool = False) -> Tensor:
        """Compute logits.

        Args:
            tokens: [batch, tokens] int64, each row one sequence from position 0, no padding.
            dense: sparse layers attend everything (the training stages before sparsity).

        Returns:
            [batch, tokens, vocab] float32.
        """
        return self.logits(self.model(tokens, dense))

    def logits(self, hidden: Tensor) -> Tensor:
        """Project last hidden states [..., hidden] to float32 logits [..., vocab]."""
        table = self.model.embed_tokens if self.spec.tie_word_embeddings else self.lm_head
        return linear(hidden / self.spec.logit_divisor, table.weight).float()

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw random weights: 0.1 on the vocabulary tables, ``fan_in ** -0.5`` elsewhere."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            is_table = "embed_tokens" in name or "lm_head" in name
            std = 0.1 if is_table else parameter.shape[1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
