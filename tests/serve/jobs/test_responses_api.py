"""``/v1/responses`` over the wire, with OpenAI's client, on both stores."""

import asyncio

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import SecretStr, TypeAdapter

from sala_serve.engine.fake import Behaviour
from sala_serve.engine.fake_core import Ending

EVENT = TypeAdapter(ResponseStreamEvent)
SLOW = {
    "prefill_tokens_per_s": 10_000,
    "num_prompt_tokens": 1_000_000,
    "max_model_len": 2_000_000,
    "kv_capacity_tokens": 4_000_000,
}
WORDS = "word0 word1 word2 "


async def until(client, response_id, condition):
    async with asyncio.timeout(20):
        while not condition(  # noqa: ASYNC110 - it happens on the other side of the wire
            found := await client.responses.retrieve(response_id)
        ):
            await asyncio.sleep(0.02)
    return found


async def ended(client, response_id):
    return await until(
        client, response_id, lambda each: each.status not in ("queued", "in_progress")
    )


async def read(stream):
    """The events of a stream, each of them as OpenAI's types check it rather than as its client trusts it."""
    events = [event async for event in stream]
    for event in events:
        EVENT.validate_json(event.model_dump_json())
    return events


async def test_a_response_is_answered_stored_continued_and_deleted(start):
    async with start() as stack:
        responses = stack.client.responses
        first = await responses.create(
            model="sala", input="Say it", instructions="Be brief", metadata={"a": "b"}
        )
        Response.model_validate_json(first.model_dump_json())
        assert (first.status, first.output_text) == ("completed", WORDS)
        assert first.usage.input_tokens_details.cached_tokens == 4
        assert first.usage.output_tokens == 3
        assert await responses.retrieve(first.id) == first
        second = await responses.create(
            model="sala", input="And now?", previous_response_id=first.id
        )
        assert second.previous_response_id == first.id
        assert stack.engine.journal.bodies[-1]["messages"] == [
            {"role": "user", "content": "Say it"},
            {"role": "assistant", "content": WORDS},
            {"role": "user", "content": "And now?"},
        ]
        items = await responses.input_items.list(second.id)
        assert [each.content[0].text for each in items.data] == ["And now?"]
        await responses.delete(first.id)
        with pytest.raises(openai.NotFoundError) as caught:
            await responses.retrieve(first.id)
        assert caught.value.code == "not_found"


async def test_a_stream_has_typed_events_in_order_and_is_stored_at_its_end(start):
    async with start() as stack:
        async with stack.client.responses.stream(model="sala", input="Say it") as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        assert events[0].type == "response.created"
        assert events[-1].type == "response.completed"
        numbers = [event.sequence_number for event in events]
        assert numbers == list(range(len(events)))
        assert final.output_text == WORDS
        assert (await stack.client.responses.retrieve(final.id)).output_text == WORDS
        plain = await stack.client.responses.create(model="sala", input="Again", stream=True)
        assert [each.type for each in await read(plain)] == [each.type for each in events]


async def test_what_is_not_to_be_stored_cannot_be_read_again(start):
    async with start() as stack:
        response = await stack.client.responses.create(model="sala", input="Hi", store=False)
        assert response.output_text == WORDS
        with pytest.raises(openai.NotFoundError):
            await stack.client.responses.retrieve(response.id)


