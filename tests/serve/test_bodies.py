import json

import pytest

from sala_serve.bodies import parse_generation
from sala_serve.errors import FieldNotAllowed, InvalidRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def test_body_is_sent_as_it_was_read():
    body = {**CHAT, "temperature": 0.1, "logit_bias": {"5": -1.5}, "seed": 12345678901234567890}
    generation = parse_generation(json.dumps(body).encode(), "messages")
    assert json.loads(generation.body) == body
    assert not generation.is_stream


def test_stream_asks_for_usage_and_keeps_other_options():
    body = {**CHAT, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    generation = parse_generation(json.dumps(body).encode(), "messages")
    assert json.loads(generation.body)["stream_options"] == {
        "continuous_usage_stats": True,
        "include_usage": True,
    }
    assert not generation.client_wants_usage


def test_repeated_field_is_checked_as_the_engine_would_read_it():
    raw = b'{"priority": null, "model": "m", "prompt": "x", "priority": 1}'
    with pytest.raises(FieldNotAllowed):
        parse_generation(raw, "prompt")


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InvalidRequest, match="surrogate"):
        parse_generation(rb'{"model": "m", "prompt": "\ud800"}', "prompt")


def test_wrong_prompt_type_names_the_field_alone():
    with pytest.raises(InvalidRequest) as caught:
        parse_generation(b'{"model": "m", "prompt": 5}', "prompt")
    assert caught.value.param == "prompt"
