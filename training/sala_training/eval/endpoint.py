"""Any endpoint that speaks OpenAI's chat, as a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def openai_chat(
    base_url: str,
    model: str,
    api_key: str | None = None,
    timeout_s: float = 120.0,
    max_answer_tokens: int = 48,
) -> Callable[[Sequence[dict[str, str]]], str]:
    """Return a function from messages to the answer, decoded greedily; threads may share it.

    Args:
        base_url: up to and including ``/v1``.
        model: served name.
        api_key: sent as a bearer token.
        timeout_s: of one request.
        max_answer_tokens: most tokens to generate.
    """
    client = _client(base_url, api_key, timeout_s)

    def ask(messages: Sequence[dict[str, str]]) -> str:
        reply = _post(client, model, messages, max_answer_tokens)
        return reply["choices"][0]["message"]["content"] or ""

    return ask


def openai_counter(
    base_url: str, model: str, api_key: str | None = None, timeout_s: float = 120.0
) -> Callable[[str], int]:
    """Return a function from a text to about as many tokens as the endpoint makes of it.

    The endpoint is asked once, with a text of a few thousand characters; other texts are counted by their
    characters in proportion. An own tokenizer is exact.

    Raises:
        ValueError: when called: the endpoint reports no usage.
    """
    client = _client(base_url, api_key, timeout_s)
    known: list[float] = []

    def count(text: str) -> int:
        if not known:
            sample = text[:4000]
            reply = _post(client, model, [{"role": "user", "content": sample}], 1)
            tokens = (reply.get("usage") or {}).get("prompt_tokens")
            if not tokens:
                raise ValueError("expected usage.prompt_tokens in the endpoint's answer, got none")
            known.append(tokens / len(sample))
        return round(len(text) * known[0])

    return count


def _client(base_url: str, api_key: str | None, timeout_s: float) -> Any:
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=base_url, headers=headers, timeout=timeout_s)


def _post(
    client: Any, model: str, messages: Sequence[dict[str, str]], max_tokens: int
) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": list(messages),
        "temperature": 0.0,
        "max_tokens": max_tokens,
    }
    reply = client.post("/chat/completions", json=body)
    reply.raise_for_status()
    document: dict[str, Any] = reply.json()
    return document
