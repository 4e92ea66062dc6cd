"""The mock engine in front of which gateways are compared: constant answers at once, for very little CPU.

The project's fake engine plays scenes and costs 0.7 ms a request; here that would be most of what is measured.
Only ``/tokenize`` computes: it counts with the demo model's tokenizer, so that sala-serve's check of its own
counter passes and sala-serve counts as in production.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import TYPE_CHECKING

import uvloop
from httptools import HttpRequestParser

from sala_serve.tokens.counter import TokenCounter

if TYPE_CHECKING:
    from collections.abc import Mapping

from machine import ROOT

MODEL = "sala"
TOKENIZER = ROOT / "training/demo/checkpoint"
MAX_MODEL_LEN = 4_000_000
NUM_ANSWER_TOKENS = 16
_LONGEST_READ_BYTES = 64 * 1024
"""Of a body; a longer one is taken and thrown away, and gets a whole answer."""
_COMMON: dict[str, object] = {"id": "chatcmpl-1", "created": 1_700_000_000, "model": MODEL}
_USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": NUM_ANSWER_TOKENS,
    "total_tokens": 12 + NUM_ANSWER_TOKENS,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def _whole_answer() -> bytes:
    message = {"role": "assistant", "content": " word" * NUM_ANSWER_TOKENS}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    document = _COMMON | {"object": "chat.completion", "choices": [choice], "usage": _USAGE}
    return json.dumps(document).encode()


def _events(*, with_usage: bool) -> list[bytes]:
    common = {**_COMMON, "object": "chat.completion.chunk"}
    pieces: list[Mapping[str, object]] = [{"role": "assistant", "content": ""}]
    pieces += [{"content": " word"}] * NUM_ANSWER_TOKENS
    choices: list[dict[str, object]] = [
        {"index": 0, "delta": piece, "finish_reason": None} for piece in pieces
    ]
    choices[-1] |= {"finish_reason": "stop"}
    documents = [{**common, "choices": [choice]} for choice in choices]
    if with_usage:
        documents.append({**common, "choices": [], "usage": _USAGE})
    events = [b"data: %b\n\n" % json.dumps(document).encode() for document in documents]
    return [*events, b"data: [DONE]\n\n"]


WHOLE = _whole_answer()
STREAMS = {with_usage: _events(with_usage=with_usage) for with_usage in (False, True)}
MODELS = json.dumps(
    {
        "object": "list",
        "data": [
            {
                "id": MODEL,
                "object": "model",
                "created": 1_700_000_000,
                "owned_by": "vllm",
                "max_model_len": MAX_MODEL_LEN,
            }
        ],
    }
).encode()


class MockEngine:
    """What connections share."""

    def __init__(self) -> None:
        self.counter = TokenCounter.load(TOKENIZER)
        self.step = 0
        self.num_requests = 0

    def progress(self) -> bytes:
        """Return ``/sala/progress``: moves with every request, shows none, since none lasts."""
        kv = {"capacity_tokens": 4 * MAX_MODEL_LEN, "used_tokens": 0}
        document = {"instance": "mock", "step": self.step, "requests": {}, "kv": kv}
        return json.dumps(document | {"max_num_seqs": 256}).encode()

    async def tokenize(self, body: bytes) -> bytes:
        """Return the answer of ``/tokenize`` to a short body."""
        document = json.loads(body)
        if "messages" in document:
            tokens = (await self.counter.count_chat(document)).num_tokens
        else:
            (prompt,) = await self.counter.count_completion(document)
            tokens = prompt.num_tokens
        # whoever checks counts looks at no token
        return json.dumps({"count": tokens, "tokens": [0] * tokens}).encode()


class _Connection(asyncio.Protocol):
    def __init__(self, engine: MockEngine) -> None:
        self._engine = engine
        self._parser = HttpRequestParser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._path, self._body, self._is_long, self._expects = b"", b"", False, False

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"expect" and value.lower() == b"100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if len(self._body) > _LONGEST_READ_BYTES:
            self._is_long = True
        else:
            self._body += body

    def on_message_complete(self) -> None:
        engine = self._engine
        engine.step += 1
        match self._path.partition(b"?")[0]:
            case b"/v1/chat/completions":
                engine.num_requests += 1
                self._answer_chat()
            case b"/v1/models":
                self._answer(MODELS)
            case b"/sala/progress":
                self._answer(engine.progress())
            case b"/tokenize":
                task = asyncio.create_task(engine.tokenize(self._body))
                task.add_done_callback(lambda done: self._answer(done.result()))
            case b"/health":
                self._answer(b"{}")
            case _:
                self._answer(b"{}", status=b"404 Not Found")

    def _answer_chat(self) -> None:
        request = {} if self._is_long else json.loads(self._body)
        if not request.get("stream"):
            self._answer(WHOLE)
            return
        with_usage = bool((request.get("stream_options") or {}).get("include_usage"))
        self._start(b"200 OK", b"text/event-stream; charset=utf-8", b"Transfer-Encoding: chunked")
        for event in STREAMS[with_usage]:
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        self._transport.write(b"0\r\n\r\n")
        self._end()

    def _answer(self, body: bytes, *, status: bytes = b"200 OK") -> None:
        self._start(status, b"application/json", b"Content-Length: %d" % len(body))
        self._transport.write(body)
        self._end()

    def _start(self, status: bytes, content_type: bytes, length: bytes) -> None:
        keeps = b"keep-alive" if self._parser.should_keep_alive() else b"close"
        lines = (
            b"HTTP/1.1 " + status,
            b"Content-Type: " + content_type,
            length,
            b"Connection: " + keeps,
        )
        self._transport.write(b"\r\n".join(lines) + b"\r\n\r\n")

    def _end(self) -> None:
        if not self._parser.should_keep_alive():
            self._transport.close()


async def serve(port: int) -> None:
    """Serve on a port of this machine until cancelled."""
    engine = MockEngine()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(engine), "127.0.0.1", port, backlog=1024)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(serve(parser.parse_args().port))
