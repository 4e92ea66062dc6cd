"""Counts prompts with the checkpoint's own tokenizer and chat template, long ones off the event loop."""

from __future__ import annotations

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from tokenizers import AddedToken, Tokenizer

from sala_serve.errors import FieldNotAllowed, InvalidRequest
from sala_serve.memory import give_back
from sala_serve.tokens.conversation import developers_as_system, read_messages, read_tools
from sala_serve.tokens.prompt import Prompt, block_hashes
from sala_serve.tokens.template import ChatTemplate, TemplateRefused, load_templates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

T = TypeVar("T")

TINY_CHARS = 1024
"""Bodies up to here are counted at once, in less time than a thread takes to be woken and to get the interpreter's
lock from a busy loop."""
SHORT_CHARS = 64 * 1024
"""Prompts up to here have a thread of their own, so that none waits for seconds behind a million tokens."""
_SPECIAL_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)


class TokenCounter:
    """Exact counts: equal to the engine's ``usage.prompt_tokens``."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        num_threads: int = 1,
    ) -> None:
        self._tokenizer = tokenizer
        self._templates = {name: ChatTemplate(source) for name, source in templates.items()}
        self._special_tokens = special_tokens
        self._short_pool = ThreadPoolExecutor(1, thread_name_prefix="count-short")
        self._long_pool = ThreadPoolExecutor(num_threads, thread_name_prefix="count-long")

    @classmethod
    def load(cls, folder: Path, *, num_threads: int = 1) -> TokenCounter:
        """Read a checkpoint's ``tokenizer.json``, ``tokenizer_config.json`` and chat templates.

        Args:
            folder: the checkpoint, or a folder with these files alone.
            num_threads: long prompts counted at the same time.

        Raises:
            ValueError: a file is missing or cannot be read; the message names it.
        """
        # the tokenizer's own threads would take every core for one prompt, and warn at each fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ValueError(f"{path}: expected the checkpoint's tokenizer, there is no such file")
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_json(folder / "special_tokens_map.json")
        config |= _read_json(folder / "tokenizer_config.json")
        special_tokens = {
            name: text for name in _SPECIAL_TOKENS if (text := _token_text(config.get(name)))
        }
        _add_missing(tokenizer, config, special_tokens)
        return cls(
            tokenizer, load_templates(folder, config), special_tokens, num_threads=num_threads
        )

    def close(self) -> None:
        """Let the threads end; what they work on is finished first."""
        self._short_pool.shutdown(wait=False, cancel_futures=True)
        self._long_pool.shutdown(wait=False, cancel_futures=True)

    async def count_chat(self, document: Mapping[str, Any]) -> Prompt:
        """Count the prompt of a chat.

        Args:
            document: the body of ``/v1/chat/completions``.

        Raises:
            InvalidRequest: the chat cannot be made into a prompt; the message says why.
            FieldNotAllowed: it brings a chat template of its own.
        """
        return await self._run(_num_chars(document.get("messages")), self._chat, document)

    async def count_completion(self, document: Mapping[str, Any]) -> list[Prompt]:
        """Count each prompt of a text completion.

        Args:
            document: the body of ``/v1/completions``.

        Raises:
            InvalidRequest: ``prompt`` is neither text nor token ids nor a list of either.
        """
        return await self._run(_num_chars(document.get("prompt")), self._completion, document)

    async def _run(
        self,
        num_chars: int,
        count: Callable[[Mapping[str, Any]], T],
        document: Mapping[str, Any],
    ) -> T:
        if _room(document, TINY_CHARS) >= 0:
            return count(document)
        loop = asyncio.get_running_loop()
        if num_chars <= SHORT_CHARS:
            return await loop.run_in_executor(self._short_pool, count, document)
        return await loop.run_in_executor(self._long_pool, _and_give_back, count, document)

    def _chat(self, document: Mapping[str, Any]) -> Prompt:
        return self._prompt(
            document, self.encode(self.chat_text(document), _flag(document, "add_special_tokens"))
        )

    def chat_text(self, document: Mapping[str, Any]) -> str:
        """Return the text that the chat template makes of a chat; errors as for :meth:`count_chat`."""
        if document.get("chat_template") is not None:
            raise FieldNotAllowed("chat_template may not be set", param="chat_template")
        tools = read_tools(document)
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if (template := self._templates.get(name)) is None:
            raise InvalidRequest("this model has no chat template: use /v1/completions")
        messages: list[Mapping[str, Any]] = [*read_messages(document, template.content_format)]
        if not template.knows_developers:
            messages = developers_as_system(messages)
        effort = document.get("reasoning_effort")
        given = _kwargs(document)
        asked = {
            "add_generation_prompt": _flag(document, "add_generation_prompt", default=True),
            "continue_final_message": _flag(document, "continue_final_message"),
            "documents": document.get("documents"),
            "reasoning_effort": effort,
        }
        if effort is not None and "enable_thinking" not in given:
            asked["enable_thinking"] = effort != "none"
        # as in vLLM, None and "auto" leave what was there before
        asked = {key: value for key, value in asked.items() if value not in (None, "auto")}
        try:
            return template.render(
                messages,
                **{"tools": tools, "documents": None, **self._special_tokens, **given, **asked},
            )
        except TemplateRefused as error:
            raise InvalidRequest(
                f"The chat template refuses this: {error}", param="messages"
            ) from None

    def _completion(self, document: Mapping[str, Any]) -> list[Prompt]:
        adds = _flag(document, "add_special_tokens", default=True)
        prompts = []
        for prompt in _prompts(document.get("prompt")):
            ids = self.encode(prompt, adds) if isinstance(prompt, str) else prompt
            prompts.append(self._prompt(document, ids))
        return prompts

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        # the plain encode() holds the interpreter's lock for seconds and makes offsets that nobody reads
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        ids: list[int] = encoding.ids
        return ids

    def _prompt(self, document: Mapping[str, Any], ids: list[int]) -> Prompt:
        if (most := document.get("truncate_prompt_tokens")) is not None:
            if isinstance(most, bool) or not isinstance(most, int) or most < 1:
                raise InvalidRequest("expected at least 1", param="truncate_prompt_tokens")
            ids = ids[-most:] if document.get("truncation_side") == "left" else ids[:most]
        try:
            return Prompt(len(ids), block_hashes(ids))
        except (TypeError, OverflowError):
            raise InvalidRequest("expected token ids", param="prompt") from None


def _and_give_back(count: Callable[[Mapping[str, Any]], T], document: Mapping[str, Any]) -> T:
    """Count, then return the memory to the system: 300 MiB after a million tokens that would stay otherwise."""
    try:
        return count(document)
    finally:
        give_back()


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int):
            return [prompt]
        if all(isinstance(each, str | list) for each in prompt):
            return prompt
    raise InvalidRequest("expected text, token ids, or a list of either", param="prompt")


def _flag(document: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    value = document.get(name)
    if not isinstance(value, bool | None):
        raise InvalidRequest("expected true or false", param=name)
    return default if value is None else value


def _kwargs(document: Mapping[str, Any]) -> dict[str, Any]:
    given = document.get("chat_template_kwargs") or {}
    if not isinstance(given, dict) or given.keys() & {"chat_template", "tokenize", "messages"}:
        raise InvalidRequest("expected arguments of the template", param="chat_template_kwargs")
    return {key: value for key, value in given.items() if value not in (None, "auto")}


def _num_chars(value: Any) -> int:
    """Return about how much text or how many token ids there are in messages or prompts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return _num_chars(value.get("content")) + _num_chars(value.get("text"))
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return len(value)
        return sum(map(_num_chars, value))
    return 0


def _room(value: Any, num_chars: int) -> int:
    """Return what is left of ``num_chars`` after all that is in a body; below 0, where it stops, it is too much."""
    num_chars -= 8  # an empty message costs time too
    if isinstance(value, str):
        return num_chars - len(value)
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list):
        for each in value:
            if num_chars < 0:
                break
            num_chars = _room(each, num_chars)
    return num_chars


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected an object")
    return document


def _token_text(token: Any) -> str | None:
    """Return a special token's text; configurations write it alone or with its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _add_missing(
    tokenizer: Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Make every special token of the configuration one token, as transformers does."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = [*special_tokens.values(), *(extra.values() if isinstance(extra, dict) else extra)]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [
        AddedToken(text, special=True)
        for each in dict.fromkeys(map(_token_text, named))
        if (text := each) and text not in known
    ]
    tokenizer.add_tokens(missing)
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
