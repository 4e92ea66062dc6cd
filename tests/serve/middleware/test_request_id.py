import re

import pytest


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
