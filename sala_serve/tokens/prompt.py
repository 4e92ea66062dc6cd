"""A prompt as the rest of the gateway sees it: how many tokens, and which prefix it shares with others."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PREFIX_BLOCK_TOKENS = 512
"""Tokens a hash covers: 8 pages of the sparse layers, 2,048 hashes for a million tokens."""
HASH_BYTES = 16


@dataclass(frozen=True)
class Prompt:
    """One prompt, counted."""

    num_tokens: int
    """As the engine will count it in ``usage.prompt_tokens``."""
    block_hashes: tuple[bytes, ...] = ()
    """One for each whole block of ``PREFIX_BLOCK_TOKENS`` tokens, over that block and all before it. The same for
    every tenant: who keeps them must key them by tenant, else one tenant could probe another's prompts."""


class PromptCounter(Protocol):
    """Counts the tokens of request bodies."""

    async def count_chat(self, document: Mapping[str, Any]) -> Prompt:
        """Count the prompt of a chat.

        Args:
            document: the body of ``/v1/chat/completions``.

        Raises:
            InvalidRequest: the chat cannot be made into a prompt; the message says why.
        """
        ...

    async def count_completion(self, document: Mapping[str, Any]) -> list[Prompt]:
        """Count each prompt of a text completion; arguments and errors as for chats."""
        ...


def block_hashes(token_ids: Sequence[int]) -> tuple[bytes, ...]:
    """Return the chained hash of each whole block of ``token_ids``."""
    data = memoryview(array("I", token_ids).tobytes())
    block_bytes = 4 * PREFIX_BLOCK_TOKENS
    hashes, before = [], b""
    for end in range(block_bytes, len(data) + 1, block_bytes):
        block = hashlib.blake2b(before, digest_size=HASH_BYTES)
        block.update(data[end - block_bytes : end])
        hashes.append(before := block.digest())
    return tuple(hashes)
