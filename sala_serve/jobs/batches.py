"""Batches: what clients do with them, and how they see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sala_serve.errors import Conflict, InvalidRequest, NotFound
from sala_serve.jobs.files import file_not_found
from sala_serve.jobs.model import Job, new_id
from sala_serve.jobs.principals import dump_principal
from sala_serve.tenants.model import check_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sala_serve.jobs.batch_lines import Endpoint
    from sala_serve.jobs.files import Files
    from sala_serve.jobs.store import JobStore
    from sala_serve.tenants.model import Principal

WINDOW_S = 24 * 3600
"""The one ``completion_window`` that there is."""


@dataclass(frozen=True)
class BatchRequest:
    """What a client asks for."""

    input_file_id: str
    endpoint: Endpoint
    metadata: Mapping[str, str] | None
    keep_output_s: int | None
    """How long the results' files are kept; ``None``: as other files."""


class Batches:
    """What clients do with batches.

    Args:
        store: where they are kept.
        files: where their input is.
        wall_clock: Unix seconds.
    """

    def __init__(self, store: JobStore, files: Files, *, wall_clock: Callable[[], float]) -> None:
        self._store = store
        self._files = files
        self._wall_clock = wall_clock

    async def create(
        self,
        principal: Principal,
        request: BatchRequest,
        *,
        request_id: str,
        trace_headers: Mapping[str, str],
    ) -> Job:
        """Hand a batch to the workers of all replicas.

        Raises:
            NotFound: the tenant has no such file.
            InvalidRequest: the file is for something else.
            PermissionDenied: the key does not reach the endpoint.
        """
        tenant_id = principal.tenant.tenant_id
        check_endpoint(principal, request.endpoint)
        try:
            file = await self._files.find(tenant_id, request.input_file_id)
        except NotFound:
            raise file_not_found(request.input_file_id, "input_file_id") from None
        if file.document["purpose"] != "batch":
            message = "The file was not uploaded with purpose 'batch'."
            raise InvalidRequest(message, param="input_file_id")
        batch_id, now_s = new_id("batch_"), self._wall_clock()
        await self._store.submit(
            batch_id,
            "batch",
            tenant_id,
            document=_document(batch_id, request, int(now_s)),
            created_unix_s=now_s,
            spec={
                "principal": dump_principal(principal),
                "endpoint": request.endpoint,
                "input_file_id": request.input_file_id,
                # named now, so that whoever takes the batch over writes the same ones
                "output_file_id": new_id("file-"),
                "error_file_id": new_id("file-"),
                "keep_output_s": request.keep_output_s or self._files.settings.file_retention_s,
                "request_id": request_id,
                "trace_headers": dict(trace_headers),
            },
        )
        return await self.get(principal, batch_id)

    async def get(self, principal: Principal, batch_id: str) -> Job:
        """Return a batch; raises NotFound."""
        return await self._store.find(principal.tenant.tenant_id, batch_id, "batch")

    async def page(self, principal: Principal, *, after: str | None, limit: int) -> list[Job]:
        """Return a tenant's batches, newest first; raises InvalidRequest if there is none ``after``."""
        tenant_id = principal.tenant.tenant_id
        jobs = await self._store.page(tenant_id, "batch", after=after, limit=limit)
        if jobs is None:
            raise InvalidRequest("There is no such batch.", param="after")
        return jobs

    async def cancel(self, principal: Principal, batch_id: str) -> Job:
        """Have a batch end soon, with the results that there are.

        Raises:
            NotFound: the tenant has no such batch.
            Conflict: it is over.
        """
        job = await self.get(principal, batch_id)
        if not await self._store.ask_cancel(job, self._wall_clock()):
            status = (await self.get(principal, batch_id)).document["status"]
            raise Conflict(f"A batch with status '{status}' cannot be cancelled.")
        return await self.get(principal, batch_id)


def batch_view(job: Job) -> dict[str, Any]:
    """Return a batch as its owner sees it."""
    document = dict(job.document)
    if job.cancel_asked_unix_s is not None and document["status"] != "completed":
        document["cancelling_at"] = int(job.cancel_asked_unix_s)
        if not job.status.is_final:
            document["status"] = "cancelling"
    counts = job.counts
    document["request_counts"] = {
        "total": document["request_counts"]["total"],
        "completed": counts.get("completed", 0),
        "failed": counts.get("failed", 0),
    }
    input_tokens, output_tokens = counts.get("input_tokens", 0), counts.get("output_tokens", 0)
    document["usage"] = {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": counts.get("cached_tokens", 0)},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": input_tokens + output_tokens,
    }
    return document


def _document(batch_id: str, request: BatchRequest, now_s: int) -> dict[str, Any]:
    later = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling")
    return {
        "id": batch_id,
        "object": "batch",
        "endpoint": request.endpoint,
        "errors": None,
        "input_file_id": request.input_file_id,
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now_s,
        "expires_at": now_s + WINDOW_S,
        **{f"{name}_at": None for name in (*later, "cancelled")},
        "request_counts": {"total": 0},
        "metadata": request.metadata,
    }
