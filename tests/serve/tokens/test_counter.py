"""Counting without an engine; tests/engine/test_token_counts.py compares the numbers with vLLM's."""

import asyncio
import json
import shutil
import time
from pathlib import Path

import pytest

from sala_serve.errors import FieldNotAllowed, InvalidRequest
from sala_serve.tokens.counter import SHORT_CHARS, TINY_CHARS, TokenCounter
from sala_serve.tokens.prompt import PREFIX_BLOCK_TOKENS, Prompt, block_hashes

DEMO = Path(__file__).parents[3] / "training" / "demo"
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def counter():
    counter = TokenCounter.load(DEMO / "checkpoint")
    yield counter
    counter.close()


def chat(*contents, **fields):
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return {"messages": messages, **fields}


async def test_chat_is_its_template_in_tokens(counter):
    text = "<s><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert counter.chat_text(chat("Hello")) == text
    (expected,) = await counter.count_completion({"prompt": text, "add_special_tokens": False})
    assert await counter.count_chat(chat("Hello")) == expected
    assert expected.num_tokens > 5


async def test_completion_gets_the_tokenizers_own_special_tokens_unless_told(counter):
    (with_them,) = await counter.count_completion({"prompt": "Hello"})
    (without,) = await counter.count_completion({"prompt": "Hello", "add_special_tokens": False})
    assert with_them.num_tokens - without.num_tokens == len(
        counter._tokenizer.encode("", add_special_tokens=True).ids
    )


async def test_lists_and_token_ids_are_counted_each(counter):
    ids = {"prompt": [5, 6, 7]}
    assert await counter.count_completion(ids) == [Prompt(3)]
    several = await counter.count_completion({"prompt": [[5, 6], [7]]})
    assert [prompt.num_tokens for prompt in several] == [2, 1]
    (one,) = await counter.count_completion({"prompt": "Hello"})
    assert await counter.count_completion({"prompt": ["Hello", "Hello"]}) == [one, one]


async def test_truncated_prompts_count_what_is_left(counter):
    body = {"prompt": list(range(2000)), "truncate_prompt_tokens": 600}
    (right,) = await counter.count_completion(body)
    (left,) = await counter.count_completion(body | {"truncation_side": "left"})
    assert (right.num_tokens, left.num_tokens) == (600, 600)
    assert right.block_hashes == block_hashes(list(range(600)))
    assert left.block_hashes == block_hashes(list(range(1400, 2000)))


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0",
        ),
        (chat("x", tools=[{"type": "function"}]), "tools.0"),
        (chat("x", tools="all"), "tools"),
        (chat("x", chat_template_kwargs={"tokenize": True}), "chat_template_kwargs"),
        (chat("x", continue_final_message=True), "messages"),
        (chat("x", add_generation_prompt="yes"), "add_generation_prompt"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls.0"),
    ],
)
async def test_what_is_not_a_chat_is_the_callers_fault(counter, document, param):
    with pytest.raises(InvalidRequest) as caught:
        await counter.count_chat(document)
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", [None, [], 3, [3.5], {"a": 1}, [[-1]], ["x", 3], [[2**40]]])
async def test_what_is_not_a_prompt_is_the_callers_fault(counter, prompt):
    with pytest.raises(InvalidRequest) as caught:
        await counter.count_completion({"prompt": prompt})
    assert caught.value.param == "prompt"


async def test_clients_bring_no_template(counter):
    with pytest.raises(FieldNotAllowed):
        await counter.count_chat(chat("x", chat_template="{{ 7 * 7 }}"))


async def test_templates_cannot_reach_the_program(tmp_path):
    folder = copy_with_template(tmp_path, "{{ messages.__class__.__mro__ }}")
    counter = TokenCounter.load(folder)
    with pytest.raises(InvalidRequest, match="unsafe"):
        await counter.count_chat(chat("x"))
    counter.close()


def copy_with_template(folder: Path, template: str) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "checkpoint" / name, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


async def test_template_file_wins_and_special_tokens_are_single(tmp_path):
    folder = copy_with_template(tmp_path, "{{ messages[0].content }}<|new|>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = ["<|new|>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    counter = TokenCounter.load(folder)
    assert counter.chat_text(chat("x")) == "x<|new|>"
    with_new = await counter.count_chat(chat("x"))
    (without,) = await counter.count_completion({"prompt": "x", "add_special_tokens": False})
    assert with_new.num_tokens == without.num_tokens + 1
    counter.close()


def test_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected"):
        TokenCounter.load(tmp_path)


async def test_short_prompts_do_not_wait_behind_long_ones(counter):
    text = (DEMO / "persuasion.txt").read_text()
    long = asyncio.create_task(counter.count_chat(chat(text * 10)))
    await asyncio.sleep(0)
    shorts = [await counter.count_chat(chat(f"Hello {number}")) for number in range(5)]
    assert not long.done()
    assert len(shorts) == 5
    assert (await long).num_tokens > 200_000


async def test_loop_goes_on_while_a_long_prompt_is_counted(counter):
    text = (DEMO / "persuasion.txt").read_text() * 10
    assert len(text) > SHORT_CHARS
    counting = asyncio.create_task(counter.count_chat(chat(text)))
    gaps, last = [], time.monotonic()
    while not counting.done():
        await asyncio.sleep(0.002)
        now = time.monotonic()
        gaps.append(now - last)
        last = now
    # a call that held the interpreter's lock would be one single gap
    assert len(gaps) > 20
    assert max(gaps) < sum(gaps) / 2


async def test_cancelled_count_does_not_disturb_the_next(counter):
    text = (DEMO / "persuasion.txt").read_text() * 5
    counting = asyncio.create_task(counter.count_chat(chat(text)))
    await asyncio.sleep(0.01)
    counting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await counting
    assert (await counter.count_chat(chat(text))).num_tokens > 100_000


def test_hashes_chain_and_cover_whole_blocks_only():
    ids = list(range(3 * PREFIX_BLOCK_TOKENS + 5))
    first = block_hashes(ids)
    assert len(first) == 3
    assert block_hashes(ids[:-6])[:2] == first[:2]
    assert len(block_hashes(ids[:-6])) == 2
    changed = ids.copy()
    changed[PREFIX_BLOCK_TOKENS] += 1
    second = block_hashes(changed)
    assert second[0] == first[0]
    assert second[1] != first[1]
    assert second[2] != first[2]
    assert block_hashes(ids[: PREFIX_BLOCK_TOKENS - 1]) == ()


@pytest.mark.parametrize(
    ("document", "is_at_once"),
    [
        (chat("Hello"), True),
        ({"prompt": "Hello"}, True),
        (chat("x" * TINY_CHARS), False),
        (chat(*[""] * TINY_CHARS), False),
        (
            chat("Hello", tools=[{"type": "function", "function": {"name": "x" * TINY_CHARS}}]),
            False,
        ),
        (chat("Hello", **{"x" * TINY_CHARS: 1}), False),
    ],
    ids=["chat", "completion", "long", "many", "tools", "key"],
)
def test_only_what_takes_no_time_is_counted_on_the_loop(counter, document, is_at_once):
    count = counter.count_chat if "messages" in document else counter.count_completion
    asked = count(document)
    try:
        if is_at_once:
            with pytest.raises(StopIteration):
                asked.send(None)
        else:
            # outside a loop there is no thread to wait for
            with pytest.raises(RuntimeError, match="no running event loop"):
                asked.send(None)
    finally:
        asked.close()
