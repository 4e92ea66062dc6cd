"""The chat client as a user runs it: a process against a real gateway."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import sys
import termios
from contextlib import asynccontextmanager

import httpx
import pytest

from sala_serve.config import ApiKeys
from sala_serve.engine.fake import Behaviour, Ending
from sala_serve.events import DONE_EVENT, comment
from sala_serve.terminal import Answer, ChatClient, ChatError, read_context
from sala_serve.terminal_progress import Note


async def chat(*arguments, stdin=b"", **variables):
    env = {key: value for key, value in os.environ.items() if not key.startswith("SALA_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sala_serve", "chat", *arguments),
        env={**env, **variables},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(20):
        out, err = await process.communicate(stdin)
    return process.returncode, out.decode(), err.decode()


async def test_answer_goes_to_stdout_and_figures_to_stderr(start_stack):
    async with start_stack(Behaviour(itl_s=0.05)) as stack:
        status, out, err = await chat("--url", stack.url, "Say something")
    assert (status, out) == (0, "word0 word1 word2 \n")
    assert err.startswith("time to first token 0.")
    assert "prompt 7 tokens, 4 cached | completion 3 tokens | " in err
    assert "\x1b" not in out + err
    (body,) = stack.engine.journal.bodies
    assert body["messages"] == [{"role": "user", "content": "Say something"}]
    assert "max_tokens" not in body


async def test_question_comes_from_a_pipe_and_files_go_before_it(stack, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "b.md").write_text("second")
    (tmp_path / "notes" / "a.txt").write_text("first")
    (tmp_path / "notes" / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "notes" / ".git").mkdir()
    (tmp_path / "notes" / ".git" / "config").write_text("hidden")
    arguments = ("--file", str(tmp_path / "notes"), "--max-tokens", "5")
    status, _, err = await chat(*arguments, stdin=b"Which?", SALA_SERVE_URL=stack.url)
    assert status == 0, err
    (body,) = stack.engine.journal.bodies
    assert body["max_tokens"] == 5
    folder = tmp_path / "notes"
    assert body["messages"][0]["content"] == (
        f'<file name="{folder}/a.txt">\nfirst\n</file>\n\n'
        f'<file name="{folder}/b.md">\nsecond\n</file>\n\n'
        "Which?"
    )


@asynccontextmanager
async def terminal(*arguments):
    """The client in a terminal: its process, what is shown so far, a function that types."""
    primary, secondary = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sala_serve", "chat", *arguments),
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        # Ctrl-C reaches those whose terminal it is
        preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )
    os.close(secondary)
    loop = asyncio.get_running_loop()
    shown = bytearray()

    def read():
        try:
            shown.extend(os.read(primary, 65536))
        except OSError:  # the other end is closed
            loop.remove_reader(primary)

    loop.add_reader(primary, read)
    try:
        yield process, shown, lambda text: os.write(primary, text)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        loop.remove_reader(primary)
        os.close(primary)


async def test_conversation_in_a_terminal_remembers_what_was_said(stack, eventually):
    async with terminal("--url", stack.url) as (process, shown, write):
        await eventually(lambda: b"> " in shown)
        write(b"First?\n")
        await eventually(lambda: shown.count(b"tokens/s") == 1 and shown.endswith(b"> "))
        write(b"Second?\n")
        await eventually(lambda: shown.count(b"tokens/s") == 2 and shown.endswith(b"> "))
        write(b"\x04")
        async with asyncio.timeout(10):
            assert await process.wait() == 0
    _, body = stack.engine.journal.bodies
    assert [message["content"] for message in body["messages"]] == [
        "First?",
        "word0 word1 word2 ",
        "Second?",
    ]


async def test_waiting_is_shown_place_first_then_a_bar_that_fills(
    start_stack, eventually, tmp_path
):
    slow = Behaviour(
        max_model_len=100_000,
        num_prompt_tokens=None,
        num_cached_tokens=None,
        prefill_tokens_per_s=6000,
    )
    (tmp_path / "book.txt").write_text("word " * 15_000)
    arguments = ("--file", str(tmp_path / "book.txt"))
    config = {"max_long_prefills": 1, "long_prompt_tokens": 5000, "progress_interval_s": 0.2}
    async with start_stack(slow, **config) as stack, asyncio.TaskGroup() as group:
        before = {"model": "sala", "prompt": "other " * 6000, "max_tokens": 1}
        group.create_task(stack.http.post("/v1/completions", json=before, timeout=60))
        await stack.admitted(1)
        stack.engine.core.freeze()
        async with terminal("--url", stack.url, *arguments, "Who?") as (process, shown, _):
            await eventually(lambda: b"place 1 in the queue" in shown)
            stack.engine.core.thaw()
            await eventually(lambda: b"tokens/s" in shown)
            async with asyncio.timeout(10):
                assert await process.wait() == 0
    text = shown.decode()
    queued, _, rest = text.partition("%")
    assert "place 1 in the queue" in queued
    assert "place" not in rest
    percents = [int(each) for each in re.findall(r"(\d+)%, [\d,]+ of 15,0\d\d tokens", text)]
    assert percents == sorted(percents)
    assert len(set(percents)) > 2
    assert "word0 word1 word2" in rest
    assert re.search(r"time to first token \d+\.\d\d s \(\d+\.\d\d s in the queue\)", rest)
    assert re.search(r"prompt 15\d{3} tokens, 0 cached", rest)


async def test_no_server_is_one_clear_line():
    status, out, err = await chat("--url", "http://127.0.0.1:9", "Hi")
    assert (status, out) == (1, "")
    assert err == (
        "sala-serve: error: no server at http://127.0.0.1:9; start one with: sala-serve up MODEL\n"
    )


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost"])
async def test_url_without_scheme_is_one_clear_line(url):
    status, _, err = await chat("--url", url, "Hi")
    expected = f"expected a URL such as http://127.0.0.1:8000, got '{url}'"
    assert (status, err) == (1, f"sala-serve: error: {expected}\n")


async def test_empty_question_is_not_sent(stack):
    status, _, err = await chat("--url", stack.url, stdin=b"\n")
    assert (status, err) == (1, "sala-serve: error: the question is empty\n")
    assert stack.engine.journal.bodies == []


async def test_ctrl_c_stops_the_answer_not_the_conversation(start_stack, eventually):
    async with (
        start_stack(Behaviour(num_tokens=1000, itl_s=0.05)) as stack,
        terminal("--url", stack.url) as (process, shown, write),
    ):
        await eventually(lambda: b"> " in shown)
        write(b"First?\n")
        await eventually(lambda: b"word1 " in shown)
        write(b"\x03")
        await eventually(lambda: b"stopped" in shown and shown.endswith(b"> "))
        await eventually(lambda: stack.engine.journal.num_aborted == 1)
        stack.engine.behaviour.num_tokens = 1
        write(b"half a quest")
        await eventually(lambda: shown.endswith(b"half a quest"))
        write(b"\x03")
        await eventually(lambda: shown.endswith(b"> "))
        write(b"Second?\n")
        await eventually(lambda: b"tokens/s" in shown and shown.endswith(b"> "))
        write(b"\x04")
        async with asyncio.timeout(10):
            assert await process.wait() == 0
    assert [m["content"] for m in stack.engine.journal.bodies[-1]["messages"]] == ["Second?"]


async def test_too_long_prompt_shows_the_servers_message(stack):
    message = "This model's maximum context length is 10 tokens. Please reduce the length."
    stack.engine.behaviour.error = (400, {"message": message, "code": 400})
    status, _, err = await chat("--url", stack.url, "Hi")
    assert (status, err) == (1, f"sala-serve: error: {message}\n")


async def test_broken_stream_is_an_error_after_what_came(start_stack):
    async with start_stack(Behaviour(ending=Ending.CONNECTION_LOST)) as stack:
        status, out, err = await chat("--url", stack.url, "Hi")
    assert (status, out) == (1, "word0 word1 word2 \n")
    assert "broke before the answer was complete" in err


async def test_key_is_taken_from_flag_or_environment(start_stack):
    async with start_stack(api_keys=ApiKeys(("sk-one",))) as stack:
        assert (await chat("--url", stack.url, "Hi", SALA_SERVE_API_KEY="sk-one"))[0] == 0
        status, _, err = await chat("--url", stack.url, "--api-key", "sk-two", "Hi")
    assert (status, err) == (1, "sala-serve: error: Incorrect API key provided.\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot read .*No such file"),
        ("image.png", b"\x89PNG\xff", "not a text file"),
        ("nul.txt", b"a\0b", "not a text file"),
    ],
)
def test_unusable_file_is_a_clear_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ChatError, match=message):
        read_context([tmp_path / name])


def test_folder_without_text_is_a_clear_error(tmp_path):
    with pytest.raises(ChatError, match="no text file in"):
        read_context([tmp_path])


def test_rate_counts_the_tokens_after_the_first():
    usage = {"prompt_tokens": 5, "completion_tokens": 11}
    answer = Answer(text="", ttft_s=2.0, duration_s=7.0, usage=usage)
    assert answer.summary() == (
        "time to first token 2.00 s | prompt 5 tokens, 0 cached | completion 11 tokens | 2.0 tokens/s"
    )


def answering(*events):
    """A client of a server that answers every request with these events."""

    def answer(_request):
        return httpx.Response(200, stream=httpx.ByteStream(b"".join(events)))

    return ChatClient(
        httpx.Client(transport=httpx.MockTransport(answer), base_url="http://gateway")
    )


def test_notes_come_before_the_chunks():
    chunk = {"choices": [{"delta": {"content": "Hi"}}]}
    client = answering(
        comment("queued", {"place": 2, "ahead_tokens": 5}),
        b": keep-alive\n\n",
        comment("prefill", {"done_tokens": 1, "total_tokens": 2}),
        b"data: " + json.dumps(chunk).encode() + b"\n\n",
        DONE_EVENT,
    )
    assert list(client.stream({})) == [
        Note("queued", {"place": 2, "ahead_tokens": 5}),
        Note("prefill", {"done_tokens": 1, "total_tokens": 2}),
        chunk,
    ]


def test_time_in_the_queue_is_told():
    answer = Answer(text="", ttft_s=20.0, duration_s=21.0, usage={}, queued_s=12.5)
    assert answer.summary().startswith("time to first token 20.00 s (12.50 s in the queue) | ")


async def test_refusal_says_when_to_try_again(stack):
    stack.gateway.running.is_draining = True
    status, _, err = await chat("--url", stack.url, "Hi")
    assert status == 1
    assert err.endswith("please retry. (try again in 5 s)\n")
