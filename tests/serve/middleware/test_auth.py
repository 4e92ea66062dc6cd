import openai
import pytest

from sala_serve.config import ApiKeys

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
