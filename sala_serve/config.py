"""The gateway's settings: frozen objects, and the one place that reads the environment.

Command line beats environment beats default. An unknown ``SALA_SERVE_*`` variable is an error, since a
misspelt setting that is silently ignored is found in production.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

PREFIX = "SALA_SERVE_"


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it."""


@dataclass(frozen=True)
class ApiKeys:
    """Accepted API keys; empty means that no key is asked for. ``repr`` shows only how many."""

    values: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.values)

    def __repr__(self) -> str:
        return f"<{len(self.values)} keys>"

    @classmethod
    def from_text(cls, text: str) -> ApiKeys:
        """Read keys separated by commas or line ends; blank lines and lines with ``#`` are skipped."""
        lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
        keys = tuple(key.strip() for line in lines for key in line.split(",") if key.strip())
        if not keys:
            raise ConfigError("expected at least one API key, got none")
        if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise ConfigError("API keys must be printable ASCII without spaces")
        return cls(keys)


@dataclass(frozen=True)
class EngineTimeouts:
    """How long the gateway waits for the engine at each step of a request."""

    connect_s: float = 5.0
    """Until the engine accepts the connection."""
    write_s: float = 60.0
    """For one write of the request body to be taken."""
    read_s: float = 3600.0
    """Between two bytes of the answer. The engine is silent during a prefill, which lasts minutes for a
    million tokens, and an answer that is not streamed is silent until its last token."""
    pool_s: float = 5.0
    """For a free slot among ``max_engine_connections``."""


@dataclass(frozen=True)
class GatewayConfig:
    """Everything the gateway needs to know at start."""

    host: str = "127.0.0.1"
    port: int = 8000
    engine_url: str = "http://127.0.0.1:8001"
    """Base URL of vLLM, without ``/v1``."""
    engine_socket: Path | None = None
    """Unix socket on which the engine listens; ``engine_url`` then only fills the Host header."""
    api_keys: ApiKeys = field(default_factory=ApiKeys)
    max_body_bytes: int = 32 * 1024 * 1024
    """A million tokens are 5 MB of text, 12 MB when the client escapes Chinese."""
    max_engine_connections: int = 1024
    """Requests running at the same time."""
    upload_timeout_s: float = 60.0
    """For the next piece of the client's body to arrive."""
    send_timeout_s: float = 60.0
    """For a client to take the next piece of its answer; a slower one is cut off."""
    drain_timeout_s: float = 300.0
    """After SIGTERM, how long running requests may take to finish before they are cut."""
    probe_interval_s: float = 1.0
    """Between two looks at the engine's health."""
    stuck_after_s: float = 60.0
    """A connected engine whose health stays unanswered for this long counts as down."""
    engine_timeouts: EngineTimeouts = field(default_factory=EngineTimeouts)


@dataclass(frozen=True)
class ChatConfig:
    """Where the terminal client finds its server."""

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = field(default=None, repr=False)


def _positive_int(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def _positive_float(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError
    return value


def _port(text: str) -> int:
    if not 0 <= (value := int(text)) <= 65535:
        raise ValueError
    return value


@dataclass(frozen=True)
class _Variable:
    parse: Callable[[str], Any]
    expected: str
    gateway_field: str | None = None
    timeout_field: str | None = None
    chat_field: str | None = None


VARIABLES: Mapping[str, _Variable] = {
    "HOST": _Variable(str, "a host name or address", "host"),
    "PORT": _Variable(_port, "a port number", "port"),
    "API_KEYS": _Variable(ApiKeys.from_text, "keys separated by commas", "api_keys"),
    "MAX_BODY_BYTES": _Variable(_positive_int, "a positive integer", "max_body_bytes"),
    "MAX_ENGINE_CONNECTIONS": _Variable(
        _positive_int, "a positive integer", "max_engine_connections"
    ),
    "DRAIN_TIMEOUT_S": _Variable(_positive_float, "seconds above 0", "drain_timeout_s"),
    "ENGINE_READ_TIMEOUT_S": _Variable(_positive_float, "seconds above 0", timeout_field="read_s"),
    "URL": _Variable(str, "the gateway's URL", chat_field="url"),
    "API_KEY": _Variable(str, "one key", chat_field="api_key"),
}
"""Every ``SALA_SERVE_*`` variable; the last two are read by ``sala-serve chat``."""


def load_gateway_config(env: Mapping[str, str], **overrides: object) -> GatewayConfig:
    """Resolve the gateway's settings.

    Args:
        env: the process environment.
        overrides: fields of :class:`GatewayConfig` from the command line; ``None`` means not given.

    Raises:
        ConfigError: a ``SALA_SERVE_*`` variable is unknown or has no usable value.
    """
    values = _read(env)
    fields = {v.gateway_field: values[name] for name, v in _known(values) if v.gateway_field}
    timeouts = {v.timeout_field: values[name] for name, v in _known(values) if v.timeout_field}
    fields |= {name: value for name, value in overrides.items() if value is not None}
    return GatewayConfig(engine_timeouts=replace(EngineTimeouts(), **timeouts), **fields)


def load_chat_config(env: Mapping[str, str], **overrides: object) -> ChatConfig:
    """Resolve the terminal client's settings; arguments as for :func:`load_gateway_config`."""
    values = _read(env)
    fields = {v.chat_field: values[name] for name, v in _known(values) if v.chat_field}
    fields |= {name: value for name, value in overrides.items() if value is not None}
    return ChatConfig(**fields)


def read_api_key_file(path: Path) -> ApiKeys:
    """Read API keys from a file, one a line.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """
    try:
        return ApiKeys.from_text(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API key file {path}: {error}") from None


def _known(values: Mapping[str, object]) -> list[tuple[str, _Variable]]:
    return [(name, variable) for name, variable in VARIABLES.items() if name in values]


def _read(env: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for full_name, text in env.items():
        if not full_name.startswith(PREFIX):
            continue
        name = full_name.removeprefix(PREFIX)
        if (variable := VARIABLES.get(name)) is None:
            known = ", ".join(PREFIX + other for other in VARIABLES)
            raise ConfigError(
                f"unknown environment variable {full_name}; known are {known}. In Kubernetes set "
                "enableServiceLinks: false, else a service named sala-serve injects such names"
            )
        try:
            values[name] = variable.parse(text)
        except ConfigError as error:
            raise ConfigError(f"{full_name}: {error}") from None
        except ValueError:
            raise ConfigError(f"{full_name}: expected {variable.expected}, got {text!r}") from None
    return values
