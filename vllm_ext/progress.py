"""How far each request is, told by the scheduler and served at ``GET /sala/progress``.

vLLM's own metrics show nothing of a prefill before its last token, which with a million tokens is minutes. Scheduler
and HTTP server are processes of one host, and a step of the scheduler may take seconds, in which it answers nobody:
so it leaves its state in a file before and after each step, and the server reads that.

Switched on by naming ``sala_progress`` in ``VLLM_PLUGINS``, without which vLLM serves no plugin's routes.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from fastapi.responses import JSONResponse
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterable, Mapping

    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.config import VllmConfig
    from vllm.engine.protocol import EngineClient
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

PLUGIN = "sala_progress"
PATH = "/sala/progress"
FOLDER_VARIABLE = "SALA_VLLM_PROGRESS_FOLDER"
"""Where the schedulers of one server leave their files; by default a temporary folder of the server's own."""
INTERVAL_S = 0.1
"""Short steps are told about this often; long ones each."""
LONG_STEP_TOKENS = 512
_NUMBERS = ("num_prompt_tokens", "num_computed_tokens", "num_cached_tokens", "num_output_tokens")
_NAME = re.compile(r"(?:\d+_)?(?:chatcmpl-|(cmpl-))?(.+)", re.DOTALL)


def choose_folder() -> None:
    """Name the folder to the processes that this one will start; called in vLLM's first process."""
    if PLUGIN not in (envs.VLLM_PLUGINS or ()) or FOLDER_VARIABLE in os.environ:
        return
    shared_memory = Path("/dev/shm")
    parent = shared_memory if os.access(shared_memory, os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="sala-vllm-", dir=parent)
    os.environ[FOLDER_VARIABLE] = folder
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child has inherited this too
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


class ProgressFile:
    """One scheduler's side: its state, replaced as a whole."""

    def __init__(
        self,
        path: Path,
        *,
        capacity_tokens: int,
        max_num_seqs: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._capacity_tokens = capacity_tokens
        self._max_num_seqs = max_num_seqs
        self._clock = clock
        self._instance = uuid.uuid4().hex
        self._num_steps = 0
        self._written_at_s = float("-inf")
        self._num_cached_tokens: dict[str, int] = {}
        self._is_broken = False

    @classmethod
    def of_engine(cls, config: VllmConfig) -> ProgressFile | None:
        """Make the file of the engine with this configuration; None unless the plugin is on."""
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder is None or PLUGIN not in (envs.VLLM_PLUGINS or ()):
            return None
        return cls(
            Path(folder) / f"engine-{config.parallel_config.data_parallel_index}.json",
            capacity_tokens=config.cache_config.kv_cache_size_tokens or 0,
            max_num_seqs=config.scheduler_config.max_num_seqs,
        )

    def step_begins(self, scheduler: Scheduler, num_tokens: int) -> None:
        """Tell what a step of ``num_tokens`` tokens is about to compute."""
        self._write(scheduler, is_due=num_tokens >= LONG_STEP_TOKENS)

    def step_ended(self, scheduler: Scheduler, num_tokens: int) -> None:
        """Tell what that step has computed."""
        if num_tokens:
            self._num_steps += 1
        self._write(scheduler, is_due=num_tokens >= LONG_STEP_TOKENS)

    def remove(self) -> None:
        """Leave nothing behind."""
        self._path.unlink(missing_ok=True)

    def _write(self, scheduler: Scheduler, *, is_due: bool) -> None:
        now_s = self._clock()
        # after its last request a scheduler is not asked again
        is_due |= not scheduler.requests or now_s - self._written_at_s >= INTERVAL_S
        if self._is_broken or not is_due:
            return
        self._written_at_s = now_s
        usage_frac = scheduler.kv_cache_manager.usage
        document = {
            "instance": self._instance,
            "step": self._num_steps,
            "requests": merge(
                (name_of(request.request_id), self._look(request))
                for request in scheduler.requests.values()
            ),
            "kv": {
                "capacity_tokens": self._capacity_tokens,
                "used_tokens": round(usage_frac * self._capacity_tokens),
            },
            "max_num_seqs": self._max_num_seqs,
        }
        known = self._num_cached_tokens
        self._num_cached_tokens = {
            each: known[each] for each in scheduler.requests if each in known
        }
        new = self._path.with_suffix(".new")
        try:
            new.write_text(json.dumps(document))
            new.replace(self._path)
        except OSError:
            # the answers go on; who asks for progress is told that there is none, and not an old one
            logger.exception("the progress of requests cannot be written any more")
            self._is_broken = True
            self.remove()

    def _look(self, request: Request) -> dict[str, Any]:
        if request.prefill_stats is not None:
            # vLLM takes it away with the first token
            self._num_cached_tokens[request.request_id] = request.prefill_stats.num_cached_tokens
        # what the step under way computes counts when it is done
        num_done = request.num_computed_tokens - request.num_in_flight_tokens
        phase = "prefilling"
        if request.status != RequestStatus.RUNNING:
            phase, num_done = "waiting", 0
        elif request.num_output_tokens or num_done >= request.num_prompt_tokens:
            phase = "decoding"
        return {
            "phase": phase,
            "num_prompt_tokens": request.num_prompt_tokens,
            "num_computed_tokens": min(max(num_done, 0), request.num_prompt_tokens),
            "num_cached_tokens": self._num_cached_tokens.get(request.request_id, 0),
            "num_output_tokens": request.num_output_tokens,
        }


def name_of(request_id: str) -> str:
    """Return the ``X-Request-Id`` that a request came with.

    vLLM puts before it what was asked for, and the number of the answer where several are asked for; behind it the
    number of the prompt of a completion, and eight random digits.
    """
    if not envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION:
        request_id = request_id.rpartition("-")[0] or request_id
    match = _NAME.fullmatch(request_id)
    assert match is not None
    is_completion, name = match.groups()
    return str(name.rpartition("-")[0] or name if is_completion else name)


def merge(looks: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Add up what belongs to one request of a client: several prompts, or several answers to one."""
    merged: dict[str, dict[str, Any]] = {}
    for name, look in looks:
        if (before := merged.get(name)) is None:
            merged[name] = dict(look)
            continue
        if before["phase"] != look["phase"]:
            before["phase"] = "prefilling"
        for number in _NUMBERS:
            before[number] += look[number]
    return merged


def read_progress(folder: Path) -> dict[str, Any] | None:
    """Return the state of all schedulers of a server as one; None if there is none."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("engine-*.json"))]
    if not documents:
        return None
    return {
        "instance": "-".join(each["instance"] for each in documents),
        "step": sum(each["step"] for each in documents),
        "requests": merge(item for each in documents for item in each["requests"].items()),
        "kv": {
            key: sum(each["kv"][key] for each in documents)
            for key in ("capacity_tokens", "used_tokens")
        },
        "max_num_seqs": sum(each["max_num_seqs"] for each in documents),
    }


class ProgressEndpoint:
    """The HTTP server's side (entry point ``vllm.endpoint_plugins``)."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route; called by vLLM."""
        app.add_api_route(PATH, self._answer, methods=["GET"], include_in_schema=False)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Need nothing of the engine; called by vLLM."""

    async def _answer(self) -> JSONResponse:
        folder = os.environ.get(FOLDER_VARIABLE)
        progress = None if folder is None else read_progress(Path(folder))
        if progress is None:
            return JSONResponse({"error": "no scheduler tells its progress"}, status_code=503)
        return JSONResponse(progress)
