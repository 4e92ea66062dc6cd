"""Log lines: their form, and what they must never hold."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys

import pytest
from pydantic import BaseModel

from sala_serve.errors import EngineLost
from sala_serve.telemetry import Metrics, Phase, RequestRecord, Usage, report
from sala_serve.telemetry.logs import JsonFormatter, TextFormatter, describe_exception

SECRET = "the-merger-closes-on-friday"


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture(params=[TextFormatter, JsonFormatter])
def logged(request):
    """Everything the process logs, at every level, in one of the forms."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(request.param())
    root, ours = logging.getLogger(), logging.getLogger("sala_serve")
    root.addHandler(handler)
    ours.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    ours.setLevel(logging.NOTSET)


def a_request():
    clock = Clock()
    record = RequestRecord("req-1", "/v1/completions", 0.0, clock=clock)
    record.tenant_id, record.key_id, record.tier = "acme", "k1", "gold"
    record.enter(Phase.QUEUE)
    clock.now_s = 1.5
    record.enter(Phase.PREFILL)
    clock.now_s = 4.0
    record.token()
    clock.now_s = 5.0
    record.status, record.usage = 200, Usage(1000, 64, 5)
    metrics = Metrics()
    metrics.request_started(record.endpoint)
    report(record, metrics)
    return metrics


@pytest.mark.parametrize("logged", [JsonFormatter], indirect=True)
def test_a_request_is_one_json_line_with_numbers_as_numbers(logged):
    a_request()
    (line,) = logged.getvalue().splitlines()
    fields = json.loads(line)
    assert fields.pop("time").endswith("+00:00")
    assert fields == {
        "level": "info",
        "logger": "sala_serve.request",
        "message": "request",
        "request_id": "req-1",
        "endpoint": "/v1/completions",
        "status": 200,
        "tenant": "acme",
        "key_id": "k1",
        "tier": "gold",
        "duration_s": 5.0,
        "queue_s": 1.5,
        "prefill_s": 2.5,
        "decode_s": 1.0,
        "ttft_s": 4.0,
        "prompt_tokens": 1000,
        "cached_tokens": 64,
        "completion_tokens": 5,
    }


@pytest.mark.parametrize("logged", [TextFormatter], indirect=True)
def test_a_request_is_one_line_for_people(logged):
    a_request()
    (line,) = logged.getvalue().splitlines()
    assert line.endswith(
        "INFO sala_serve.request req-1 /v1/completions 200 tenant=acme key_id=k1 tier=gold duration_s=5.0 "
        "queue_s=1.5 prefill_s=2.5 decode_s=1.0 ttft_s=4.0 prompt_tokens=1000 cached_tokens=64 "
        "completion_tokens=5"
    )


def test_a_request_without_an_answer_counts_as_given_up(logged):
    record = RequestRecord("req-2", "/v1/completions", 0.0, clock=Clock())
    metrics = Metrics()
    metrics.request_started(record.endpoint)
    report(record, metrics)
    assert record.status == 499
    assert "499" in logged.getvalue()


def test_probes_are_logged_at_debug_only(logged):
    record = RequestRecord("req-3", "/healthz", 0.0, clock=Clock(), status=200)
    metrics = Metrics()
    metrics.request_started(record.endpoint)
    logging.getLogger("sala_serve").setLevel(logging.INFO)
    report(record, metrics)
    assert logged.getvalue() == ""


def failures():
    """Exceptions whose messages quote what a client has sent."""

    class Body(BaseModel):
        number: int

    def decode():
        bytes.decode(SECRET.encode() + b"\xff", "utf-8")

    def validate():
        Body.model_validate({"number": SECRET})

    def chained():
        try:
            validate()
        except ValueError:
            raise EngineLost(SECRET) from RuntimeError(SECRET)

    def grouped():
        raise BaseExceptionGroup(SECRET, [ValueError(SECRET), KeyError(SECRET)])

    return [decode, validate, chained, grouped]


@pytest.mark.parametrize("fail", failures(), ids=lambda fail: fail.__name__)
def test_an_exception_is_logged_with_its_frames_and_without_its_message(logged, fail):
    try:
        fail()
    except BaseException:
        logging.getLogger("sala_serve").exception("it failed")
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    text = logged.getvalue()
    assert SECRET not in text
    assert text.count("test_logs.py") >= 2
    assert fail.__name__ in text


def test_codes_and_error_numbers_are_kept():
    try:
        try:
            raise ConnectionResetError(104, SECRET)
        except OSError as error:
            raise EngineLost(SECRET) from error
    except EngineLost as error:
        text = describe_exception(error)
    assert "ConnectionResetError ECONNRESET" in text
    assert text.endswith("sala_serve.errors.EngineLost engine_lost")
    assert text.index("ECONNRESET") < text.index("which led to:")


def test_an_exception_that_causes_itself_ends():
    first, second = ValueError(), KeyError()
    first.__context__, second.__context__ = second, first
    assert describe_exception(first).count("ValueError") == 1


async def test_asyncios_report_of_a_lost_exception_does_not_quote_it(logged):
    async def fail():
        raise ValueError(SECRET)

    task = asyncio.ensure_future(fail())
    await asyncio.wait({task})
    asyncio.get_running_loop().call_exception_handler(
        {
            "message": "Task exception was never retrieved",
            "exception": task.exception(),
            "task": task,
        }
    )
    task._log_traceback = False
    text = logged.getvalue()
    assert SECRET not in text
    assert "Task exception was never retrieved" in text
    assert "ValueError" in text


PROGRAM = """
import logging, sys
from sala_serve.telemetry import TelemetrySettings, configure_logging
configure_logging(TelemetrySettings(log_format=sys.argv[1], log_level="debug"))
logging.getLogger("httpcore.http11").debug("send_request_headers [(b'Authorization', b'%s')]", sys.argv[2])
logging.getLogger("sala_serve.engine").debug("ours")
raise ValueError(sys.argv[2])
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_at_debug_libraries_are_quiet_and_the_last_exception_is_not_quoted(form):
    command = [sys.executable, "-c", PROGRAM, form, SECRET]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 1
    assert SECRET not in process.stderr
    assert "ours" in process.stderr
    assert "send_request_headers" not in process.stderr
    assert "ValueError" in process.stderr
    if form == "json":
        lines = [json.loads(line) for line in process.stderr.splitlines()]
        assert [line["level"] for line in lines] == ["debug", "critical"]
