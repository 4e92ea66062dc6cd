"""``sala-serve chat``: a conversation with a gateway, about files if wanted."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from rich.console import Console

from sala_serve.config import ChatConfig
from sala_serve.terminal_progress import Note, WaitingDisplay, parse_note

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

TIMEOUT = httpx.Timeout(connect=5.0, write=60.0, read=3600.0, pool=5.0)
"""The server may be silent for minutes while it reads a long prompt."""


class ChatError(Exception):
    """Something to tell the user in one line."""


@dataclass(frozen=True)
class Answer:
    """One answer and what it took."""

    text: str
    ttft_s: float
    duration_s: float
    usage: dict[str, Any]
    queued_s: float = 0.0
    """The part of ``ttft_s`` that was spent in the queue."""

    def summary(self) -> str:
        """Return the line printed under the answer."""
        num_completion = self.usage.get("completion_tokens", 0)
        details = self.usage.get("prompt_tokens_details") or {}
        decode_s = self.duration_s - self.ttft_s
        # the first token's time belongs to the prefill
        rate = (
            f"{(num_completion - 1) / decode_s:.1f}" if num_completion > 1 and decode_s > 0 else "-"
        )
        queued = f" ({self.queued_s:.2f} s in the queue)" if self.queued_s else ""
        return (
            f"time to first token {self.ttft_s:.2f} s{queued} | "
            f"prompt {self.usage.get('prompt_tokens', 0)} tokens, "
            f"{details.get('cached_tokens') or 0} cached | "
            f"completion {num_completion} tokens | {rate} tokens/s"
        )


class ChatClient:
    """Talks to one gateway."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def first_model(self) -> str:
        """Return the name of the first model served."""
        try:
            response = self._client.get("/v1/models")
        except httpx.TransportError as error:
            raise self._not_reached(error) from None
        if response.status_code != 200:
            raise ChatError(_error_message(response.content))
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise ChatError(f"{self._client.base_url} is not a sala-serve gateway") from None

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any] | Note]:
        """Yield the chunks of a streamed answer, before the first the gateway's notes about waiting.

        Raises:
            ChatError: the server is not there, refused the request, or broke off.
        """
        is_complete = False
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ChatError(_error_message(response.read()) + _when_to_retry(response))
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:"):
                        if (note := parse_note(line)) is not None:
                            yield note
                        continue
                    if data == "[DONE]":
                        is_complete = True
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ChatError(_error_message(data.encode()))
                    yield chunk
        except httpx.TransportError as error:
            raise self._not_reached(error) from None
        if not is_complete:
            raise ChatError("the answer broke off")

    def _not_reached(self, error: httpx.TransportError) -> ChatError:
        url = self._client.base_url
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ChatError(f"no server at {url}; start one with: sala-serve up MODEL")
        return ChatError(f"the connection to {url} broke ({type(error).__name__})")


