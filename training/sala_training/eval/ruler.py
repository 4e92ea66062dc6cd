"""A task set in the manner of RULER, made of real text for any length, for any endpoint that speaks OpenAI's chat.

``needle`` one number under a key; ``keys`` one of several keys; ``values`` all numbers of a key;
``queries`` the numbers of several keys; ``chain`` variables that were assigned from one another; ``common``
the words of a list that come often; ``quote`` a sentence of the text, by its beginning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sala_training.data import words
from sala_training.eval import intervals
from sala_training.eval.answers import says

CountTokens = Callable[[str], int]
"""Tokens that the endpoint's tokenizer makes of a text."""
Ask = Callable[[str], str]
"""Sends one user message, returns the whole answer."""

_CUE_WORDS = 6
_NUM_COMMON, _COMMON_TIMES, _RARE_TIMES = 5, 20, 2


@dataclass(frozen=True)
class Task:
    """One question about one long text."""

    kind: str
    prompt: str
    answers: tuple[str, ...]
    """All of them are to be in the answer."""
    num_tokens: int
    """Of the prompt."""


@dataclass(frozen=True)
class Result:
    """Of the tasks of one kind and length."""

    kind: str
    length_tokens: int
    num_tasks: int
    score: float
    """Mean share of the answers that were given."""
    low: float
    high: float
    """95 % interval over tasks."""


