import re

import openai
import pytest

from sala_serve.config import ApiKeys


async def test_given_id_is_returned_and_used(stack):
    response = await stack.http.get("/healthz", headers={"X-Request-Id": "trace-1.a:b_c"})
    assert response.headers["X-Request-Id"] == "trace-1.a:b_c"


@pytest.mark.parametrize("given", [None, "", "with space", "x" * 129, "é", "a/b"])
async def test_missing_or_harmful_id_is_replaced(stack, given):
    headers = {} if given is None else {"X-Request-Id": given.encode()}
    response = await stack.http.get("/healthz", headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-Id"])


async def test_errors_carry_the_id_too(stack):
    response = await stack.http.get("/nothing", headers={"X-Request-Id": "e1"})
    assert (response.status_code, response.headers["X-Request-Id"]) == (404, "e1")


async def test_one_line_a_request_with_its_outcome(stack, caplog):
    caplog.set_level("INFO", logger="sala_serve")
    await stack.http.post("/v1/completions", content=b"{", headers={"X-Request-Id": "r1"})
    await stack.http.get("/healthz")
    lines = [record.message for record in caplog.records if record.name == "sala_serve.request"]
    assert len(lines) == 1
    start = "r1 /v1/completions 400 error_code=invalid_request tenant=default duration_s=0."
    assert lines[0].startswith(start)


KEYS = ApiKeys(("sk-one", "sk-two"))


@pytest.mark.parametrize("key", KEYS.values)
async def test_each_key_is_accepted(start_stack, key):
    async with start_stack(api_keys=KEYS) as stack:
        assert (await stack.client.with_options(api_key=key).models.list()).data


@pytest.mark.parametrize("key", ["sk-three", "sk-on", "sk-one2"])
async def test_wrong_key_is_refused(start_stack, key):
    async with start_stack(api_keys=KEYS) as stack:
        with pytest.raises(openai.AuthenticationError) as caught:
            await stack.client.with_options(api_key=key).chat.completions.create(
                model="sala", messages=[{"role": "user", "content": "Hi"}]
            )
    assert caught.value.code == "invalid_api_key"
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("header", [None, "sk-one", "Basic sk-one", "Bearer", "Bearer é"])
async def test_anything_but_a_bearer_key_is_refused(start_stack, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    async with start_stack(api_keys=KEYS) as stack:
        response = await stack.http.get("/v1/models", headers=headers)
    assert response.status_code == 401


async def test_probes_and_metrics_need_no_key(start_stack):
    async with start_stack(api_keys=KEYS) as stack:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await stack.http.get(path)).status_code == 200


async def test_refused_key_and_unknown_path_say_why_in_the_log(start_stack, caplog):
    caplog.set_level("INFO", logger="sala_serve")
    async with start_stack(api_keys=KEYS) as stack:
        await stack.http.get("/v1/models", headers={"Authorization": "Bearer sk-bad"})
        await stack.http.get("/v2/sk-secret")
    assert "/v1/models 401 error_code=invalid_api_key" in caplog.text
    assert "other 404 error_code=route_not_found" in caplog.text
    assert "sk-bad" not in caplog.text
    assert "sk-secret" not in caplog.text


@pytest.mark.parametrize(
    "path", ["//v1/models", "/%76%31/models", "/v1%2Fmodels", "/v1/models/", "/v1/"]
)
async def test_no_spelling_of_a_path_gets_around_the_key(start_stack, path):
    async with start_stack(api_keys=KEYS) as stack:
        response = await stack.http.get(stack.url + path)
    assert response.status_code in {401, 404}
    assert "sala" not in response.text


async def test_key_in_the_query_string_is_not_taken(start_stack):
    async with start_stack(api_keys=KEYS) as stack:
        response = await stack.http.get("/v1/models", params={"api_key": "sk-one"})
    assert response.status_code == 401
