"""An engine is stuck when it has work and nothing in it moves; what it says is played, and so is the time."""

import json

import pytest

from sala_serve.engine.http import EngineAnswer
from sala_serve.engine.monitor import EngineMonitor
from sala_serve.engine.watch import EngineWatch
from sala_serve.errors import EngineTimeout
from sala_serve.telemetry import Metrics

STUCK_AFTER_S = 60.0


def progress(step, computed=0, instance="a", phase="prefilling"):
    request = {
        "phase": phase,
        "num_prompt_tokens": 1_000_000,
        "num_computed_tokens": computed,
        "num_cached_tokens": 0,
        "num_output_tokens": 0,
    }
    return {
        "instance": instance,
        "step": step,
        "requests": {"r": request} if computed is not None else {},
        "kv": {"capacity_tokens": 2_000_000, "used_tokens": computed or 0},
    }


def scrape(running=1, usage=0.5, prompt_tokens=10):
    return (
        f'vllm:num_requests_running{{engine="0"}} {running}\n'
        f'vllm:num_requests_waiting{{engine="0"}} 0\n'
        f'vllm:kv_cache_usage_perc{{engine="0"}} {usage}\n'
        f'vllm:prompt_tokens_total{{engine="0"}} {prompt_tokens}\n'
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n'
    )


class Engine:
    """Answers what it is told to; has one open request."""

    def __init__(self):
        self.now_s = 0.0
        self.num_open = 1
        self.says = progress(0)
        self.metrics = None
        self.found_stuck = []
        measured = Metrics()
        self.monitor = EngineMonitor(
            self,
            engine_id="e",
            metrics=measured,
            probe_interval_s=1.0,
            stuck_after_s=STUCK_AFTER_S,
            clock=lambda: self.now_s,
        )
        self.monitor.tell_when_stuck(self.found_stuck.append)
        self.watch = EngineWatch(
            self,
            self.monitor,
            engine_id="e",
            metrics=measured,
            stuck_after_s=STUCK_AFTER_S,
            clock=lambda: self.now_s,
        )

    async def get(self, path, *, timeout_s):
        if path == "/sala/progress":
            if isinstance(self.says, Exception):
                raise self.says
            return EngineAnswer(404 if self.says is None else 200, json.dumps(self.says).encode())
        if path == "/metrics":
            return EngineAnswer(200, self.metrics.encode())
        models = {"data": [{"id": "m", "max_model_len": 100}]}
        return EngineAnswer(200, json.dumps(models).encode())

    async def after(self, seconds):
        self.now_s += seconds
        await self.monitor.probe()
        await self.watch.look_once()

    @property
    def is_out(self):
        return not self.monitor.status.is_ready


@pytest.fixture
async def engine():
    engine = Engine()
    await engine.after(0)
    assert not engine.is_out
    return engine


async def test_million_token_prefill_that_moves_is_not_stuck(engine):
    for chunk in range(1, 20):
        engine.says = progress(chunk, computed=8192 * chunk)
        await engine.after(STUCK_AFTER_S - 1)
    assert engine.found_stuck == []


async def test_frozen_core_is_found_though_health_answers(engine):
    await engine.after(STUCK_AFTER_S - 1)
    assert not engine.is_out
    await engine.after(2)
    assert engine.is_out
    assert engine.monitor.is_stuck
    assert engine.found_stuck == ["no progress for more than 60 s"]
    await engine.after(1)
    assert engine.is_out  # /health says 200 all the while


async def test_engine_that_moves_again_is_taken_back(engine):
    await engine.after(STUCK_AFTER_S + 1)
    engine.says = progress(1, computed=100)
    await engine.after(1)
    await engine.after(1)
    assert not engine.is_out


async def test_engine_whose_progress_stays_unanswered_is_stuck(engine):
    engine.says = EngineTimeout("late")
    await engine.after(STUCK_AFTER_S + 1)
    assert engine.is_out


async def test_idle_engine_is_never_stuck(engine):
    engine.num_open, engine.says = 0, progress(5, computed=None)
    await engine.after(1)
    await engine.after(100 * STUCK_AFTER_S)
    assert engine.found_stuck == []


async def test_request_that_begins_after_long_idleness_has_its_whole_time(engine):
    engine.num_open, engine.says = 0, progress(5, computed=None)
    await engine.after(1)
    await engine.after(100 * STUCK_AFTER_S)
    engine.num_open = 1
    await engine.after(STUCK_AFTER_S - 1)
    assert not engine.is_out


async def test_restart_between_two_looks_is_counted(engine):
    engine.says = progress(50, computed=10)
    await engine.after(1)
    engine.says = progress(60, computed=0, instance="b")
    await engine.after(1)
    assert engine.monitor.num_starts == 2


async def test_without_the_plugin_the_cache_in_use_is_the_sign(engine):
    engine = Engine()
    engine.says, engine.metrics = None, scrape(usage=0.1)
    await engine.after(0)
    for usage in (0.2, 0.3, 0.4):
        engine.metrics = scrape(usage=usage)
        await engine.after(STUCK_AFTER_S - 1)
    assert engine.found_stuck == []
    assert engine.watch.look.kv_capacity_tokens == 1600
    assert engine.watch.look.kv_used_tokens == 640
    assert engine.watch.look.requests == {}
    await engine.after(STUCK_AFTER_S + 1)
    assert engine.is_out


async def test_unreadable_progress_is_no_news(engine):
    engine.says = {"step": "?"}
    await engine.after(STUCK_AFTER_S - 1)
    assert not engine.is_out
    await engine.after(2)
    assert engine.is_out
