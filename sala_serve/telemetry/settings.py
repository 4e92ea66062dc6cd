"""Settings of what the gateway reports; traces are set by the standard ``OTEL_*`` variables instead."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sala_serve.settings import Section


class TelemetrySettings(Section):
    """Section ``telemetry``."""

    log_format: Literal["text", "json"] = "text"
    """One line an event: for people, or a JSON object for machines."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Of the gateway's own lines; its libraries speak from warnings on, whatever this says."""
    max_tenant_labels: int = Field(default=50, ge=1, le=1000)
    """Tenants with metrics of their own, those with the most tokens; the rest is ``other``."""
