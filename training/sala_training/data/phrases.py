"""Facts, questions and answers in words: what the recall tasks say.

A fact is one sentence (or two) that binds a value to a key. Its question comes in a plain form, answered
by a sentence that repeats the key, and in a bare form, answered by the value alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sala_training.data import words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

BARE_REQUESTS: tuple[str, ...] = (
    "Reply with the value only.",
    "Answer with the value only.",
    "Give only the value.",
)
INTRODUCTIONS: tuple[str, ...] = (
    "Read the following text and answer the question at the end.",
    "Here is a text. Remember the facts in it.",
    "Please read this text carefully.",
    "There is some important information in the text below.",
)
SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You answer questions about the text that the user gives.",
    "Be brief.",
)


@dataclass(frozen=True)
class Fact:
    """A value bound to a key, ready to be written into a text and asked for."""

    text: str
    """The sentence that states it; starts with a capital letter and ends with punctuation."""
    key: str
    value: str
    questions: tuple[str, ...]
    answer: str
    """The sentence that answers any of the questions."""

    @property
    def has_own_key(self) -> bool:
        """Whether the key tells this fact from others of its kind."""
        return " " in self.key and self.key not in words.CODE_NOUNS

    @property
    def key_phrase(self) -> str:
        """The key with its article: "the north tower", "Alice Archer"."""
        return self.key if self.key[0].isupper() else f"the {self.key}"


@dataclass(frozen=True)
class Relation:
    """A kind of word fact; ``{key}`` and ``{value}`` stand for the drawn words."""

    is_person: bool
    """The key is a person's name instead of a place."""
    values: tuple[str, ...]
    facts: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


CODE_FACTS: tuple[str, ...] = (
    "The {noun} for the {key} is {value}.",
    "The {noun} for the {key} is {value}.",
    "Remember: the {noun} for the {key} is {value}.",
    "The {noun} for the {key} is {value}. Remember it.",
    "The {noun} of the {key} is {value}.",
    "Note that {value} is the {noun} for the {key}.",
    "Please write down the {noun} for the {key}: {value}.",
    "To open the {key}, use the {noun} {value}.",
    "For the {key}, the {noun} was set to {value}.",
    "If you go to the {key}, you will need the {noun} {value}.",
)
CODE_QUESTIONS: tuple[str, ...] = (
    "What is the {noun} for the {key}?",
    "What is the {noun} for the {key}?",
    "What is the {noun} of the {key}?",
    "Tell me the {noun} for the {key}.",
    "Which {noun} belongs to the {key}?",
    "According to the text, what is the {noun} for the {key}?",
    "I need the {noun} for the {key}.",
    "Find the {noun} for the {key} in the text.",
    "What {noun} does the text give for the {key}?",
)
UNSEEN_CODE_FACT = "Somebody chose {value} to be the {noun} that unlocks the {key}."
UNSEEN_CODE_QUESTION = "Could you look up which {noun} unlocks the {key}?"
"""Phrasing that no training sample uses: for the second evaluation."""

SINGLE_FACTS: tuple[str, ...] = (
    "The {noun} is {value}. Remember it.",
    "The {noun} is {value}. Remember it. {value} is the {noun}.",
    "Remember: the {noun} is {value}.",
    "The {noun} is {value}.",
    "Here is the {noun}: {value}.",
    "Do not forget that the {noun} is {value}.",
)
SINGLE_QUESTIONS: tuple[str, ...] = (
    "What is the {noun}?",
    "What is the {noun}?",
    "What was the {noun}?",
    "Tell me the {noun}.",
    "What is the {noun} in the text?",
    "Which {noun} is mentioned in the text?",
)

PERSON_CODE_FACTS: tuple[str, ...] = (
    "The {noun} of {key} is {value}.",
    "Remember: the {noun} of {key} is {value}.",
    "{key} uses the {noun} {value}.",
)
PERSON_CODE_QUESTIONS: tuple[str, ...] = (
    "What is the {noun} of {key}?",
    "Tell me the {noun} of {key}.",
    "Which {noun} does {key} use?",
)

RELATIONS: tuple[Relation, ...] = (
    Relation(
        True,
        words.CITIES,
        (
            "{key} lives in {value}.",
            "{key} has lived in {value} for years.",
            "It is known that {key} lives in {value}.",
        ),
        (
            "Where does {key} live?",
            "In which city does {key} live?",
            "Which city is the home of {key}?",
        ),
        "{key} lives in {value}.",
    ),
    Relation(
        True,
        words.CITIES,
        ("{key} was born in {value}.", "We learn that {key} was born in {value}."),
        ("Where was {key} born?", "In which city was {key} born?"),
        "{key} was born in {value}.",
    ),
    Relation(
        True,
        words.PROFESSIONS,
        (
            "{key} works as a {value}.",
            "{key} became a {value}.",
            "By profession, {key} is a {value}.",
        ),
        (
            "What is the profession of {key}?",
            "What does {key} work as?",
            "What is the job of {key}?",
        ),
        "{key} works as a {value}.",
    ),
    Relation(
        True,
        words.ANIMALS,
        (
            "The favourite animal of {key} is the {value}.",
            "{key} likes the {value} more than any other animal.",
        ),
        ("What is the favourite animal of {key}?", "Which animal does {key} like most?"),
        "The favourite animal of {key} is the {value}.",
    ),
    Relation(
        True,
        words.FOODS,
        ("{key} likes to eat {value}.", "For dinner, {key} always eats {value}."),
        ("What does {key} like to eat?", "Which food does {key} like?"),
        "{key} likes to eat {value}.",
    ),
    Relation(
        False,
        words.COLOURS,
        (
            "The door of the {key} is painted {value}.",
            "Somebody painted the door of the {key} {value}.",
        ),
        ("What colour is the door of the {key}?", "Which colour has the door of the {key}?"),
        "The door of the {key} is painted {value}.",
    ),
    Relation(
        False,
        words.OBJECTS,
        (
            "Inside the {key} there is a {value}.",
            "The {key} hides a {value}.",
            "A visitor left a {value} in the {key}.",
        ),
        (
            "What is inside the {key}?",
            "What can be found in the {key}?",
            "Which object is in the {key}?",
        ),
        "Inside the {key} there is a {value}.",
    ),
    Relation(
        False,
        words.FIRST_NAMES,
        ("The keeper of the {key} is called {value}.", "The {key} is looked after by {value}."),
        ("Who is the keeper of the {key}?", "Who looks after the {key}?"),
        "The keeper of the {key} is called {value}.",
    ),
    Relation(
        False,
        words.MONTHS,
        ("The {key} opens in {value}.", "Visitors are allowed to see the {key} from {value}."),
        ("When does the {key} open?", "In which month does the {key} open?"),
        "The {key} opens in {value}.",
    ),
)

