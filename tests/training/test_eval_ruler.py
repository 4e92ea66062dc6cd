"""Tasks made of real text: exact in length, answerable from their text alone, scored as they should be."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import httpx
import pytest

from sala_training.eval.endpoint import openai_chat, openai_counter
from sala_training.eval.ruler import KINDS, Haystack, Task, evaluate, share_given, tasks

TEXT = (Path(__file__).parents[2] / "training/demo/persuasion.txt").read_text()
HAYSTACK = Haystack([TEXT])


def count(text: str) -> int:
    return len(text.split())


def read_and_answer(prompt: str) -> str:
    """Answer every kind of task from its prompt alone."""
    text, _, question = prompt.rpartition("\n\n")
    if found := re.match(r"Which magic numbers for (.*) does", question):
        keys = found[1].split(", ")
        return " ".join(n for k in keys for n in re.findall(rf"numbers for {k} is (\d+)", text))
    if found := re.match(r"Which variables were assigned the value (\d+)", question):
        values: dict[str, str] = {}
        for name, given, source in re.findall(r"VAR (\w+) = (?:(\d+)|VAR (\w+))\.", text):
            values[name] = given or values.get(source, "?")
        return ", ".join(name for name, value in values.items() if value == found[1])
    if "come most often" in question:
        counts = Counter(re.findall(r"\d+\. (\w+)", text))
        return ", ".join(word for word, _ in counts.most_common(5))
    cue = re.search(r'begins with "(.*)"\.', question)[1]
    return re.search(re.escape(cue) + r" (.*?[.!?])\s", text + " ")[1]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_task_fills_its_length_and_is_answered_from_its_text(kind: str) -> None:
    made = tasks(kind, 1500, 4, HAYSTACK, count, seed=3)
    assert made == tasks(kind, 1500, 4, HAYSTACK, count, seed=3)
    assert made != tasks(kind, 1500, 4, HAYSTACK, count, seed=4)
    assert all(0.9 * 1500 < task.num_tokens == count(task.prompt) <= 1500 for task in made)
    result = evaluate(made, 1500, read_and_answer, num_parallel=2)
    assert (result.kind, result.num_tasks, result.score) == (kind, 4, 1.0)
    assert evaluate(made, 1500, lambda prompt: "I do not know.").score == 0
    # cut where what is asked for cannot be: nothing answers without the text
    assert all(
        answer not in task.prompt.rpartition("\n\n")[2] for task in made for answer in task.answers
    )


def test_what_is_asked_for_stands_at_every_depth() -> None:
    made = tasks("keys", 1500, 10, HAYSTACK, count)
    places = [task.prompt.index(task.answers[0]) / len(task.prompt) for task in made]
    assert [int(10 * place) for place in places] == pytest.approx(range(10), abs=2)
    quoted = tasks("quote", 1500, 10, HAYSTACK, count)
    places = [task.prompt.index(task.answers[0]) / len(task.prompt) for task in quoted]
    assert [int(10 * place) for place in places] == pytest.approx(range(10), abs=2)


def test_text_begins_again_where_it_ends_but_never_says_a_quote_twice() -> None:
    short = Haystack([" ".join(HAYSTACK.sentences[:40])])
    (task,) = tasks("needle", 8000, 1, short, count)
    assert task.num_tokens > 7000
    with pytest.raises(ValueError, match="pass more text"):
        tasks("quote", 8000, 1, short, count)
    (task,) = tasks("common", 60000, 1, short, count)
    assert task.num_tokens > 54000
    assert read_and_answer(task.prompt).split(", ")
    assert share_given(read_and_answer(task.prompt), task) == 1


def test_tasks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a kind of"):
        tasks("riddle", 1500, 1, HAYSTACK, count)
    with pytest.raises(ValueError, match="expected room for the task, got 10 tokens"):
        tasks("needle", 10, 1, HAYSTACK, count)
    with pytest.raises(ValueError, match="at least 20 sentences"):
        Haystack(["One. Two."])
    with pytest.raises(ValueError, match="at least one task"):
        evaluate([], 10, str)


@pytest.mark.parametrize(
    ("answer", "share"),
    [("12, 34", 1.0), ("34 and 12.", 1.0), ("12", 0.5), ("123 345", 0.0), ("", 0.0)],
)
def test_only_whole_answers_count(answer: str, share: float) -> None:
    assert share_given(answer, Task("values", "", ("12", "34"), 0)) == share


def test_an_endpoint_is_asked_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def reply(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        seen.append(body)
        prompt = body["messages"][0]["content"]
        message = {
            "role": "assistant",
            "content": read_and_answer(prompt) if body["max_tokens"] > 1 else "",
        }
        usage = {"prompt_tokens": len(prompt.split())}
        return httpx.Response(200, json={"choices": [{"message": message}], "usage": usage})

    client = httpx.Client
    transport = httpx.MockTransport(reply)
    monkeypatch.setattr(httpx, "Client", lambda **options: client(transport=transport, **options))
    counter = openai_counter("http://engine/v1", "demo")
    made = tasks("values", 1500, 3, HAYSTACK, counter)
    # by its characters, from one question to the endpoint
    assert len(seen) == 1
    assert all(count(task.prompt) == pytest.approx(1500, rel=0.1) for task in made)
    ask = openai_chat("http://engine/v1", "demo")
    result = evaluate(made, 1500, lambda p: ask([{"role": "user", "content": p}]), num_parallel=3)
    assert result.score == 1.0
    assert (result.low, result.high) == (1.0, 1.0)
    assert {body["temperature"] for body in seen} == {0.0}
