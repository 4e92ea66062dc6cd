import json

import pytest

from sala_serve.engine.vllm_errors import error_from_vllm


def translate(status, message, param=None):
    error = {"message": message, "type": "BadRequestError", "param": param, "code": status}
    return error_from_vllm(status, json.dumps({"error": error}).encode(), prompt_field="messages")


# messages of vLLM 0.32
TOO_LONG = [
    "This model's maximum context length is 512 tokens. However, your prompt contains at least 513 input "
    "tokens, which exceeds this limit even without any output tokens.",
    "This model's maximum context length is 512 tokens. However, you requested 600 output tokens and your "
    "prompt contains at least 1 input tokens, for a total of at least 601 tokens.",
    "The decoder prompt (length 600) is longer than the maximum model length of 512. Make sure that "
    "`max_model_len` is no smaller than the number of text tokens.",
    "Input length (600) exceeds model's maximum context length (512).",
]


@pytest.mark.parametrize("message", TOO_LONG, ids=range(len(TOO_LONG)))
def test_over_long_prompts_get_their_own_code(message):
    error = translate(400, message, "input_tokens")
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")


def test_too_many_output_tokens_name_that_field():
    assert translate(400, TOO_LONG[1], "max_tokens").param == "max_tokens"


def test_validation_error_keeps_the_path_and_drops_the_input():
    message = (
        "1 validation error:\n  {'type': 'float_parsing', 'loc': 'body.temperature', 'msg': 'Input should "
        "be a valid number, unable to parse string as a number', 'input': 'my secret prompt'}"
    )
    error = translate(400, message, "body.temperature")
    assert error.param == "temperature"
    assert error.message == (
        "temperature: Input should be a valid number, unable to parse string as a number"
    )


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (400, "temperature must be non-negative", "invalid_request"),
        (422, "cannot process", "invalid_request"),
        (501, "not supported", "invalid_request"),
        (404, "The model `x` does not exist.", "model_not_found"),
        (500, "something", "engine_error"),
        (500, "EngineCore encountered an issue.", "engine_lost"),
        (503, "The engine is currently busy", "engine_unavailable"),
        (429, "Slow down", "engine_unavailable"),
        (401, "Unauthorized", "engine_error"),
        (302, "", "engine_error"),
        (204, "", "engine_error"),
        (404, "", "engine_error"),
    ],
)
def test_status_decides_the_rest(status, message, code):
    assert translate(status, message).code == code


@pytest.mark.parametrize(
    "body", [b"", b"Internal Server Error", b"[]", b'{"error": "text"}', b'{"error": {}}']
)
def test_unreadable_bodies_are_errors_too(body):
    assert error_from_vllm(500, body, prompt_field="prompt").code == "engine_error"
    assert error_from_vllm(400, body, prompt_field="prompt").code == "invalid_request"


def test_path_does_not_name_the_engines_classes():
    error = translate(400, "wrong", "body.messages.0.ChatCompletionDeveloperMessageParam.content")
    assert error.param == "messages.0.content"
