"""Runs one line of a batch: again while that may help, to a result in any case."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from sala_serve.errors import GatewayError, InternalError, InvalidRequest
from sala_serve.jobs.batch_lines import refusal, success
from sala_serve.jobs.principals import load_principal
from sala_serve.jobs.response_request import parse_response_request
from sala_serve.jobs.running import EngineRequest, Progress
from sala_serve.jobs.worker import RETRIES, WAITS, delay_s
from sala_serve.tenants.model import check_endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sala_serve.jobs.batch_lines import BatchLine, LineResult
    from sala_serve.jobs.responses import Responses
    from sala_serve.jobs.running import Engines, Piece
    from sala_serve.jobs.settings import JobsSettings
    from sala_serve.jobs.worker import Held
    from sala_serve.tenants.model import Principal

logger = logging.getLogger(__name__)


class LineRunner:
    """Runs lines of batches on the engines."""

    def __init__(self, engines: Engines, responses: Responses, settings: JobsSettings) -> None:
        self.engines = engines
        self.responses = responses
        self.settings = settings

    def task(self, held: Held, line: BatchLine) -> LineTask:
        """Return what runs a line of a batch."""
        return LineTask(self, held, line)


class LineTask:
    """One line that is to run, or runs."""

    def __init__(self, runner: LineRunner, held: Held, line: BatchLine) -> None:
        self.line = line
        self.has_begun = False
        """Whether an engine works on it."""
        self._runner = runner
        self._spec = held.lease.spec
        self._is_cancelled = held.is_cancel_asked.is_set
        self._request_id = f"{held.lease.job_id}-{line.number}"

    async def run(self) -> LineResult:
        """Return what comes of the line.

        A limit, a full queue or no engine is waited for; the batch's own end ends that. A failure of the
        engine is tried again, ``max_attempts`` times in all.
        """
        settings = self._runner.settings
        num_attempts = num_waits = 0
        while True:
            try:
                body = await self._answer()
                return await asyncio.to_thread(success, self.line, self._request_id, body)
            except WAITS as error:
                num_waits += 1
                next_s = delay_s(settings, error, num_waits)
            except GatewayError as error:
                num_attempts += 1
                if not isinstance(error, RETRIES) or num_attempts >= settings.max_attempts:
                    return refusal(self.line, self._request_id, error)
                next_s = delay_s(settings, error, num_attempts)
            except Exception:
                logger.exception("%s failed", self._request_id)
                bug = InternalError("The gateway failed on this request.")
                return refusal(self.line, self._request_id, bug)
            finally:
                self.has_begun = False
            await asyncio.sleep(next_s)

    async def _answer(self) -> dict[str, Any]:
        """Run the line once; return the answer's body. Raises GatewayError."""
        engines, endpoint = self._runner.engines, self._spec["endpoint"]
        principal = await engines.current(load_principal(self._spec["principal"]))
        check_endpoint(principal, endpoint)
        for name in ("stream", "background"):
            if self.line.body.get(name):
                message = f"{name}: a line of a batch has one whole answer."
                raise InvalidRequest(message, param=name)
        last: dict[str, Any] | None = None
        if endpoint == "/v1/responses":
            pieces = await self._response(principal)
        else:
            pieces = await self._completion(principal)
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, dict):
                    last = piece
                elif isinstance(piece, Progress):
                    self.has_begun = piece.phase in ("prefill", "decoding")
        assert last is not None
        return cast("dict[str, Any]", last["response"]) if endpoint == "/v1/responses" else last

    async def _response(self, principal: Principal) -> AsyncGenerator[Piece]:
        responses = self._runner.responses
        request = await asyncio.to_thread(parse_response_request, self.line.body)
        prepared = await responses.prepare(
            principal,
            request,
            request_id=self._request_id,
            trace_headers=self._spec["trace_headers"],
            record=None,
        )
        engine_request = replace(
            prepared.engine_request,
            endpoint="/v1/batches",
            is_batch=True,
            is_charged_when_cut=self._is_cancelled,
        )
        return responses.run(replace(prepared, engine_request=engine_request))

    async def _completion(self, principal: Principal) -> AsyncGenerator[Piece]:
        engines = self._runner.engines
        request = EngineRequest(
            principal=principal,
            path=self._spec["endpoint"],
            document=self.line.body,
            request_id=self._request_id,
            endpoint="/v1/batches",
            is_batch=True,
            trace_headers=self._spec["trace_headers"],
            is_charged_when_cut=self._is_cancelled,
        )
        return engines.run(await asyncio.to_thread(engines.check, request))
