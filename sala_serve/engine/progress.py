"""What an engine says about the requests inside it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

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
    instance: str | None = None
    """Another one after every start of the engine."""
    signs: tuple[float, ...] = ()
    """Numbers that change while an engine without ``/sala/progress`` works."""

    @property
    def is_working(self) -> bool:
        """Whether it has requests, by its own account."""
        return bool(self.requests) or (self.step is None and any(self.signs[:_NUM_GAUGES]))

    def has_moved_since(self, before: EngineProgress) -> bool:
        """Tell whether anything was computed, began or ended."""
        return (self.instance, self.step, self.signs) != (
            before.instance,
            before.step,
            before.signs,
        ) or self.requests != before.requests


def parse_progress(text: bytes) -> EngineProgress:
    """Read the answer of ``GET /sala/progress``.

    Raises:
        ValueError, KeyError, TypeError: it is not such an answer.
    """
    document = json.loads(text)
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
        instance=document.get("instance"),
    )


_SIGNS = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
)
_NUM_GAUGES = 2
_SAMPLE = re.compile(r"^([a-z_:]+)\{([^}]*)\} (\S+)$", re.MULTILINE)
_CAPACITY = "vllm:cache_config_info"
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def parse_metrics(text: str) -> EngineProgress:
    """Read the few of vLLM's metrics that show from outside whether an engine without the plugin works.

    During a prefill only the share of the cache that is used moves: vLLM counts tokens when it has an output.
    """
    values, capacity = dict.fromkeys(_SIGNS, 0.0), None
    for name, labels, value in _SAMPLE.findall(text):
        if name in values:
            values[name] += float(value)
        elif name == _CAPACITY:
            config = dict(_LABEL.findall(labels))
            tokens = config.get("kv_cache_size_tokens", "")
            blocks, size = config.get("num_gpu_blocks", ""), config.get("block_size", "")
            if tokens.isdigit():
                capacity = int(tokens)
            elif blocks.isdigit() and size.isdigit():
                capacity = int(blocks) * int(size)
    used = None if capacity is None else round(capacity * values["vllm:kv_cache_usage_perc"])
    return EngineProgress(
        step=None,
        kv_capacity_tokens=capacity,
        kv_used_tokens=used,
        signs=tuple(values.values()),
    )
