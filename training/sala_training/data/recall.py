"""Recall in its barest form, as tokens: pairs to look up (MQAR), and spans to copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sala_training.data.tokenizer import BOS_ID, SPECIAL_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

COPY_SPAN_TOKENS = 64
COPY_CUE_TOKENS = 4
"""First tokens of a repeated span, by which it is recognised; they are read, not scored."""


@dataclass(frozen=True)
class Probe:
    """A sequence and the tokens of it that can only be known by looking back."""

    tokens: NDArray[np.int64]
    """[length + 1]."""
    is_answer: NDArray[np.bool_]
    """[length + 1]; the token at this index is looked up."""


def mqar(rng: np.random.Generator, num_pairs: int, length_tokens: int, vocab_size: int) -> Probe:
    """Make one sequence of multi-query associative recall.

    After ``<s>`` come ``num_pairs`` pairs of a key and its value, then random tokens, among which each
    key returns once at a uniformly random place, followed by its value. Keys, values and what is between
    are of three disjoint parts of the vocabulary, drawn anew for each sequence.

    Args:
        rng: of all that is drawn.
        num_pairs: pairs, all different.
        length_tokens: tokens a model reads.
        vocab_size: of the model; the special tokens are not used.

    Raises:
        ValueError: no room for the pairs twice, or too few tokens for them.
    """
    usable = vocab_size - len(SPECIAL_TOKENS)
    if length_tokens < 4 * num_pairs or usable < 4 * num_pairs:
        raise ValueError(
            f"expected at least {4 * num_pairs} tokens of length and of vocabulary for {num_pairs} pairs, "
            f"got {length_tokens} and {usable}"
        )
    drawn = len(SPECIAL_TOKENS) + rng.permutation(usable)
    keys, values, others = (
        drawn[:num_pairs],
        drawn[num_pairs : 2 * num_pairs],
        drawn[2 * num_pairs :],
    )
    tokens = rng.choice(others, length_tokens + 1)
    is_answer = np.zeros(length_tokens + 1, bool)
    tokens[0] = BOS_ID
    first = 1 + 2 * num_pairs
    tokens[1:first:2], tokens[2:first:2] = keys, values
    # gaps between the questions: a uniformly random way to place pairs that do not overlap
    room = length_tokens + 1 - first - 2 * num_pairs
    places = first + np.sort(rng.choice(room + num_pairs, num_pairs, replace=False))
    places += np.arange(num_pairs)
    asked = rng.permutation(num_pairs)
    tokens[places], tokens[places + 1] = keys[asked], values[asked]
    is_answer[places + 1] = True
    return Probe(tokens.astype(np.int64), is_answer)


def copy(
    rng: np.random.Generator, distance_tokens: int, filler: NDArray[np.int64], vocab_size: int
) -> Probe:
    """Make a random span, then text, then the span again.

    Args:
        rng: of the span.
        distance_tokens: from the start of the span to its repetition.
        filler: at least ``distance_tokens`` of text between them.
        vocab_size: of the model; the special tokens are not used.

    Raises:
        ValueError: the distance is shorter than the span, or the filler than the distance.
    """
    between = distance_tokens - COPY_SPAN_TOKENS
    if between < 0 or len(filler) < between:
        raise ValueError(
            f"expected a distance of at least {COPY_SPAN_TOKENS} and as much text, "
            f"got {distance_tokens} and {len(filler)}"
        )
    span = rng.integers(len(SPECIAL_TOKENS), vocab_size, COPY_SPAN_TOKENS)
    tokens = np.concatenate([[BOS_ID], span, filler[:between], span]).astype(np.int64)
    is_answer = np.zeros(len(tokens), bool)
    is_answer[COPY_CUE_TOKENS - COPY_SPAN_TOKENS :] = True
    return Probe(tokens, is_answer)
