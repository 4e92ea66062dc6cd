"""Counts by asking the engine: for a gateway without a tokenizer folder, and to check the one it has."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

from sala_serve.errors import EngineFailed, EngineUnavailable, GatewayError, InvalidRequest
from sala_serve.tokens.prompt import Prompt, block_hashes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sala_serve.engine.pool import EnginePool
    from sala_serve.tokens.prompt import PromptCounter

logger = logging.getLogger(__name__)

_CHAT_FIELDS = (
    *("messages", "tools", "add_generation_prompt", "continue_final_message"),
    "add_special_tokens",
)
_PROBE_TEXT = "Hello,  world!\n\tΓειά 你好 🙂 1234567 <s></s> don't e\u0301"
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe", "parameters": {"type": "object", "properties": {}}},
}
_PROBES: tuple[Mapping[str, Any], ...] = (
    {"prompt": _PROBE_TEXT},
    {"messages": [{"role": "user", "content": _PROBE_TEXT}]},
    {
        "messages": [
            {"role": "system", "content": _PROBE_TEXT},
            {"role": "user", "content": [{"type": "text", "text": _PROBE_TEXT}] * 2},
            {"role": "assistant", "content": "Yes. "},
            {"role": "user", "content": "So?"},
        ],
        "tools": [_PROBE_TOOL],
    },
)


class EngineTokenCounter:
    """Exact as the engine is, at the price of sending each prompt twice."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool

    async def count_chat(self, document: Mapping[str, Any]) -> Prompt:
        """Count the prompt of a chat.

        Raises:
            EngineUnavailable, EngineLost, EngineTimeout: no engine could be asked.
            GatewayError: the engine refuses the chat.
        """
        body = {name: document[name] for name in _CHAT_FIELDS if document.get(name) is not None}
        arguments = dict(document.get("chat_template_kwargs") or {})
        effort = document.get("reasoning_effort")
        if effort is not None:
            arguments |= {"enable_thinking": arguments.get("enable_thinking", effort != "none")}
        asked = {"documents": document.get("documents"), "reasoning_effort": effort}
        arguments |= {name: value for name, value in asked.items() if value is not None}
        if arguments:
            body["chat_template_kwargs"] = arguments
        return await self._ask(document, body, "messages")

    async def count_completion(self, document: Mapping[str, Any]) -> list[Prompt]:
        """Count each prompt of a text completion; errors as for chats."""
        prompt: Any = document.get("prompt")
        is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        counted = []
        for each in [prompt] if is_one else prompt or []:
            if isinstance(each, str):
                body = {"prompt": each}
                if document.get("add_special_tokens") is not None:
                    body["add_special_tokens"] = document["add_special_tokens"]
                counted.append(await self._ask(document, body, "prompt"))
            else:
                counted.append(Prompt(len(each), await asyncio.to_thread(block_hashes, each)))
        if not counted:
            raise InvalidRequest("expected text, token ids, or a list of either", param="prompt")
        return counted

    async def _ask(
        self, document: Mapping[str, Any], body: dict[str, Any], prompt_field: str
    ) -> Prompt:
        model = document.get("model")
        engines = self._pool.ready(model) or self._pool.ready()
        if model is not None:
            body["model"] = model
        raw = await asyncio.to_thread(lambda: json.dumps(body).encode())
        for engine in engines:
            try:
                async with engine.client.post(
                    "/tokenize", raw, headers={}, prompt_field=prompt_field
                ) as reply:
                    answer = await reply.read()
                return await asyncio.to_thread(_read_answer, answer)
            except EngineUnavailable:
                engine.note_unreachable()
        raise EngineUnavailable("No engine is ready to count this prompt.")


class CheckedTokenCounter:
    """The gateway's own counter, as long as it counts as the engine does.

    A tokenizer folder of another model, or an engine that was started with another template, would bill and
    schedule by wrong numbers; a few probes when the engine is ready tell, and from then on the engine is asked.
    """

    def __init__(self, own: PromptCounter, engine: EngineTokenCounter, pool: EnginePool) -> None:
        self._counter: PromptCounter = own
        self._engine = engine
        self._pool = pool

    async def run(self) -> None:
        """Compare once, when an engine is ready."""
        while True:
            await self._pool.wait_ready()
            try:
                return await self.check()
            except GatewayError as error:
                logger.warning("the token counts could not be compared yet: %s", error.message)
                await asyncio.sleep(1)

    async def check(self) -> None:
        """Compare both counters on a few prompts; raises what the engine's raises."""
        for probe in _PROBES:
            own, engine = [await _count(each, probe) for each in (self._counter, self._engine)]
            if own != engine:
                logger.error(
                    "the tokenizer folder does not fit the engine: it counts %s tokens where the engine counts "
                    "%s. The engine is asked from now on; give the gateway the engine's own tokenizer",
                    *(_in_words(own), _in_words(engine)),
                )
                self._counter = self._engine
                return

    async def count_chat(self, document: Mapping[str, Any]) -> Prompt:
        """Count the prompt of a chat; errors are those of the counter that holds."""
        return await self._counter.count_chat(document)

    async def count_completion(self, document: Mapping[str, Any]) -> list[Prompt]:
        """Count each prompt of a text completion; errors are those of the counter that holds."""
        return await self._counter.count_completion(document)


async def _count(counter: PromptCounter, probe: Mapping[str, Any]) -> list[int] | None:
    """Return the numbers of tokens, or None if the counter refuses the prompt, as templates may."""
    try:
        if "messages" in probe:
            return [(await counter.count_chat(probe)).num_tokens]
        return [prompt.num_tokens for prompt in await counter.count_completion(probe)]
    except InvalidRequest:
        return None


def _in_words(counts: list[int] | None) -> str:
    return "no" if counts is None else ", ".join(map(str, counts))


def _read_answer(answer: bytes) -> Prompt:
    try:
        document = json.loads(answer)
        return Prompt(int(document["count"]), block_hashes(document["tokens"]))
    except (ValueError, KeyError, TypeError):
        raise EngineFailed("The engine's count cannot be read.") from None
