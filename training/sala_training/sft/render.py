"""A chat as the tokens that a served model reads and writes, and which of them it is to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sala_serve.errors import InvalidRequest
from sala_serve.tokens.counter import TokenCounter
from sala_training.sft.chats import ChatError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from sala_training.sft.chats import Chat


class TemplateMismatchError(ChatError):
    """The template says something else in training than in serving, so that a loss would teach the wrong thing."""


@dataclass(frozen=True)
class Rendered:
    """Tokens of one sample."""

    tokens: list[int]
    is_scored: list[bool]
    """Whether predicting the token at the same index is learnt: what the assistant says, its end included."""


class Renderer:
    """Renders through the gateway's own code, which equals the engine's, so that nothing can differ in serving."""

    def __init__(self, tokenizer_folder: Path, stop_ids: Collection[int]) -> None:
        """Load tokenizer and template.

        Args:
            tokenizer_folder: of the checkpoint.
            stop_ids: token ids that end an answer in serving (``eos_token_id``).

        Raises:
            ValueError: the folder holds no tokenizer.
        """
        self._served = TokenCounter.load(tokenizer_folder)
        self._stop_ids = frozenset(stop_ids)

    def text(self, messages: Sequence[dict[str, Any]], chat: Chat, asks: bool) -> str:
        """Return what the template makes of the messages.

        Args:
            messages: the first ones of the chat, or all.
            chat: with its tools.
            asks: end with the opening of an assistant's turn, as the prompt of a request does.

        Raises:
            ChatError: the template refuses them.
        """
        document = {"messages": list(messages), "tools": chat.tools, "add_generation_prompt": asks}
        try:
            return self._served.chat_text(document)
        except InvalidRequest as error:
            raise ChatError(f"{chat.source}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of rendered text."""
        return self._served.encode(text, add_special_tokens=False)

    def render(self, chat: Chat) -> list[Rendered]:
        """Return the samples of a chat: one, where every prompt of a turn begins the chat's whole text.

        Templates that leave out earlier reasoning, or tokens that join across the start of an answer, make
        the prompt of a turn differ from the beginning of the whole; such a turn becomes a sample of its own.

        Raises:
            TemplateMismatchError: an answer does not follow its prompt, or does not end with a stop token.
            ChatError: the template refuses the chat.
        """
        whole_text = self.text(chat.messages, chat, asks=False)
        whole = self.encode(whole_text)
        is_scored = [False] * len(whole)
        alone = []
        for index, message in enumerate(chat.messages):
            # nothing in serving makes a model speak first
            if message["role"] != "assistant" or index in chat.untrained or index == 0:
                continue
            prompt, answer = self._turn(chat, index)
            prompt_ids, answer_ids = self.encode(prompt), self.encode(answer)
            end = self._end(answer_ids, f"{chat.source}: messages.{index}")
            ids = prompt_ids + answer_ids[:end]
            if whole[: len(ids)] == ids and whole_text.startswith(prompt + answer):
                is_scored[len(prompt_ids) : len(ids)] = [True] * end
            else:
                alone.append(Rendered(ids, [False] * len(prompt_ids) + [True] * end))
        return ([Rendered(whole, is_scored)] if any(is_scored) else []) + alone

    def _turn(self, chat: Chat, index: int) -> tuple[str, str]:
        """Return the prompt of a turn as it is served, and what the model is to say to it."""
        prompt = self.text(chat.messages[:index], chat, asks=True)
        text = self.text(chat.messages[: index + 1], chat, asks=False)
        if not text.startswith(prompt):
            same = next(
                (i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), 0
            )
            raise TemplateMismatchError(
                f"{chat.source}: messages.{index}: expected the answer to follow its prompt; "
                f"the template writes {prompt[same : same + 30]!r} when asked and "
                f"{text[same : same + 30]!r} when answered"
            )
        return prompt, text[len(prompt) :]

    def _end(self, answer_ids: Sequence[int], where: str) -> int:
        """Return the number of tokens up to the one at which serving stops, it included."""
        first = next((i for i, token in enumerate(answer_ids) if token in self._stop_ids), None)
        if first is None:
            raise TemplateMismatchError(
                f"{where}: expected one of the stop tokens {sorted(self._stop_ids)} at the end of the answer: "
                "without it the served model would never stop"
            )
        return first + 1
