import asyncio
import re

import openai
import pytest

from sala_serve.engine.fake import Behaviour

PATH = "/v1/chat/completions"
REQUEST = {"model": "sala", "messages": [{"role": "user", "content": "Hi"}]}


async def test_models_lists_name_and_context_length(start_stack):
    async with start_stack(Behaviour(model="long", max_model_len=1_048_576)) as stack:
        (model,) = (await stack.client.models.list()).data
    assert model.id == "long"
    assert model.max_model_len == 1_048_576


async def test_models_shows_one(stack):
    assert (await stack.client.models.retrieve("sala")).id == "sala"
    with pytest.raises(openai.NotFoundError):
        await stack.client.models.retrieve("org/other")


async def test_models_is_503_until_the_engine_has_told_them(start_stack):
    async with start_stack(Behaviour(health_status=503)) as stack:
        response = await stack.http.get("/v1/models")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"


async def test_probes_say_ok_when_the_engine_is_ready(stack):
    assert (await stack.http.get("/healthz")).json() == {"status": "ok"}
    assert (await stack.http.get("/readyz")).json() == {"status": "ready"}


async def test_process_is_alive_but_not_ready_while_the_engine_is_down(start_stack, eventually):
    async with start_stack(Behaviour(health_status=503)) as stack:
        await eventually(lambda: "unhealthy" in stack.gateway.monitor.status.reason)
        assert (await stack.http.get("/healthz")).status_code == 200
        response = await stack.http.get("/readyz")
        assert response.status_code == 503
        assert "unhealthy" in response.json()["error"]["message"]
        stack.engine.behaviour.health_status = 200
        await eventually(lambda: stack.gateway.monitor.status.is_ready)
        assert (await stack.http.get("/readyz")).status_code == 200


async def test_draining_gateway_is_not_ready_and_admits_nothing(stack):
    await stack.gateway.running.drain(timeout_s=0.1)
    response = await stack.http.get("/readyz")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
    body = {"model": "sala", "messages": [{"role": "user", "content": "Hi"}]}
    response = await stack.http.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
    assert (await stack.http.get("/healthz")).status_code == 200


async def test_unknown_paths_and_methods_are_shaped_errors(stack):
    response = await stack.http.get("/v1/nothing")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "route_not_found")
    response = await stack.http.get("/v1/chat/completions")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    name = "sala_gateway_requests_total"
    assert await stack.metric(name, endpoint="other", status="404") == 1


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
    (engine,) = stack.gateway.pool.engines
    assert await stack.metric("sala_gateway_engine_up", engine=engine) == 1


async def test_running_requests_are_counted(start_stack, eventually):
    async with start_stack(Behaviour(ttft_s=0.5)) as stack:
        async with asyncio.TaskGroup() as group:
            group.create_task(stack.http.post(PATH, json=REQUEST))
            await eventually(lambda: stack.engine.journal.num_running == 1)
            name = "sala_gateway_requests_in_flight"
            assert await stack.metric(name, endpoint=PATH) == 1
        assert await stack.metric(name, endpoint=PATH) == 0


@pytest.mark.parametrize("path", ["/healthz/", "/v1/chat/completions/"])
async def test_other_spellings_of_a_path_are_not_redirected(stack, path):
    response = await stack.http.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "route_not_found")


async def test_wrong_method_names_the_right_one(stack):
    response = await stack.http.get(PATH)
    assert response.headers["Allow"] == "POST"


async def test_clients_cannot_make_series_of_metrics(stack):
    for name in ("a", "b"):
        await stack.http.post(PATH, json={**REQUEST, "model": name})
        await stack.http.get(f"/{name}", headers={"Host": name})
        await stack.http.get(f"/v1/models/{name}")
        await stack.http.request("OPTIONS", f"/v1/models/{name}")
    text = (await stack.http.get("/metrics")).text
    expected = {PATH, "/v1/models/{name}", "other", "/metrics"}
    assert set(re.findall(r'endpoint="([^"]*)"', text)) == expected
