"""Probes of recall, loss by position and their intervals, on scorers whose scores are known."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from sala_training.data import recall as probes
from sala_training.data.tokenizer import BOS_ID, SPECIAL_TOKENS
from sala_training.eval import by_position, intervals, recall
from sala_training.eval.retrieval import placements
from sala_training.eval.scorer import Predictions

VOCAB = 300


def lookup(tokens: np.ndarray, memory_tokens: int | None = None) -> Predictions:
    """Predicts what followed the last earlier occurrence of a token, if that is not too far back."""
    seen: dict[int, tuple[int, int]] = {}
    right = []
    for i, (token, following) in enumerate(
        zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)
    ):
        expected, at = seen.get(token, (-1, 0))
        right.append(expected == following and (memory_tokens is None or i - at <= memory_tokens))
        seen[token] = (following, i)
    is_right = np.array(right)
    return Predictions(np.where(is_right, -0.1, -5.0), is_right)


def test_mqar_asks_every_pair_once_after_all_were_told() -> None:
    rng = np.random.default_rng(0)
    depths = []
    for _ in range(40):
        probe = probes.mqar(rng, 8, 128, VOCAB)
        assert len(probe.tokens) == 129
        assert probe.tokens[0] == BOS_ID
        told = dict(probe.tokens[1:17].reshape(8, 2).tolist())
        at = np.flatnonzero(probe.is_answer)
        assert {int(probe.tokens[i - 1]): int(probe.tokens[i]) for i in at} == told
        assert at.min() > 16
        between = np.delete(probe.tokens[17:], np.concatenate([at - 17, at - 18]))
        assert not set(between.tolist()) & (
            set(told) | set(told.values()) | set(range(len(SPECIAL_TOKENS)))
        )
        depths += at.tolist()
    # uniform: a quarter of the questions in each quarter of what follows the pairs
    quarters = np.histogram(depths, bins=4, range=(17, 129))[0] / len(depths)
    assert quarters == pytest.approx([0.25] * 4, abs=0.1)
    for length, vocab in ((31, VOCAB), (128, 36)):
        with pytest.raises(ValueError, match="for 8 pairs"):
            probes.mqar(rng, 8, length, vocab)


def test_a_model_with_a_short_memory_recalls_less() -> None:
    score = recall.mqar(lookup, 8, 256, 20, VOCAB)
    assert (score.num_answers, score.right_frac) == (160, 1.0)
    assert score.answer_nats == pytest.approx(0.1)
    short = recall.mqar(partial(lookup, memory_tokens=64), 8, 256, 20, VOCAB)
    # of the 238 places after the pairs about 55 lie within its memory
    assert 0.1 < short.right_low < short.right_frac < short.right_high < 0.4
    assert short.nats_low < short.answer_nats < short.nats_high
    assert short == recall.mqar(partial(lookup, memory_tokens=64), 8, 256, 20, VOCAB)
    with pytest.raises(ValueError, match="at least one probe"):
        recall.mqar(lookup, 8, 256, 0, VOCAB)


def test_a_copy_is_the_span_again_at_its_distance(held_out) -> None:
    filler = np.arange(100, 300)
    probe = probes.copy(np.random.default_rng(0), 200, filler, VOCAB)
    assert len(probe.tokens) == 1 + 200 + 64
    assert np.array_equal(probe.tokens[1:65], probe.tokens[201:265])
    assert np.array_equal(probe.tokens[65:201], filler[:136])
    assert np.flatnonzero(probe.is_answer).tolist() == list(range(205, 265))
    near, far = (
        recall.copy(partial(lookup, memory_tokens=300), distance, 6, held_out, VOCAB)
        for distance in (128, 1024)
    )
    assert near.right_frac > 0.5 > 0.1 > far.right_frac
    for distance in (63, 300):
        with pytest.raises(ValueError, match="distance of at least 64"):
            probes.copy(np.random.default_rng(0), distance, filler, VOCAB)


def test_a_needle_is_right_when_its_whole_reply_is(tokenizer, held_out) -> None:
    cases = placements(6, 512, 0, tokenizer, held_out)

    def half(tokens: np.ndarray) -> Predictions:
        # one token of the reply is not the likeliest, in every other case
        half.calls += 1
        is_right = np.ones(len(tokens) - 1, bool)
        is_right[-3] = half.calls % 2
        return Predictions(np.full(len(tokens) - 1, -0.5), is_right)

    half.calls = 0
    score = recall.needle(half, cases, tokenizer)
    assert (score.num_answers, score.right_frac) == (6, 0.5)
    assert score.answer_nats > 3 * 0.5
    with pytest.raises(ValueError, match="at least one case"):
        recall.needle(half, [], tokenizer)


def test_loss_by_position_is_the_mean_of_its_bins_over_the_same_documents() -> None:
    def score(tokens: np.ndarray) -> Predictions:
        positions = np.arange(len(tokens) - 1)
        return Predictions(-(tokens[0] + (positions >= 256)).astype(float), positions >= 0)

    documents = [np.full(n, level) for n, level in ((601, 1), (700, 2), (600, 50))]
    bins = by_position.loss_by_position(score, documents, 600)
    assert [(b.start, b.end) for b in bins] == [
        (0, 64),
        (64, 128),
        (128, 256),
        (256, 512),
        (512, 600),
    ]
    # the third document is too short, and takes no part in any bin
    assert [b.nats for b in bins] == pytest.approx([1.5, 1.5, 1.5, 2.5, 2.5])
    assert (bins[0].low, bins[0].high) == (1.0, 2.0)
    with pytest.raises(ValueError, match="the longest has 700"):
        by_position.loss_by_position(score, documents, 700)


def test_intervals() -> None:
    # Wilson's, as tabulated: 8 of 10, 0 of 20
    assert intervals.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert intervals.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = intervals.mean(values.tolist())
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.03)
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.15)
    # a ratio of sums, not a mean of ratios
    assert intervals.ratio([1, 1], [1, 1]) == (1.0, 1.0)
    low, high = intervals.ratio([10, 0], [10, 1])
    assert (low, high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="at least one unit"):
        intervals.ratio([], [])