class Terminal:
    """A conversation: keeps the messages, prints the answers."""

    def __init__(
        self, client: ChatClient, *, model: str, max_tokens: int | None, context: str
    ) -> None:
        self._client = client
        self._model = model
        self._max_tokens = max_tokens
        self._context = context
        self._messages: list[dict[str, str]] = []
        self._notes = Console(stderr=True, highlight=False)

    def ask(self, question: str) -> None:
        """Print the answer to ``question`` as it comes; it is remembered once it is complete."""
        content = f"{self._context}{question}" if not self._messages else question
        messages = [*self._messages, {"role": "user", "content": content}]
        answer = self._answer(messages)
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._notes.print(answer.summary(), style="dim", soft_wrap=True)

    def converse(self) -> None:
        """Ask questions read from the terminal until end of file."""
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its editing keys and history
        self._notes.print(f"{self._model} | Ctrl-C stops an answer, Ctrl-D ends", style="dim")
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                self._notes.print()
                return
            except KeyboardInterrupt:  # as in a shell: a new line
                self._notes.print()
                continue
            try:
                if question:
                    self.ask(question)
            except KeyboardInterrupt:
                self._notes.print("stopped", style="dim")
            except ChatError as error:
                self._notes.print(f"error: {error}", style="red", markup=False, soft_wrap=True)

    def _answer(self, messages: list[dict[str, str]]) -> Answer:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._max_tokens is not None:
            body["max_tokens"] = self._max_tokens
        started_at_s = time.monotonic()
        first_at_s = queued_at_s = None
        queued_s = 0.0
        parts: list[str] = []
        usage: dict[str, Any] = {}
        waiting = WaitingDisplay(self._notes)
        try:
            with waiting:
                for chunk in self._client.stream(body):
                    now_s = time.monotonic()
                    if queued_at_s is not None:  # what was said last held until now
                        queued_s += now_s - queued_at_s
                        queued_at_s = None
                    if isinstance(chunk, Note):
                        waiting.show(chunk)
                        queued_at_s = now_s if chunk.kind == "queued" else None
                        continue
                    usage = chunk.get("usage") or usage
                    text = "".join(
                        choice.get("delta", {}).get("content") or "" for choice in chunk["choices"]
                    )
                    if not text:
                        continue
                    if first_at_s is None:
                        first_at_s = now_s
                        waiting.stop()
                    parts.append(text)
                    sys.stdout.write(text)
                    sys.stdout.flush()
        finally:
            if parts:
                sys.stdout.write("\n")
                sys.stdout.flush()
        ended_at_s = time.monotonic()
        return Answer(
            text="".join(parts),
            ttft_s=(first_at_s or ended_at_s) - started_at_s,
            duration_s=ended_at_s - started_at_s,
            usage=usage,
            queued_s=queued_s,
        )


def run(
    config: ChatConfig,
    *,
    model: str | None,
    paths: Sequence[Path],
    max_tokens: int | None,
    prompt: str | None,
) -> int:
    """Run ``sala-serve chat`` and return its exit status."""
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    try:
        if not config.url.startswith(("http://", "https://")):
            raise ChatError(f"expected a URL such as {ChatConfig.url}, got {config.url!r}")
        context = read_context(paths)
        with httpx.Client(base_url=config.url, headers=headers, timeout=TIMEOUT) as http:
            client = ChatClient(http)
            terminal = Terminal(
                client,
                model=model or client.first_model(),
                max_tokens=max_tokens,
                context=context,
            )
            if prompt is None and sys.stdin.isatty():
                terminal.converse()
            else:
                question = sys.stdin.read() if prompt is None else prompt
                if not question.strip():
                    raise ChatError("the question is empty")
                terminal.ask(question)
    except ChatError as error:
        print(f"sala-serve: error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except BrokenPipeError:  # the reader of our output has enough
        sys.stderr.close()
        return 0
    return 0


def read_context(paths: Sequence[Path]) -> str:
    """Return the texts of files, and of the text files in folders, each under its name.

    Raises:
        ChatError: a path cannot be read, a file is not text, or a folder holds no text file.
    """
    parts = []
    for path in paths:
        if path.is_dir():
            texts = [(file, _text_of(file)) for file in _files_in(path)]
            found = [(file, text) for file, text in texts if text is not None]
            if not found:
                raise ChatError(f"no text file in {path}")
        else:
            text = _text_of(path)
            if text is None:
                raise ChatError(f"not a text file: {path}")
            found = [(path, text)]
        parts += [f'<file name="{file}">\n{text}\n</file>\n\n' for file, text in found]
    return "".join(parts)


def _files_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _text_of(path: Path) -> str | None:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise ChatError(f"cannot read {path}: {error.strerror}") from None
    return None if "\0" in text else text


def _error_message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "the server's answer cannot be read"


def _when_to_retry(response: httpx.Response) -> str:
    seconds = response.headers.get("retry-after", "")
    return f" (try again in {seconds} s)" if seconds.isdecimal() else ""
