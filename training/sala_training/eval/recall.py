"""Scores of recall probes: the share of answers that greedy decoding gets right, and their log-probability."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sala_training.data import recall
from sala_training.data.tokenizer import IM_END_ID, encode
from sala_training.eval import intervals

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tokenizers import Tokenizer

    from sala_training.data.recall import Probe
    from sala_training.data.stream import TokenStream
    from sala_training.eval.retrieval import Case
    from sala_training.eval.scorer import Scorer


@dataclass(frozen=True)
class RecallScore:
    """Over all answers of some probes."""

    num_answers: int
    right_frac: float
    right_low: float
    right_high: float
    """95 % interval over probes."""
    answer_nats: float
    """Mean negative log-probability of an answer: goes on moving where the share is 0 or 1."""
    nats_low: float
    nats_high: float

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def evaluate(score: Scorer, probes: Iterable[Probe]) -> RecallScore:
    """Score probes.

    Raises:
        ValueError: there are none.
    """
    right, nats, num = [], [], []
    for probe in probes:
        predictions = score(probe.tokens)
        at = probe.is_answer[1:]
        right.append(float(predictions.is_right[at].sum()))
        nats.append(float(-predictions.log_probs[at].sum()))
        num.append(float(at.sum()))
    if not num:
        raise ValueError("expected at least one probe, got none")
    total = sum(num)
    share = sum(right) / total
    if len(num) == total:  # one answer a probe: a share of independent trials
        low, high = intervals.wilson(int(sum(right)), len(num))
    else:
        low, high = intervals.ratio(right, num)
    return RecallScore(int(total), share, low, high, sum(nats) / total, *intervals.ratio(nats, num))


def mqar(
    score: Scorer, num_pairs: int, length_tokens: int, num: int, vocab_size: int, seed: int = 0
) -> RecallScore:
    """Score ``num`` sequences of :func:`sala_training.data.recall.mqar`."""
    rng = np.random.default_rng((seed, num_pairs, length_tokens))
    return evaluate(
        score, (recall.mqar(rng, num_pairs, length_tokens, vocab_size) for _ in range(num))
    )


def copy(
    score: Scorer,
    distance_tokens: int,
    num: int,
    haystack: TokenStream,
    vocab_size: int,
    seed: int = 0,
) -> RecallScore:
    """Score ``num`` sequences of :func:`sala_training.data.recall.copy`, with held-out text between."""
    rng = np.random.default_rng((seed, distance_tokens))

    def probes() -> Iterable[Probe]:
        for _ in range(num):
            start = haystack.random_paragraph(rng, distance_tokens)
            filler = haystack.stretch(start, distance_tokens).astype(np.int64)
            yield recall.copy(rng, distance_tokens, filler, vocab_size)

    return evaluate(score, probes())


def needle(score: Scorer, cases: Sequence[Case], tokenizer: Tokenizer) -> RecallScore:
    """Score the expected reply to every case, token by token, as if it had been answered so far.

    An answer is right when every token of the reply, the end of the turn included, is the likeliest one.

    Raises:
        ValueError: there are no cases.
    """
    if not cases:
        raise ValueError("expected at least one case, got none")
    right, nats = [], []
    for case in cases:
        reply = [*encode(tokenizer, case.reply), IM_END_ID]
        predictions = score(np.array([*case.prompt_ids, *reply], np.int64))
        right.append(bool(predictions.is_right[-len(reply) :].all()))
        nats.append(float(-predictions.log_probs[-len(reply) :].sum()))
    low, high = intervals.wilson(sum(right), len(cases))
    share = sum(right) / len(cases)
    return RecallScore(len(cases), share, low, high, float(np.mean(nats)), *intervals.mean(nats))
