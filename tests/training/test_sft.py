"""Fine-tuning data: every usual form, the served template's bytes, a loss on what the assistant says alone."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sala_training.batch import StepPosition
from sala_training.data.tokenizer import EOS_IDS, IM_END_ID
from sala_training.sft import store
from sala_training.sft.chats import Chat, ChatError, from_row, read
from sala_training.sft.render import Rendered, Renderer, TemplateMismatchError

if TYPE_CHECKING:
    from pathlib import Path

CALL = {
    "type": "function",
    "function": {"name": "height", "arguments": {"of": "tower", "in": ["m"]}},
}
TOOL = {"type": "function", "function": {"name": "height", "description": "How high it is."}}
TOOL["function"] |= {"parameters": {"type": "object", "properties": {"of": {"type": "string"}}}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How high is the tower?"},
    {"role": "assistant", "content": "It is 48 metres high."},
    {"role": "user", "content": "And the wall?"},
    {"role": "assistant", "content": "Nobody knows."},
]
TOOLS_TALK = [
    TALK[1],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"metres": 48}'},
    TALK[2],
]
# writes tools and calls as Qwen does, and leaves earlier reasoning out
TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content and loop.last %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@pytest.fixture(scope="session")
def folder(data_folder: Path) -> Path:
    """The miniature tokenizer with its own template."""
    return data_folder / "tokenizer"


def with_template(folder: Path, tmp_path: Path, template: str) -> Path:
    shutil.copytree(folder, tmp_path / "tokenizer", dirs_exist_ok=True)
    path = tmp_path / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return tmp_path / "tokenizer"


def scored(renderer: Renderer, sample: Rendered) -> list[str]:
    """The runs of scored tokens, as text."""
    runs: list[list[int]] = []
    for i, (token, flag) in enumerate(zip(sample.tokens, sample.is_scored, strict=True)):
        if flag and i and sample.is_scored[i - 1]:
            runs[-1].append(token)
        elif flag:
            runs.append([token])
    decode = renderer._served._tokenizer.decode
    return [decode(run, skip_special_tokens=False) for run in runs]


def test_the_forms_are_one_chat() -> None:
    openai = from_row({"messages": TALK})
    turns = ["human", "gpt", "human", "gpt"]
    sharegpt = {"system": "Be brief.", "conversations": []}
    sharegpt["conversations"] = [
        {"from": speaker, "value": m["content"]} for speaker, m in zip(turns, TALK[1:], strict=True)
    ]
    alpaca = {
        "system": "Be brief.",
        "instruction": "And",
        "input": "the wall?",
        "output": "Nobody knows.",
    }
    alpaca |= {"history": [["How high is the tower?", "It is 48 metres high."]]}
    assert list(openai.messages) == TALK
    assert from_row(sharegpt).messages == openai.messages
    assert from_row(alpaca).messages[:3] == openai.messages[:3]
    assert from_row(alpaca).messages[3]["content"] == "And\nthe wall?"
    calls = {"from": "function_call", "value": json.dumps(CALL["function"])}
    observed = {"from": "observation", "value": '{"metres": 48}'}
    talk = [sharegpt["conversations"][0], calls, observed, sharegpt["conversations"][1]]
    tools = json.dumps([TOOL["function"]])
    expected = from_row({"messages": TOOLS_TALK, "tools": [TOOL]})
    assert from_row({"conversations": talk, "tools": tools}) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "expected an object, got list"),
        ({"text": "x"}, r"expected messages, conversations.*\['text'\]"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages.0: expected a role.*'bot'"),
        ({"messages": [TALK[1]]}, "a message of the assistant to learn"),
        ({"messages": [TALK[1], TALK[2] | {"weight": 0}]}, "a message of the assistant to learn"),
        ({"messages": [TALK[1], TALK[2] | {"weight": 2}]}, "weight of 0 or 1, got 2"),
        ({"messages": [TALK[1], {"role": "assistant", "content": ""}]}, "say something"),
        ({"messages": [TALK[1], {"role": "user", "content": 3}]}, "content as text, got int"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations.0.*'alien'"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "expected JSON"),
        ({"conversations": [{"from": "gpt"}]}, "from and value"),
        ({"instruction": "x", "output": 3}, "output: expected text, got int"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "pairs"),
        ({"messages": TALK, "tools": "x"}, "a list of tools"),
    ],
)
def test_a_row_that_is_no_chat_is_refused(row: Any, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        from_row(row)


def test_files_name_the_row_and_may_leave_out_bad_ones(tmp_path: Path) -> None:
    lines = tmp_path / "chats.jsonl"
    lines.write_text(
        json.dumps({"messages": TALK}) + "\n\n{\n" + json.dumps({"messages": []}) + "\n"
    )
    with pytest.raises(ChatError, match=r"chats.jsonl:3: not JSON"):
        list(read(lines))
    errors: list[ChatError] = []
    assert [chat.source for chat in read(lines, errors)] == ["chats.jsonl:1"]
    assert [str(e)[:14] for e in errors] == ["chats.jsonl:3:", "chats.jsonl:4:"]
    array = tmp_path / "chats.json"
    array.write_text(json.dumps([{"messages": TALK}] * 2))
    assert len(list(read(array))) == 2
    array.write_text("{}")
    with pytest.raises(ChatError, match="expected an array"):
        list(read(array))


@pytest.mark.parametrize("own_template", [True, False])
def test_the_text_is_what_transformers_makes_for_the_engine(
    own_template: bool, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    if not own_template:
        folder = with_template(folder, tmp_path, TEMPLATE)
    served, renderer = AutoTokenizer.from_pretrained(folder), Renderer(folder, EOS_IDS)
    chats = [Chat(tuple(TALK))] + ([] if own_template else [Chat(tuple(TOOLS_TALK), [TOOL])])
    for chat in chats:
        for num in range(1, len(chat.messages) + 1):
            for asks in (False, True):
                messages = [dict(m) for m in chat.messages[:num]]
                options = {"tools": chat.tools, "add_generation_prompt": asks}
                text = renderer.text(messages, chat, asks)
                assert text == served.apply_chat_template(messages, tokenize=False, **options)
                ids = served.apply_chat_template(messages, return_dict=False, **options)
                assert renderer.encode(text) == list(ids)


def test_the_loss_is_on_what_the_assistant_says_and_its_end(folder: Path, tmp_path: Path) -> None:
    renderer = Renderer(folder, EOS_IDS)
    (sample,) = renderer.render(Chat(tuple(TALK)))
    answers = ["It is 48 metres high.<|im_end|>", "Nobody knows.<|im_end|>"]
    assert scored(renderer, sample) == answers
    # what is read before each answer are the tokens of the request that would ask for it
    for index, first in ((2, 0), (4, 1)):
        prompt = renderer.encode(renderer.text(TALK[:index], Chat(tuple(TALK)), asks=True))
        starts = [i for i, s in enumerate(sample.is_scored) if s and not sample.is_scored[i - 1]]
        assert sample.tokens[: starts[first]] == prompt
    (second,) = renderer.render(Chat(tuple(TALK), untrained=frozenset({2})))
    assert scored(renderer, second) == answers[1:]
    assert second.tokens == sample.tokens

    renderer = Renderer(with_template(folder, tmp_path, TEMPLATE), EOS_IDS)
    (sample,) = renderer.render(Chat(tuple(TOOLS_TALK), [TOOL]))
    call, answer = scored(renderer, sample)
    assert call == f"<tool_call>{json.dumps(CALL['function'])}</tool_call><|im_end|>"
    assert answer == answers[0]


def test_a_turn_whose_prompt_does_not_begin_the_whole_is_a_sample_of_its_own(
    folder: Path, tmp_path: Path
) -> None:
    renderer = Renderer(with_template(folder, tmp_path, TEMPLATE), EOS_IDS)
    talk = [m | {"reasoning_content": "Hm."} if m["role"] == "assistant" else m for m in TALK]
    whole, first = renderer.render(Chat(tuple(talk)))
    assert scored(renderer, whole) == ["<think>Hm.</think>Nobody knows.<|im_end|>"]
    assert scored(renderer, first) == ["<think>Hm.</think>It is 48 metres high.<|im_end|>"]
    asked = renderer.encode(renderer.text(talk[:2], Chat(tuple(talk)), asks=True))
    assert first.tokens[: len(asked)] == asked

    # an answer that begins with a newline would join the newline of its opening
    odd = [TALK[1], {"role": "assistant", "content": "\nYes."}]
    renderer = Renderer(folder, EOS_IDS)
    (sample,) = renderer.render(Chat(tuple(odd)))
    asked = renderer.encode(renderer.text(odd[:1], Chat(tuple(odd)), asks=True))
    assert renderer.encode(renderer.text(odd, Chat(tuple(odd)), asks=False))[: len(asked)] != asked
    assert sample.tokens[: len(asked)] == asked
    assert scored(renderer, sample) == ["\nYes.<|im_end|>"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # opens an answer otherwise when asked than when it is there; forgets the end of a turn
        (
            "'<|im_start|>assistant\\n' }}",
            "'<|im_start|>assistant: ' }}",
            "expected the answer to follow",
        ),
        ("'<|im_end|>' + '\\n'", "'\\n'", "expected one of the stop tokens"),
    ],
)
def test_a_template_that_would_teach_the_wrong_thing_is_refused(
    old: str, new: str, message: str, folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert old in config["chat_template"]
    wrong = with_template(folder, tmp_path, config["chat_template"].replace(old, new))
    with pytest.raises(TemplateMismatchError, match=message):
        Renderer(wrong, EOS_IDS).render(Chat(tuple(TALK)))


def make_samples(num: int) -> list[Rendered]:
    """Sample i is the token i, over and over; the second half is scored."""
    lengths = np.random.default_rng(1).integers(2, 40, num).tolist()
    return [Rendered([i] * n, [2 * j >= n for j in range(n)]) for i, n in enumerate(lengths)]


def test_rows_hold_whole_chats_and_each_once_an_epoch(tmp_path: Path) -> None:
    samples = make_samples(50)
    samples.append(
        Rendered([50] * 100, [j == 99 for j in range(100)])
    )  # its answer lies beyond a row
    samples.append(Rendered([51] * 100, [j > 30 for j in range(100)]))  # cut
    store.write(samples, tmp_path)
    rows = store.ChatRows(tmp_path, length_tokens=64, rows_per_step=3, seed=7)
    num_rows = len(rows.rows)
    assert num_rows < 1.3 * sum(len(s.tokens) for s in samples[:50]) / 64 + 1
    seen: list[dict[int, int]] = []
    for epoch in range(2):
        counts: dict[int, int] = {}
        for place in range(epoch * num_rows, (epoch + 1) * num_rows):
            batch = rows.batch(StepPosition(0, 0, place // 3), range(place % 3, place % 3 + 1))
            assert len(batch.tokens) == 64
            ends = np.cumsum(batch.cu_seqlens.lengths)
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                # a document is one chat
                assert set(batch.tokens[start:end].tolist()) == set(
                    batch.targets[start:end].tolist()
                )
                sample = int(batch.tokens[start])
                weights = batch.weights[start:end]
                if weights.any():
                    counts[sample] = counts.get(sample, 0) + 1
                    wanted = samples[sample].is_scored[1 : end - start + 1]
                    assert weights.bool().tolist() == wanted
                    assert sample == 51 or end - start == len(samples[sample].tokens) - 1
        seen.append(counts)
    assert seen[0] == seen[1] == {i: 1 for i in range(52) if i != 50}
    store.write([Rendered([1] * 9, [j == 8 for j in range(9)])], tmp_path)
    with pytest.raises(ChatError, match="within 2 tokens"):
        store.ChatRows(tmp_path, 2, 1)


def test_a_row_depends_on_its_place_alone(tmp_path: Path) -> None:
    store.write(make_samples(50), tmp_path)
    rows = store.ChatRows(tmp_path, 64, 4, seed=7)
    again = store.ChatRows(tmp_path, 64, 4, seed=7)
    whole = rows.batch(StepPosition(1, 9, 2), range(4))
    parts = [again.batch(StepPosition(1, 9, 2), range(i, i + 2)) for i in (0, 2)]
    assert whole.tokens.tolist() == [t for part in parts for t in part.tokens.tolist()]
    other = store.ChatRows(tmp_path, 64, 4, seed=8).batch(StepPosition(1, 9, 2), range(4))
    assert other.tokens.tolist() != whole.tokens.tolist()


def test_preparing_counts_and_says_what_it_was_made_of(folder: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    rows = [{"messages": TALK}, {"instruction": "Say no.", "output": "No."}, {"text": "none"}]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ChatError, match=r"chats.jsonl:3"):
        store.prepare([chats], folder, EOS_IDS, tmp_path / "out")
    made = store.prepare([chats], folder, EOS_IDS, tmp_path / "out", skip_bad=True)
    assert (made["chats"], made["samples"], made["left_out"], made["turns_alone"]) == (2, 2, 1, 0)
    assert 0 < made["scored_tokens"] < made["tokens"]
    assert store.manifest(tmp_path / "out") == made
    batch = store.ChatRows(tmp_path / "out", 32, 1).batch(StepPosition(0, 0, 0), range(1))
    assert batch.weights.sum() > 0
    assert (batch.targets[batch.weights.bool()] == IM_END_ID).any()
    other = with_template(folder, tmp_path, TEMPLATE)
    assert (
        store.prepare([chats], other, EOS_IDS, tmp_path / "o", True)["tokenizer"]
        != made["tokenizer"]
    )
    chats.write_text("")
    with pytest.raises(ChatError, match="got none"):
        store.prepare([chats], folder, EOS_IDS, tmp_path / "out")
