"""Training samples by (seed, step, index): plain text, documents with facts and questions, short chats.

Every sample is assembled from token lists that meet at word or paragraph boundaries, so that its tokens
equal those of the rendered chat. The questions of a sample follow its text in several turns of one chat.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sala_training.data import phrases, smalltalk
from sala_training.data.phrases import Fact, FactMaker
from sala_training.data.stream import PhraseEncoder, TokenStream
from sala_training.data.tokenizer import BOS_ID, IM_END_ID, encode, load, render

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

MIN_RECALL_TOKENS = 256
_MAX_FACT_FRAC = 0.2
_MAX_TURN_FRAC = 0.35
"""Bounds on the share of a recall sample taken by facts, and by questions with their answers."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Shares of the kinds of sample, and the loss weights of their tokens."""

    text: float = 0.5
    recall: float = 0.4
    chat: float = 0.1
    """The three are normalised to a sum of 1."""
    answer_weight: float = 8.0
    """Tokens of an answer and the ``<|im_end|>`` after it; text of the corpus weighs 1."""
    haystack_weight: float = 1.0
    """Corpus text inside a recall sample's question."""
    max_facts: int = 40
    max_turns: int = 12


@dataclass(frozen=True)
class PlacedFact:
    """Where a fact stands in a sample."""

    fact: Fact
    start: int
    """Index of its first token."""
    num_tokens: int


@dataclass(frozen=True)
class Turn:
    """One question with its answer."""

    question: str
    answer: str
    value: str
    answer_start: int
    answer_end: int
    """The answer is ``tokens[answer_start:answer_end]``; ``<|im_end|>`` follows."""


_Round = tuple[list[int], list[int], str, str, str]
"""One question and its answer: tokens of both, text of both, the value asked for."""


@dataclass(frozen=True)
class Sample:
    """One sequence with what a test wants to know of it."""

    kind: str
    tokens: NDArray[np.uint16]
    """[length + 1] uint16."""
    weights: NDArray[np.float32]
    """[length + 1] float32; the weight of predicting the token at the same index; the first is 0."""
    facts: tuple[PlacedFact, ...] = ()
    turns: tuple[Turn, ...] = ()


class ChatPieces:
    """Token lists between the messages of a chat, cut out of the rendered template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Render a chat of marks and split it at them."""
        marks = ["\x01", "\x02", "\x03", "\x04", "\x05"]
        roles = ["system", "user", "assistant", "user", "assistant"]
        rounds = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        with_system = _split(render(rounds), marks)
        without = _split(render(rounds[1:]), marks[1:])
        if without[1:] != with_system[2:] or with_system[1] != with_system[3]:
            raise ValueError("expected a chat template whose turns do not depend on earlier ones")
        self.open_system = encode(tokenizer, with_system[0])
        """``<s><|im_start|>system\\n``"""
        self.system_to_user = encode(tokenizer, with_system[1])
        self.open_user = encode(tokenizer, without[0])
        self.user_to_assistant = encode(tokenizer, without[1])
        self.assistant_to_user = encode(tokenizer, without[2])
        """Starts with ``<|im_end|>``, the last token an answer is trained on."""
        self.close = encode(tokenizer, without[4])
        if self.assistant_to_user[0] != IM_END_ID or self.close[0] != IM_END_ID:
            raise ValueError("expected a chat template that ends a turn with <|im_end|>")


def _split(text: str, marks: Sequence[str]) -> list[str]:
    pieces = []
    for mark in marks:
        before, text = text.split(mark)
        pieces.append(before)
    return [*pieces, text]


class Writer:
    """A sequence under construction: token lists with one weight each."""

    def __init__(self) -> None:
        self.tokens: list[NDArray[np.uint16]] = []
        self.weights: list[NDArray[np.float32]] = []
        self.num_tokens = 0

    def add(self, tokens: Sequence[int] | NDArray[np.uint16], weight: float) -> int:
        """Append ``tokens`` and return the index of the first."""
        start = self.num_tokens
        self.tokens.append(np.asarray(tokens, np.uint16))
        self.weights.append(np.full(len(tokens), weight, np.float32))
        self.num_tokens += len(tokens)
        return start

    def finish(self, num_tokens: int) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
        """Return both rows, cut to ``num_tokens``; the first token is never predicted."""
        tokens = np.concatenate(self.tokens)[:num_tokens]
        weights = np.concatenate(self.weights)[:num_tokens]
        weights[0] = 0.0
        return tokens, weights


