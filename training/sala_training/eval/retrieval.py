"""Retrieval: facts placed anywhere in held-out text, asked for through the chat template.

Four variants. ``passkey`` is the main one: "The passkey for the north tower is 48213.", three more
passkeys of other places as distractors, "What is the passkey for the north tower?"; this wording is also
trained on, the texts, keys and values are new. ``single`` is a passkey without a key, ``named`` a word
fact (a city, a colour, a profession ...), and ``unseen`` states and asks in words that no training sample
uses, about places that none names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from sala_training.data import words
from sala_training.data.phrases import Fact, FactMaker, unseen_fact
from sala_training.data.stream import PhraseEncoder
from sala_training.data.tasks import ChatPieces, FactPlacer
from sala_training.eval import intervals
from sala_training.eval.answers import says
from sala_training.eval.endpoint import openai_chat

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sala_training.data.stream import TokenStream

NUM_DISTRACTORS = 3


class Variant(StrEnum):
    """How the fact is stated and asked for; see the module's text."""

    PASSKEY = "passkey"
    SINGLE = "single"
    NAMED = "named"
    UNSEEN = "unseen"


@dataclass(frozen=True)
class Case:
    """One question about one placed fact."""

    variant: Variant
    messages: tuple[dict[str, str], ...]
    prompt_ids: tuple[int, ...]
    """What the chat template makes of the messages, the opening of the assistant's turn included."""
    fact: str
    answer: str
    """The value asked for."""
    reply: str
    """The sentence that training would answer with; only a draft to be verified, never scored."""
    distractors: tuple[str, ...]
    """Values of the other facts: an answer that names one is wrong."""
    depth_frac: float
    """Index of the fact's first token over the prompt's tokens."""


@dataclass(frozen=True)
class Outcome:
    """What was generated for one case."""

    case: Case
    text: str
    is_right: bool


@dataclass(frozen=True)
class Report:
    """Scores of one set of cases."""

    variant: str
    length_tokens: int
    num_cases: int
    exact_frac: float
    exact_low: float
    exact_high: float
    """95 % interval of the share."""
    exact_frac_by_depth: tuple[float | None, ...]
    """Ten values, shallow (start of the prompt) to deep; None where no case lies."""
    failures: tuple[dict[str, Any], ...]
    """Depth, expected value and generated text of wrong answers, at most 20."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return asdict(self)


Generator = Callable[[Case], str]
"""Returns the greedy continuation of a case's prompt as text, special tokens left out."""


def placements(
    num: int,
    length_tokens: int,
    seed: int,
    tokenizer: Tokenizer,
    haystack: TokenStream,
    variant: Variant = Variant.PASSKEY,
) -> list[Case]:
    """Make cases whose prompts have exactly ``length_tokens`` tokens, depths spread evenly.

    Args:
        num: cases to make; depth ``i`` is drawn in [i / num, (i + 1) / num).
        length_tokens: of the whole prompt, question and template included.
        seed: the same arguments and seed give the same cases.
        tokenizer: of the haystack.
        haystack: held-out text.
        variant: how facts are stated and asked for.

    Raises:
        ValueError: the haystack is too short or ``length_tokens`` leaves no room for the facts.
    """
    encoder, chat = PhraseEncoder(tokenizer), ChatPieces(tokenizer)
    return [
        _place(i, num, length_tokens, seed, tokenizer, haystack, variant, encoder, chat)
        for i in range(num)
    ]


def _place(
    index: int,
    num: int,
    length_tokens: int,
    seed: int,
    tokenizer: Tokenizer,
    haystack: TokenStream,
    variant: Variant,
    encoder: PhraseEncoder,
    chat: ChatPieces,
) -> Case:
    rng = np.random.default_rng((seed, index, length_tokens))
    maker = FactMaker(rng, ())
    needle, *others = _facts(variant, maker)
    question = maker.pick(needle.questions)
    question_ids = encoder.encode(question)
    depth = (index + float(rng.random())) / num
    depths = [depth, *rng.random(len(others)).tolist()]
    opening = len(chat.open_user)
    num_fixed = opening + 1 + len(question_ids) + len(chat.user_to_assistant)
    placer = FactPlacer(haystack, encoder, [needle, *others], depths)
    stack = placer.fit(rng, length_tokens - num_fixed)

    body = np.concatenate([piece for piece, _ in stack.pieces])
    before = 0
    for piece, fact in stack.pieces:
        if fact is needle:
            break
        before += len(piece)
    content_ids = [*body.tolist(), haystack.newline_id, *question_ids]
    content = tokenizer.decode(content_ids, skip_special_tokens=False)
    return Case(
        variant=variant,
        messages=({"role": "user", "content": content},),
        prompt_ids=(*chat.open_user, *content_ids, *chat.user_to_assistant),
        fact=needle.text,
        answer=needle.value,
        reply=needle.answer,
        distractors=tuple(fact.value for fact in others),
        depth_frac=(opening + before) / length_tokens,
    )