MINED_WORD_RELATION = Relation(
    False,
    (),
    (
        "The secret word for the {key} is {value}.",
        "Remember: the secret word for the {key} is {value}.",
        'If they ask for the secret word of the {key}, say "{value}".',
    ),
    (
        "What is the secret word for the {key}?",
        "Tell me the secret word for the {key}.",
        "Which secret word belongs to the {key}?",
    ),
    "The secret word for the {key} is {value}.",
)
"""Its values are words of the corpus, so that copying is learnt for any word."""

REPEAT_QUESTIONS: tuple[str, ...] = (
    "Repeat the sentence that mentions {key}.",
    "Quote the sentence about {key}.",
)


class FactMaker:
    """Draws facts for one sample; no key and no value occurs twice."""

    def __init__(self, rng: np.random.Generator, mined_words: Sequence[str]) -> None:
        """Start a sample.

        Args:
            rng: all randomness comes from it.
            mined_words: values of secret words; may be empty.
        """
        self._rng = rng
        self._mined = mined_words
        self._used: set[str] = set()
        self._places: list[str] = []

    def pick(self, options: Sequence[str]) -> str:
        """Return one of ``options``, each as likely."""
        return options[int(self._rng.integers(len(options)))]

    def _fresh(self, draw: Callable[[], str]) -> str:
        word = draw()
        for _ in range(64):
            if word not in self._used:
                break
            word = draw()
        self._used.add(word)
        return word

    def _place(self) -> str:
        def draw() -> str:
            adjective, noun = self.pick(words.ADJECTIVES), self.pick(words.PLACES)
            if self._places and self._rng.random() < 0.3:
                # a near miss: half of an earlier key
                earlier = self.pick(self._places).split(" ")
                adjective, noun = (
                    (earlier[0], noun) if self._rng.random() < 0.5 else (adjective, earlier[1])
                )
            return f"{adjective} {noun}"

        place = self._fresh(draw)
        self._places.append(place)
        return place

    def _person(self) -> str:
        return self._fresh(lambda: f"{self.pick(words.FIRST_NAMES)} {self.pick(words.LAST_NAMES)}")

    def digits(self) -> str:
        """Return a number of 4 to 8 digits, without a leading zero, new in this sample."""

        def draw() -> str:
            num_digits = int(self._rng.integers(4, 9))
            return str(int(self._rng.integers(10 ** (num_digits - 1), 10**num_digits)))

        return self._fresh(draw)

    def code(self) -> Fact:
        """Return a number that belongs to a place or a person."""
        noun, value = self.pick(words.CODE_NOUNS), self.digits()
        if self._rng.random() < 0.15:
            return _fact(
                self.pick(PERSON_CODE_FACTS),
                PERSON_CODE_QUESTIONS,
                PERSON_CODE_FACTS[0],
                noun,
                self._person(),
                value,
            )
        return _fact(
            self.pick(CODE_FACTS), CODE_QUESTIONS, CODE_FACTS[0], noun, self._place(), value
        )

    def passkey(self) -> Fact:
        """Return the number of a place in the wording of the main evaluation."""
        return _fact(
            CODE_FACTS[0],
            CODE_QUESTIONS[:1],
            CODE_FACTS[0],
            "passkey",
            self._place(),
            self.digits(),
        )

    def single(self, noun: str | None = None) -> Fact:
        """Return a number without a key; a sample may hold only one, and no other numbers."""
        noun = noun or self.pick(words.CODE_NOUNS)
        return _fact(
            self.pick(SINGLE_FACTS),
            SINGLE_QUESTIONS,
            "The {noun} is {value}.",
            noun,
            noun,
            self.digits(),
        )

    def word(self) -> Fact:
        """Return a word that belongs to a place or a person."""
        if self._mined and self._rng.random() < 0.25:
            relation, values = MINED_WORD_RELATION, self._mined
        else:
            relation = RELATIONS[int(self._rng.integers(len(RELATIONS)))]
            values = relation.values
        key = self._person() if relation.is_person else self._place()
        return _fact(
            self.pick(relation.facts),
            relation.questions,
            relation.answer,
            "",
            key,
            self.pick(values),
        )


def _fact(
    text: str, questions: tuple[str, ...], answer: str, noun: str, key: str, value: str
) -> Fact:
    def fill(template: str) -> str:
        return template.format(noun=noun, key=key, value=value)

    return Fact(
        fill(text), key, value, tuple(fill(question) for question in questions), fill(answer)
    )


def unseen_fact(key: str, noun: str, value: str) -> Fact:
    """Return a number fact in the phrasing that training never uses."""
    return _fact(UNSEEN_CODE_FACT, (UNSEEN_CODE_QUESTION,), CODE_FACTS[0], noun, key, value)