class Haystack:
    """Sentences of real text, as many as are asked for: it begins again where it ends."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Cut texts into sentences.

        Raises:
            ValueError: there are fewer than 20 sentences.
        """
        joined = " ".join(" ".join(text.split()) for text in texts)
        self.sentences = [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", joined) if s]
        if len(self.sentences) < 20:
            raise ValueError(f"expected at least 20 sentences of text, got {len(self.sentences)}")

    def take(self, start: int, num: int) -> list[str]:
        """Return ``num`` sentences from the one numbered ``start``."""
        return [self.sentences[(start + i) % len(self.sentences)] for i in range(num)]


def tasks(
    kind: str, length_tokens: int, num: int, haystack: Haystack, count: CountTokens, seed: int = 0
) -> list[Task]:
    """Make tasks; the same arguments make the same ones.

    Args:
        kind: see the module's text.
        length_tokens: most tokens of a prompt; each is nearly as long.
        num: of tasks. What is asked for stands at depths spread over the text.
        haystack: the text.
        count: of tokens.
        seed: of all that is drawn.

    Raises:
        ValueError: no such kind, or a length in which it has no room.
    """
    if kind not in KINDS:
        raise ValueError(f"expected a kind of {sorted(KINDS)}, got {kind!r}")
    made = []
    for index in range(num):
        rng = np.random.default_rng((seed, sorted(KINDS).index(kind), length_tokens, index))
        depth = (index + float(rng.random())) / num
        build = KINDS[kind](rng, haystack, depth)
        prompt, answers = _fitted(build, length_tokens, count)
        made.append(Task(kind, prompt, answers, count(prompt)))
    return made


_Build = Callable[[int], tuple[str, tuple[str, ...]]]
"""Makes a prompt and its answers with so many units (sentences, or words) of text."""


def _fitted(build: _Build, length_tokens: int, count: CountTokens) -> tuple[str, tuple[str, ...]]:
    """Return the longest prompt that the search finds within the length."""
    low, best = 1, build(1)
    if (num := count(best[0])) > length_tokens:
        raise ValueError(f"expected room for the task, got {length_tokens} tokens for {num}")
    high, before = 2, num
    while (num := count((candidate := build(high))[0])) <= length_tokens:
        if num <= before:
            raise ValueError(f"expected text for {length_tokens} tokens, got {num}: pass more text")
        low, high, best, before = high, 2 * high, candidate, num
    while high - low > 1 + low // 64:
        middle = (low + high) // 2
        candidate = build(middle)
        if count(candidate[0]) <= length_tokens:
            low, best = middle, candidate
        else:
            high = middle
    return best


def _with_facts(sentences: list[str], facts: Sequence[str], depths: Sequence[float]) -> str:
    """Put facts between sentences; a depth is the share of the sentences before it."""
    places = [int(depth * len(sentences)) for depth in depths]
    # from the end, so that places stay right, and of those at one place the last fact first
    for index in sorted(range(len(facts)), key=lambda i: (places[i], i), reverse=True):
        sentences.insert(places[index], facts[index])
    return " ".join(sentences)


def _keys(rng: np.random.Generator, num: int) -> list[str]:
    pairs = [f"{a}-{p}" for a in words.ADJECTIVES for p in words.PLACES]
    return [str(k).replace(" ", "-") for k in rng.choice(pairs, num, replace=False)]


def _numbers(rng: np.random.Generator, num: int) -> list[str]:
    return [str(n) for n in rng.choice(9_000_000, num, replace=False) + 1_000_000]


def _needles(num_keys: int, num_values: int, num_asked: int) -> Any:
    def start(rng: np.random.Generator, haystack: Haystack, depth: float) -> _Build:
        keys = _keys(rng, num_keys)
        numbers = _numbers(rng, num_keys * num_values)
        begin = int(rng.integers(len(haystack.sentences)))
        depths = rng.random(len(numbers))
        depths[0] = depth
        owners = [key for key in keys for _ in range(num_values)]
        facts = [
            f"One of the magic numbers for {k} is {n}."
            for k, n in zip(owners, numbers, strict=True)
        ]
        asked = keys[:num_asked]
        answers = tuple(n for k, n in zip(owners, numbers, strict=True) if k in asked)
        question = (
            f"Which magic numbers for {', '.join(asked)} does the text mention? "
            "Answer with all of these numbers and nothing else."
        )

        def build(units: int) -> tuple[str, tuple[str, ...]]:
            text = _with_facts(haystack.take(begin, units), facts, depths.tolist())
            return f"{_INTRODUCTION}\n\n{text}\n\n{question}", answers

        return build

    return start


_INTRODUCTION = "Some magic numbers are hidden in the following text. Remember them; you will be asked about them."


def _chain(rng: np.random.Generator, haystack: Haystack, depth: float) -> _Build:
    letters = ["".join(rng.choice(list("ABCDEFGHJKLMNPQRSTUVWXYZ"), 5)) for _ in range(10)]
    value, other = _numbers(rng, 2)
    begin = int(rng.integers(len(haystack.sentences)))
    chains = ((letters[:5], value), (letters[5:], other))
    facts: list[str] = []
    depths: list[float] = []
    for number, (names, first) in enumerate(chains):
        facts += [f"VAR {names[0]} = {first}."]
        facts += [f"VAR {b} = VAR {a}." for a, b in zip(names[:-1], names[1:], strict=True)]
        # in order, from a place on that is spread over the tasks
        depths += np.sort(rng.uniform(0.0 if number else depth, 1.0, 5)).tolist()
    question = (
        f"Which variables were assigned the value {value}, directly or from another variable? "
        "Answer with all of their names and nothing else."
    )

    def build(units: int) -> tuple[str, tuple[str, ...]]:
        text = _with_facts(haystack.take(begin, units), facts, depths)
        return (
            f"Assignments of variables are hidden in the following text.\n\n{text}\n\n{question}",
            tuple(letters[:5]),
        )

    return build


def _common(rng: np.random.Generator, haystack: Haystack, depth: float) -> _Build:
    found = sorted({w for s in haystack.sentences for w in re.findall(r"\b[a-z]{5,9}\b", s)})
    drawn = [str(w) for w in rng.permutation(found)]
    common, rare = drawn[:_NUM_COMMON], drawn[_NUM_COMMON:]
    if not rare:
        raise ValueError(f"expected a text of more than {_NUM_COMMON} words, got {len(drawn)}")
    order_seed = int(rng.integers(1 << 31))

    def build(units: int) -> tuple[str, tuple[str, ...]]:
        # where the words of the text do not suffice, all come more often
        rounds = 1 + (units - 1) // len(rare)
        listed = common * (_COMMON_TIMES * rounds) + (rare * rounds)[:units] * _RARE_TIMES
        listed = np.random.default_rng(order_seed).permutation(listed).tolist()
        text = " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1))
        question = f"Which {_NUM_COMMON} words come most often in this list? Answer with these words and nothing else."
        return f"Below is a numbered list of words.\n\n{text}\n\n{question}", tuple(common)

    return build


def _quote(rng: np.random.Generator, haystack: Haystack, depth: float) -> _Build:
    """A sentence whose beginning no other sentence shares, at the depth asked for."""
    starts: dict[str, int] = {}
    for sentence in haystack.sentences:
        cue = " ".join(sentence.split()[:_CUE_WORDS])
        starts[cue] = starts.get(cue, 0) + 1
    usable = [
        i
        for i, sentence in enumerate(haystack.sentences)
        if _CUE_WORDS + 4 <= len(sentence.split()) <= 40
        and starts[" ".join(sentence.split()[:_CUE_WORDS])] == 1
    ]
    if not usable:
        raise ValueError("expected a text with sentences of ten to forty words, got none")
    chosen = int(rng.choice(usable))
    spoken = haystack.sentences[chosen].split()
    cue, rest = " ".join(spoken[:_CUE_WORDS]), " ".join(spoken[_CUE_WORDS:])

    def build(units: int) -> tuple[str, tuple[str, ...]]:
        # never so long that the text, beginning again, says the sentence twice
        units = min(units, len(haystack.sentences))
        text = " ".join(haystack.take(chosen - int(depth * units), units))
        question = f'The text has a sentence that begins with "{cue}". How does that sentence go on? Write the rest of it and nothing else.'
        return f"Read the following text.\n\n{text}\n\n{question}", (rest,)

    return build


KINDS: dict[str, Callable[[np.random.Generator, Haystack, float], _Build]] = {
    "needle": _needles(1, 1, 1),
    "keys": _needles(8, 1, 1),
    "values": _needles(1, 4, 1),
    "queries": _needles(4, 1, 4),
    "chain": _chain,
    "common": _common,
    "quote": _quote,
}


def share_given(answer: str, task: Task) -> float:
    """Return the share of the task's answers that stand in ``answer``, as whole words, whatever the case."""
    return sum(says(answer, expected) for expected in task.answers) / len(task.answers)


def evaluate(made: Sequence[Task], length_tokens: int, ask: Ask, num_parallel: int = 1) -> Result:
    """Ask every task of one kind and score the answers.

    Args:
        made: tasks of one kind.
        length_tokens: that they were made for.
        ask: the endpoint.
        num_parallel: requests at a time.

    Raises:
        ValueError: there are none.
    """
    from concurrent.futures import ThreadPoolExecutor

    if not made:
        raise ValueError("expected at least one task, got none")
    with ThreadPoolExecutor(num_parallel) as pool:
        answers = list(pool.map(lambda task: ask(task.prompt), made))
    shares = [share_given(answer, task) for answer, task in zip(answers, made, strict=True)]
    if len(made[0].answers) == 1:
        low, high = intervals.wilson(round(sum(shares)), len(shares))
    else:
        low, high = intervals.mean(shares)
    return Result(made[0].kind, length_tokens, len(made), float(np.mean(shares)), low, high)
