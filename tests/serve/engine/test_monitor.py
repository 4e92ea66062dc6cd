import httpx
import pytest

from sala_serve.engine.monitor import EngineMonitor
from sala_serve.errors import EngineUnavailable, ModelNotFound
from sala_serve.telemetry import Metrics

MODELS = {"data": [{"id": "m", "created": 5, "max_model_len": 100}]}


class Engine:
    """What the engine answers next, and the time."""

    def __init__(self):
        self.health = 200
        self.models = MODELS
        self.now_s = 0.0
        transport = httpx.MockTransport(self.answer)
        self.monitor = EngineMonitor(
            httpx.AsyncClient(transport=transport, base_url="http://engine"),
            metrics=Metrics(),
            probe_interval_s=1.0,
            stuck_after_s=60.0,
            clock=lambda: self.now_s,
        )

    def answer(self, request):
        if isinstance(self.health, Exception):
            raise self.health
        if request.url.path == "/health":
            return httpx.Response(self.health)
        return httpx.Response(200, json=self.models)


async def test_ready_once_health_and_models_answer():
    engine = Engine()
    assert engine.monitor.status.reason == "engine starting"
    with pytest.raises(EngineUnavailable):
        engine.monitor.require_known()
    await engine.monitor.probe()
    engine.monitor.require_ready()
    assert engine.monitor.require_model("m").max_model_len == 100
    with pytest.raises(ModelNotFound):
        engine.monitor.require_model("other")


async def test_refused_connection_is_down_at_once_and_models_stay_known():
    engine = Engine()
    await engine.monitor.probe()
    engine.health = httpx.ConnectError("refused")
    await engine.monitor.probe()
    with pytest.raises(EngineUnavailable):
        engine.monitor.require_ready()
    engine.monitor.require_known()


async def test_late_answers_are_forgiven_until_the_engine_counts_as_stuck():
    engine = Engine()
    await engine.monitor.probe()
    engine.health = httpx.ReadTimeout("late")
    engine.now_s = 59.0
    await engine.monitor.probe()
    assert engine.monitor.status.is_ready
    engine.now_s = 61.0
    await engine.monitor.probe()
    assert not engine.monitor.status.is_ready
    engine.health = 200
    await engine.monitor.probe()
    assert engine.monitor.status.is_ready


@pytest.mark.parametrize("models", [{}, {"data": None}, {"data": []}, {"data": [{}]}, []])
async def test_unreadable_models_are_not_ready(models):
    engine = Engine()
    engine.models = models
    await engine.monitor.probe()
    assert not engine.monitor.status.is_ready


async def test_exit_of_the_process_is_down_and_says_so():
    engine = Engine()
    await engine.monitor.probe()
    engine.monitor.engine_exited("the engine exited")
    with pytest.raises(EngineUnavailable, match="the engine exited"):
        engine.monitor.require_ready()
