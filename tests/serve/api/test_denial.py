"""What a client may not make cheap use of: shape and size of bodies, their number, their pace."""

import asyncio
import json
import threading

import httpx
import pytest

from sala_serve import uploads
from sala_serve.api.generate import GenerationEndpoint
from sala_serve.engine.fake import Behaviour
from sala_serve.tenants.model import Limits, Scopes

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
REQUEST = {"model": "sala", "messages": MESSAGES}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BOUNDS = {
    "max_json_depth": 8,
    "max_messages": 5,
    "max_tools": 4,
    "max_schema_bytes": 1000,
    "max_stop_strings": 3,
    "max_choices": 2,
    "max_logprobs": 4,
}


def nested(depth):
    """Return a list of lists; the body around it is one level more."""
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def part(**fields):
    return {"messages": [{"role": "user", "content": [fields]}]}


@pytest.mark.parametrize(
    ("most", "more", "param"),
    [
        ({"metadata": nested(7)}, {"metadata": nested(8)}, None),
        ({"messages": MESSAGES * 5}, {"messages": MESSAGES * 6}, "messages"),
        ({"tools": [TOOL] * 4}, {"tools": [TOOL] * 5}, "tools"),
        ({"tools": [TOOL]}, {"tools": [{**TOOL, "x": "x" * 1000}]}, "tools"),
        (
            {"response_format": {"type": "json_schema", "x": "x" * 900}},
            {"response_format": {"type": "json_schema", "x": "x" * 1000}},
            "response_format",
        ),
        (
            {"structured_outputs": {"regex": "x"}},
            {"structured_outputs": {"regex": "x" * 1000}},
            "structured_outputs",
        ),
        ({"stop": ["a"] * 3}, {"stop": ["a"] * 4}, "stop"),
        ({"stop": "a"}, {"stop_token_ids": [1] * 4}, "stop_token_ids"),
        ({"bad_words": ["a"] * 3}, {"bad_words": ["a"] * 4}, "bad_words"),
        ({"logit_bias": {"1": 1}}, {"logit_bias": dict.fromkeys("1234", 1)}, "logit_bias"),
        ({"n": 2}, {"n": 3}, "n"),
        ({"n": 1}, {"n": 0}, "n"),
        ({"n": 1}, {"n": 1.5}, "n"),
        ({"logprobs": True, "top_logprobs": 4}, {"logprobs": True, "top_logprobs": 5}, "top_logprobs"),
        ({"max_tokens": 0}, {"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1}, {"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 1}, {"max_completion_tokens": "1"}, "max_completion_tokens"),
        ({"prompt_cache_key": "k" * 256}, {"prompt_cache_key": "k" * 257}, "prompt_cache_key"),
        (
            part(type="text", text="x"),
            part(type="image_url", image_url={"url": "http://127.0.0.1/"}),
            "messages.0.content.0.type",
        ),
        (
            part(type="input_text", text="x"),
            part(type="file", file_url="file:///etc/passwd"),
            "messages.0.content.0.type",
        ),
        (part(type="refusal", refusal="x"), part(type="text"), "messages.0.content.0.text"),
        ({"messages": MESSAGES}, {"messages": [{"role": "u", "content": 5}]}, "messages.0.content"),
        *(
            ({}, {name: "x"}, name)
            for name in ("chat_template", "prompt_embeds", "mm_processor_kwargs", "request_id")
        ),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_what_is_inside_a_body_is_bounded(start_stack, most, more, param):
    async with start_stack(**BOUNDS) as stack:
        response = await stack.http.post(PATH, json={**REQUEST, **most})
        assert response.status_code == 200, response.text
        response = await stack.http.post(PATH, json={**REQUEST, **more})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert len(stack.engine.journal.bodies) == 1


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], ["a", 1], ["a", ["b"]], [["a"]], [[1], "b"], {"a": 1}, 5, None, [True], ["a"] * 6],
    ids=str,
)
async def test_prompt_of_another_shape_is_refused(start_stack, prompt):
    async with start_stack(**BOUNDS) as stack:
        body = {"model": "sala", "prompt": prompt}
        response = await stack.http.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt"


async def test_echo_does_not_tell_what_others_prompts_are_worth(stack):
    body = {"model": "sala", "prompt": "Hi", "echo": True, "logprobs": 1}
    response = await stack.http.post("/v1/completions", json=body)
    assert response.json()["error"]["code"] == "field_not_allowed"


