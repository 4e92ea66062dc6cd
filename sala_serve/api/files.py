"""``/v1/files``: the wire of OpenAI's Files API; what it does is in ``jobs/files.py``."""

from __future__ import annotations

import re
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter
from starlette.requests import Request  # noqa: TC002 - FastAPI reads the annotations
from starlette.responses import JSONResponse, Response

from sala_serve.api.objects import (
    Deleted,
    Page,
    StoredObject,
    answers,
    page_of,
    page_parameters,
    path_parameter,
    query_parameter,
    read_choice,
    read_int,
)
from sala_serve.api.sse import AnswerWriter
from sala_serve.errors import ClientDisconnected, GatewayError, InvalidRequest
from sala_serve.jobs.file_form import FileForm
from sala_serve.jobs.files import too_large
from sala_serve.jobs.model import new_id
from sala_serve.middleware import principal_of, send_error
from sala_serve.telemetry import RequestRecord

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from sala_serve.gateway import Gateway
    from sala_serve.jobs.files import StoredFile

KEEP_S = (3600, 30 * 86400)
"""Least and most of ``expires_after.seconds``."""
_FORM_BYTES = 64 * 1024
"""What a form may have beside its file."""
_LONGEST_PAGE = 10_000


class FileObject(StoredObject):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


_UPLOAD_SCHEMA = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": KEEP_S[0],
            "maximum": KEEP_S[1],
        },
    },
}
_ONE = {"parameters": [path_parameter("file_id")]}
_PURPOSES = {"type": "string", "enum": ["batch", "batch_output"]}


def files_router(gateway: Gateway) -> APIRouter:
    """Return the routes of files."""
    router = APIRouter()
    files = gateway.jobs.files

    @router.post(
        "/v1/files",
        responses=answers(FileObject),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"multipart/form-data": {"schema": _UPLOAD_SCHEMA}},
            }
        },
    )
    async def upload_file(request: Request) -> Response:
        """Store a file; its content may be read back and be a batch's input."""
        async with gateway.running.admit(RequestRecord.of(request.scope)):
            return JSONResponse(await _receive(gateway, request))

    @router.get(
        "/v1/files",
        responses=answers(Page),
        openapi_extra={
            "parameters": [
                *page_parameters(_LONGEST_PAGE, _LONGEST_PAGE),
                query_parameter("order", {"type": "string", "enum": ["asc", "desc"]}),
                query_parameter("purpose", _PURPOSES),
            ]
        },
    )
    async def list_files(request: Request) -> Response:
        """List the files."""
        limit = read_int(request, "limit", _LONGEST_PAGE, 1, _LONGEST_PAGE)
        order = read_choice(request, "order", "desc", "asc")
        found = await files.page(
            principal_of(request.scope).tenant.tenant_id,
            after=request.query_params.get("after"),
            limit=limit + 1,
            newest_first=order == "desc",
            purpose=request.query_params.get("purpose"),
        )
        return JSONResponse(page_of([dict(each.document) for each in found], limit))

    @router.get("/v1/files/{file_id}", responses=answers(FileObject), openapi_extra=_ONE)
    async def show_file(request: Request) -> Response:
        """Show what is known of a file."""
        return JSONResponse((await _find(gateway, request)).document)

    @router.delete("/v1/files/{file_id}", responses=answers(Deleted), openapi_extra=_ONE)
    async def delete_file(request: Request) -> Response:
        """Remove a file; a batch that reads it fails."""
        file = await _find(gateway, request)
        await files.delete(principal_of(request.scope).tenant.tenant_id, file.file_id)
        return JSONResponse({"id": file.file_id, "object": "file", "deleted": True})

    @router.get(
        "/v1/files/{file_id}/content",
        responses={200: {"content": {"application/octet-stream": {}}}},
        response_class=Response,
        openapi_extra=_ONE,
    )
    async def show_content(request: Request) -> Response:
        """Send a file's content."""
        return _Content(gateway, await _find(gateway, request))

    return router


async def _find(gateway: Gateway, request: Request) -> StoredFile:
    tenant_id = principal_of(request.scope).tenant.tenant_id
    return await gateway.jobs.files.find(tenant_id, request.path_params["file_id"])


async def _receive(gateway: Gateway, request: Request) -> dict[str, Any]:
    """Store a form's file as it comes; return its object."""
    principal, settings = principal_of(request.scope), gateway.settings.jobs
    tenant_id = principal.tenant.tenant_id
    form = FileForm(request.headers.get("content-type", ""))
    writer = gateway.jobs.files.writer(tenant_id, new_id("file-"))

    def check(num_bytes: int) -> None:
        if num_bytes > settings.max_file_bytes + _FORM_BYTES:
            raise too_large(settings)

    pieces = gateway.uploads.pieces(
        request,
        sender=principal.key_id or tenant_id,
        check=check,
        timeout_s=settings.file_upload_timeout_s,
    )
    is_published = False
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                for content in form.feed(piece):
                    await writer.write(content)
        filename = form.finish()
        if form.fields.get("purpose") != "batch":
            raise InvalidRequest("purpose: expected batch.", param="purpose")
        if not writer.num_bytes:
            raise InvalidRequest("The file is empty.", param="file")
        keep_s = _keep_s(form.fields) or settings.file_retention_s
        document = await writer.publish(filename=filename, purpose="batch", keep_s=keep_s)
        is_published = True
    finally:
        if not is_published:
            await writer.give_up()
    return document


def _keep_s(fields: dict[str, str]) -> int | None:
    """Return how long the uploader wants the file to be kept, if that is said; raises InvalidRequest."""
    anchor, seconds = (fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("Expected created_at.", param="expires_after.anchor")
    is_number = seconds is not None and re.fullmatch(r"[0-9]{1,9}", seconds)
    if not is_number or not KEEP_S[0] <= int(seconds or 0) <= KEEP_S[1]:
        message = f"Expected an integer from {KEEP_S[0]} to {KEEP_S[1]}."
        raise InvalidRequest(message, param="expires_after.seconds")
    return int(seconds or 0)


class _Content(Response):
    """A file's content, piece by piece."""

    def __init__(self, gateway: Gateway, file: StoredFile) -> None:
        super().__init__()
        self._gateway = gateway
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, to the end, which is noted in the request's record."""
        record = RequestRecord.of(scope)
        writer = AnswerWriter(send, send_timeout_s=self._gateway.settings.server.send_timeout_s)
        writer.headers["X-Content-Type-Options"] = "nosniff"
        try:
            async with self._gateway.running.admit(record) as running:
                await running.while_client_stays(self._write(writer), receive)
            await writer.finish()
        except GatewayError as error:
            record.status, record.error_code = error.status, error.code
            if not writer.is_started and not isinstance(error, ClientDisconnected):
                await send_error(error, scope, receive, send)
            # else the server closes the connection of an answer that is not complete

    async def _write(self, writer: AnswerWriter) -> None:
        async with aclosing(self._gateway.jobs.files.pieces(self._file)) as pieces:
            async for piece in pieces:
                if not writer.is_started:
                    num_bytes = self._file.document["bytes"]
                    await writer.begin_whole("application/octet-stream", num_bytes)
                await writer.write_piece(piece)
