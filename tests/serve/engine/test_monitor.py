import asyncio
import json

import pytest

from sala_serve.engine.http import EngineAnswer
from sala_serve.engine.monitor import EngineMonitor
from sala_serve.errors import EngineLost, EngineTimeout, EngineUnavailable
from sala_serve.telemetry import Metrics

MODELS = {"data": [{"id": "m", "created": 5, "max_model_len": 100}]}


class Engine:
    """What the engine answers next, and the time."""

    def __init__(self, probe_interval_s=1.0):
        self.health = 200
        self.models = MODELS
        self.now_s = 0.0
        self.found_stuck = []
        self.monitor = EngineMonitor(
            self,
            engine_id="e",
            metrics=Metrics(),
            probe_interval_s=probe_interval_s,
            stuck_after_s=60.0,
            clock=lambda: self.now_s,
        )
        self.monitor.tell_when_stuck(self.found_stuck.append)

    async def get(self, path, *, timeout_s):
        if isinstance(self.health, Exception):
            raise self.health
        if path == "/health":
            return EngineAnswer(self.health, b"")
        return EngineAnswer(200, json.dumps(self.models).encode())

    @property
    def is_ready(self):
        return self.monitor.status.is_ready


async def test_ready_once_health_and_models_answer():
    engine = Engine()
    assert engine.monitor.status.reason == "engine starting"
    assert not engine.is_ready
    await engine.monitor.probe()
    assert engine.is_ready
    assert [model.max_model_len for model in engine.monitor.status.models] == [100]
    assert engine.monitor.num_starts == 1


@pytest.mark.parametrize("error", [EngineUnavailable("refused"), EngineLost("reset")])
async def test_refused_connection_is_down_at_once_and_models_stay_known(error):
    engine = Engine()
    await engine.monitor.probe()
    engine.health = error
    await engine.monitor.probe()
    assert not engine.is_ready
    assert engine.monitor.status.models
    engine.health = 200
    await engine.monitor.probe()
    assert engine.monitor.num_starts == 2
    assert engine.found_stuck == []


async def test_unreachable_engine_is_out_until_the_next_good_probe():
    engine = Engine()
    await engine.monitor.probe()
    engine.monitor.note_unreachable()
    assert not engine.is_ready
    await engine.monitor.probe()
    assert engine.is_ready


async def test_engine_whose_connection_broke_is_asked_at_once(eventually):
    engine = Engine(probe_interval_s=3600)
    watching = asyncio.create_task(engine.monitor.run())
    await eventually(lambda: engine.is_ready)
    engine.monitor.note_broken()
    assert not engine.is_ready
    await eventually(lambda: engine.is_ready)
    assert engine.monitor.num_starts == 1
    watching.cancel()


async def test_late_answers_are_forgiven_until_the_engine_counts_as_stuck():
    engine = Engine()
    await engine.monitor.probe()
    engine.health = EngineTimeout("late")
    engine.now_s = 59.0
    await engine.monitor.probe()
    assert engine.is_ready
    engine.now_s = 61.0
    await engine.monitor.probe()
    assert not engine.is_ready
    assert engine.monitor.is_stuck
    assert engine.found_stuck == ["no answer for more than 60 s"]
    engine.health = 200
    await engine.monitor.probe()
    assert engine.is_ready
    assert engine.monitor.num_starts == 1


async def test_engine_without_progress_is_out_until_it_moves_or_is_another_process():
    engine = Engine()
    await engine.monitor.probe()
    engine.monitor.note_stuck("no progress")
    await engine.monitor.probe()
    assert not engine.is_ready
    engine.monitor.note_moving()
    await engine.monitor.probe()
    assert engine.is_ready
    engine.monitor.note_stuck("no progress")
    engine.monitor.engine_exited("the engine exited")
    await engine.monitor.probe()
    assert engine.is_ready
    assert engine.monitor.num_starts == 2


@pytest.mark.parametrize("models", [{}, {"data": None}, {"data": []}, {"data": [{}]}, []])
async def test_unreadable_models_are_not_ready(models):
    engine = Engine()
    engine.models = models
    await engine.monitor.probe()
    assert not engine.is_ready


async def test_exit_of_the_process_is_down_and_says_so():
    engine = Engine()
    await engine.monitor.probe()
    engine.monitor.engine_exited("the engine exited")
    assert not engine.is_ready
    assert engine.monitor.status.reason == "the engine exited"
