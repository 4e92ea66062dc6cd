"""Nothing that a client sends or is sent comes out in a log line, a metric or a span, whatever happens."""

from __future__ import annotations

import contextlib
import io
import json
import logging

import httpx
import pytest

from sala_serve.config import ApiKeys
from sala_serve.engine.fake import Behaviour, Ending
from sala_serve.telemetry.logs import JsonFormatter, TextFormatter

WORD = "zanzibar"
"""In every prompt, wrong field, path and model of these requests, in errors of the engine, in keys."""
KEY = f"sk-{WORD}-right"
CHAT = "/v1/chat/completions"


@pytest.fixture(params=[TextFormatter, JsonFormatter])
def logged(request):
    """What the process logs with our own level at debug."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(request.param())
    root, ours = logging.getLogger(), logging.getLogger("sala_serve")
    root.addHandler(handler)
    ours.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    ours.setLevel(logging.NOTSET)


def chat(**fields):
    return {"model": "sala", "messages": [{"role": "user", "content": f"{WORD}?"}], **fields}


REQUESTS = {
    "whole answer": {"json": chat()},
    "stream": {"json": chat(stream=True)},
    "not JSON": {"content": f"{{{WORD}".encode()},
    "not UTF-8": {"content": WORD.encode() + b"\xff"},
    "wrong field": {"json": chat(stream=WORD)},
    "wrong messages": {"json": {"model": "sala", "messages": WORD}},
    "no such model": {"json": chat() | {"model": WORD}},
    "field not allowed": {"json": chat(cache_salt=WORD)},
    "wrong key": {"json": chat(), "headers": {"Authorization": f"Bearer sk-{WORD}-wrong"}},
    "other header": {
        "json": chat(),
        "headers": {"X-Prompt": WORD, "X-Request-Id": f"{WORD} {WORD}"},
    },
    "no such path": {"json": chat(), "url": f"/v1/{WORD}?q={WORD}"},
    "encoded": {"json": chat(), "headers": {"Content-Encoding": WORD}},
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_requests_of_every_kind_leave_no_trace(start_stack, logged, name):
    request = {"url": CHAT, **REQUESTS[name]}
    headers = {"Authorization": f"Bearer {KEY}", **request.pop("headers", {})}
    async with start_stack(api_keys=ApiKeys((KEY,))) as stack:
        answer = await stack.http.post(headers=headers, **request)
        status = str(answer.status_code)
        metrics = (await stack.http.get("/metrics")).text
    assert status in logged.getvalue()
    assert WORD not in logged.getvalue()
    assert f'status="{status}"' in metrics
    assert WORD not in metrics


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(error=(400, {"message": f"cannot read {WORD}", "code": 400})),
        Behaviour(error=(500, {"message": f"failed on {WORD}", "code": 500})),
        Behaviour(ending=Ending.CONNECTION_LOST),
        Behaviour(ending=Ending.SILENT_END),
        Behaviour(ending=Ending.ERROR_EVENT),
    ],
    ids=lambda behaviour: f"{behaviour.ending} {behaviour.error and behaviour.error[0]}",
)
@pytest.mark.parametrize("is_stream", [True, False])
async def test_failures_of_the_engine_leave_no_trace(start_stack, logged, behaviour, is_stream):
    async with start_stack(behaviour) as stack:
        with contextlib.suppress(httpx.RemoteProtocolError):  # a whole answer that breaks
            await stack.http.post(CHAT, json=chat(stream=is_stream))
        metrics = (await stack.http.get("/metrics")).text
    assert CHAT in logged.getvalue()
    assert WORD not in logged.getvalue()
    assert WORD not in metrics


async def test_a_bug_that_quotes_a_request_leaves_no_trace(start_stack, logged):
    async with start_stack() as stack:

        class Broken(dict):
            """Instead of the parts that a request goes through."""

            def __len__(self):
                raise KeyError(f"{WORD} is not expected")

        stack.gateway.running._requests = Broken()
        answer = await stack.http.post(CHAT, json=chat())
        stack.gateway.running._requests = {}
        metrics = (await stack.http.get("/metrics")).text
    assert answer.status_code == 500
    assert json.loads(answer.text)["error"]["code"] == "internal_error"
    assert WORD not in answer.text
    text = logged.getvalue()
    assert "KeyError" in text
    assert "running.py" in text
    assert WORD not in text
    assert WORD not in metrics
