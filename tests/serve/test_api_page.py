"""docs/api.md agrees with the code."""

import re
from pathlib import Path

import openai
import pytest

from sala_serve import errors
from sala_serve.bodies import FORBIDDEN_FIELDS
from sala_serve.config import COMMAND_VARIABLES, FLAT, PREFIX, ChatConfig, setting_fields
from sala_serve.errors import GatewayError
from sala_serve.telemetry import METRICS

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
ERRORS = {
    error.code: error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, GatewayError) and not error.__subclasses__()
}


def table(heading):
    """The rows of the first table under a heading, without its head; code marks removed."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_errors_are_those_of_the_code():
    rows = table("Errors")
    assert [(row[0], row[1]) for row in rows] == [
        (str(error.status), code) for code, error in ERRORS.items()
    ]


@pytest.mark.parametrize("row", table("Errors"), ids=lambda row: row[1])
def test_openais_client_raises_the_class_named(row):
    import httpx

    if row[4] == "none":
        return
    error = ERRORS[row[1]]("why")
    request = httpx.Request("POST", "http://gateway/v1/chat/completions")
    response = httpx.Response(error.status, request=request, json=error.body())
    raised = openai.OpenAI(api_key="x")._make_status_error_from_response(response)
    assert type(raised).__name__ == row[4].partition(";")[0]
    assert raised.code == error.code


@pytest.mark.parametrize(
    ("header", "codes"),
    [
        (
            "Retry-After",
            {"engine_unavailable", "overloaded", "queue_full", "rate_limit_exceeded"}
            | {"shutting_down", "state_unavailable"},
        ),
        (
            "X-Should-Retry",
            {"engine_timeout", "first_token_timeout", "insufficient_quota", "total_timeout"},
        ),
        ("WWW-Authenticate", {"invalid_api_key"}),
    ],
)
def test_headers_come_with_the_errors_named(header, codes):
    assert {code for code, error in ERRORS.items() if header in error.headers} == codes
    (line,) = [
        line
        for line in PAGE.partition("## Errors")[0].splitlines()
        if line.startswith("|") and header in line
    ]
    assert all(code in line for code in codes)


def test_metrics_are_those_of_the_code():
    rows = [
        (name, kind, tuple(re.findall(r"\w+", labels)), meaning.lower())
        for name, kind, labels, meaning in table("Metrics")
    ]
    assert rows == [
        (spec.full_name, spec.kind, spec.labels, spec.help.rstrip(".").lower()) for spec in METRICS
    ]


def test_settings_and_defaults_are_those_of_the_code():
    rows = {row[0].removeprefix(PREFIX): row[1] for row in table("Settings")}
    assert set(rows) == {*FLAT, *COMMAND_VARIABLES}
    settings = {path: definition.default for path, definition in setting_fields()}
    for name, shown in rows.items():
        default = settings[FLAT[name]] if name in FLAT else getattr(ChatConfig(), name.lower(), "")
        assert shown == (str(default) if default else "")


def test_refused_fields_are_those_of_the_code():
    section = PAGE.partition("Refused with `field_not_allowed`:")[2].partition("\n\n")[0]
    assert re.findall(r"`(\w+)`", section) == list(FORBIDDEN_FIELDS)


@pytest.mark.parametrize(
    ("bound", "text"), [("MAX_HEAD_BYTES", "256 KiB"), ("HEAD_TIMEOUT_S", "60 s")]
)
def test_bounds_are_those_of_the_code(bound, text):
    from sala_serve import serving

    value = getattr(serving, bound)
    assert text == (f"{value // 1024} KiB" if bound.endswith("BYTES") else f"{value:.0f} s")
    assert text in PAGE
