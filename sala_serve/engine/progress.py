"""What an engine says about the requests inside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Phase = Literal["waiting", "prefilling", "decoding"]
PROGRESS_PATH = "/sala/progress"


@dataclass(frozen=True)
class RequestProgress:
    """How far one request has got; several prompts or answers of it are added up."""

    phase: Phase
    num_prompt_tokens: int
    num_computed_tokens: int
    """Prompt tokens done, cached ones included."""
    num_cached_tokens: int
    """Prompt tokens found in the prefix cache; 0 while waiting."""
    num_output_tokens: int


@dataclass(frozen=True)
class EngineProgress:
    """One look at an engine."""

    step: int | None
    """Steps computed since the engine started; None if the engine does not say."""
    requests: Mapping[str, RequestProgress] = field(default_factory=dict)
    """By the ``X-Request-Id`` they were sent with."""
    kv_capacity_tokens: int | None = None
    kv_used_tokens: int | None = None
    max_num_seqs: int | None = None


def parse_progress(document: Any) -> EngineProgress:
    """Read the answer of ``GET /sala/progress``.

    Raises:
        ValueError, KeyError, TypeError: it is not such an answer.
    """
    kv = document["kv"]
    return EngineProgress(
        step=int(document["step"]),
        requests={
            request_id: RequestProgress(**values)
            for request_id, values in document["requests"].items()
        },
        kv_capacity_tokens=int(kv["capacity_tokens"]),
        kv_used_tokens=int(kv["used_tokens"]),
        max_num_seqs=document.get("max_num_seqs"),
    )
