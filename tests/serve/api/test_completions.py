import pytest

PATH = "/v1/completions"


async def test_completion_returns_the_engines_answer(stack):
    answer = await stack.client.completions.create(model="sala", prompt="Once", max_tokens=3)
    assert answer.choices[0].text == "word0 word1 word2 "
    assert answer.usage.total_tokens == 10
    (seen,) = stack.engine.journal.bodies
    assert len(seen.pop("cache_salt")) == 43
    assert seen == {"model": "sala", "prompt": "Once", "max_tokens": 3}


async def test_completion_streams(stack):
    stream = await stack.client.completions.create(
        model="sala", prompt="Once", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "word0 word1 word2 "
    assert chunks[-1].usage.completion_tokens == 3


@pytest.mark.parametrize("prompt", ["text", [1, 2, 3], [[1, 2], [3]], ["a", "b"]])
async def test_completion_takes_text_and_token_ids(stack, prompt):
    response = await stack.http.post(PATH, json={"model": "sala", "prompt": prompt})
    assert response.status_code == 200
    assert stack.engine.journal.bodies[0]["prompt"] == prompt


async def test_over_long_prompt_names_the_prompt(stack):
    message = (
        "This model's maximum context length is 4096 tokens. However, your prompt contains at least "
        "4097 input tokens (parameter=input_tokens, value=4097)"
    )
    stack.engine.behaviour.error = (
        400,
        {"message": message, "type": "BadRequestError", "param": "input_tokens", "code": 400},
    )
    response = await stack.http.post(PATH, json={"model": "sala", "prompt": "long"})
    assert response.status_code == 400
    assert response.json() == {
        "error": {
            "message": message.removesuffix(" (parameter=input_tokens, value=4097)"),
            "type": "invalid_request_error",
            "param": "prompt",
            "code": "context_length_exceeded",
        }
    }
