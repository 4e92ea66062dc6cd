"""Log lines for people or as JSON, on standard error, which never quote a request.

What may leave this process is decided here, not at each call: exceptions are logged as their types and
frames without their messages, because a ``ValidationError`` or a ``UnicodeDecodeError`` quotes what it met,
which is a prompt. Libraries speak from warnings on, whatever the level: below it, HTTP clients print headers.
"""

from __future__ import annotations

import errno
import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING

from sala_serve.errors import GatewayError

if TYPE_CHECKING:
    from sala_serve.telemetry.settings import TelemetrySettings

OURS = "sala_serve"
_ASYNCIO = "asyncio"
_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def configure_logging(settings: TelemetrySettings) -> None:
    """Send every log line of the process to standard error, in the form asked for."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger(OURS).setLevel(settings.log_level.upper())
    sys.excepthook = _log_uncaught


class TextFormatter(logging.Formatter):
    """One line an event, for people; an exception's frames follow it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the frames if the record has an exception."""
        return super().format(_harmless(record))

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802 - the name logging calls
        """Return types and frames of an exception and its causes, without their messages."""
        return describe_exception(ei[1])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        record = _harmless(record)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if fields := getattr(record, "fields", None):
            line |= {"message": "request", **fields}
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = describe_exception(record.exc_info[1])
        return json.dumps(line)


def describe_exception(error: BaseException | None) -> str:
    """Return types, codes and frames of ``error``, its causes and the members of groups; no message."""
    lines: list[str] = []
    seen: set[int] = set()
    _describe(error, lines, seen, indent="")
    return "\n".join(lines)


def _describe(error: BaseException | None, lines: list[str], seen: set[int], indent: str) -> None:
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        _describe(cause, lines, seen, indent)
        lines.append(f"{indent}which led to:")
    for frame in traceback.extract_tb(error.__traceback__):
        lines.append(f"{indent}  {frame.filename}:{frame.lineno} in {frame.name}")
    kind = type(error)
    code = getattr(error, "code", None) if isinstance(error, GatewayError) else None
    if isinstance(error, OSError) and error.errno is not None:
        code = errno.errorcode.get(error.errno)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    lines.append(f"{indent}{name} {code}" if code else f"{indent}{name}")
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            _describe(each, lines, seen, f"{indent}  | ")


def _harmless(record: logging.LogRecord) -> logging.LogRecord:
    """Return ``record`` without what another library, or another formatter, may have quoted."""
    if record.name != _ASYNCIO and not record.exc_info:
        return record
    record = logging.makeLogRecord(record.__dict__)
    record.exc_text = None  # formatters keep their text of the exception here
    if record.name == _ASYNCIO:
        # the second line shows the task, and in it the exception with its message
        record.msg, record.args = record.getMessage().partition("\n")[0], ()
    return record


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger(OURS).critical("the process ends", exc_info=(kind, error, trace))
