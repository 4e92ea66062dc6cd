"""Long samples made of short ones, as UltraChat v2 is: a document, questions on it, other documents around it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sala_training.sft.chats import ChatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

_INTRODUCTIONS = (
    "Here are {num} documents. Read them, then answer the questions.",
    "The following {num} documents are numbered. Questions on one of them follow.",
    "Use these {num} documents to answer what is asked after them.",
)


@dataclass(frozen=True)
class Source:
    """A document and what was asked about it."""

    text: str
    questions: tuple[tuple[str, str], ...]
    """Pairs of question and answer; none: the document only distracts."""


def read_sources(path: Path) -> list[Source]:
    """Read a JSONL file of ``{"document": text, "questions": [{"question": text, "answer": text}]}``.

    Raises:
        ChatError: a row of another form; the message names it.
    """
    sources = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            asked = [(q["question"], q["answer"]) for q in row.get("questions") or ()]
            texts = [row["document"], *(text for pair in asked for text in pair)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ChatError(
                f"{path.name}:{number}: expected a document and questions with answers: {error!r}"
            ) from None
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ChatError(f"{path.name}:{number}: expected text that is not empty")
        sources.append(Source(row["document"], tuple(asked)))
    return sources


def synthesise(
    sources: Sequence[Source],
    num: int,
    min_tokens: int,
    max_tokens: int,
    count: Callable[[str], int],
    seed: int = 0,
    max_questions: int = 4,
) -> Iterator[dict[str, Any]]:
    """Make chats about one document among many; rows for :func:`sala_training.sft.chats.from_row`.

    Each has a length drawn evenly between the logarithms of the bounds, a document with questions, and as
    many others, in random order and without repetition, as the length has room for. The place of the
    document asked about is uniform among all places. Its questions follow, turn by turn.

    Args:
        sources: documents; those without questions only distract.
        num: chats to make.
        min_tokens: least length of the documents together.
        max_tokens: greatest.
        count: tokens of a text.
        seed: of all that is drawn; chat i depends on nothing but the seed and i.
        max_questions: turns at most.

    Raises:
        ChatError: no source has questions, or none of those is shorter than ``max_tokens``.
    """
    lengths = [count(source.text) for source in sources]
    asked = [i for i, s in enumerate(sources) if s.questions and lengths[i] <= max_tokens]
    if not asked:
        raise ChatError(
            f"expected a document with questions and at most {max_tokens} tokens, got none"
        )
    for index in range(num):
        rng = np.random.default_rng((seed, index))
        length = float(np.exp(rng.uniform(np.log(min_tokens), np.log(max_tokens))))
        chosen = asked[int(rng.integers(len(asked)))]
        room = length - lengths[chosen]
        others = []
        for other in rng.permutation(len(sources)).tolist():
            if other != chosen and lengths[other] <= room:
                others.append(other)
                room -= lengths[other]
        place = int(rng.integers(len(others) + 1))
        order = [*others[:place], chosen, *others[place:]]
        questions = sources[chosen].questions
        picked = rng.permutation(len(questions))[:max_questions].tolist()
        yield _chat([sources[i].text for i in order], [questions[i] for i in picked], place, rng)


def _chat(
    texts: Sequence[str],
    questions: Sequence[tuple[str, str]],
    place: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    introduction = _INTRODUCTIONS[int(rng.integers(len(_INTRODUCTIONS)))].format(num=len(texts))
    documents = "\n\n".join(f"[Document {i}]\n{text}" for i, text in enumerate(texts, start=1))
    messages = []
    for turn, (question, answer) in enumerate(questions):
        content = question if turn else f"{introduction}\n\n{documents}\n\n{question}"
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "place": place, "num_documents": len(texts)}
