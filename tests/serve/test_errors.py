import re

import pytest

from sala_serve import errors
from sala_serve.errors import GatewayError

LEAVES = [
    error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, GatewayError) and not error.__subclasses__()
]


@pytest.mark.parametrize("error", LEAVES, ids=lambda error: error.__name__)
def test_each_error_stands_in_the_drawing_with_status_and_code(error):
    assert re.search(rf"─ {error.__name__} +{error.status} {error.code}\b", errors.__doc__)
    kind = {429: error.type}.get(error.status, "invalid_request_error")
    assert error.type == ("server_error" if error.status >= 500 else kind)


def test_codes_are_distinct():
    assert len({error.code for error in LEAVES}) == len(LEAVES)


def test_body_has_openais_four_fields():
    error = errors.EngineUnavailable("Wait.")
    assert error.body() == {
        "error": {
            "message": "Wait.",
            "type": "server_error",
            "param": None,
            "code": "engine_unavailable",
        }
    }
    assert error.response().headers["Retry-After"] == "5"


@pytest.mark.parametrize(
    ("wait_s", "expected"),
    [
        (None, {"Retry-After": "5"}),
        (0.0, {"X-Sala-Expected-Wait-S": "1", "Retry-After": "1"}),
        (119.2, {"X-Sala-Expected-Wait-S": "120", "Retry-After": "120"}),
        (120.1, {"X-Sala-Expected-Wait-S": "121", "X-Should-Retry": "false"}),
    ],
)
def test_wait_is_stated_so_that_openais_client_does_the_right_thing(wait_s, expected):
    error = errors.QueueFull("Full.", headers=errors.wait_headers(wait_s))
    assert error.headers == expected
    assert (
        dict(error.response().headers).items()
        >= {name.lower(): value for name, value in expected.items()}.items()
    )


def test_rate_limit_says_which_kind_as_openai_does():
    error = errors.RateLimited("Later.", kind="tokens", headers={"x-ratelimit-limit-tokens": "9"})
    assert error.body()["error"]["type"] == "tokens"
    assert error.headers == {"Retry-After": "5", "x-ratelimit-limit-tokens": "9"}
    assert errors.RateLimited.headers == {"Retry-After": "5"}
