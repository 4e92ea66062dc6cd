"""Long chats made of documents: one is asked about, at a uniformly random place among the others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sala_training.sft.chats import ChatError, from_row
from sala_training.sft.long_context import Source, read_sources, synthesise

if TYPE_CHECKING:
    from pathlib import Path

ASKED = [
    Source(f"Tower {i} is {i} metres high. " * 5, ((f"How high is {i}?", f"{i} m"),) * 6)
    for i in range(5)
]
OTHERS = [Source(f"Wall {i} is of stone. " * 8, ()) for i in range(60)]


def count(text: str) -> int:
    return len(text.split())


def test_one_document_is_asked_about_and_the_others_fill_the_length() -> None:
    chats = list(synthesise([*OTHERS, *ASKED], 300, 200, 2000, count, seed=1))
    places, lengths = [], []
    for row in chats:
        chat = from_row(row)
        first = chat.messages[0]["content"]
        documents = [d.partition("]\n")[2].strip() for d in first.split("[Document ")[1:]]
        assert len(documents) == row["num_documents"] == len(set(documents))
        assert len(chat.messages) == 8  # four of its six questions
        number = chat.messages[1]["content"].removesuffix(" m")
        assert documents[row["place"]].startswith(f"Tower {number} is")
        lengths.append(sum(map(count, documents)))
        places.append(row["place"] / max(1, row["num_documents"] - 1))
    # as full as documents of 30 and 40 words allow; lengths even in their logarithm
    assert min(lengths) >= 200 - 40
    assert max(lengths) <= 2000
    assert np.quantile(lengths, 0.5) == pytest.approx((200 * 2000) ** 0.5, rel=0.2)
    # uniform from the first document to the last
    assert np.histogram(places, bins=4)[0] / 300 == pytest.approx([0.25] * 4, abs=0.08)


def test_a_chat_depends_on_its_number_and_the_seed_alone() -> None:
    make = [
        list(synthesise([*OTHERS, *ASKED], n, 100, 500, count, s))
        for n, s in ((5, 1), (9, 1), (5, 2))
    ]
    assert make[0] == make[1][:5] != make[2]


def test_sources_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "sources.jsonl"
    rows = [{"document": "A tower.", "questions": [{"question": "What?", "answer": "A tower."}]}]
    rows += [{"document": "A wall."}]
    path.write_text("\n".join(map(json.dumps, rows)))
    sources = read_sources(path)
    assert sources == [Source("A tower.", (("What?", "A tower."),)), Source("A wall.", ())]
    for row in (
        '{"text": "x"}',
        "{",
        '{"document": ""}',
        '{"document": "x", "questions": [{"question": "y"}]}',
    ):
        path.write_text("\n" + row)
        with pytest.raises(ChatError, match=r"sources.jsonl:2: expected"):
            read_sources(path)
    for few in (OTHERS, ASKED):
        with pytest.raises(ChatError, match="at most 20 tokens"):
            next(synthesise(few, 1, 10, 20, count))
