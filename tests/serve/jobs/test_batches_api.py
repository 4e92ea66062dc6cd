"""``/v1/files`` and ``/v1/batches`` over the wire, with OpenAI's client, on both stores."""

import asyncio
import io
import json

import openai
import pytest
from openai.types import Batch, FileObject

from sala_serve.jobs.files import PIECE_BYTES

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Go"}]


def line(custom_id, url=CHAT, **body):
    given = {"model": "sala", **body}
    if url == CHAT:
        given = {"messages": MESSAGES, **given}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": given}


async def upload(client, lines, name="input.jsonl"):
    text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    return await client.files.create(file=(name, text.encode()), purpose="batch")


async def create(client, lines, endpoint=CHAT, **more):
    file = await upload(client, lines)
    batch = await client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more
    )
    Batch.model_validate_json(batch.model_dump_json())
    return batch


async def until(client, batch_id, condition):
    async with asyncio.timeout(20):
        while not condition(  # noqa: ASYNC110 - it happens on the other side of the wire
            batch := await client.batches.retrieve(batch_id)
        ):
            await asyncio.sleep(0.02)
    return batch


async def ended(client, batch_id):
    final = ("completed", "failed", "expired", "cancelled")
    batch = await until(client, batch_id, lambda each: each.status in final)
    Batch.model_validate_json(batch.model_dump_json())
    return batch


async def results(client, file_id):
    content = await client.files.content(file_id)
    return [json.loads(each) for each in content.text.splitlines()]


async def test_files_are_stored_listed_read_and_deleted(start, client_of):
    async with start() as stack:
        client = stack.client
        content = bytes(range(256)) * (PIECE_BYTES // 256 * 2) + b"end"
        file = await client.files.create(
            file=("big.bin", io.BytesIO(content)),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 7200},
        )
        FileObject.model_validate_json(file.model_dump_json())
        assert (file.bytes, file.filename, file.purpose) == (len(content), "big.bin", "batch")
        assert file.expires_at == file.created_at + 7200
        assert await client.files.retrieve(file.id) == file
        answer = await client.files.content(file.id)
        assert answer.content == content
        assert answer.response.headers["content-type"] == "application/octet-stream"
        second = await upload(client, ["{}"])
        assert second.expires_at == second.created_at + 30 * 86400
        assert [each.id async for each in client.files.list()] == [second.id, file.id]
        first_page = await client.files.list(limit=1, order="asc")
        assert (first_page.data, first_page.has_more) == ([file], True)
        assert (await client.files.list(after=file.id, order="asc")).data == [second]
        assert (await client.files.list(purpose="batch_output")).data == []
        async with client_of(stack, "bob") as bob:
            assert (await bob.files.list()).data == []
            for forbidden in (
                bob.files.retrieve(file.id),
                bob.files.content(file.id),
                bob.files.delete(file.id),
                bob.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h"),
            ):
                with pytest.raises(openai.NotFoundError) as caught:
                    await forbidden
                assert caught.value.code == "not_found"
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.content(file.id)
        assert (await client.files.list()).data == [second]
        keys = [key async for key in stack.gateway.state.redis.scan_iter(f"*{file.id}*")]
        assert keys == []


