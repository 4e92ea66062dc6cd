"""The gateway's settings: one frozen tree, and the one place that reads the file and the environment.

Command line beats environment beats file beats default. An unknown name is an error which says what the
nearest known one is, since a misspelt setting that is silently ignored is found in production.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from sala_serve.bodies import BodySettings
from sala_serve.engine.settings import EngineSettings
from sala_serve.jobs.settings import JobsSettings
from sala_serve.scheduling.settings import SchedulingSettings
from sala_serve.settings import PositiveInt, Seconds, Section
from sala_serve.state import StateSettings
from sala_serve.telemetry.settings import TelemetrySettings
from sala_serve.tenants.settings import AdminSettings, LimitsSettings, TenantsSettings
from sala_serve.tokens.settings import TokenSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pydantic.fields import FieldInfo

PREFIX = "SALA_SERVE_"
DELIMITER = "__"


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


def _read_keys(value: object) -> object:
    if isinstance(value, list) and all(isinstance(key, str) for key in value):
        value = "\n".join(value)
    return ApiKeys.from_text(value) if isinstance(value, str) else value


class ServerSettings(Section):
    """The listening side: addresses, bounds on what clients send and take."""

    host: str = "127.0.0.1"
    """Address to listen on (`--host`)."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port (`--port`); 0: any."""
    api_keys: Annotated[
        InstanceOf[ApiKeys], BeforeValidator(_read_keys), PlainSerializer(repr), NoDecode
    ] = ApiKeys()
    """Keys of the tenant `default` (`--api-key-file`); without these and without tenants everybody may ask."""
    max_body_bytes: PositiveInt = 32 * 1024 * 1024
    """A million tokens are 5 MB of text, 12 MB when the client escapes Chinese."""
    max_buffered_bytes: PositiveInt = 1024 * 1024 * 1024
    """All bodies that this replica holds, uploading, waiting and running; a body counts until its answer ends."""
    max_running_requests: PositiveInt = 1024
    """Running or uploading at the same time; more are refused."""
    max_uploads_per_key: PositiveInt = 64
    """Bodies that one key may be sending at the same time."""
    upload_timeout_s: Seconds = 120.0
    """For the client's body to arrive."""
    min_upload_bytes_per_s: PositiveInt = 1024
    """A body that comes slower than this, measured after its first 10 s, is given up."""
    send_timeout_s: Seconds = 60.0
    """For a client to take the next piece of its answer; a slower one is cut off."""
    hold_status_s: Annotated[float, Field(ge=0, le=30)] = 1.0
    """How long the status of a stream is held back, so that an early error keeps its own."""
    progress_interval_s: Seconds = 1.0
    """Between two notes about place and progress on a stream that has no token yet."""
    retry_grace_s: Annotated[float, Field(ge=0)] = 15.0
    """How long a whole answer is computed on for a client that left and will ask again: it gave an
    `Idempotency-Key`, or it left when its own timeout was over."""
    drain_timeout_s: Seconds = 300.0
    """After SIGTERM, how long running requests may take to finish before they are cut."""


class DeadlineSettings(Section):
    """How long the phases of one request may take. A client may shorten them with `X-Request-Timeout-S`."""

    queue_s: Seconds = 3600.0
    """From the body's arrival to the start on an engine."""
    first_token_s: Seconds = 7200.0
    """From the start on an engine to the first token; a million tokens take minutes."""
    between_tokens_s: Seconds = 600.0
    """Between two tokens of a stream, once the first has come."""
    total_s: Seconds = 14400.0
    """From the body's arrival to the end of the answer."""


class Settings(BaseSettings):
    """Everything that the gateway needs to know at start."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, env_nested_delimiter=DELIMITER
    )

    server: ServerSettings = ServerSettings()
    deadlines: DeadlineSettings = DeadlineSettings()
    bodies: BodySettings = BodySettings()
    state: StateSettings = StateSettings()
    tenants: TenantsSettings = TenantsSettings()
    limits: LimitsSettings = LimitsSettings()
    admin: AdminSettings = AdminSettings()
    tokens: TokenSettings = TokenSettings()
    scheduling: SchedulingSettings = SchedulingSettings()
    jobs: JobsSettings = JobsSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    engines: Annotated[tuple[EngineSettings, ...], Field(min_length=1)] = (EngineSettings(),)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read nothing unasked: :func:`load_settings` is given what to read."""
        return (init_settings,)

    def masked(self) -> str:
        """Return what differs from the defaults, as JSON without any secret, for the log."""
        defaults = Settings().model_dump(mode="json")
        changed = {
            section: value
            for section, values in self.model_dump(mode="json").items()
            if (value := _difference(values, defaults[section])) not in ({}, None)
        }
        return _URL_PASSWORD.sub(r"\1***@", json.dumps(changed, ensure_ascii=False))


