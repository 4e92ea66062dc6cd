import openai
import pytest

PATH = "/v1/chat/completions"


async def test_stated_length_above_the_limit_is_refused(start_stack):
    async with start_stack(max_body_bytes=1000) as stack:
        with pytest.raises(openai.APIStatusError) as caught:
            await stack.client.chat.completions.create(
                model="sala", messages=[{"role": "user", "content": "x" * 2_000_000}]
            )
    assert caught.value.status_code == 413
    assert caught.value.code == "body_too_large"


async def test_unstated_length_is_counted(start_stack):
    async def body():
        for _ in range(20):
            yield b" " * 100

    async with start_stack(max_body_bytes=1000) as stack:
        response = await stack.http.post(PATH, content=body())
        labels = {"endpoint": PATH, "status": "413"}
        assert await stack.metric("sala_gateway_requests_total", **labels) == 1
    assert response.status_code == 413


async def test_body_at_the_limit_is_accepted(start_stack):
    body = b'{"model": "sala", "messages": [{"role": "user"}]}'
    async with start_stack(max_body_bytes=len(body)) as stack:
        assert (await stack.http.post(PATH, content=body)).status_code == 200
        assert (await stack.http.post(PATH, content=body + b" ")).status_code == 413
