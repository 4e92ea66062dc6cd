"""The OpenAPI document, and what schemathesis makes of it: whatever is sent, only documented answers come."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest

from sala_serve.api.openapi import error_classes
from sala_serve.app import build_app
from sala_serve.config import ApiKeys

KEY = "sk-of-the-fuzzer"
AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_schema_conformance", "unsupported_method", "allow_header_conformance"),
    "ignored_auth",
)


@pytest.fixture
async def document(stack):
    return (await stack.http.get("/openapi.json")).json()


async def test_every_path_is_documented(stack, document):
    routes = {route.path_format for route in build_app(stack.gateway).routes}
    assert set(document["paths"]) == routes - {"/openapi.json"}


async def test_every_error_is_documented_for_what_generates(document):
    responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    for error in error_classes():
        if error.status not in (405, 499):
            assert error.code in responses[str(error.status)]["description"], error


async def test_probes_need_no_key_and_the_rest_does(document):
    for path, item in document["paths"].items():
        for operation in item.values():
            assert ("security" in operation) == path.startswith("/v1/"), path


async def test_whatever_is_sent_the_answer_is_documented(start_stack, tmp_path):
    async with start_stack(api_keys=ApiKeys((KEY,))) as stack:
        document = (await stack.http.get("/openapi.json")).json()
        _name_the_model(document)
        path = tmp_path / "openapi.json"
        path.write_text(json.dumps(document))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run", str(path), "--url", stack.url),
            *("--header", f"Authorization: Bearer {KEY}", "--checks", ",".join(CHECKS)),
            *("--phases", "coverage,fuzzing", "--max-examples", "8"),
            *("--seed", "1", "--no-shrink", "--continue-on-failure", "--request-timeout", "10"),
            *("--generation-database", "none"),
            cwd=tmp_path,
            env={**os.environ, "NO_COLOR": "1"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(400):
            report, _ = await process.communicate()
        assert process.returncode == 0, report.decode()
        # the good ones among them came as far as the engine
        kinds = {
            ("prompt" in body, bool(body.get("stream"))) for body in stack.engine.journal.bodies
        }
        assert len(kinds) == 4
        # and nothing of them is left
        assert len(stack.gateway.running) == len(stack.gateway.answers) == 0
        assert stack.gateway.uploads.num_buffered_bytes == 0
        assert stack.gateway.scheduler.snapshot().num_queued == 0


def _name_the_model(document):
    """Let requests ask for the model that there is, else nearly all would end at that."""
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("required", ()) and "title" in schema["properties"]["model"]:
            schema["properties"]["model"] = {"const": "sala"}
