"""``/v1/batches``: the wire of OpenAI's Batch API; what it does is in ``jobs/batches.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request  # noqa: TC002 - FastAPI reads the annotations
from starlette.responses import JSONResponse, Response

from sala_serve.api.files import KEEP_S
from sala_serve.api.objects import (
    Page,
    StoredObject,
    answers,
    json_body,
    page_of,
    page_parameters,
    path_parameter,
    read_int,
)
from sala_serve.bodies import parse_object
from sala_serve.errors import InvalidRequest
from sala_serve.jobs.batch_lines import Endpoint
from sala_serve.jobs.batches import BatchRequest, batch_view
from sala_serve.jobs.response_request import parse_metadata
from sala_serve.middleware import principal_of
from sala_serve.telemetry import RequestRecord

if TYPE_CHECKING:
    from sala_serve.gateway import Gateway

_LONGEST_PAGE = 100


class BatchObject(StoredObject):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: Endpoint
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    request_counts: dict[str, int]
    metadata: dict[str, str] | None


class OutputExpiresAfter(BaseModel):
    """How long the files of results are kept."""

    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"]
    seconds: int = Field(ge=KEEP_S[0], le=KEEP_S[1])


class CreateBatch(BaseModel):
    """What a batch is made of."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str = Field(max_length=256)
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    output_expires_after: OutputExpiresAfter | None = None


_ONE = {"parameters": [path_parameter("batch_id")]}


def batches_router(gateway: Gateway) -> APIRouter:
    """Return the routes of batches."""
    router = APIRouter()
    batches = gateway.jobs.batches

    @router.post(
        "/v1/batches",
        responses=answers(BatchObject),
        openapi_extra=json_body(CreateBatch),
    )
    async def create_batch(request: Request) -> Response:
        """Run the requests of a file within a day."""
        principal, record = principal_of(request.scope), RequestRecord.of(request.scope)
        sender = principal.key_id or principal.tenant.tenant_id
        async with (
            gateway.running.admit(record),
            gateway.uploads.parsed(request, sender=sender, parse=_parse) as parsed,
        ):
            job = await batches.create(
                principal,
                parsed,
                request_id=record.request_id,
                trace_headers=record.trace.headers(request.headers),
            )
        return JSONResponse(batch_view(job))

    @router.get(
        "/v1/batches",
        responses=answers(Page),
        openapi_extra={"parameters": page_parameters(_LONGEST_PAGE, 20)},
    )
    async def list_batches(request: Request) -> Response:
        """List the batches, newest first."""
        limit = read_int(request, "limit", 20, 1, _LONGEST_PAGE)
        after = request.query_params.get("after")
        jobs = await batches.page(principal_of(request.scope), after=after, limit=limit + 1)
        return JSONResponse(page_of([batch_view(job) for job in jobs], limit))

    @router.get("/v1/batches/{batch_id}", responses=answers(BatchObject), openapi_extra=_ONE)
    async def show_batch(request: Request) -> Response:
        """Show a batch as it stands."""
        return JSONResponse(batch_view(await batches.get(*_named(request))))

    @router.post(
        "/v1/batches/{batch_id}/cancel", responses=answers(BatchObject), openapi_extra=_ONE
    )
    async def cancel_batch(request: Request) -> Response:
        """End a batch with the results that there are."""
        return JSONResponse(batch_view(await batches.cancel(*_named(request))))

    return router


def _named(request: Request) -> tuple[Any, str]:
    return principal_of(request.scope), request.path_params["batch_id"]


def _parse(raw: bytes) -> BatchRequest:
    try:
        body = CreateBatch.model_validate(parse_object(raw))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{path}: {first['msg']}.", param=path) from None
    expires = body.output_expires_after
    return BatchRequest(
        input_file_id=body.input_file_id,
        endpoint=body.endpoint,
        metadata=None if body.metadata is None else parse_metadata(body.metadata),
        keep_output_s=None if expires is None else expires.seconds,
    )
