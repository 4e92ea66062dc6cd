"""What the body of /v1/responses may hold, and the chat that it becomes."""

import pytest

from sala_serve.errors import FieldNotAllowed, InvalidRequest
from sala_serve.jobs.response_request import parse_response_request

TOOL = {
    "type": "function",
    "name": "weather",
    "description": "Tells it.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
TIME = {"type": "function", "name": "time", "parameters": None}


def parse(**fields):
    return parse_response_request({"model": "sala", "input": "Hi", **fields})


def test_text_becomes_one_message_after_the_instructions():
    request = parse(instructions="Be brief.", max_output_tokens=7, temperature=0, top_p=0.5)
    assert request.chat_document([]) == {
        "model": "sala",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
        ],
        "max_completion_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
    }
    assert request.is_stored
    assert not request.is_background
    assert not request.is_stream


def test_a_conversation_with_tools_becomes_the_messages_of_a_chat():
    items = [
        {"role": "developer", "content": "Rules."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
        {"type": "message", "role": "assistant", "content": "Let me see."},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "noon"}],
        },
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
    ]
    request = parse(input=items, tools=[TOOL, TIME])

    def call(call_id, name):
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}

    assert request.chat_document([])["messages"] == [
        {"role": "system", "content": "Rules."},
        {"role": "user", "content": "Weather"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [call("c1", "weather"), call("c2", "time")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "noon"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
    ]


def test_tools_and_structured_output_are_those_of_a_chat():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    text = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    request = parse(
        tools=[TOOL, TIME],
        tool_choice={"type": "function", "name": "weather"},
        text=text,
        parallel_tool_calls=False,
    )
    assert request.chat["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Tells it.",
                "parameters": TOOL["parameters"],
                "strict": True,
            },
        },
        {"type": "function", "function": {"name": "time"}},
    ]
    assert request.chat["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert request.chat["parallel_tool_calls"] is False
    assert request.chat["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }
    assert request.echo["text"] == text


def test_allowed_tools_are_the_only_ones_the_engine_gets():
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"name": "time"}]}
    request = parse(tools=[TOOL, TIME], tool_choice=choice)
    assert [tool["function"]["name"] for tool in request.chat["tools"]] == ["time"]
    assert request.chat["tool_choice"] == "required"
    assert [tool["name"] for tool in request.echo["tools"]] == ["weather", "time"]


def test_reasoning_effort_logprobs_cache_key_and_tier_are_passed_on():
    request = parse(
        reasoning={"effort": "low"},
        top_logprobs=2,
        prompt_cache_key="k",
        service_tier="flex",
        seed=5,
    )
    assert request.chat["reasoning_effort"] == "low"
    assert (request.chat["logprobs"], request.chat["top_logprobs"]) == (True, 2)
    assert request.chat["prompt_cache_key"] == "k"
    assert request.chat["service_tier"] == "flex"
    assert request.chat["seed"] == 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 5}, "model"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"role": ["user"], "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"type": ["message"]}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": {}}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": ["x"]}}, "tool_choice.name"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"name": ["weather"]}],
                },
            },
            "tool_choice.tools",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True, "store": False}, "store"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(index): "" for index in range(17)}}, "metadata"),
        ({"stream": "yes"}, "stream"),
        ({"no_such": 1}, "no_such"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_or_not_done_is_refused_by_name(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert caught.value.param == param


def test_fields_of_the_gateway_are_refused():
    with pytest.raises(FieldNotAllowed):
        parse(cache_salt="mine")
