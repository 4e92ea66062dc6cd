"""The lines of a batch's files: reads the requests, finds what is wrong with them, writes the results."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from sala_serve.bodies import parse_object
from sala_serve.errors import InvalidRequest
from sala_serve.jobs.model import dump, new_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sala_serve.bodies import BodySettings
    from sala_serve.errors import GatewayError

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)
_MAX_PROBLEMS = 100
_MAX_ID_LENGTH = 512


@dataclass(frozen=True)
class BatchLine:
    """One request of a batch."""

    number: int
    """In the input file, from 1."""
    custom_id: str
    body: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class LineResult:
    """What came of a line."""

    line: bytes
    """For the output or the error file."""
    is_success: bool
    counts: Mapping[str, int]
    """What the batch counts: how it ended, tokens."""

    def packed(self) -> bytes:
        """Return it as bytes; see :func:`unpack`."""
        return (b"+" if self.is_success else b"-") + self.line


def unpack(packed: bytes) -> tuple[bool, bytes]:
    """Return whether a packed result is a success, and its line."""
    return packed[:1] == b"+", packed[1:]


class LineProblem(Exception):  # noqa: N818 - named for what it is
    """A line cannot be run; that fails the whole batch, as OpenAI's do."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    def entry(self, line_number: int | None) -> dict[str, Any]:
        """Return it as one of the batch's ``errors``."""
        return {
            "code": self.code,
            "line": line_number,
            "message": self.message,
            "param": self.param,
        }


class LineReader:
    """Reads the lines of one batch.

    Args:
        endpoint: of the batch, to which each line must go.
        bounds: on what is inside a line.
        max_line_bytes: of one.
    """

    def __init__(self, endpoint: str, bounds: BodySettings, *, max_line_bytes: int) -> None:
        self._endpoint = endpoint
        self._bounds = bounds
        self.max_line_bytes = max_line_bytes

    def read(self, number: int, raw: bytes) -> BatchLine:
        """Parse a line; raises LineProblem."""
        if len(raw) > self.max_line_bytes:
            message = f"This line is larger than {self.max_line_bytes} bytes."
            raise LineProblem("line_too_large", message)
        try:
            document = parse_object(raw, self._bounds)
        except InvalidRequest:
            message = "This line is not parseable as valid JSON."
            raise LineProblem("invalid_json_line", message) from None
        for name in ("custom_id", "method", "url", "body"):
            if document.get(name) is None:
                message = f"Missing required parameter: '{name}'."
                raise LineProblem("missing_required_parameter", message, name)
        custom_id, body = document["custom_id"], document["body"]
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID_LENGTH:
            message = f"The custom_id must be a string of 1 to {_MAX_ID_LENGTH} characters."
            raise LineProblem("invalid_custom_id", message, "custom_id")
        if document["method"] != "POST":
            raise LineProblem("invalid_method", "The method must be 'POST'.", "method")
        if document["url"] != self._endpoint:
            message = "The URL provided for this request does not match the batch endpoint."
            raise LineProblem("mismatched_url", message, "url")
        if not isinstance(body, dict):
            raise LineProblem("invalid_type", "The body must be a JSON object.", "body")
        return BatchLine(number, custom_id, body)


class InputCheck:
    """Looks at every line of a batch before any is run.

    Args:
        reader: of its lines.
        max_lines: of one batch.
    """

    def __init__(self, reader: LineReader, *, max_lines: int) -> None:
        self._reader = reader
        self._max_lines = max_lines
        self._custom_ids: dict[str, int] = {}
        self.problems: list[dict[str, Any]] = []
        self.num_lines = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether so much is wrong that the rest need not be looked at."""
        return len(self.problems) >= _MAX_PROBLEMS or self.num_lines > self._max_lines

    def take(self, lines: Iterable[tuple[int, bytes]]) -> None:
        """Check some lines; megabytes take tens of milliseconds: call it in a thread."""
        for number, raw in lines:
            self.num_lines += 1
            try:
                line = self._reader.read(number, raw)
                first = self._custom_ids.setdefault(line.custom_id, number)
                if first != number:
                    message = (
                        f"The custom_id is a duplicate of that of the request in line {first}."
                    )
                    raise LineProblem("duplicate_custom_id", message, "custom_id")
            except LineProblem as problem:
                self.problems.append(problem.entry(number))
            if self.is_hopeless:
                return

    def finish(self) -> list[dict[str, Any]]:
        """Return all problems."""
        if self.num_lines > self._max_lines:
            message = f"The input file has more than {self._max_lines} requests."
            self.problems.append(LineProblem("too_many_requests_in_file", message).entry(None))
        elif self.num_lines == 0:
            problem = LineProblem("empty_file", "The input file has no requests.")
            self.problems.append(problem.entry(None))
        return self.problems


def success(line: BatchLine, request_id: str, body: Mapping[str, Any]) -> LineResult:
    """Return the result of a line that was answered."""
    return LineResult(
        _line(line.custom_id, _response(200, request_id, body), None),
        is_success=True,
        counts={"completed": 1, **_token_counts(body.get("usage") or {})},
    )


def refusal(line: BatchLine, request_id: str, error: GatewayError) -> LineResult:
    """Return the result of a line that was answered with an error."""
    response = _response(error.status, request_id, error.body())
    return LineResult(_line(line.custom_id, response, None), is_success=False, counts={"failed": 1})


def expiry(raw: bytes) -> LineResult:
    """Return the result of a line that was not run in time."""
    error = {
        "code": "batch_expired",
        "message": "This request could not be executed before the completion window expired.",
    }
    custom_id = json.loads(raw)["custom_id"]
    line = _line(custom_id, None, error)
    return LineResult(line, is_success=False, counts={"failed": 1, "expired": 1})


def _line(
    custom_id: str, response: Mapping[str, Any] | None, error: Mapping[str, Any] | None
) -> bytes:
    fields = {"id": new_id("batch_req_"), "custom_id": custom_id}
    return dump({**fields, "response": response, "error": error}) + b"\n"


def _response(status: int, request_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": request_id, "body": body}


def _token_counts(usage: Mapping[str, Any]) -> dict[str, int]:
    """Return what an answer took: those of chats and of responses name it differently."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return {
        "input_tokens": usage.get("prompt_tokens") or usage.get("input_tokens") or 0,
        "output_tokens": usage.get("completion_tokens") or usage.get("output_tokens") or 0,
        "cached_tokens": details.get("cached_tokens") or 0,
    }
