"""One engine and how it is talked to."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from sala_serve.settings import Seconds, Section


class EngineSettings(Section):
    """One entry of ``engines``."""

    url: str = "http://127.0.0.1:8001"
    """Base URL of vLLM, without ``/v1``."""
    socket: Path | None = None
    """Unix socket on which the engine listens; ``url`` then only fills the Host header."""
    engine_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._:-]{1,64}$")
    """Short name in metrics and logs; None: host and port of ``url``."""
    probe_interval_s: Seconds = 1.0
    """Between two looks at the engine's health."""
    stuck_after_s: Seconds = 60.0
    """Without any progress while requests run, or without any answer, for this long: the engine is stuck. Longer
    than its longest step."""
    connect_timeout_s: Seconds = 5.0
    """Until the engine accepts a connection."""
    write_timeout_s: Seconds = 60.0
    """For the engine to take the next piece of a request's body."""
    read_timeout_s: Seconds = 3600.0
    """Between two bytes of the answer. The engine is silent during a prefill, which lasts minutes for a
    million tokens, and an answer that is not streamed is silent until its last token."""