def _facts(variant: Variant, maker: FactMaker) -> list[Fact]:
    """Return the fact asked for and its distractors."""
    match variant:
        case Variant.PASSKEY:
            return [maker.passkey() for _ in range(1 + NUM_DISTRACTORS)]
        case Variant.SINGLE:
            return [maker.single("passkey")]
        case Variant.NAMED:
            facts = [maker.word()]
            while len(facts) < 1 + NUM_DISTRACTORS:
                fact = maker.word()
                # a distractor with the same value would make a wrong answer look right
                if fact.value not in {other.value for other in facts}:
                    facts.append(fact)
            return facts
        case Variant.UNSEEN:
            facts = []
            keys: set[str] = set()
            while len(facts) < 1 + NUM_DISTRACTORS:
                key = f"{maker.pick(words.HELD_OUT_ADJECTIVES)} {maker.pick(words.HELD_OUT_PLACES)}"
                if key not in keys:
                    keys.add(key)
                    facts.append(unseen_fact(key, "passkey", maker.digits()))
            return facts


def is_right(text: str, case: Case) -> bool:
    """Whether ``text`` gives the case's value and no other: digits exactly, words as whole words.

    A number counts as the answer only when it is the sole number in the text, so that neither a longer
    number nor a list of guesses passes.
    """
    if case.answer.isdigit():
        return set(re.findall(r"\d+", text)) == {case.answer}
    return says(text, case.answer) and not any(says(text, value) for value in case.distractors)


def evaluate(cases: Sequence[Case], generate: Generator) -> Report:
    """Generate an answer for every case and score them.

    Args:
        cases: of one variant and one length.
        generate: greedy generation; 48 new tokens are enough for any answer.

    Raises:
        ValueError: there are no cases.
    """
    if not cases:
        raise ValueError("expected at least one case, got none")
    outcomes = []
    for case in cases:
        text = generate(case)
        outcomes.append(Outcome(case, text, is_right(text, case)))
    return summarise(outcomes)


def summarise(outcomes: Sequence[Outcome]) -> Report:
    """Return the share of right answers, in total and by tenth of the prompt."""
    by_depth: list[list[bool]] = [[] for _ in range(10)]
    for outcome in outcomes:
        by_depth[min(9, int(10 * outcome.case.depth_frac))].append(outcome.is_right)
    failures = [
        {
            "depth_frac": round(o.case.depth_frac, 4),
            "fact": o.case.fact,
            "expected": o.case.answer,
            "got": o.text,
        }
        for o in outcomes
        if not o.is_right
    ]
    num_right = sum(outcome.is_right for outcome in outcomes)
    low, high = intervals.wilson(num_right, len(outcomes))
    return Report(
        variant=outcomes[0].case.variant.value,
        length_tokens=len(outcomes[0].case.prompt_ids),
        num_cases=len(outcomes),
        exact_frac=num_right / len(outcomes),
        exact_low=low,
        exact_high=high,
        exact_frac_by_depth=tuple(sum(d) / len(d) if d else None for d in by_depth),
        failures=tuple(failures[:20]),
    )


def openai_generator(
    base_url: str,
    model: str,
    api_key: str | None = None,
    timeout_s: float = 120.0,
    max_answer_tokens: int = 48,
) -> Generator:
    """Return a generator that asks an OpenAI-compatible chat endpoint.

    Args:
        base_url: up to and including ``/v1``.
        model: served name.
        api_key: sent as a bearer token.
        timeout_s: of one request.
        max_answer_tokens: most tokens to generate.
    """
    ask = openai_chat(base_url, model, api_key, timeout_s, max_answer_tokens)
    return lambda case: ask(case.messages)
