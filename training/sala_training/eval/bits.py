"""Bits per byte on held-out text: a loss that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sala_training.data.tokenizer import BOS_ID, EOS_ID, SPECIAL_TOKENS
from sala_training.eval import intervals

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LogProbs = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""[length + 1] int64 -> [length] float64: natural log-probability of each token after the first."""


@dataclass(frozen=True)
class Bits:
    """Compression of a text by a model."""

    bits_per_byte: float
    num_tokens: int
    num_bytes: int
    low: float
    high: float
    """95 % interval of the bits per byte over windows."""


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return the UTF-8 bytes each token stands for, [vocab] int64; 0 for special tokens."""
    size = tokenizer.get_vocab_size()
    # byte-level BPE writes each byte as one character
    lengths = [len(tokenizer.id_to_token(i) or "") for i in range(size)]
    lengths[: len(SPECIAL_TOKENS)] = [0] * len(SPECIAL_TOKENS)
    return np.array(lengths, np.int64)


def bits_per_byte(
    log_probs: LogProbs,
    tokens: NDArray[np.uint16],
    tokenizer: Tokenizer,
    window_tokens: int,
    max_windows: int | None = None,
) -> Bits:
    """Score ``tokens`` in windows that do not overlap, each read from its own ``<s>``.

    Args:
        log_probs: the model.
        tokens: [tokens] uint16, documents ended by ``</s>``; those ends are read but not scored.
        tokenizer: the one that made them.
        window_tokens: tokens scored together; the last, shorter window is left out.
        max_windows: score at most so many windows, evenly spaced.

    Raises:
        ValueError: there is less than one window.
    """
    num_windows = len(tokens) // window_tokens
    if num_windows == 0:
        raise ValueError(f"expected at least {window_tokens} tokens, got {len(tokens)}")
    chosen = np.arange(num_windows)
    if max_windows is not None and max_windows < num_windows:
        chosen = np.linspace(0, num_windows - 1, max_windows).astype(np.int64)
    lengths = token_bytes(tokenizer)
    num_tokens = 0
    bits, window_bytes = [], []
    for window in chosen.tolist():
        body = np.asarray(tokens[window * window_tokens : (window + 1) * window_tokens], np.int64)
        scored = body != EOS_ID
        values = log_probs(np.concatenate([[BOS_ID], body]))
        bits.append(-float(np.asarray(values)[scored].sum()) / math.log(2))
        window_bytes.append(float(lengths[body].sum()))
        num_tokens += int(scored.sum())
    num_bytes = int(sum(window_bytes))
    low, high = intervals.ratio(bits, window_bytes)
    return Bits(sum(bits) / num_bytes, num_tokens, num_bytes, low, high)
