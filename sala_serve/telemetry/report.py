"""The end of a request: its trace closed, its metrics counted, its one line logged."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sala_serve.errors import ClientDisconnected
from sala_serve.telemetry.record import PROBES

if TYPE_CHECKING:
    from sala_serve.telemetry.metrics import Metrics
    from sala_serve.telemetry.record import RequestRecord

logger = logging.getLogger("sala_serve.request")


def report(record: RequestRecord, metrics: Metrics) -> None:
    """End ``record``; called once, by whoever called ``metrics.request_started``."""
    # a request that ends without an answer was given up by its client or by the server's stop
    if record.status is None:
        record.status = ClientDisconnected.status
    duration_s = record.finish()
    metrics.request_finished(record, record.status, duration_s)
    # probes are counted, too many lines for a log
    level = logging.DEBUG if record.endpoint in PROBES else logging.INFO
    if logger.isEnabledFor(level):
        fields = fields_of(record, duration_s)
        logger.log(level, "%s", _as_text(fields), extra={"fields": fields})


def fields_of(record: RequestRecord, duration_s: float) -> dict[str, Any]:
    """Return what is logged of a request: ids, codes, counts and seconds, nothing a client has written."""
    usage = record.usage
    fields = {
        "request_id": record.request_id,
        "endpoint": record.endpoint,
        "status": record.status,
        "error_code": record.error_code,
        "tenant": record.tenant_id,
        "key_id": record.key_id,
        "tier": record.tier,
        "engine": record.engine_id,
        "duration_s": round(duration_s, 3),
        **{f"{phase}_s": round(spent_s, 3) for phase, spent_s in record.phases_s.items()},
        "ttft_s": None if record.ttft_s is None else round(record.ttft_s, 3),
        "prompt_tokens": usage.num_prompt_tokens if usage else record.num_prompt_tokens,
        "cached_tokens": usage.num_cached_tokens if usage else None,
        "completion_tokens": usage.num_completion_tokens if usage else None,
        "trace_id": record.trace.trace_id,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _as_text(fields: dict[str, Any]) -> str:
    # the first three stand in every line and need no name
    head = [str(fields[name]) for name in ("request_id", "endpoint", "status")]
    rest = [f"{name}={value}" for name, value in list(fields.items())[3:]]
    return " ".join(head + rest)
