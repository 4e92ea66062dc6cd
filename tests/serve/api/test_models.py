import openai
import pytest

from sala_serve.engine.fake import Behaviour


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