async def test_what_is_no_good_upload_is_refused_and_leaves_nothing(start):
    bounds = {"max_file_bytes": 3 * PIECE_BYTES, "file_bytes_per_tenant": 4 * PIECE_BYTES}
    async with start(**bounds) as stack:
        post = stack.http.post
        good = {"file": ("a", b"x")}
        for refused, status, param in (
            (post("/v1/files", files=good, data={"purpose": "vision"}), 400, "purpose"),
            (post("/v1/files", files=good), 400, "purpose"),
            (post("/v1/files", files={"file": ("a", b"")}, data={"purpose": "batch"}), 400, "file"),
            (post("/v1/files", files={"other": ("a", b"x")}), 400, "file"),
            (post("/v1/files", json={"purpose": "batch"}), 400, None),
            (post("/v1/files", files={"x": (None, b"y" * 2000)}), 400, "x"),
        ):
            answer = await refused
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
        half = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nabc'
        answer = await post(
            "/v1/files",
            content=half,
            headers={"content-type": "multipart/form-data; boundary=b"},
        )
        assert answer.json()["error"]["code"] == "invalid_request"
        form = {"purpose": "batch", "expires_after[anchor]": "created_at"}
        answer = await post("/v1/files", files=good, data=form)
        assert answer.json()["error"]["param"] == "expires_after.seconds"

        async def pieces(num_bytes):
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
            for _ in range(num_bytes // 65536):
                yield b"z" * 65536

        # neither stated nor to be guessed from its beginning
        answer = await post(
            "/v1/files",
            content=pieces(4 * PIECE_BYTES),
            headers={"content-type": "multipart/form-data; boundary=b"},
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        await upload(stack.client, ["z" * (3 * PIECE_BYTES)])
        with pytest.raises(openai.RateLimitError) as caught:
            await upload(stack.client, ["z" * (2 * PIECE_BYTES)])
        assert caught.value.code == "insufficient_quota"
        (kept,) = (await stack.client.files.list()).data
        redis = stack.gateway.state.redis
        names = {f"sala:file:{kept.id}".encode(), f"sala:file:{kept.id}:pieces".encode()}
        assert {key async for key in redis.scan_iter("sala:file:*")} == names
        await stack.client.files.delete(kept.id)
        assert int(await redis.get("sala:shelf:file:default:total")) == 0


async def test_a_batch_runs_each_line_and_sorts_its_results(start):
    async with start(max_attempts=2) as stack:
        lines = [line(f"r{index}", max_tokens=index % 3 + 1) for index in range(20)]
        lines.insert(3, line("bad", messages="none"))
        lines.insert(9, line("other-model", model="nobody"))
        lines.insert(12, "")  # empty lines are nothing
        batch = await create(stack.client, lines, metadata={"a": "b"})
        assert batch.status in ("validating", "in_progress")
        assert batch.expires_at == batch.created_at + 86400
        batch = await ended(stack.client, batch.id)
        assert batch.status == "completed"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (22, 20, 2)
        stamps = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
        assert sorted(stamps) == list(stamps)
        assert (batch.metadata, batch.errors, batch.cancelled_at) == ({"a": "b"}, None, None)
        assert batch.usage.input_tokens == 7 * 20
        assert batch.usage.total_tokens == 7 * 20 + sum(index % 3 + 1 for index in range(20))
        good = await results(stack.client, batch.output_file_id)
        assert [each["custom_id"] for each in good] == [f"r{index}" for index in range(20)]
        for index, each in enumerate(good):
            assert set(each) == {"id", "custom_id", "response", "error"}
            assert (each["error"], each["response"]["status_code"]) == (None, 200)
            answer = each["response"]["body"]["choices"][0]["message"]["content"]
            assert len(answer.split()) == index % 3 + 1
        assert len({each["id"] for each in good}) == 20
        bad = await results(stack.client, batch.error_file_id)
        assert [
            (each["custom_id"], each["response"]["status_code"], each["error"]) for each in bad
        ] == [("bad", 400, None), ("other-model", 404, None)]
        assert bad[0]["response"]["body"]["error"]["param"] == "messages"
        output = await stack.client.files.retrieve(batch.output_file_id)
        assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
        assert [each.id async for each in stack.client.batches.list()] == [batch.id]
        with pytest.raises(openai.ConflictError):
            await stack.client.batches.cancel(batch.id)
        # what is in the files is not kept twice
        keys = [key async for key in stack.gateway.state.redis.scan_iter(f"*{batch.id}*")]
        assert keys == [f"sala:job:{batch.id}".encode()]


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [("/v1/completions", {"prompt": "Go"}), ("/v1/responses", {"input": "Go"})],
)
async def test_other_endpoints_have_batches_too(start, endpoint, body):
    async with start() as stack:
        lines = [line("a", endpoint, **body), line("b", endpoint, **body, stream=True)]
        batch = await ended(stack.client, (await create(stack.client, lines, endpoint)).id)
        (good,) = await results(stack.client, batch.output_file_id)
        answer = good["response"]["body"]
        kind = {"/v1/completions": "text_completion", "/v1/responses": "response"}[endpoint]
        assert (good["custom_id"], answer["object"]) == ("a", kind)
        assert batch.usage.output_tokens == 3
        (bad,) = await results(stack.client, batch.error_file_id)
        assert bad["response"]["body"]["error"]["param"] == "stream"


async def test_a_file_with_broken_lines_fails_with_their_numbers(start):
    async with start(max_batch_requests=20) as stack:
        no_body = {"custom_id": "x", "method": "POST", "url": CHAT}
        lines = [
            line("fine"),
            "{not json",
            no_body,
            line("fine"),
            line("elsewhere", "/v1/completions"),
            "[1]",
            {**line("get"), "method": "GET"},
        ]
        batch = await ended(stack.client, (await create(stack.client, lines)).id)
        assert (batch.status, batch.output_file_id) == ("failed", None)
        assert [(each.line, each.code, each.param) for each in batch.errors.data] == [
            (2, "invalid_json_line", None),
            (3, "missing_required_parameter", "body"),
            (4, "duplicate_custom_id", "custom_id"),
            (5, "mismatched_url", "url"),
            (6, "invalid_json_line", None),
            (7, "invalid_method", "method"),
        ]
        assert batch.failed_at >= batch.created_at
        for lines, code in (
            (["\n \n"], "empty_file"),
            ([line(str(index)) for index in range(21)], "too_many_requests_in_file"),
        ):
            batch = await ended(stack.client, (await create(stack.client, lines)).id)
            assert [each.code for each in batch.errors.data] == [code]
        assert stack.engine.journal.bodies == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
        ({"surprise": 1}, "surprise"),
    ],
)
async def test_a_batch_that_makes_no_sense_is_refused(stack, change, param):
    body = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h"}
    answer = await stack.http.post("/v1/batches", json=body | change)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