async def test_a_call_of_a_tool_is_an_item_and_its_output_goes_back(start):
    tool = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}
    async with start(Behaviour(calls_tools=True, num_tokens=0)) as stack:
        responses = stack.client.responses
        first = await responses.create(model="sala", input="Look", tools=[tool])
        (call,) = [item for item in first.output if item.type == "function_call"]
        assert (call.name, call.arguments, call.status) == ("look", "{}", "completed")
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "A cat"}
        await responses.create(
            model="sala", input=[output], tools=[tool], previous_response_id=first.id
        )
        sent = stack.engine.journal.bodies[-1]["messages"]
        assert sent[-1] == {"role": "tool", "tool_call_id": call.call_id, "content": "A cat"}
        assert sent[-2]["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}


async def test_structured_output_asks_the_engine_for_a_schema(start):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    wanted = {"type": "json_schema", "name": "thing", "schema": schema, "strict": True}
    async with start() as stack:
        response = await stack.client.responses.create(
            model="sala", input="Hi", text={"format": wanted}, max_output_tokens=2
        )
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.text.format.schema_ == schema
        sent = stack.engine.journal.bodies[-1]
        assert sent["response_format"]["json_schema"]["schema"] == schema
        assert sent["max_completion_tokens"] == 2


async def test_input_tokens_are_counted_without_running(start):
    async with start(Behaviour(num_prompt_tokens=None)) as stack:
        counted = await stack.client.responses.input_tokens.count(
            model="sala", input="one two three"
        )
        assert counted.object == "response.input_tokens"
        run = await stack.client.responses.create(model="sala", input="one two three")
        assert counted.input_tokens == run.usage.input_tokens


async def test_a_background_response_runs_by_itself(start):
    async with start() as stack:
        created = await stack.client.responses.create(model="sala", input="Go", background=True)
        assert created.status in ("queued", "in_progress")
        response = await ended(stack.client, created.id)
        Response.model_validate_json(response.model_dump_json())
        assert (response.status, response.output_text) == ("completed", WORDS)
        assert response.background
        # one for the request that asked for it, one for the job
        name = "sala_gateway_requests_total"
        assert await stack.metric(name, endpoint="/v1/responses", status="200") == 2


async def test_its_status_tells_the_prefill_and_its_stream_resumes_after_any_event(start):
    async with start(Behaviour(**SLOW)) as stack:
        responses = stack.client.responses
        created = await responses.create(model="sala", input="Go", background=True)
        seen = await until(
            stack.client,
            created.id,
            lambda each: (each.model_extra["sala"] or {}).get("phase") == "prefill",
        )
        told = seen.model_extra["sala"]
        assert seen.status == "in_progress"
        assert (told["attempt"], told["total_tokens"]) == (1, 1_000_000)
        stack.engine.behaviour.prefill_tokens_per_s = None
        whole = await read(await responses.retrieve(created.id, stream=True))
        assert [each.type for each in whole[:3]] == [
            *("response.created", "response.queued", "response.in_progress")
        ]
        assert whole[-1].type == "response.completed"
        for after in range(len(whole)):
            rest = await responses.retrieve(created.id, stream=True, starting_after=after)
            assert await read(rest) == whole[after + 1 :]


async def test_the_stream_of_a_background_response_can_be_left_and_taken_up_again(start):
    async with start(Behaviour(itl_s=0.02, num_tokens=20)) as stack:
        responses = stack.client.responses
        stream = await responses.create(model="sala", input="Go", background=True, stream=True)
        seen = []
        async for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        response_id = seen[0].response.id
        rest = await read(
            await responses.retrieve(
                response_id, stream=True, starting_after=seen[-1].sequence_number
            )
        )
        numbers = [event.sequence_number for event in seen + rest]
        assert numbers == list(range(len(numbers)))
        text = "".join(
            event.delta for event in seen + rest if event.type == "response.output_text.delta"
        )
        assert text == rest[-1].response.output_text
        assert stack.engine.journal.num_aborted == 0
        assert len(stack.engine.journal.bodies) == 1


async def test_cancelling_stops_the_engine(start, eventually):
    async with start(Behaviour(**SLOW)) as stack:
        responses = stack.client.responses
        created = await responses.create(model="sala", input="Go", background=True)
        await eventually(lambda: stack.engine.journal.num_running)
        assert (await responses.cancel(created.id)).status == "cancelled"
        await eventually(lambda: not stack.engine.journal.num_running)
        assert stack.engine.core.jobs == []
        assert (await responses.retrieve(created.id)).status == "cancelled"
        with pytest.raises(openai.BadRequestError):
            await responses.cancel((await _quick(stack)).id)


async def _quick(stack):
    stack.engine.behaviour.prefill_tokens_per_s = None
    return await stack.client.responses.create(model="sala", input="Hi")


async def test_deleting_stops_the_engine(start, eventually):
    async with start(Behaviour(**SLOW)) as stack:
        created = await stack.client.responses.create(model="sala", input="Go", background=True)
        await eventually(lambda: stack.engine.journal.num_running)
        await stack.client.responses.delete(created.id)
        await eventually(lambda: not stack.engine.journal.num_running)


async def test_a_client_that_leaves_its_foreground_stream_stops_the_engine(start, eventually):
    async with start(Behaviour(**SLOW)) as stack:
        stream = await stack.client.responses.create(
            model="sala", input="Go", stream=True, extra_headers={"X-Sala-Progress": "events"}
        )
        await eventually(lambda: stack.engine.journal.num_running)
        await stream.close()
        await eventually(lambda: not stack.engine.journal.num_running)


async def test_waiting_is_visible_on_a_stream(start):
    async with start(Behaviour(**SLOW), hold_status_s=0) as stack:
        body = {"model": "sala", "input": "Go", "stream": True}
        async with stack.http.stream("POST", "/v1/responses", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith(": prefill"):
                    break
        assert "total_tokens=1000000" in line


async def test_an_engine_that_breaks_off_fails_a_foreground_stream_for_all_to_see(start):
    async with start(Behaviour(ending=Ending.CONNECTION_LOST)) as stack:
        stream = await stack.client.responses.create(model="sala", input="Go", stream=True)
        events = await read(stream)
        assert events[-1].type == "response.failed"
        assert events[-1].response.error.code == "server_error"
        stored = await stack.client.responses.retrieve(events[0].response.id)
        assert stored.status == "failed"
        with pytest.raises(openai.InternalServerError) as caught:
            await stack.client.responses.create(model="sala", input="Go")
        assert caught.value.code == "engine_lost"


async def test_other_tenants_find_nothing(start, client_of):
    async with (
        start(api_keys="static-key") as stack,
        client_of(stack, "alice") as alice,
        client_of(stack, "bob") as bob,
    ):
        created = await alice.responses.create(model="sala", input="Mine", background=True)
        await ended(alice, created.id)
        for reach in (
            bob.responses.retrieve(created.id),
            bob.responses.retrieve(created.id, stream=True),
            bob.responses.cancel(created.id),
            bob.responses.delete(created.id),
            bob.responses.input_items.list(created.id),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                await reach
            assert caught.value.code == "not_found"
        with pytest.raises(openai.BadRequestError) as caught:
            await bob.responses.create(model="sala", input="Yours", previous_response_id=created.id)
        assert caught.value.param == "previous_response_id"
        assert (await alice.responses.retrieve(created.id)).status == "completed"


async def test_scopes_of_the_key_hold(start, client_of):
    async with (
        start(api_keys="static-key") as stack,
        client_of(stack, "carol", endpoints=frozenset({"/v1/responses"})) as carol,
        client_of(stack, "dave", endpoints=frozenset({"/v1/chat/completions"})) as dave,
    ):
        response = await carol.responses.create(model="sala", input="Hi")
        assert response.output_text == WORDS
        background = await carol.responses.create(model="sala", input="Hi", background=True)
        assert (await ended(carol, background.id)).status == "completed"
        for refused in (
            dave.responses.create(model="sala", input="Hi"),
            dave.responses.create(model="sala", input="Hi", background=True),
            dave.responses.retrieve(response.id),
        ):
            with pytest.raises(openai.PermissionDeniedError):
                await refused


async def test_a_job_whose_key_was_revoked_meanwhile_does_not_run(start, client_of, eventually):
    async with (
        start(
            Behaviour(**SLOW), api_keys="static-key", key_cache_s=0, max_running_responses=1
        ) as stack,
        client_of(stack, "erin") as erin,
    ):
        first = await erin.responses.create(model="sala", input="Hi", background=True)
        await eventually(lambda: stack.engine.journal.num_running)
        second = await erin.responses.create(model="sala", input="Hi", background=True)
        store = stack.gateway.keys.store
        (key,) = await store.keys("erin")
        await store.revoke_key(key.key_id)
        _, token = await store.create_key("erin", name="two", scopes=key.scopes)
        erin = erin.with_options(api_key=token)
        assert (await erin.responses.retrieve(second.id)).model_extra["sala"]["place"] == 1
        await erin.responses.cancel(first.id)
        failed = await ended(erin, second.id)
        assert failed.status == "failed"
        assert "no longer valid" in failed.error.message
        assert len(stack.engine.journal.bodies) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": "x", "conversation": "c"}, "conversation"),
        ({"input": "x", "cache_salt": "mine"}, "cache_salt"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "background": True, "store": False}, "store"),
        ({"input": "x", "model": "other"}, "model"),
        ({"input": "x", "service_tier": "gold"}, "service_tier"),
        ({"input": "x", "unheard_of": 1}, "unheard_of"),
    ],
)
async def test_what_cannot_be_done_is_refused_with_its_name(stack, fields, param):
    answer = await stack.http.post("/v1/responses", json={"model": "sala", **fields})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


