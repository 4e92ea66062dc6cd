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
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    assert error.type == kind


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