async def test_a_cancelled_batch_keeps_what_is_done(start, eventually, client_of):
    async with start(batch_concurrency=2) as stack:
        batch = await create(stack.client, [line("quick")])
        quick = await ended(stack.client, batch.id)
        stack.engine.behaviour.ttft_s = 60
        batch = await create(stack.client, [line(f"r{index}") for index in range(5)])
        await eventually(lambda: stack.engine.journal.num_running == 2)
        async with client_of(stack, "bob") as bob:
            for forbidden in (bob.batches.retrieve(batch.id), bob.batches.cancel(batch.id)):
                with pytest.raises(openai.NotFoundError):
                    await forbidden
            assert (await bob.batches.list()).data == []
        asked = await stack.client.batches.cancel(batch.id)
        assert asked.status == "cancelling"
        assert asked.cancelling_at
        batch = await ended(stack.client, batch.id)
        assert (batch.status, batch.output_file_id) == ("cancelled", None)
        assert batch.cancelled_at >= batch.cancelling_at
        await eventually(lambda: stack.engine.journal.num_running == 0)
        page = await stack.client.batches.list(limit=1)
        assert (page.data, page.has_more) == ([batch], True)
        assert (await stack.client.batches.list(after=batch.id)).data == [quick]


async def test_a_key_that_does_not_reach_the_lines_endpoint_has_no_batches_of_it(start, client_of):
    reaches = frozenset({"/v1/files", "/v1/batches", "/v1/completions"})
    async with start() as stack, client_of(stack, "carol", endpoints=reaches) as carol:
        with pytest.raises(openai.PermissionDeniedError):
            await create(carol, [line("a")])
        lines = [line("a", "/v1/completions", prompt="Go")]
        batch = await create(carol, lines, "/v1/completions")
        assert (await ended(carol, batch.id)).request_counts.completed == 1


async def test_lines_of_a_key_that_was_revoked_meanwhile_are_refused(start, client_of, eventually):
    async with start(batch_concurrency=1, key_cache_s=0) as stack, client_of(stack, "erin") as erin:
        store = stack.gateway.keys.store
        stack.engine.behaviour.itl_s = 0.2
        batch = await create(erin, [line("a"), line("b")])
        await eventually(lambda: stack.engine.journal.num_running == 1)
        (key,) = await store.keys("erin")
        _, token = await store.create_key("erin", name="two", scopes=key.scopes)
        await store.revoke_key(key.key_id)
        other = erin.with_options(api_key=token)
        batch = await ended(other, batch.id)
        (good,) = await results(other, batch.output_file_id)
        (bad,) = await results(other, batch.error_file_id)
        assert (good["custom_id"], bad["custom_id"]) == ("a", "b")
        assert bad["response"]["status_code"] == 403


async def test_a_lost_engine_and_a_limit_cost_a_line_time_and_nothing_else(start):
    limits = {"requests_per_min": 2400}
    async with start(default_limits=limits, max_attempts=3) as stack:
        stack.engine.behaviour.error = (500, {"message": "no", "code": 500})
        batch = await create(stack.client, [line("a"), line("b")])
        await until(stack.client, batch.id, lambda _: stack.engine.journal.bodies)
        batch = await ended(stack.client, batch.id)
        bad = await results(stack.client, batch.error_file_id)
        assert [each["response"]["status_code"] for each in bad] == [500, 500]
        assert len(stack.engine.journal.bodies) == 6
        stack.engine.behaviour.error = None
        batch = await create(stack.client, [line(f"r{index}") for index in range(6)])
        assert (await ended(stack.client, batch.id)).request_counts.completed == 6
