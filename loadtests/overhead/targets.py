"""What is measured: the engine itself, ours as users run it, and others with the settings of their manuals."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

from overhead.engine import MODEL, TOKENIZER
from overhead.rivals import python_of
from processes import Process, StartFailed, free_port

ADMIN_TOKEN = "an-admin-token-of-the-benchmark"
LITELLM_KEY = "sk-a-key-of-the-benchmark"
READY_TIMEOUT_S = 120.0
OURS = f"""
[admin]
token = "{ADMIN_TOKEN}"
port = 0
[tokens]
tokenizer = "{TOKENIZER}"
[[engines]]
url = "http://127.0.0.1:{{engine_port}}"
"""
"""Keys, limits and exact counts on; everything else as it is by default, so the state is embedded."""
LIMITS = {
    "requests_per_min": 10**7,
    "input_tokens_per_min": 10**10,
    "output_tokens_per_min": 10**10,
    "tokens_in_flight": 10**10,
    "tokens_per_day": 10**12,
}
"""All kept, none reached."""
LITELLM = f"""
model_list:
  - model_name: {MODEL}
    litellm_params:
      model: hosted_vllm/{MODEL}
      api_base: http://127.0.0.1:{{engine_port}}/v1
      api_key: none
general_settings:
  master_key: {LITELLM_KEY}
"""


@dataclass(frozen=True)
class Target:
    """Something that listens."""

    name: str
    port: int
    key: str | None
    process: Process


@contextmanager
def engine(folder: Path) -> Iterator[Target]:
    """Start the mock engine for the length of the block."""
    port = free_port()
    command = [sys.executable, "-m", "overhead.engine", "--port", str(port)]
    with Process(command, folder / "engine.log") as process:
        process.wait_port(port)
        yield Target("direct", port, None, process)


@contextmanager
def ours(folder: Path, engine_port: int) -> Iterator[Target]:
    """Start sala-serve with a tenant that has limits, and one of its keys."""
    settings = folder / "ours.toml"
    settings.write_text(OURS.format(engine_port=engine_port))
    command = [sys.executable, "-m", "sala_serve", "gateway", "--config", str(settings)]
    with Process([*command, "--port", "0"], folder / "ours.log") as process:
        url = process.wait_line(r"listening on (http://\S+?),")
        admin_url = process.wait_line(r"admin API on (http://\S+)")
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        with httpx.Client(base_url=f"{admin_url}/admin/v1", headers=headers) as admin:
            tenant = {"id": "bench", "name": "Benchmark", "tier": "default", "limits": LIMITS}
            admin.post("/tenants", json=tenant).raise_for_status()
            made = admin.post("/tenants/bench/keys", json={"name": "bench"})
            key = made.raise_for_status().json()["key"]
        yield _ready(Target("sala-serve", int(url.rpartition(":")[2]), key, process))


@contextmanager
def rival(name: str, folder: Path, engine_port: int, environments: Path) -> Iterator[Target]:
    """Start another gateway.

    Raises:
        NotInstalled: it cannot be installed here.
        StartFailed: it does not start, or does not answer.
    """
    python, port = python_of(name, environments), free_port()
    env: Mapping[str, str] = {"HOME": str(folder)}
    key = None
    match name:
        case "litellm":
            settings = folder / "litellm.yaml"
            settings.write_text(LITELLM.format(engine_port=engine_port))
            command = [str(python.with_name("litellm")), "--config", str(settings)]
            command += ["--num_workers", "1"]
            # else it asks the network for prices at its start
            env = {**env, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
            key = LITELLM_KEY
        case _:
            module = {"smg": ["smg", "launch"], "vllm-router": ["vllm_router.launch_router"]}[name]
            command = [str(python), "-m", *module, "--policy", "round_robin"]
            command += ["--worker-urls", f"http://127.0.0.1:{engine_port}"]
            command += ["--prometheus-port", str(free_port())]
            command += ["--log-level", {"smg": "warn", "vllm-router": "warning"}[name]]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with Process(command, folder / f"{name}.log", env) as process:
        yield _ready(Target(name, port, key, process))


def _ready(target: Target) -> Target:
    """Return it when it answers a chat."""
    ends_at_s = time.monotonic() + READY_TIMEOUT_S
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    target.process.wait_port(target.port)
    answer = "nothing"
    with httpx.Client(base_url=f"http://127.0.0.1:{target.port}", headers=headers) as client:
        while time.monotonic() < ends_at_s and target.process.is_running:
            try:
                response = client.post("/v1/chat/completions", json=body)
                if response.status_code == 200:
                    return target
                answer = response.text[:200]
            except httpx.HTTPError as error:
                answer = type(error).__name__
            time.sleep(0.2)
    raise StartFailed(f"{target.name} does not answer a chat: {answer}")