class Upload:
    """A body that is being sent, as slowly as a test wants."""

    def __init__(self, stack, *, headers=None, num_bytes=1000):
        self._rest = asyncio.Event()
        self._filler = b" " * num_bytes
        self._send = stack.http.post(PATH, content=self._body(), headers=headers or {})

    async def _body(self):
        yield self._filler
        await self._rest.wait()
        yield json.dumps(REQUEST).encode()

    async def __aenter__(self):
        self.task = asyncio.create_task(self._send)
        return self

    async def __aexit__(self, *_):
        self.finish()
        await asyncio.wait({self.task})

    def finish(self):
        self._rest.set()


async def test_one_key_sends_so_many_bodies_at_once_and_others_too(start_stack, eventually):
    settings = {"max_uploads_per_key": 1, "require_keys": True}
    async with start_stack(**settings) as stack:
        store = stack.gateway.keys.store
        tokens = []
        for name in ("one", "two"):
            tenant = await store.create_tenant(name=name, tier="default", limits=Limits())
            _, token = await store.create_key(tenant.tenant_id, name=name, scopes=Scopes())
            tokens.append({"Authorization": f"Bearer {token}"})
        async with Upload(stack, headers=tokens[0]) as upload:
            await eventually(lambda: stack.gateway.uploads.num_buffered_bytes == 1000)
            refused = await stack.http.post(PATH, json=REQUEST, headers=tokens[0])
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            other = await stack.http.post(PATH, json=REQUEST, headers=tokens[1])
            assert other.status_code == 200
            upload.finish()
            assert (await upload.task).status_code == 200
        assert (await stack.http.post(PATH, json=REQUEST, headers=tokens[0])).status_code == 200


async def test_bodies_of_all_together_are_bounded(start_stack, eventually):
    settings = {"max_buffered_bytes": 2500, "max_body_bytes": 2000}
    async with start_stack(**settings) as stack:
        held = stack.gateway.uploads
        async with Upload(stack, num_bytes=1900) as upload:
            await eventually(lambda: held.num_buffered_bytes == 1900)
            assert await stack.metric("sala_gateway_buffered_bytes") == 1900
            padded = json.dumps(REQUEST) + " " * 700
            refused = await stack.http.post(PATH, content=padded)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "overloaded"
            assert (await stack.http.post(PATH, json=REQUEST)).status_code == 200
            upload.finish()
            assert (await upload.task).status_code == 200
        assert held.num_buffered_bytes == 0
        assert (await stack.http.post(PATH, content=padded)).status_code == 200


async def test_body_is_held_until_its_answer_ends(start_stack, eventually):
    async with start_stack(Behaviour(ttft_s=60)) as stack:
        task = asyncio.create_task(stack.http.post(PATH, json=REQUEST, timeout=0.5))
        await eventually(lambda: stack.engine.journal.num_running == 1)
        assert stack.gateway.uploads.num_buffered_bytes > 50
        with pytest.raises(httpx.ReadTimeout):
            await task
        await eventually(lambda: stack.gateway.uploads.num_buffered_bytes == 0)


async def test_stated_length_alone_holds_nothing(start_stack, eventually):
    async with start_stack() as stack:
        host, port = stack.url.removeprefix("http://").split(":")
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 30000000\r\n\r\n{{"
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode())
        await eventually(lambda: stack.gateway.uploads.num_buffered_bytes > 0)
        assert stack.gateway.uploads.num_buffered_bytes == 1
        writer.close()
        await writer.wait_closed()
        await eventually(lambda: len(stack.gateway.running) == 0)
        assert stack.gateway.uploads.num_buffered_bytes == 0


async def test_body_that_comes_too_slowly_is_given_up(start_stack, monkeypatch):
    monkeypatch.setattr(uploads, "SLOW_AFTER_S", 0.3)
    async with start_stack(min_upload_bytes_per_s=1000) as stack:

        async def drops():
            for _ in range(40):
                yield b" " * 10
                await asyncio.sleep(0.05)

        response = await stack.http.post(PATH, content=drops())
        assert response.status_code == 408
        assert response.json()["error"]["code"] == "upload_timeout"

        async def steadily():
            for _ in range(10):
                yield b" " * 20_000
                await asyncio.sleep(0.05)
            yield json.dumps(REQUEST).encode()

        assert (await stack.http.post(PATH, content=steadily())).status_code == 200


@pytest.mark.parametrize("num_bytes", [1000, 2_000_000])
async def test_large_bodies_are_parsed_beside_the_loop(stack, monkeypatch, num_bytes):
    threads = []
    parse = GenerationEndpoint._parse

    def noting(self, raw):
        threads.append(threading.current_thread().name)
        return parse(self, raw)

    monkeypatch.setattr(GenerationEndpoint, "_parse", noting)
    body = json.dumps(REQUEST) + " " * num_bytes
    assert (await stack.http.post(PATH, content=body)).status_code == 200
    assert threads[0].startswith("parse") == (num_bytes > uploads.PARSE_IN_THREAD_BYTES)
