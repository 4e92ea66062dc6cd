"""The gateway's settings: frozen objects, and the one place that reads the environment.

Command line beats environment beats default. An unknown ``SALA_SERVE_*`` variable is an error, since a
misspelt setting that is silently ignored is found in production.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from _typeshed import DataclassInstance

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
    max_running_requests: int = 1024
    """Running or uploading at the same time; more are refused. Each may hold ``max_body_bytes``."""
    upload_timeout_s: float = 120.0
    """For the client's body to arrive."""
    send_timeout_s: float = 60.0
    """For a client to take the next piece of its answer; a slower one is cut off."""
    drain_timeout_s: float = 300.0
    """After SIGTERM, how long running requests may take to finish before they are cut."""
    probe_interval_s: float = 1.0
    """Between two looks at the engine's health."""
    stuck_after_s: float = 60.0
    """A connected engine whose health stays unanswered for this long counts as down."""
    engine_connect_timeout_s: float = 5.0
    """Until the engine accepts a connection."""
    engine_write_timeout_s: float = 60.0
    """For the engine to take the next piece of a request's body."""
    engine_read_timeout_s: float = 3600.0
    """Between two bytes of the answer. The engine is silent during a prefill, which lasts minutes for a
    million tokens, and an answer that is not streamed is silent until its last token."""


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


def parse_port(text: str) -> int:
    """Return ``text`` as a port, 0 for any, else raise ``ValueError``."""
    if not 0 <= (value := int(text)) <= 65535:
        raise ValueError
    return value


def parse_engine_url(text: str) -> str:
    """Return ``text`` if it can be an engine's base URL, else raise ``ValueError``."""
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.path.strip("/") == "v1":
        raise ValueError
    if url.username or url.query or url.fragment or url.port == 0:  # reading a bad port raises
        raise ValueError
    return text


@dataclass(frozen=True)
class _Variable:
    parse: Callable[[str], Any]
    expected: str


VARIABLES: Mapping[str, _Variable] = {
    "HOST": _Variable(str, "a host name or address"),
    "PORT": _Variable(parse_port, "a port number"),
    "API_KEYS": _Variable(ApiKeys.from_text, "keys separated by commas"),
    "MAX_BODY_BYTES": _Variable(_positive_int, "a positive integer"),
    "MAX_RUNNING_REQUESTS": _Variable(_positive_int, "a positive integer"),
    "DRAIN_TIMEOUT_S": _Variable(_positive_float, "seconds above 0"),
    "ENGINE_READ_TIMEOUT_S": _Variable(_positive_float, "seconds above 0"),
    "URL": _Variable(str, "the gateway's URL"),
    "API_KEY": _Variable(str, "one key"),
}
"""Every ``SALA_SERVE_*`` variable, named as its field; ``sala-serve chat`` reads the last two."""


def load_gateway_config(env: Mapping[str, str], **overrides: object) -> GatewayConfig:
    """Resolve the gateway's settings.

    Args:
        env: the process environment.
        overrides: fields of :class:`GatewayConfig` from the command line; ``None`` means not given.

    Raises:
        ConfigError: a ``SALA_SERVE_*`` variable is unknown or has no usable value.
    """
    return GatewayConfig(**_resolve(GatewayConfig, env, overrides))


def load_chat_config(env: Mapping[str, str], **overrides: object) -> ChatConfig:
    """Resolve the terminal client's settings; arguments as for :func:`load_gateway_config`."""
    return ChatConfig(**_resolve(ChatConfig, env, overrides))


def _resolve(
    config: type[DataclassInstance], env: Mapping[str, str], overrides: Mapping[str, object]
) -> dict[str, Any]:
    known = {each.name for each in fields(config)}
    values = {name: value for name, value in _read(env).items() if name in known}
    return values | {name: value for name, value in overrides.items() if value is not None}


def read_api_key_file(path: Path) -> ApiKeys:
    """Read API keys from a file, one a line.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """
    try:
        return ApiKeys.from_text(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API key file {path}: {error}") from None


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
            values[name.lower()] = variable.parse(text)
        except ConfigError as error:
            raise ConfigError(f"{full_name}: {error}") from None
        except ValueError:
            raise ConfigError(f"{full_name}: expected {variable.expected}, got {text!r}") from None
    return values
