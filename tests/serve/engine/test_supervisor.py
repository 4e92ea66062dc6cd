from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sala_serve.config import Settings
from sala_serve.engine.launch import EngineCommand
from sala_serve.engine.supervisor import (
    EngineStartFailed,
    EngineSupervisor,
    RestartPolicy,
    telling_lines,
)
from sala_serve.gateway import Gateway

STUB = Path(__file__).parent / "stub_vllm.py"


class Bench:
    """A supervisor of the stub, with what it did."""

    def __init__(self, stub, mode, policy, **engine_settings):
        socket = stub.folder / "engine.sock"
        self.lines = []
        self.delays_s = []
        engine = {"url": "http://engine", "socket": socket, "probe_interval_s": 0.02}
        engine |= engine_settings
        self.gateway = Gateway.create(Settings(engines=(engine,)))
        argv = (sys.executable, str(STUB), "--uds", str(socket), "--served-model-name", "sala")
        self.supervisor = EngineSupervisor(
            EngineCommand(argv, stub.env(mode)),
            socket=socket,
            monitor=self.gateway.monitor,
            policy=policy,
            print_line=self.lines.append,
            clock=time.monotonic,
            sleep=self._sleep,
        )

    async def _sleep(self, delay_s):
        self.delays_s.append(delay_s)
        await asyncio.sleep(0)

    @asynccontextmanager
    async def running(self):
        async with self.gateway.run(), asyncio.TaskGroup() as group:
            task = group.create_task(self.supervisor.run())
            yield
            task.cancel()

    async def ready(self):
        async with asyncio.timeout(20):
            await self.gateway.monitor.wait_ready()


@pytest.fixture
def bench(stub):
    def make(mode, policy=None, **engine_settings):
        return Bench(stub, mode, policy or RestartPolicy(stop_grace_s=3), **engine_settings)

    return make


async def test_stopping_leaves_no_process(bench, stub, eventually):
    it = bench("ok")
    async with it.running():
        await it.ready()
        assert len(stub.alive()) == 2
    await eventually(lambda: not stub.alive())
    assert any(line.startswith("xxx") and len(line) <= 2000 for line in it.lines)


async def test_engine_that_ignores_sigterm_is_killed(bench, stub, eventually):
    it = bench("ignore_sigterm", RestartPolicy(stop_grace_s=0.3))
    async with it.running():
        await eventually(lambda: "ignoring SIGTERM" in it.lines)
    await eventually(lambda: not stub.alive())


async def test_engine_that_cannot_start_is_given_up_with_its_reason(bench, stub, eventually):
    it = bench("die_at_start")
    with pytest.raises(ExceptionGroup) as caught:
        async with it.running():
            await asyncio.sleep(20)
    failure = caught.value
    while isinstance(failure, ExceptionGroup):
        (failure,) = failure.exceptions
    assert isinstance(failure, EngineStartFailed)
    assert failure.num_attempts == 3
    assert failure.causes == ["OSError: no file named model.safetensors found"]
    assert it.delays_s == [1.0, 2.0]
    assert len(stub.pids()) == 6
    await eventually(lambda: not stub.alive())


async def test_dead_engine_is_restarted_and_its_workers_are_gone(bench, stub, eventually):
    it = bench("ok")
    async with it.running():
        await it.ready()
        engine, worker = stub.pids()
        os.kill(engine, signal.SIGKILL)
        await eventually(lambda: "restarted" in it.gateway.monitor.status.reason)
        await eventually(lambda: len(stub.pids()) == 4)
        await eventually(lambda: worker not in stub.alive())
        await it.ready()
    assert it.delays_s == [1.0]
    await eventually(lambda: not stub.alive())


async def test_stuck_engine_is_stopped_and_started_again(bench, stub, eventually):
    it = bench("ok")
    async with it.running():
        await it.ready()
        before = stub.pids()
        it.gateway.monitor.note_stuck("no progress for more than 60 s")
        assert it.gateway.monitor.is_stuck
        await eventually(lambda: len(stub.pids()) == 4)
        await eventually(lambda: set(stub.alive()).isdisjoint(before))
        await it.ready()
        assert not it.gateway.monitor.is_stuck
        assert it.gateway.monitor.num_starts == 2
    assert it.delays_s == [1.0]


async def test_frozen_process_is_found_by_its_silence_and_replaced(bench, stub, eventually):
    it = bench("ok", RestartPolicy(stop_grace_s=0.3), stuck_after_s=0.5)
    async with it.running():
        await it.ready()
        engine, _ = before = stub.pids()
        os.kill(engine, signal.SIGSTOP)
        await eventually(lambda: len(stub.pids()) == 4)
        await eventually(lambda: set(stub.alive()).isdisjoint(before))
        await it.ready()
    await eventually(lambda: not stub.alive())


@pytest.mark.parametrize(
    ("healthy_after_s", "delays_s"), [(60.0, [1.0, 2.0, 3.0]), (0.0, [1.0, 1.0, 1.0])]
)
async def test_delay_doubles_unless_the_engine_was_healthy_for_a_while(
    bench, eventually, healthy_after_s, delays_s
):
    policy = RestartPolicy(max_delay_s=3.0, healthy_after_s=healthy_after_s, max_failed_starts=1)
    it = bench("die_after_ready", policy)
    async with asyncio.timeout(30), it.running():
        await eventually(lambda: len(it.delays_s) >= 3)
    assert it.delays_s[:3] == delays_s


async def test_death_of_the_guard_takes_the_engine_along(bench, stub, eventually):
    it = bench("ok")
    async with it.running():
        await it.ready()
        before = stub.pids()
        guard = os.getpgid(before[0])
        assert guard not in before
        os.kill(guard, signal.SIGKILL)
        await eventually(lambda: len(stub.pids()) == 4)
        await eventually(lambda: set(stub.alive()).isdisjoint(before))


def test_telling_lines_are_the_distinct_errors_without_prefixes():
    log = """\
(APIServer pid=5) INFO 11-23 22:10:10 [api_server.py:10] starting
(EngineCore pid=7) ERROR 11-23 22:10:11 [core.py:900] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-23 22:10:11 [core.py:900]   File "x.py", line 1, in <module>
(EngineCore pid=7) ERROR 11-23 22:10:11 [core.py:900] torch.OutOfMemoryError: CUDA out of memory.
(EngineCore pid=7) torch.OutOfMemoryError: CUDA out of memory.
(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above.
"""
    assert telling_lines(log.splitlines()) == ["torch.OutOfMemoryError: CUDA out of memory."]


def test_telling_lines_know_usage_errors():
    log = ["usage: vllm serve [options]", "vllm serve: error: unrecognized arguments: --nope"]
    assert telling_lines(log) == [log[1]]


def test_telling_lines_fall_back_to_the_end_of_the_log():
    assert telling_lines(["one", "two", "", "three", "four"]) == ["two", "three", "four"]