@dataclass(frozen=True)
class Haystack:
    """A stretch of the stream with facts in its cuts."""

    pieces: tuple[tuple[NDArray[np.uint16], Fact | None], ...]
    """In order: tokens, and the fact they state (None for text). A fact's piece ends with a paragraph
    break where one starts there; inside a paragraph it starts with the space before its first word."""
    start: int
    """Of the stretch in the stream."""
    num_text_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens of text and facts together."""
        return sum(len(piece) for piece, _ in self.pieces)


class FactPlacer:
    """Puts given facts at given depths into any stretch, to an exact total length."""

    def __init__(
        self,
        stream: TokenStream,
        encoder: PhraseEncoder,
        facts: Sequence[Fact],
        depths: Sequence[float],
    ) -> None:
        """Encode the facts both ways.

        Args:
            stream: the text.
            encoder: of the stream's tokenizer.
            facts: what to place.
            depths: [facts] in [0, 1), share of the text before each; moved to the next boundary.
        """
        order = np.argsort(np.asarray(depths), kind="stable")
        self._stream = stream
        self._facts = [facts[int(i)] for i in order]
        self._depths = np.asarray(depths, np.float64)[order]
        newline = [stream.newline_id]
        self._as_paragraph = [
            np.array(encoder.encode(f.text) + newline, np.uint16) for f in self._facts
        ]
        self._in_paragraph = [
            np.array(encoder.encode(" " + f.text), np.uint16) for f in self._facts
        ]
        self._paragraph_costs = np.array([len(t) for t in self._as_paragraph])
        self._inner_costs = np.array([len(t) for t in self._in_paragraph])

    @property
    def max_tokens(self) -> int:
        """Most tokens the facts can take, wherever they stand."""
        return int(np.maximum(self._paragraph_costs, self._inner_costs).sum())

    def positions(self, start: int, num_tokens: int) -> NDArray[np.int64]:
        """Return the boundary of each fact, in order, for a stretch of ``num_tokens`` from ``start``."""
        starts = self._stream.sentence_starts
        targets = start + (self._depths * num_tokens).astype(np.int64)
        last = int(np.searchsorted(starts, start + num_tokens)) - 1
        return starts[np.minimum(np.searchsorted(starts, targets), last)]

    def cost(self, positions: NDArray[np.int64]) -> int:
        """Return the tokens the facts take at these positions."""
        is_paragraph = self._stream.starts_paragraph[positions]
        return int(np.where(is_paragraph, self._paragraph_costs, self._inner_costs).sum())

    def build(self, start: int, num_tokens: int, positions: NDArray[np.int64]) -> Haystack:
        """Return the stretch of ``num_tokens`` with the facts at ``positions``."""
        body = self._stream.stretch(start, num_tokens)
        pieces: list[tuple[NDArray[np.uint16], Fact | None]] = []
        done = 0
        for i, position in enumerate(positions.tolist()):
            cut = position - start
            if cut > done:
                pieces.append((body[done:cut], None))
                done = cut
            is_paragraph = self._stream.starts_paragraph[position]
            pieces.append(
                ((self._as_paragraph if is_paragraph else self._in_paragraph)[i], self._facts[i])
            )
        pieces.append((body[done:], None))
        return Haystack(tuple(pieces), start, num_tokens)

    def fit(self, rng: np.random.Generator, num_tokens: int) -> Haystack:
        """Return text with the facts, of exactly ``num_tokens`` tokens together.

        Raises:
            ValueError: the facts leave no room for text, or the stream is too short.
        """
        num_text = num_tokens - self.max_tokens
        if num_text < 1:
            raise ValueError(
                f"expected room for text, got {num_tokens} tokens for {self.max_tokens} of facts"
            )
        for _ in range(256):
            start = self._stream.random_paragraph(rng, num_tokens)
            positions = self.positions(start, num_text)
            # facts inside a paragraph take fewer tokens than allowed for: the text gets the rest
            exact = num_tokens - self.cost(positions)
            if self._stream.can_end[start + exact]:
                return self.build(start, exact, positions)
        raise ValueError(f"expected a place for {num_tokens} tokens between words, found none")


class SampleStream:
    """All samples of a training run, as a pure function of (seed, step, index)."""

    def __init__(
        self,
        stream: TokenStream,
        tokenizer: Tokenizer,
        mined_words: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """Prepare to draw samples.

        Args:
            stream: training text.
            tokenizer: the one that made it.
            mined_words: words of the corpus, used as values of facts.
            seed: of everything drawn.
        """
        self._stream = stream
        self._encoder = PhraseEncoder(tokenizer)
        self._chat = ChatPieces(tokenizer)
        self._mined = tuple(mined_words)
        self._seed = seed
        self._newline = [stream.newline_id]

    @classmethod
    def open(cls, folder: Path, seed: int = 0) -> SampleStream:
        """Open what :func:`sala_training.data.prepare.prepare` wrote to ``folder``."""
        tokenizer = load(folder / "tokenizer")
        words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
        return cls(TokenStream.open(folder / "train.bin", tokenizer), tokenizer, words, seed)

    def batch(
        self, step: int, num_seqs: int, length_tokens: int, mix: Mix, first_index: int = 0
    ) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
        """Return a batch of sequences with one token more than ``length_tokens``.

        Args:
            step: training step.
            num_seqs: sequences to return.
            length_tokens: tokens a model reads; targets are the same row shifted by one.
            mix: kinds and weights.
            first_index: index of the first sequence in the step's global batch, so that any split over
                processes gives the same global batch.

        Returns:
            tokens [num_seqs, length_tokens + 1] uint16 and weights, the same shape, float32: a weight
            belongs to predicting the token at its own index.
        """
        tokens = np.empty((num_seqs, length_tokens + 1), np.uint16)
        weights = np.empty((num_seqs, length_tokens + 1), np.float32)
        for row in range(num_seqs):
            sample = self.sample(step, first_index + row, length_tokens, mix)
            tokens[row], weights[row] = sample.tokens, sample.weights
        return tokens, weights

    def sample(self, step: int, index: int, length_tokens: int, mix: Mix) -> Sample:
        """Return sequence ``index`` of ``step``; arguments as in :meth:`batch`."""
        rng = np.random.default_rng((self._seed, step, index))
        shares = np.array([mix.text, mix.recall, mix.chat], np.float64)
        if shares.min() < 0 or shares.sum() <= 0:
            raise ValueError(
                f"expected shares of text, recall and chat above 0, got {shares.tolist()}"
            )
        kind = ("text", "recall", "chat")[int(rng.choice(3, p=shares / shares.sum()))]
        if kind == "recall":
            return self.recall(rng, length_tokens, mix)
        return (
            self.text(rng, length_tokens) if kind == "text" else self.chats(rng, length_tokens, mix)
        )

    def text(self, rng: np.random.Generator, length_tokens: int) -> Sample:
        """Return ``<s>`` and a stretch of the stream, documents separated by ``</s>``; weight 1."""
        if len(self._stream) < length_tokens:
            raise ValueError(f"expected {length_tokens} tokens of text, got {len(self._stream)}")
        start = int(rng.integers(len(self._stream) - length_tokens + 1))
        tokens = np.empty(length_tokens + 1, np.uint16)
        tokens[0] = BOS_ID
        tokens[1:] = self._stream.tokens[start : start + length_tokens]
        weights = np.ones(length_tokens + 1, np.float32)
        weights[0] = 0.0
        return Sample("text", tokens, weights)

    def recall(self, rng: np.random.Generator, length_tokens: int, mix: Mix) -> Sample:
        """Return a document with facts in it, followed by questions about them.

        Raises:
            ValueError: ``length_tokens`` is below 256.
        """
        if length_tokens < MIN_RECALL_TOKENS:
            raise ValueError(f"expected at least {MIN_RECALL_TOKENS} tokens, got {length_tokens}")
        maker = FactMaker(rng, self._mined)
        facts = self._draw_facts(rng, maker, length_tokens, mix)
        opening = self._opening(rng, maker)
        rounds = self._draw_rounds(rng, maker, facts, int(_MAX_TURN_FRAC * length_tokens), mix)
        num_fixed = sum(map(len, opening)) + 1 + sum(len(q) + len(a) for q, a, *_ in rounds)
        num_fixed += len(rounds) * len(self._chat.user_to_assistant) + len(self._chat.close)
        num_fixed += (len(rounds) - 1) * len(self._chat.assistant_to_user)
        placer = FactPlacer(self._stream, self._encoder, facts, rng.random(len(facts)).tolist())
        haystack = placer.fit(rng, length_tokens + 1 - num_fixed)

        writer = Writer()
        for part in opening:
            writer.add(part, 0.0)
        placed = []
        for piece, fact in haystack.pieces:
            start = writer.add(piece, mix.haystack_weight if fact is None else 0.0)
            if fact is not None:
                placed.append(PlacedFact(fact, start, len(piece)))
        writer.add(self._newline, 0.0)
        turns = self._write_rounds(writer, rounds, mix, self._chat.close)
        tokens, weights = writer.finish(length_tokens + 1)
        return Sample("recall", tokens, weights, tuple(placed), turns)

    def _draw_facts(
        self, rng: np.random.Generator, maker: FactMaker, length_tokens: int, mix: Mix
    ) -> list[Fact]:
        most = max(1, min(mix.max_facts, length_tokens // 64))
        # some samples as sparse as the evaluation, the others dense for more signal
        num = int(rng.integers(1, (min(4, most) if rng.random() < 0.2 else most) + 1))
        style = rng.random()
        if style < 0.2:
            # no other number in the text, so that the question needs no key
            facts = [maker.single("passkey" if rng.random() < 0.6 else None)]
            facts += [maker.word() for _ in range(num - 1)]
        elif style < 0.4:
            facts = [maker.passkey() for _ in range(num)]
        else:
            facts = [maker.code() if rng.random() < 0.6 else maker.word() for _ in range(num)]
        budget = int(_MAX_FACT_FRAC * length_tokens)
        kept: list[Fact] = []
        for fact in facts:
            budget -= len(self._encoder.encode(fact.text)) + 2
            if kept and budget < 0:
                break
            kept.append(fact)
        return kept

    def _draw_rounds(
        self,
        rng: np.random.Generator,
        maker: FactMaker,
        facts: Sequence[Fact],
        max_tokens: int,
        mix: Mix,
    ) -> list[_Round]:
        rounds: list[_Round] = []
        for i in rng.permutation(len(facts))[: mix.max_turns]:
            one = self._ask(maker, facts[int(i)])
            max_tokens -= len(one[0]) + len(one[1]) + 12
            if rounds and max_tokens < 0:
                break
            rounds.append(one)
        return rounds

    def _ask(self, maker: FactMaker, fact: Fact) -> _Round:
        style = maker.pick(("plain", "plain", "plain", "plain", "plain", "bare", "bare", "repeat"))
        question, answer = maker.pick(fact.questions), fact.answer
        if style == "repeat" and fact.has_own_key:
            question, answer = (
                maker.pick(phrases.REPEAT_QUESTIONS).format(key=fact.key_phrase),
                fact.text,
            )
        elif style == "bare":
            question, answer = f"{question} {maker.pick(phrases.BARE_REQUESTS)}", fact.value
        return (
            self._encoder.encode(question),
            self._encoder.encode(answer),
            question,
            answer,
            fact.value,
        )

    def _opening(self, rng: np.random.Generator, maker: FactMaker) -> list[list[int]]:
        opening = [self._chat.open_user]
        if rng.random() < 0.1:
            system = self._encoder.encode(maker.pick(phrases.SYSTEM_PROMPTS))
            opening = [self._chat.open_system, system, self._chat.system_to_user]
        if rng.random() < 0.3:
            opening += [self._encoder.encode(maker.pick(phrases.INTRODUCTIONS)), self._newline]
        return opening

    def _write_rounds(
        self, writer: Writer, rounds: Sequence[_Round], mix: Mix, close: Sequence[int]
    ) -> tuple[Turn, ...]:
        turns = []
        for number, (question_ids, answer_ids, question, answer, value) in enumerate(rounds):
            writer.add(question_ids, 0.0)
            writer.add(self._chat.user_to_assistant, 0.0)
            at = writer.add(answer_ids, mix.answer_weight)
            turns.append(Turn(question, answer, value, at, at + len(answer_ids)))
            is_last = number == len(rounds) - 1
            after = close if is_last else self._chat.assistant_to_user
            writer.add(after[:1], mix.answer_weight)
            writer.add(after[1:], 0.0)
        return tuple(turns)

    def chats(self, rng: np.random.Generator, length_tokens: int, mix: Mix) -> Sample:
        """Return short conversations one after another, each from its own ``<s>``; the last is cut."""
        maker = FactMaker(rng, self._mined)
        writer = Writer()
        turns: list[Turn] = []
        while writer.num_tokens < length_tokens + 1:
            kind = rng.random()
            if kind < 0.4:
                turns += self._small_talk(rng, maker, writer, mix)
            elif kind < 0.75:
                turns += self._memory(rng, FactMaker(rng, self._mined), writer, mix)
            else:
                self._continuation(rng, maker, writer)
        tokens, weights = writer.finish(length_tokens + 1)
        whole = tuple(turn for turn in turns if turn.answer_end < length_tokens + 1)
        return Sample("chat", tokens, weights, (), whole)

    def _round(self, question: str, answer: str, value: str = "") -> _Round:
        return self._encoder.encode(question), self._encoder.encode(answer), question, answer, value

    def _small_talk(
        self, rng: np.random.Generator, maker: FactMaker, writer: Writer, mix: Mix
    ) -> tuple[Turn, ...]:
        rounds: list[_Round] = []
        for table in (smalltalk.OPENINGS, smalltalk.OPENINGS, smalltalk.CLOSINGS):
            if not rounds or rng.random() < 0.3:
                topic = table[int(rng.integers(len(table)))]
                rounds.append(self._round(maker.pick(topic.asked), maker.pick(topic.replies)))
        for tokens in self._opening_of_chat(rng, maker):
            writer.add(tokens, 0.0)
        return self._write_rounds(writer, rounds, mix, self._chat.close)

    def _opening_of_chat(self, rng: np.random.Generator, maker: FactMaker) -> list[list[int]]:
        if rng.random() < 0.1:
            system = self._encoder.encode(maker.pick(phrases.SYSTEM_PROMPTS))
            return [self._chat.open_system, system, self._chat.system_to_user]
        return [self._chat.open_user]

    def _memory(
        self, rng: np.random.Generator, maker: FactMaker, writer: Writer, mix: Mix
    ) -> tuple[Turn, ...]:
        """Facts that the user tells in the conversation itself, asked for one or more turns later."""
        num = int(rng.integers(1, 6))
        facts = [maker.single()] if rng.random() < 0.3 else []
        while len(facts) < num:
            facts.append(maker.code() if not facts and rng.random() < 0.5 else maker.word())
        told = " ".join(fact.text for fact in facts)
        asked = [facts[int(i)] for i in rng.permutation(num)[: int(rng.integers(1, 4))]]
        rounds = [self._ask(maker, fact) for fact in asked]
        if rng.random() < 0.5:
            rounds.insert(0, self._round(told, maker.pick(smalltalk.MEMORY_REPLIES)))
        else:
            _, answer_ids, question, answer, value = rounds[0]
            question = f"{told}\n\n{question}" if rng.random() < 0.5 else f"{told} {question}"
            rounds[0] = (self._encoder.encode(question), answer_ids, question, answer, value)
        for tokens in self._opening_of_chat(rng, maker):
            writer.add(tokens, 0.0)
        return self._write_rounds(writer, rounds, mix, self._chat.close)

    def _continuation(self, rng: np.random.Generator, maker: FactMaker, writer: Writer) -> None:
        """Paragraphs to continue; the answer starts at a paragraph and is ordinary text, weight 1."""
        starts = self._stream.paragraph_starts
        first = int(rng.integers(max(1, len(starts) - 8)))
        cuts = starts[first : first + 8]
        if len(cuts) < 3:
            return
        middle, end = int(rng.integers(1, 4)), len(cuts) - 1
        while end > middle + 1 and cuts[end] - cuts[0] > 600:
            end -= 1
        middle = min(middle, end - 1)
        if middle < 1 or cuts[end] - cuts[0] > 600:
            return
        begin, cut, stop = (int(cuts[i]) for i in (0, middle, end))
        text = self._stream.stretch(begin, stop - begin)
        writer.add(self._chat.open_user, 0.0)
        writer.add(self._encoder.encode(maker.pick(smalltalk.CONTINUE_REQUESTS)), 0.0)
        writer.add(self._newline, 0.0)
        writer.add(text[: cut - begin - 1], 1.0)
        writer.add(self._chat.user_to_assistant, 0.0)
        writer.add(text[cut - begin : -1], 1.0)
        writer.add(self._chat.close[:1], 1.0)
        writer.add(self._chat.close[1:], 0.0)
