from sala_serve.engine.fake import Behaviour


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
