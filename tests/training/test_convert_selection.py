"""HALO's selection rule, on the published sweeps and on hand-made cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sala_training.convert.selection import (
    Score,
    SelectionError,
    agreement,
    at_random,
    choose,
    importance,
    kendall_tau,
    recall_drop,
    replaced,
    sweep,
    uniform,
)
from sala_training.convert.spec import TeacherSpec
from sala_training.convert.teacher import TeacherForCausalLM

PUBLISHED = json.loads(Path(__file__).with_name("halo_sweeps.json").read_text())["sweeps"]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_published_sweeps_give_the_published_layers(name: str) -> None:
    published = PUBLISHED[name]
    scores = [Score(recall, common) for recall, common in published["scores"]]
    chosen = set(choose(importance(scores), len(scores) // 4))
    # one layer of HypeNet-5B is not the one that its scores give
    swapped = {"HypeNet-5B": ({34}, {31})}.get(name, (set(), set()))
    assert (chosen - set(published["layers"]), set(published["layers"]) - chosen) == swapped


def test_importance_is_harm_to_recall_over_harm_to_the_rest() -> None:
    scores = [Score(0.9, 0.5), Score(0.5, 0.4), Score(0.8, 0.3), Score(0.7, 0.6)]
    # the last one harms the rest least: its denominator is the epsilon
    assert importance(scores) == pytest.approx([0, 2, 1 / 3, 50])
    assert importance([Score(1, 1), Score(0, 0)]) == pytest.approx([0, 1])
    assert recall_drop(scores, Score(1.0, 0.6)) == pytest.approx([0.1, 0.5, 0.2, 0.3])
    for bad in ([], [Score(float("nan"), 0.0)]):
        with pytest.raises(SelectionError, match="finite scores"):
            importance(bad)


def test_choosing_is_deterministic_and_keeps_what_must_be() -> None:
    assert choose([1, 3, 2, 3, 3], 2) == (1, 3)
    assert choose([1, 3, 2, 3, 3], 3, always=(0, 4)) == (0, 1, 4)
    assert choose([1.0] * 5, 0) == ()
    assert choose([5, 4, 3, 2, 1], 5) == (0, 1, 2, 3, 4)
    for num, always in ((1, (0, 4)), (6, ()), (2, (7,))):
        with pytest.raises(SelectionError, match="softmax layers"):
            choose([1.0] * 5, num, always)


def test_the_alternatives() -> None:
    assert uniform(16, 4) == (0, 5, 10, 15)
    assert [uniform(8, n) for n in (0, 1, 2)] == [(), (0,), (0, 7)]
    drawn = {at_random(16, 4, seed, always=(0, 15)) for seed in range(8)}
    assert len(drawn) > 4
    assert all(len(layers) == 4 and {0, 15} <= set(layers) for layers in drawn)
    assert at_random(16, 4, 3) == at_random(16, 4, 3)


def test_kendalls_tau() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    # one pair of six the other way round
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    # tau-b: five of six pairs untied on the left
    assert kendall_tau([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / (5 * 6) ** 0.5)
    assert kendall_tau([1, 1], [1, 2]) == 0
    assert agreement([[1, 2, 3], [1, 2, 3], [3, 2, 1]]) == pytest.approx(-1 / 3)
    for rankings in ([[1, 2]], [[1, 2], [1]], [[1], [1]]):
        with pytest.raises(SelectionError):
            agreement(rankings)


def test_a_sweep_replaces_one_layer_at_a_time_and_goes_on_where_it_stopped() -> None:
    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: torch.Tensor, cu_seqlens: object) -> torch.Tensor:
            return torch.full_like(x, self.value)

    config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 2, "rms_norm_eps": 1e-6}
    teacher = TeacherForCausalLM(TeacherSpec.from_config(config | {"max_position_embeddings": 8}))
    original = [layer.self_attn for layer in teacher.model.layers]

    def score(model: nn.Module) -> Score:
        mixers = [layer.self_attn for layer in model.model.layers]
        assert sum(a is not b for a, b in zip(mixers, original, strict=True)) == 1
        (value,) = [m.value for m in mixers if isinstance(m, Constant)]
        return Score(value, mixers.index(next(m for m in mixers if isinstance(m, Constant))))

    told: list[int] = []
    done = {1: Score(-1, -1)}
    replacements = {i: Constant(i / 2) for i in range(3)}
    scores = sweep(teacher, replacements, score, done, lambda layer, _: told.append(layer))
    assert scores == {0: Score(0, 0), 1: Score(-1, -1), 2: Score(1.0, 2)}
    assert told == [0, 2]
    assert [layer.self_attn for layer in teacher.model.layers] == original
    with pytest.raises(KeyError), replaced(teacher, 0, replacements[0]):
        raise KeyError
    assert teacher.model.layers[0].self_attn is original[0]
