"""Whatever is sent that the document allows, or does not: no 5xx, and no status that it does not name."""

import asyncio
import threading
import time

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from sala_serve.api.admin.app import admin_app
from sala_serve.serving import bind
from sala_serve.state import State, StateSettings


@pytest.fixture(scope="module")
def admin_url(make_replica):
    """An admin port in a thread, since schemathesis sends with blocking calls."""
    listener = bind("127.0.0.1", 0)
    state = State.create(StateSettings(), clock=time.monotonic)
    app = admin_app(make_replica(state), ())
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))

    async def serve() -> None:
        await server.serve(sockets=[listener])
        await state.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_no_request_makes_it_fail(admin_url, headers):
    schema = schemathesis.openapi.from_url(f"{admin_url}/openapi.json", headers=headers)
    statuses: set[int] = set()
    num_operations = 0
    for result in schema.get_all_operations():
        num_operations += 1

        @settings(
            max_examples=15,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(result.ok().as_strategy())
        def check(case):
            # no document says which tiers are configured, or which times are past
            excluded = [positive_data_acceptance]
            answer = case.call_and_validate(headers=headers, excluded_checks=excluded)
            statuses.add(answer.status_code)

        check()
    assert num_operations >= 15
    assert {200, 201, 404} <= statuses
