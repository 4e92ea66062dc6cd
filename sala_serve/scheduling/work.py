"""What is scheduled, what a waiting caller is told, and what is asked of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class TierView(Protocol):
    """What is asked of a service tier (``sala_serve.tenants``)."""

    @property
    def name(self) -> str:
        """In metrics."""

    @property
    def weight(self) -> float:
        """Share relative to tenants of other tiers."""

    @property
    def priority(self) -> int:
        """As in vLLM: a smaller one is served earlier."""


class PromptView(Protocol):
    """What is asked of a counted prompt (``sala_serve.tokens``)."""

    @property
    def num_tokens(self) -> int:
        """In the model's own tokens."""

    @property
    def block_hashes(self) -> tuple[bytes, ...]:
        """Chained, one for each whole block."""


class UsageView(Protocol):
    """What is asked of an engine's report at the end of an answer."""

    @property
    def num_prompt_tokens(self) -> int:
        """Cached ones included."""

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens from the prefix cache."""

    @property
    def num_completion_tokens(self) -> int:
        """Generated tokens."""


class ProgressView(Protocol):
    """What is asked of a look at a running request (``sala_serve.engine``)."""

    @property
    def phase(self) -> str:
        """``waiting``, ``prefilling`` or ``decoding``."""

    @property
    def num_prompt_tokens(self) -> int:
        """Cached ones included."""

    @property
    def num_computed_tokens(self) -> int:
        """Prompt tokens done, cached ones included."""

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""

    @property
    def num_output_tokens(self) -> int:
        """Generated so far."""


class FactsView(Protocol):
    """What an engine can hold; None: not known."""

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and answer of one request."""

    @property
    def kv_capacity_tokens(self) -> int | None:
        """Tokens of all requests together."""

    @property
    def max_num_seqs(self) -> int | None:
        """Requests computed at the same time."""


class EngineView(Protocol):
    """What is asked of an engine."""

    @property
    def engine_id(self) -> str:
        """Short, and the same over restarts."""

    @property
    def facts(self) -> FactsView:
        """What it can hold."""

    @property
    def progress(self) -> Mapping[str, ProgressView]:
        """How far its requests have got, by request id; those of other gateways too."""

    @property
    def num_starts(self) -> int:
        """How often it has become ready; after each time its prefix cache is empty."""

    @property
    def kv_used_tokens(self) -> int | None:
        """Tokens that running requests hold; None: not known."""


AnyEngine = TypeVar("AnyEngine", bound=EngineView)
PoolEngine = TypeVar("PoolEngine", bound=EngineView, covariant=True)


class PoolView(Protocol[PoolEngine]):
    """What is asked of the pool of engines."""

    @property
    def engines(self) -> Mapping[str, PoolEngine]:
        """All of them."""

    def ready(self, model: str | None = None) -> Sequence[PoolEngine]:
        """Those that can take work, of those that serve ``model`` if given."""


@dataclass(frozen=True, eq=False)
class Work:
    """One request that asks for its turn; one that had to give way asks again with the same object."""

    request_id: str
    """As sent to the engine in ``X-Request-Id``."""
    tenant_id: str
    tier: TierView
    prompt: PromptView
    output_tokens: int
    """Most tokens that may be generated."""
    model: str
    arrived_at_s: float
    """Monotonic, of the scheduler's clock; a request that comes back keeps its own."""
    deadline_s: float | None = None
    """Seconds after arrival by which its turn must come; None: however long it takes."""
    pin_key: str | None = None
    """The client's ``prompt_cache_key``: requests of a tenant with the same key go to the same engine."""


@dataclass(frozen=True)
class Waiting:
    """What a waiting caller may know. Times are seconds from now; None while no engine is ready."""

    place: int
    """From 1, in the order in which requests of its length are expected to start."""
    num_ahead: int
    tokens_ahead: int
    """Uncached prompt tokens that are expected to be computed before it starts."""
    expected_start_s: float | None
    expected_first_token_s: float | None

    def behind(self, ahead_tokens: int, own_tokens: int) -> Waiting:
        """Return what one may be told who waits right behind this one.

        Args:
            ahead_tokens: that this one computes.
            own_tokens: that the one behind computes.
        """
        start_s = first_token_s = None
        if self.expected_start_s is not None and self.expected_first_token_s is not None:
            prefill_s = self.expected_first_token_s - self.expected_start_s
            start_s = self.expected_first_token_s
            first_token_s = start_s + prefill_s * own_tokens / max(ahead_tokens, 1)
        return Waiting(
            self.place + 1,
            self.num_ahead + 1,
            self.tokens_ahead + ahead_tokens,
            start_s,
            first_token_s,
        )
