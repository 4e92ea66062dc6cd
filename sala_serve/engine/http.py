"""The connection to vLLM: one POST a request, its failures as errors of ours."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx

from sala_serve.engine.vllm_errors import error_from_vllm
from sala_serve.errors import EngineLost, EngineTimeout, EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from sala_serve.engine.settings import EngineSettings

_MAX_ERROR_BYTES = 64 * 1024


def engine_client(settings: EngineSettings) -> httpx.AsyncClient:
    """Build an HTTP client for one engine."""
    # a kept-alive connection may be closed by the engine just as we send on it; a new one costs
    # microseconds on loopback and a POST of a prompt must not be sent twice. Admission bounds their number
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    socket = None if settings.socket is None else str(settings.socket)
    return httpx.AsyncClient(
        base_url=settings.url,
        transport=httpx.AsyncHTTPTransport(
            uds=socket,
            limits=limits,
            verify=settings.url.startswith("https:"),  # else no time goes into certificates
        ),
        headers={"Accept-Encoding": "identity"},  # streams are relayed as they come
        timeout=httpx.Timeout(
            settings.read_timeout_s,
            connect=settings.connect_timeout_s,
            write=settings.write_timeout_s,
        ),
        follow_redirects=False,
    )


class EngineReply:
    """An answer of the engine that has begun."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    async def read(self) -> bytes:
        """Return the whole answer.

        Raises:
            EngineLost, EngineTimeout: it did not come to its end.
        """
        with _translated_errors():
            return await self._response.aread()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the answer as it arrives; raises like :meth:`read`."""
        with _translated_errors():
            async for chunk in self._response.aiter_raw():
                yield chunk


class HttpEngine:
    """One vLLM server."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    @asynccontextmanager
    async def post(
        self, path: str, body: bytes, *, headers: Mapping[str, str], prompt_field: str
    ) -> AsyncIterator[EngineReply]:
        """Send a request; leaving the block early closes the connection, on which vLLM aborts.

        Args:
            path: for example ``/v1/chat/completions``.
            body: JSON.
            headers: sent as they are.
            prompt_field: ``param`` of an error about the prompt's length.

        Raises:
            EngineUnavailable: the engine does not accept connections.
            EngineLost, EngineTimeout: it gave no answer.
            GatewayError: it answered with an error; see :func:`error_from_vllm`.
        """
        request = self._client.build_request(
            "POST", path, content=body, headers={"Content-Type": "application/json", **headers}
        )
        with _translated_errors():
            response = await self._client.send(request, stream=True)
        try:
            if response.status_code != 200:
                text = await _read_start(response)
                raise error_from_vllm(response.status_code, text, prompt_field=prompt_field)
            yield EngineReply(response)
        finally:
            await response.aclose()


async def _read_start(response: httpx.Response) -> bytes:
    text = b""
    with _translated_errors():
        async for chunk in response.aiter_raw():
            text += chunk
            if len(text) > _MAX_ERROR_BYTES:
                break
    return text


class _translated_errors:  # noqa: N801 - reads as a statement
    """Turn the HTTP client's failures into errors of ours."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        match error:
            case httpx.ConnectError() | httpx.ConnectTimeout():
                raise EngineUnavailable("The engine is not reachable.") from error
            case httpx.TimeoutException():
                raise EngineTimeout("The engine did not answer in time.") from error
            case httpx.TransportError():
                raise EngineLost(
                    "The connection to the engine broke before the answer was complete."
                ) from error
