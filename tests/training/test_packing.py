"""Packed documents are computed as if each were alone; what leaks between them is caught."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from sala_kernels.spec import SalaSpec
from sala_kernels.testing import relative_rms
from sala_training.batch import Batch, CuSeqlens, pack
from sala_training.losses import chunked_cross_entropy
from sala_training.model import ops
from sala_training.model.mixers import LightningMixer, SparseMixer
from sala_training.model.sala import SalaForCausalLM
from sala_training.recipes import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

PLAIN = runpy.run_path(str(Path(__file__).with_name("plain_model.py")))
BOUND = 1e-5
LENGTHS = (300, 1, 64, 107)
# 300 tokens are five blocks, of which four are attended: the first, the own, one local, one chosen
CONFIG: dict[str, Any] = tiny().model | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "mixer_types": ["lightning-attn", "minicpm4"],
    "head_dim": 8,
    "lightning_head_dim": 8,
    "dim_model_base": 8,
    "sparse_config": tiny().model["sparse_config"]
    | {"window_size": 64, "topk": 3, "dense_len": 100},
}


@pytest.fixture(scope="module")
def model() -> SalaForCausalLM:
    model = SalaForCausalLM(SalaSpec.from_config(CONFIG))
    model.initialise(seed=3)
    with torch.no_grad():  # an opinion on every token, so that what is read matters
        model.lm_head.weight.mul_(100)
    return model


@pytest.fixture(scope="module")
def documents() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randint(0, 64, (length + 1,), generator=generator),
            torch.rand(length + 1, generator=generator),
        )
        for length in LENGTHS
    ]


def losses_and_gradients(
    model: SalaForCausalLM, batch: Batch
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    head = partial(chunked_cross_entropy, targets=batch.targets, chunk_tokens=100)
    losses, _ = model(batch.tokens, batch.cu_seqlens, head=head)
    weighted = losses * batch.weights
    return weighted.detach(), list(torch.autograd.grad(weighted.sum(), list(model.parameters())))


def differences(
    model: SalaForCausalLM, documents: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[float, float]:
    """How far the packed losses and the worst gradient are from those of documents alone."""
    packed_losses, packed = losses_and_gradients(model, pack(documents))
    alone = [losses_and_gradients(model, pack([document])) for document in documents]
    gradients = [sum(parts) for parts in zip(*(parts for _, parts in alone), strict=True)]
    losses = torch.cat([losses for losses, _ in alone])
    worst = max(relative_rms(a, b) for a, b in zip(packed, gradients, strict=True))
    return relative_rms(packed_losses, losses), worst


def test_the_packed_loss_is_the_sum_of_separate_losses_and_so_is_its_gradient(
    model: SalaForCausalLM, documents: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    loss, gradient = differences(model, documents)
    assert loss < BOUND
    assert gradient < BOUND


def test_equal_documents_are_one_batch_and_give_the_same(model: SalaForCausalLM) -> None:
    tokens = torch.randint(0, 64, (3, 130), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rows = model(tokens)
        packed = model(tokens.flatten(), CuSeqlens.of([130, 130, 130]))
        uneven = model(tokens.flatten()[:389], CuSeqlens.of([130, 130, 129]))
    assert torch.equal(rows.flatten(0, 1), packed)
    assert relative_rms(uneven, packed[:389]) < BOUND


@pytest.mark.parametrize("mixer", [LightningMixer, SparseMixer])
def test_a_mixer_insists_on_the_boundaries(mixer: type[LightningMixer | SparseMixer]) -> None:
    with pytest.raises(TypeError, match="cu_seqlens"):
        mixer(SalaSpec.from_config(CONFIG))(torch.zeros(4, 32))


def one_document(cu_seqlens: CuSeqlens) -> CuSeqlens:
    """The same row with its boundaries lost, but not its positions."""
    whole = CuSeqlens.of([cu_seqlens.num_tokens])
    return CuSeqlens(whole.offsets, cu_seqlens.positions, whole.lengths)


def state_across_documents(patch: pytest.MonkeyPatch) -> None:
    right = ops.lightning
    patch.setattr(ops, "lightning", lambda *args: right(*args[:-1], one_document(args[-1])))


def attention_across_documents(patch: pytest.MonkeyPatch) -> None:
    right = ops.attend
    patch.setattr(ops, "attend", lambda *args: right(*args[:-1], one_document(args[-1])))


@pytest.mark.parametrize("leak", [state_across_documents, attention_across_documents])
def test_a_planted_leak_is_caught(
    model: SalaForCausalLM,
    documents: list[tuple[torch.Tensor, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    leak: Callable[[pytest.MonkeyPatch], None],
) -> None:
    leak(monkeypatch)
    loss, gradient = differences(model, documents)
    assert loss > 1000 * BOUND
    assert gradient > 1000 * BOUND


def of_formulas(
    model: SalaForCausalLM, documents: list[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """How far the packed logits are from the formulas' of each document."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    batch = pack(documents)
    with torch.no_grad(), np.errstate(over="ignore"):
        packed = model(batch.tokens, batch.cu_seqlens).split(LENGTHS)
    expected = [PLAIN["logits"](weights, CONFIG, d[0][:-1].numpy()) for d in documents]
    return max(relative_rms(a, torch.from_numpy(b)) for a, b in zip(packed, expected, strict=True))


def test_packed_documents_equal_the_formulas_and_a_wrong_decay_does_not(
    model: SalaForCausalLM,
    documents: list[tuple[torch.Tensor, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert of_formulas(model, documents) < 2 * BOUND
    right = ops.lightning_chunked

    def growing(q: Any, k: Any, v: Any, slopes: torch.Tensor, scale: float) -> torch.Tensor:
        return right(q, k, v, -slopes, scale)

    monkeypatch.setattr(ops, "lightning_chunked", growing)
    assert not of_formulas(model, documents) < 1000 * BOUND
