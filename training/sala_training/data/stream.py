"""Token streams on disk, where they may be cut, and an exact encoder for short ASCII phrases."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from sala_training.data.tokenizer import EOS_ID, encode

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

_ABBREVIATIONS = (
    "Mr",
    "Mrs",
    "Ms",
    "Dr",
    "St",
    "vs",
    "Fig",
    "No",
    "Prof",
    "pp",
    "p",
    "cf",
    "ed",
    "J",
    "M",
)

# the tokenizer's pre-tokenizer for ASCII text, in the syntax of the standard library
_ASCII_PIECES = re.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\n+|[^\S\n]+(?!\S)|[^\S\n]+"
)


class PhraseEncoder:
    """Encodes short ASCII phrases word by word from a memo: equal to the tokenizer, far faster."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap ``tokenizer``; phrases must not contain special tokens."""
        self._tokenizer = tokenizer
        self._memo: dict[str, list[int]] = {}

    def encode(self, phrase: str) -> list[int]:
        """Return the token ids of ``phrase``.

        Raises:
            ValueError: the phrase is not ASCII.
        """
        if not phrase.isascii():
            raise ValueError(f"expected an ASCII phrase, got {phrase!r}")
        ids: list[int] = []
        memo = self._memo
        for piece in _ASCII_PIECES.findall(phrase):
            known = memo.get(piece)
            if known is None:
                known = memo[piece] = encode(self._tokenizer, piece)
            ids += known
        return ids


class TokenStream:
    """Documents as one row of tokens, each document ended by ``</s>``, with its cutting points.

    Two kinds of points allow pieces to be joined without changing how the joined text would be
    tokenised: paragraph starts, and sentence starts inside a paragraph (a word with its space).
    """

    def __init__(self, tokens: NDArray[np.uint16], tokenizer: Tokenizer) -> None:
        """Index ``tokens``.

        Args:
            tokens: [tokens] uint16; may be a read-only memory map.
            tokenizer: the one that made them.

        Raises:
            ValueError: no paragraph starts in the tokens.
        """
        self.tokens = tokens
        table = _TokenTable(tokenizer)
        self.newline_id = table.newline_id
        body = np.asarray(tokens)
        is_break = (body == table.newline_id) | (body == EOS_ID)
        after_break = np.zeros(len(body), bool)
        after_break[0] = True
        after_break[1:] = is_break[:-1] & ~is_break[1:]
        starts_sentence = np.zeros(len(body), bool)
        ends = table.ends_sentence[body]
        ends[1:] &= ~table.is_abbreviation[body[:-1]]
        starts_sentence[1:] = ends[:-1] & table.starts_capital_word[body[1:]]
        self.starts_paragraph: NDArray[np.bool_] = after_break
        """[tokens] bool; whether a paragraph starts at this token."""
        self.paragraph_starts: NDArray[np.int64] = np.flatnonzero(after_break)
        """[paragraphs] int64; the token before is ``\\n\\n`` or ``</s>``."""
        self.sentence_starts: NDArray[np.int64] = np.flatnonzero(after_break | starts_sentence)
        """[sentences] int64; paragraph starts included."""
        is_newline = table.is_newline[body] | is_break
        self.can_end: NDArray[np.bool_] = np.zeros(len(body) + 1, bool)
        """[tokens + 1] bool; a stretch may end before this token and be followed by a newline."""
        self.can_end[1:-1] = (table.starts_word[body[1:]] | is_newline[1:]) & ~is_newline[:-1]
        if len(self.paragraph_starts) == 0:
            raise ValueError(f"expected paragraphs in the stream, got none in {len(body)} tokens")

    @classmethod
    def open(cls, path: Path, tokenizer: Tokenizer) -> TokenStream:
        """Map a file of little-endian uint16 tokens and index it."""
        return cls(np.memmap(path, dtype="<u2", mode="r"), tokenizer)

    def __len__(self) -> int:
        return len(self.tokens)

    def stretch(self, start: int, num_tokens: int) -> NDArray[np.uint16]:
        """Copy ``num_tokens`` tokens from ``start``, with ``</s>`` written as a paragraph break."""
        body = np.array(self.tokens[start : start + num_tokens])
        body[body == EOS_ID] = self.newline_id
        return body

    def random_paragraph(self, rng: np.random.Generator, num_tokens: int) -> int:
        """Return a random paragraph start with at least ``num_tokens`` tokens after it.

        Raises:
            ValueError: the stream is too short.
        """
        limit = int(np.searchsorted(self.paragraph_starts, len(self) - num_tokens, side="right"))
        if limit == 0:
            raise ValueError(f"expected a stream of more than {num_tokens} tokens, got {len(self)}")
        return int(self.paragraph_starts[int(rng.integers(limit))])


class _TokenTable:
    """What each token of the vocabulary looks like, as look-up tables ([vocab] bool)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.get_vocab_size()
        texts = [
            (tokenizer.id_to_token(i) or "").replace("Ġ", " ").replace("Ċ", "\n")
            for i in range(size)
        ]
        newline = encode(tokenizer, "\n\n")
        if len(newline) != 1:
            raise ValueError(
                "expected a tokenizer with one token for an empty line: train on paragraphs"
            )
        self.newline_id = newline[0]
        self.is_newline = np.array([bool(text) and text.strip("\n") == "" for text in texts])
        self.starts_word = np.array([len(t) > 1 and t[0] == " " and t[1].isalpha() for t in texts])
        self.starts_capital_word = np.array(
            [len(t) > 1 and t[0] == " " and "A" <= t[1] <= "Z" for t in texts]
        )
        self.ends_sentence = np.array([t in (".", "!", "?", '."', '!"', '?"', ".)") for t in texts])
        self.is_abbreviation = np.array([t.strip() in _ABBREVIATIONS for t in texts])