async def test_a_prompt_that_is_too_long_keeps_its_code(start):
    async with start(Behaviour(num_prompt_tokens=5000)) as stack:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                await stack.client.responses.create(model="sala", input="Hi", stream=stream)
            assert caught.value.code == "context_length_exceeded"
        created = await stack.client.responses.create(model="sala", input="Hi", background=True)
        failed = await ended(stack.client, created.id)
        assert failed.error.code == "invalid_prompt"
        assert failed.error.type == "context_length_exceeded"


@pytest.mark.parametrize(
    "query", ["stream=maybe", "starting_after=1", "stream=true&starting_after=x"]
)
async def test_wrong_queries_are_refused(stack, query):
    response = await stack.client.responses.create(model="sala", input="Hi")
    answer = await stack.http.get(f"/v1/responses/{response.id}?{query}")
    assert answer.status_code == 400


async def test_input_items_come_in_pages(stack):
    given = [{"role": "user", "content": f"m{index}"} for index in range(5)]
    response = await stack.client.responses.create(model="sala", input=given)
    pages = await stack.client.responses.input_items.list(response.id, limit=2, order="asc")
    texts = [item.content[0].text async for item in pages]
    assert texts == [f"m{index}" for index in range(5)]
    newest = await stack.client.responses.input_items.list(response.id, limit=1)
    assert newest.data[0].content[0].text == "m4"
    assert newest.has_more


async def test_a_stored_answer_survives_its_gateway(start_stack, redis_server):
    config = {"url": SecretStr(redis_server.url), "secret": "a" * 32}
    async with start_stack(**config) as stack:
        response = await stack.client.responses.create(model="sala", input="Hi")
    async with start_stack(**config) as stack:
        assert await stack.client.responses.retrieve(response.id) == response


async def test_an_answer_that_cannot_be_stored_is_given_and_says_so(start_stack, redis_server):
    config = {"url": SecretStr(redis_server.url), "secret": "a" * 32}
    async with start_stack(Behaviour(itl_s=0.05), command_timeout_s=1, **config) as stack:
        async with stack.client.responses.stream(model="sala", input="Hi") as stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    redis_server.stop()
            final = await stream.get_final_response()
        assert final.output_text == WORDS
        assert final.model_extra["store"] is False


async def test_the_openapi_page_has_every_path(stack):
    document = (await stack.http.get("/openapi.json")).json()
    assert {path for path in document["paths"] if "responses" in path} == {
        "/v1/responses",
        "/v1/responses/input_tokens",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/responses/{response_id}/input_items",
    }
