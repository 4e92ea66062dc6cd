"""What the chat client shows before the first token."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sala_serve.events import comment
from sala_serve.terminal_progress import Note, WaitingDisplay, parse_note


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def console(request):
    return Console(
        file=io.StringIO(), force_terminal=request.param, width=120, legacy_windows=False
    )


def shown(console):
    """The screen's last state as text, control sequences left out."""
    text = console.file.getvalue()
    console.file.truncate(0)
    console.file.seek(0)
    return text


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("queued", {"place": 3, "ahead_tokens": 1_200_000, "expected_start_s": 41}),
        ("prefill", {"done_tokens": 131_072, "total_tokens": 1_048_576, "cached_tokens": 0}),
        ("counting", {}),
    ],
)
def test_note_of_the_gateway_is_understood(name, fields):
    line = comment(name, {**fields, "unknown": None}).decode().rstrip("\n")
    assert parse_note(line) == Note(name, fields)


@pytest.mark.parametrize(
    "line",
    ["", ": keep-alive", ": queued place=three", ": prefilled a=1", "data: {}", "queued a=1"],
)
def test_any_other_line_is_no_note(line):
    assert parse_note(line) is None


@pytest.mark.parametrize("console", [True], indirect=True, ids=["terminal"])
def test_place_then_progress_then_nothing(console):
    with WaitingDisplay(console) as waiting:
        waiting.show(Note("counting", {}))
        waiting._plain.refresh()
        assert "counting tokens" in shown(console)
        waiting.show(
            Note("queued", {"place": 3, "ahead_tokens": 1_200_000, "expected_start_s": 41})
        )
        waiting._plain.refresh()
        assert "place 3 in the queue, 1,200,000 tokens ahead, starts in 41 s" in shown(console)
        fields = {"done_tokens": 262_144, "total_tokens": 1_048_576, "cached_tokens": 65_536}
        waiting.show(Note("prefill", {**fields, "expected_first_token_s": 38}))
        waiting._progress.refresh()
        text = shown(console)
        assert " 25%, 262,144 of 1,048,576 tokens, 65,536 cached, 38 s left" in text
        assert text.count("━") > 10
        waiting.show(Note("queued", {"place": 1}))
        waiting._plain.refresh()
        assert "place 1 in the queue" in shown(console)
        waiting.show(Note("prefill", {**fields, "done_tokens": 524_288}))
        waiting._progress.refresh()
        assert " 50%, 524,288 of 1,048,576 tokens" in shown(console)
    assert shown(console).endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize("console", [True], indirect=True, ids=["terminal"])
def test_an_engine_that_does_not_tell_makes_no_percentage_up(console):
    with WaitingDisplay(console) as waiting:
        waiting.show(Note("prefill", {"total_tokens": 1_048_576}))
        waiting._progress.refresh()
        text = shown(console)
    assert "1,048,576 tokens" in text
    assert " of " not in text
    assert "%" not in text


@pytest.mark.parametrize("console", [False], indirect=True, ids=["pipe"])
def test_a_pipe_gets_nothing(console):
    with WaitingDisplay(console) as waiting:
        waiting.show(Note("queued", {"place": 3}))
        waiting.show(Note("prefill", {"done_tokens": 1, "total_tokens": 2}))
    assert shown(console) == ""