_URL_PASSWORD = re.compile(r"(\w://)[^/@\s\"]*@")


def _difference(value: Any, default: Any) -> Any:
    if isinstance(value, dict) and isinstance(default, dict):
        return {name: each for name, each in value.items() if each != default.get(name)}
    return None if value == default else value


@dataclass(frozen=True)
class ChatConfig:
    """Where the terminal client finds its server."""

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = field(default=None, repr=False)


FLAT: Mapping[str, tuple[str, str]] = {
    "HOST": ("server", "host"),
    "PORT": ("server", "port"),
    "API_KEYS": ("server", "api_keys"),
    "MAX_BODY_BYTES": ("server", "max_body_bytes"),
    "MAX_RUNNING_REQUESTS": ("server", "max_running_requests"),
    "DRAIN_TIMEOUT_S": ("server", "drain_timeout_s"),
    "ENGINE_READ_TIMEOUT_S": ("engines", "read_timeout_s"),
}
"""Variables with a short name of their own, and the setting that each one sets; that of ``engines`` holds for
every engine that does not set its own."""
COMMAND_VARIABLES = ("CONFIG", "URL", "API_KEY")
"""Read by the commands: the file of settings, and the server and key of ``sala-serve chat``."""


def load_settings(
    env: Mapping[str, str],
    *,
    file: Path | None = None,
    overrides: Mapping[str, Mapping[str, Any] | list[Any]] | None = None,
) -> Settings:
    """Read the gateway's settings.

    Args:
        env: the process environment.
        file: a TOML file; else the one that ``SALA_SERVE_CONFIG`` names, if any.
        overrides: sections from the command line; a field that is ``None`` was not given.

    Raises:
        ConfigError: the file cannot be read, or a name is unknown or has no usable value.
    """
    _check_names(env)
    path = file or (Path(name) if (name := env.get(f"{PREFIX}CONFIG")) else None)
    values = {} if path is None else _read_file(path)
    in_env = _read_environment(env)
    values = _merged(_merged(values, in_env), _without_none(overrides or {}))
    if (text := env.get(f"{PREFIX}ENGINE_READ_TIMEOUT_S")) is not None:
        engines = values.get("engines") or [{}]
        values["engines"] = [{"read_timeout_s": text, **engine} for engine in engines]
    try:
        return Settings(**values)
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False, include_input=False, include_context=False)
        raise ConfigError(_explain(first["loc"], first["type"], first["msg"], env, path)) from None


def load_chat_config(env: Mapping[str, str], **overrides: str | None) -> ChatConfig:
    """Read the terminal client's settings; an override that is ``None`` was not given.

    Raises:
        ConfigError: a ``SALA_SERVE_*`` variable is unknown.
    """
    _check_names(env)
    values = {name: env.get(PREFIX + name.upper()) for name in ("url", "api_key")} | {
        name: value for name, value in overrides.items() if value is not None
    }
    return ChatConfig(**{name: value for name, value in values.items() if value is not None})


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


