"""Events and responses, judged by OpenAI's own types and by the accumulator of its client."""

import pytest
from openai._models import construct_type
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from sala_serve.errors import EngineLost
from sala_serve.jobs.model import Status
from sala_serve.jobs.response_request import parse_response_request
from sala_serve.jobs.response_stream import (
    ResponseStream,
    abandoned_items,
    event,
    failed,
    response_document,
)

EVENTS = TypeAdapter(ResponseStreamEvent)


def start(**fields):
    request = parse_response_request({"model": "sala", "input": "Hi", **fields})
    return response_document(request, "resp_1", 1.5, Status.RUNNING)


def play(document, chunks, **options):
    """All events of one attempt."""
    stream = ResponseStream(document, **options)
    events = [each for chunk in chunks for each in stream.feed(chunk)]
    return events + stream.finish(9.5)[2]


def judged(document, events):
    """Let OpenAI's types and accumulator read a whole stream; return what the client ends up with."""
    events = [event("created", document), event("in_progress", document), *events]
    state = ResponseStreamState(input_tools=omit, text_format=omit)
    for number, each in enumerate(events):
        strict = EVENTS.validate_python({**each, "sequence_number": number})
        assert strict.type == each["type"]
        state.handle_event(
            construct_type(type_=ResponseStreamEvent, value={**each, "sequence_number": number})
        )
    return state._completed_response


def kinds(events):
    return [each["type"].removeprefix("response.") for each in events]


def test_text_has_the_events_of_openai_in_their_order(chunks):
    document = start()
    events = play(document, chunks("Hello ", "world"))
    assert kinds(events) == [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    response = judged(document, events)
    assert response.output_text == "Hello world"
    assert response.usage.input_tokens == 9
    assert response.usage.input_tokens_details.cached_tokens == 4
    assert response.usage.input_tokens_details.cache_write_tokens == 0
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    assert response.usage.total_tokens == 12
    assert response.completed_at == 9
    Response.model_validate(events[-1]["response"], strict=True)


def test_reasoning_text_and_calls_are_items_of_their_own(chunks):
    def chunk(**delta):
        return {"choices": [{"index": 0, "delta": delta}]}

    def call(index, **function):
        first = {"id": f"call-{index}"} if "name" in function else {}
        return chunk(tool_calls=[{"index": index, **first, "function": function}])

    document = start(tools=[{"type": "function", "name": "f"}])
    events = play(
        document,
        [
            chunk(reasoning_content="Let "),
            chunk(reasoning="me think"),
            chunk(content="Calling."),
            call(0, name="f", arguments=""),
            call(0, arguments='{"a":'),
            call(0, arguments="1}"),
            call(1, name="g", arguments="{}"),
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
        ],
    )
    response = judged(document, events)
    reasoning, message, first, second = response.output
    assert reasoning.content[0].text == "Let me think"
    assert message.content[0].text == "Calling."
    assert (first.call_id, first.name, first.arguments) == ("call-0", "f", '{"a":1}')
    assert (second.call_id, second.name, second.arguments) == ("call-1", "g", "{}")
    assert [each["output_index"] for each in events if "item" in each] == [
        *(0, 0, 1, 1, 2, 2, 3, 3),
    ]
    assert response.status == "completed"


def test_an_answer_cut_by_length_is_incomplete(chunks):
    document = start(max_output_tokens=2)
    events = play(document, chunks("Hello ", finish="length"))
    assert events[-1]["type"] == "response.incomplete"
    response = Response.model_validate(events[-1]["response"], strict=True)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    assert response.output_text == "Hello "


def test_an_empty_answer_is_an_empty_message(chunks):
    document = start()
    response = judged(document, play(document, chunks()))
    assert response.output_text == ""
    assert response.output[0].type == "message"


def test_logprobs_come_with_each_delta_and_at_the_end():
    document = start(top_logprobs=1)
    top = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}
    content = [{**top, "top_logprobs": [top]}]
    delta = {"index": 0, "delta": {"content": "Hi"}, "logprobs": {"content": content}}
    response = judged(document, play(document, [{"choices": [delta]}]))
    assert response.output[0].content[0].logprobs[0].top_logprobs[0].bytes == [72, 105]


def test_a_failure_is_a_response_that_openai_can_read():
    document = failed(start(), EngineLost("It went away."))
    response = Response.model_validate(document, strict=True)
    assert response.status == "failed"
    assert response.error.code == "server_error"
    assert response.error.type == "engine_lost"


@pytest.mark.parametrize("num_seen", range(9))
def test_a_second_attempt_after_any_cut_is_a_stream_that_openai_accepts(chunks, num_seen):
    document = start()
    seen = play(document, chunks("He", "llo wor"))[:-1][:num_seen]
    closing, next_idx = abandoned_items(seen)
    again = play(document, chunks("Hello ", "world"), first_output_idx=next_idx)
    response = judged(document, [*seen, *closing, event("in_progress", document), *again])
    assert response.output_text == "Hello world"
    assert len(response.output) == 1
