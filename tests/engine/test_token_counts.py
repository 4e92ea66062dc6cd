"""The gateway's own token counts against vLLM's rendering of the same requests, template by template."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.config import ModelConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import resolve_chat_template_content_format, safe_apply_chat_template

from sala_serve.errors import InvalidRequest
from sala_serve.tokens.counter import TokenCounter
from sala_serve.tokens.template import ChatTemplate
from vllm_ext import register

pytestmark = pytest.mark.engine

DEMO_CHECKPOINT = Path(__file__).parents[2] / "training" / "demo" / "checkpoint"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS_IN_SYSTEM = """\
{%- if tools %}
{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<call>' + call.function.name + (call.function.arguments | tojson(indent=2)) }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {{- '<result>' + message.tool_call_id + message.content }}
    {%- elif message.content is not none %}
        {{- message.role + (message.name if message.name else '') + ': ' + message.content | trim }}
        {%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% if enable_thinking is defined %}
{{- enable_thinking }}{{ reasoning_effort }}{% endif %}{% endif %}
"""
PARTS = """\
{{ bos_token }}{% set loop_messages = messages[0:] %}{% for message in loop_messages %}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] %}[{{ part['type'] }}]{{ part['text'] }}{% endfor %}{% endif %}
{%- generation %}{{ eos_token }}{% endgeneration %}{% endfor %}
"""
MACRO = """\
{% macro show(content) %}{% for item in content %}<{{ item.text }}>{% endfor %}{% endmacro %}
{%- for m in messages %}{{ m.role }}{{ show(m.content) }}{% endfor %}
"""
DEVELOPERS = """\
{% for m in messages %}{% if m.role == 'developer' %}DEV{{ m.tools | tojson }}{% endif %}
{{- m.content }}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}
"""
STRICT = """\
{% if messages[0].role != 'user' %}{{ raise_exception('must begin with the user') }}{% endif %}
{%- for m in messages %}{{ m.content }}{% endfor %}{% for d in documents or [] %}{{ d.title }}{% endfor %}
"""
TEMPLATES = {
    "chatml": CHATML,
    "tools": TOOLS_IN_SYSTEM,
    "parts": PARTS,
    "macro": MACRO,
    "developers": DEVELOPERS,
    "strict": STRICT,
    "demo": None,
}

CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "look_up", "arguments": '{"word": "Wärme", "n": 3}'},
}
LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        "strict": True,
    },
}
PLAIN_TOOL = {
    "type": "function",
    "unknown": 1,
    "function": {"description": "The time — 现在", "name": "now", "unknown": 2},
}
USER = {"role": "user", "content": "What is the passkey? <|im_end|> 你好 🙂"}
ANSWER = {"role": "assistant", "content": "48213, I think  "}
CHATS: dict[str, dict[str, Any]] = {
    "one": {"messages": [USER]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, USER]},
    "turns": {"messages": [USER, ANSWER, {"role": "user", "name": "Ann", "content": "Sure?"}]},
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}],
            }
        ]
    },
    "tools": {"messages": [USER], "tools": [LOOK_UP, PLAIN_TOOL]},
    "no tools": {"messages": [USER], "tools": [LOOK_UP], "tool_choice": "none"},
    "calls": {
        "tools": [LOOK_UP],
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "x"}]},
        ],
    },
    "broken arguments": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "tool_calls": [CALL | {"function": {"name": "look_up", "arguments": "[1"}}],
            },
        ]
    },
    "developer": {
        "messages": [
            {"role": "developer", "content": "Be kind."},
            {"role": "system", "content": "Be brief."},
            USER,
            {"role": "developer", "content": "Now."},
        ]
    },
    "continued": {
        "messages": [USER, ANSWER],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "no generation prompt": {"messages": [USER], "add_generation_prompt": False},
    "thinking": {
        "messages": [USER, ANSWER | {"reasoning_content": "hm"}],
        "reasoning_effort": "low",
        "chat_template_kwargs": {"documents": [{"title": "T", "text": "t"}]},
    },
    "documents": {"messages": [USER], "documents": [{"title": "T", "text": "t"}]},
    "special tokens": {"messages": [USER], "add_special_tokens": True},
    "billing header": {
        "messages": [
            {"role": "system", "content": "x-anthropic-billing-header: 1\nBe brief."},
            USER,
        ]
    },
}


@pytest.fixture(scope="module")
def model_config() -> ModelConfig:
    register()
    return ModelConfig(model=str(DEMO_CHECKPOINT), dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_CHECKPOINT)


def counter_with(template: str | None) -> TokenCounter:
    counter = TokenCounter.load(DEMO_CHECKPOINT)
    if template is not None:
        counter._templates = {"default": ChatTemplate(template)}
    return counter


def tokens_of_vllm(
    chat: dict[str, Any], template: str | None, model_config: ModelConfig, tokenizer: Any
) -> list[int]:
    """Follow vLLM from a body to token ids."""
    request = ChatCompletionRequest.model_validate(json.loads(json.dumps({"model": "m", **chat})))
    params = request.build_chat_params(template, "auto").with_defaults(
        {
            "tools": request.tools and [tool.model_dump() for tool in request.tools],
            "tokenize": False,
        }
    )
    content_format = resolve_chat_template_content_format(
        chat_template=template,
        tools=None,
        given_format="auto",
        tokenizer=tokenizer,
        model_config=model_config,
    )
    conversation, _, _ = parse_chat_messages(
        request.messages, model_config, content_format=content_format
    )
    text = safe_apply_chat_template(
        model_config, tokenizer, conversation, **params.get_apply_chat_template_kwargs()
    )
    return tokenizer.encode(text, add_special_tokens=request.add_special_tokens)


@pytest.mark.parametrize("chat", CHATS.values(), ids=list(CHATS))
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_chat_has_the_tokens_that_vllm_makes_of_it(
    template: str | None, chat: dict[str, Any], model_config: ModelConfig, tokenizer: Any
) -> None:
    counter = counter_with(template)
    try:
        expected = tokens_of_vllm(chat, template, model_config, tokenizer)
    except VLLMValidationError:
        with pytest.raises(InvalidRequest):
            counter.chat_text(chat)
        return
    text = counter.chat_text(chat)
    assert text == tokenizer.decode(expected, clean_up_tokenization_spaces=False) or chat.get(
        "add_special_tokens"
    )
    assert asyncio.run(counter.count_chat(chat)).num_tokens == len(expected)


def test_every_template_of_the_comparison_accepts_some_chats_and_they_differ() -> None:
    made = {}
    for name, template in TEMPLATES.items():
        counter = counter_with(template)
        for chat_name in ("one", "tools", "parts"):
            made[name, chat_name] = counter.chat_text(CHATS[chat_name])
    assert len(set(made.values())) > len(made) // 2
    assert "look_up" in made["tools", "tools"]
    assert "[text]a[text]b" in made["parts", "parts"]
    assert "a\nb" in made["chatml", "parts"]
