"""Which layers stay softmax attention: HALO's rule on a sweep of one replaced layer at a time."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from sala_training.convert.teacher import TeacherForCausalLM

MAX_IMPORTANCE = 50.0
_EPSILON = 1e-10


class SelectionError(ValueError):
    """Scores or a number of layers that no selection can be made of."""


@dataclass(frozen=True)
class Score:
    """What a model scores; higher is better in both."""

    recall: float
    """For instance the mean log-probability of the answers to questions about a text."""
    common: float
    """Of what needs no recall; for instance the negative of the bits per byte."""


@contextmanager
def replaced(teacher: TeacherForCausalLM, layer: int, mixer: nn.Module) -> Iterator[None]:
    """Put a mixer in the place of one of the teacher's, for the while of a ``with``."""
    place = teacher.model.layers[layer]
    before = place.self_attn
    place.self_attn = mixer
    try:
        yield
    finally:
        place.self_attn = before


def sweep(
    teacher: TeacherForCausalLM,
    mixers: Mapping[int, nn.Module],
    score: Callable[[nn.Module], Score],
    done: Mapping[int, Score] | None = None,
    on_score: Callable[[int, Score], None] | None = None,
) -> dict[int, Score]:
    """Score the teacher with each layer replaced by its linear one, the others as they were.

    Args:
        teacher: on the device of the mixers.
        mixers: layer -> linear mixer after its alignment.
        score: of a model with the teacher's signature.
        done: scores that are known already, of a sweep that was stopped.
        on_score: told of each new score, to keep it.
    """
    scores = dict(done or {})
    for layer, mixer in mixers.items():
        if layer not in scores:
            with replaced(teacher, layer, mixer):
                scores[layer] = score(teacher)
            if on_score is not None:
                on_score(layer, scores[layer])
    return dict(sorted(scores.items()))


def importance(scores: Sequence[Score]) -> list[float]:
    """Return HALO's importance of each layer: its harm to recall relative to its harm to the rest.

    ``min(50, (max recall - recall) / (max common - common + 1e-10))``, where the maxima are over the
    sweep. The layer whose replacement harms the rest least has 50, unless it also harms recall least: 0.

    Raises:
        SelectionError: no scores, or one that is not finite.
    """
    recall, common = [s.recall for s in scores], [s.common for s in scores]
    if not scores or not all(map(math.isfinite, recall + common)):
        raise SelectionError(f"expected finite scores of every layer, got {list(scores)}")
    best_recall, best_common = max(recall), max(common)
    return [
        min(MAX_IMPORTANCE, (best_recall - r) / (best_common - c + _EPSILON))
        for r, c in zip(recall, common, strict=True)
    ]


def recall_drop(scores: Sequence[Score], teacher: Score) -> list[float]:
    """Return the plain fall of recall from the unchanged teacher (Jet-Nemotron's rule)."""
    return [teacher.recall - score.recall for score in scores]


def choose(
    values: Sequence[float], num_softmax: int, always: Sequence[int] = ()
) -> tuple[int, ...]:
    """Return the layers that stay softmax: ``always`` and the largest values; of equals, the earlier.

    Args:
        values: importance of each layer.
        num_softmax: layers in all, those of ``always`` counted.
        always: layers kept whatever their value; SALA keeps the first and the last.

    Raises:
        SelectionError: ``num_softmax`` is below the number of ``always`` or above that of the layers.
    """
    kept = sorted(set(always))
    if not len(kept) <= num_softmax <= len(values) or any(not 0 <= i < len(values) for i in kept):
        raise SelectionError(
            f"expected {len(kept)} to {len(values)} softmax layers with {kept} among them, got {num_softmax}"
        )
    others = sorted((i for i in range(len(values)) if i not in kept), key=lambda i: -values[i])
    return tuple(sorted([*kept, *others[: num_softmax - len(kept)]]))


def uniform(num_layers: int, num_softmax: int) -> tuple[int, ...]:
    """Return evenly spaced layers, the first and the last among them."""
    if num_softmax < 2:
        return tuple(range(num_softmax))
    return tuple(round(i * (num_layers - 1) / (num_softmax - 1)) for i in range(num_softmax))


def at_random(
    num_layers: int, num_softmax: int, seed: int, always: Sequence[int] = ()
) -> tuple[int, ...]:
    """Return ``always`` and random other layers."""
    values = np.random.default_rng(seed).random(num_layers)
    return choose(values.tolist(), num_softmax, always)


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's tau-b of two rankings: 1 the same order, -1 the opposite one, 0 unrelated or all equal.

    Raises:
        SelectionError: they are of unequal length, or shorter than two.
    """
    if len(first) != len(second) or len(first) < 2:
        raise SelectionError(
            f"expected two rankings of one length, got {len(first)} and {len(second)}"
        )
    signs = [
        (np.sign(first[i] - first[j]), np.sign(second[i] - second[j]))
        for i, j in combinations(range(len(first)), 2)
    ]
    untied = math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))
    return float(sum(a * b for a, b in signs)) / untied if untied else 0.0


def agreement(rankings: Sequence[Sequence[float]]) -> float:
    """Return the mean of Kendall's tau over all pairs of seeds; below 0.5 the selection is not resolved.

    Raises:
        SelectionError: there are fewer than two rankings.
    """
    if len(rankings) < 2:
        raise SelectionError(f"expected the rankings of at least two seeds, got {len(rankings)}")
    return float(np.mean([kendall_tau(a, b) for a, b in combinations(rankings, 2)]))