def read_api_key_file(path: Path) -> ApiKeys:
    """Read API keys from a file, one a line.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """
    try:
        return ApiKeys.from_text(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API key file {path}: {error}") from None


def setting_fields() -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Yield the path and the definition of every setting, in order; those of a list are its items'."""
    for name, section in Settings.model_fields.items():
        kind = section.annotation
        items: Any = getattr(kind, "__args__", (kind,))[0]
        for each, definition in items.model_fields.items():
            yield (name, each), definition


def variable_of(path: tuple[str, ...]) -> str:
    """Return the environment variable that sets ``path``; a short one where there is one."""
    for name, flat in FLAT.items():
        if flat == path:
            return PREFIX + name
    return PREFIX + DELIMITER.join(path).upper()


class _Environment(EnvSettingsSource):
    """Reads a mapping instead of the process's environment."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._given = {name.lower(): text for name, text in env.items()}
        super().__init__(Settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._given


def _read_environment(env: Mapping[str, str]) -> dict[str, Any]:
    """Return the values that the environment sets, by section."""
    named = {name: text for name, text in env.items() if name.startswith(PREFIX)}
    for name, path in FLAT.items():
        if (text := named.pop(PREFIX + name, None)) is None or path[0] == "engines":
            continue
        full_name = PREFIX + DELIMITER.join(path).upper()
        if full_name in named:
            raise ConfigError(f"{PREFIX}{name} and {full_name} are one setting: set one of them")
        named[full_name] = text
    try:
        return _Environment(named)()
    except SettingsError:
        # its message does not say which of them
        names = ", ".join(sorted(named))
        raise ConfigError(f"{names}: expected JSON for a list, a table or a section") from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the settings in {path}: {error}") from None


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``below`` with the values of ``above``, section by section; a list replaces a list."""
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        is_nested = isinstance(under, dict) and isinstance(value, dict)
        merged[name] = _merged(under or {}, value) if is_nested else value
    return merged


def _without_none(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in sections.items()
        if value is not None
    }


def _check_names(env: Mapping[str, str]) -> None:
    """Refuse variables that set nothing."""
    settings = {PREFIX + DELIMITER.join(path).upper() for path, _ in setting_fields()}
    sections = {PREFIX + name.upper() for name in Settings.model_fields}
    known = {PREFIX + name for name in (*FLAT, *COMMAND_VARIABLES)} | settings | sections
    for name in env:
        if not name.startswith(PREFIX) or name in known:
            continue
        if any(name.startswith(each + DELIMITER) for each in settings):  # an entry of a table
            continue
        raise ConfigError(
            f"unknown environment variable {name}{_nearest(name, known)}. In Kubernetes set "
            "enableServiceLinks: false, else a service named sala-serve injects such names"
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0)
    return f"; the nearest setting is {found[0]}" if found else ""


def _explain(
    loc: tuple[int | str, ...], kind: str, message: str, env: Mapping[str, str], file: Path | None
) -> str:
    """Say in one line what is wrong with the setting at ``loc``, and where it was set."""
    name = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        known = [".".join(path) for path, _ in setting_fields()] + list(Settings.model_fields)
        where = f" in {file}" if file else ""
        plain = ".".join(str(part) for part in loc if not isinstance(part, int))
        return f"unknown setting {name}{where}{_nearest(plain, known)}"
    path = tuple(str(part) for part in loc if not isinstance(part, int))
    variables = {variable_of(path), PREFIX + DELIMITER.join(path).upper()}
    names = sorted(variables & env.keys()) or [name]
    return f"{names[0]}: {message[:1].lower()}{message[1:].removeprefix('alue error, ')}"


def settings_page() -> str:
    """Return ``docs/settings.md``: every setting with its default, as the code has it."""
    lines = [_PAGE_HEAD]
    section = ""
    for (name, each), definition in setting_fields():
        if name != section:
            section = name
            header = f"[[{name}]]" if name == "engines" else f"[{name}]"
            lines += [
                "",
                f"## `{header}`",
                "",
                "| field | default | meaning |",
                "| --- | --- | --- |",
            ]
        default = definition.get_default(call_default_factory=True, validated_data={})
        meaning = " ".join((definition.description or "").replace("``", "`").split())
        lines.append(f"| `{each}` | {_shown(default)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _shown(default: Any) -> str:
    if default is None or default == ApiKeys() or default in ((), {}, ""):
        return ""
    return f"`{json.dumps(default, default=_plain)}`"


def _plain(value: Any) -> Any:
    return (
        value.model_dump(mode="json", exclude_none=True)
        if isinstance(value, Section)
        else str(value)
    )


_PAGE_HEAD = """\
# Settings

Command line beats environment beats file beats default. The file is TOML, named by `--config` or `SALA_SERVE_CONFIG`; the
variable of a field is `SALA_SERVE_<SECTION>__<FIELD>`, a list or table is JSON there. Some have a short name too, which
[api.md](api.md) lists. A name that is not here is an error. `python -m sala_serve.config` writes this page."""


if __name__ == "__main__":
    print(settings_page(), end="")  # noqa: T201
