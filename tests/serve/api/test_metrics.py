import asyncio

from sala_serve.engine.fake import Behaviour
from sala_serve.telemetry.metrics import METRICS

PATH = "/v1/chat/completions"
REQUEST = {"model": "sala", "messages": [{"role": "user", "content": "Hi"}]}


async def test_every_metric_of_the_table_is_exposed(stack):
    await stack.http.post(PATH, json={**REQUEST, "stream": True})
    text = (await stack.http.get("/metrics")).text
    exposed = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    exposed = {name for name in exposed if not name.endswith("_created")}
    assert exposed == set(METRICS)
    assert all(name.startswith("sala_gateway_") for name in METRICS)


async def test_requests_tokens_and_times_are_counted(stack):
    await stack.http.post(PATH, json=REQUEST)
    await stack.http.post(PATH, json={**REQUEST, "stream": True})
    await stack.http.post(PATH, json={**REQUEST, "model": "other"})
    requests = "sala_gateway_requests_total"
    assert await stack.metric(requests, endpoint=PATH, status="200") == 2
    assert await stack.metric(requests, endpoint=PATH, status="404") == 1
    assert await stack.metric("sala_gateway_prompt_tokens_total", endpoint=PATH) == 14
    assert await stack.metric("sala_gateway_cached_tokens_total", endpoint=PATH) == 8
    assert await stack.metric("sala_gateway_completion_tokens_total", endpoint=PATH) == 6
    durations = "sala_gateway_request_duration_seconds_count"
    assert await stack.metric(durations, endpoint=PATH) == 2
    ttft = "sala_gateway_time_to_first_token_seconds_count"
    assert await stack.metric(ttft, endpoint=PATH) == 1
    assert await stack.metric("sala_gateway_engine_up") == 1


async def test_running_requests_are_counted(start_stack, eventually):
    async with start_stack(Behaviour(ttft_s=0.5)) as stack:
        async with asyncio.TaskGroup() as group:
            group.create_task(stack.http.post(PATH, json=REQUEST))
            await eventually(lambda: stack.engine.journal.num_running == 1)
            name = "sala_gateway_requests_in_flight"
            assert await stack.metric(name, endpoint=PATH) == 1
        assert await stack.metric(name, endpoint=PATH) == 0
