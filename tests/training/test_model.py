from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sala_kernels.spec import SalaSpec
from sala_kernels.testing import relative_rms
from sala_training.model import ops
from sala_training.model.mixers import RMSNorm
from sala_training.model.sala import SalaForCausalLM
from sala_training.recipes import tiny

PLAIN = runpy.run_path(str(Path(__file__).with_name("plain_model.py")))
# float32 against float64, through three layers
BOUND = 2e-5
TOKENS = 400
# four blocks of seven: three forced (first, own, one local), one chosen by content
CONFIG: dict[str, Any] = tiny().model | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "mixer_types": ["minicpm4", "lightning-attn", "minicpm4"],
    "head_dim": 8,
    "lightning_head_dim": 8,
    "dim_model_base": 8,
    "sparse_config": tiny().model["sparse_config"]
    | {"window_size": 64, "topk": 3, "dense_len": 300},
}


@pytest.fixture(scope="module")
def model() -> SalaForCausalLM:
    model = SalaForCausalLM(SalaSpec.from_config(CONFIG))
    model.initialise(seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # a norm whose weights are one would hide where it stands
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif "q_proj" in name or "k_proj" in name:  # decided attention: blocks matter
                parameter.mul_(2)
    return model.eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (TOKENS,), generator=torch.Generator().manual_seed(5))


def oracle(
    model: SalaForCausalLM, tokens: torch.Tensor, error: str = "", **changes: Any
) -> torch.Tensor:
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    with np.errstate(over="ignore"):
        return torch.from_numpy(PLAIN["logits"](weights, CONFIG | changes, tokens.numpy(), error))


@pytest.fixture(scope="module")
def expected(model: SalaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    return oracle(model, tokens)


@torch.no_grad()
def run(model: SalaForCausalLM, tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
    return model(tokens[None], **arguments)[0]


# around windows (16, 32, 128), blocks and chunks (64), the selected blocks (256) and the switch (300)
@pytest.mark.parametrize(
    "length",
    [
        1,
        2,
        15,
        16,
        17,
        31,
        32,
        63,
        64,
        65,
        127,
        128,
        129,
        191,
        255,
        256,
        257,
        298,
        299,
        300,
        301,
        400,
    ],
)
def test_every_prefix_equals_the_formulas(
    model: SalaForCausalLM, tokens: torch.Tensor, expected: torch.Tensor, length: int
) -> None:
    assert relative_rms(run(model, tokens[:length]), expected[:length]) < BOUND


@pytest.mark.parametrize("error", PLAIN["ERRORS"])
def test_the_bound_rejects_a_planted_error(
    model: SalaForCausalLM, tokens: torch.Tensor, expected: torch.Tensor, error: str
) -> None:
    # beyond any doubt of rounding, at the worst token: a selection goes wrong for few of them
    wrong = oracle(model, tokens, error)
    worst = max(relative_rms(wrong[i], expected[i]) for i in range(TOKENS))
    assert worst > 100 * BOUND
    assert relative_rms(run(model, tokens), wrong) > 10 * BOUND


def test_selection_changes_the_answer(
    model: SalaForCausalLM, tokens: torch.Tensor, expected: torch.Tensor
) -> None:
    dense = run(model, tokens, dense=True)
    everything = CONFIG["sparse_config"] | {"dense_len": TOKENS + 1}
    assert relative_rms(dense, oracle(model, tokens, sparse_config=everything)) < BOUND
    # token 299 is the 300th
    assert relative_rms(dense[:299], expected[:299]) < BOUND
    assert relative_rms(dense[299:], expected[299:]) > 100 * BOUND


def test_always_sparse_starts_where_there_are_blocks_to_drop(
    model: SalaForCausalLM, tokens: torch.Tensor, expected: torch.Tensor
) -> None:
    always = SalaForCausalLM(SalaSpec.from_config(CONFIG | {"always_sparse": True}))
    always.load_state_dict(model.state_dict())
    actual = run(always, tokens)
    from_the_start = CONFIG["sparse_config"] | {"dense_len": 0}
    assert relative_rms(actual, oracle(model, tokens, sparse_config=from_the_start)) < BOUND
    assert relative_rms(actual[:256], expected[:256]) < BOUND
    assert relative_rms(actual[256:299], expected[256:299]) > 100 * BOUND


def test_a_row_does_not_see_the_others(model: SalaForCausalLM, tokens: torch.Tensor) -> None:
    rows = torch.stack((tokens[:300], tokens[100:]))
    with torch.no_grad():
        both = model(rows)
    for row, output in zip(rows, both, strict=True):
        assert relative_rms(output, run(model, row)) < BOUND


def test_tiles_of_queries_change_nothing(
    model: SalaForCausalLM, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, tokens)
    monkeypatch.setattr(ops, "_SPARSE_QUERY_TILE_TOKENS", 37)
    assert relative_rms(run(model, tokens), whole) < BOUND


def test_every_weight_learns_through_the_selection(
    model: SalaForCausalLM, tokens: torch.Tensor
) -> None:
    model.zero_grad()
    model(tokens[None]).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    model.zero_grad()


def test_the_norm_rounds_before_its_weight() -> None:
    norm = RMSNorm(256, 1e-6).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        rounded_first = exact.to(torch.bfloat16) * norm.weight
        rounded_last = (exact * norm.weight.double()).to(torch.bfloat16)
        assert torch.equal(norm(x), rounded_first)
        assert not torch.equal(rounded_first, rounded_last)
