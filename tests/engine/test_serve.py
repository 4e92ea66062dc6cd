"""The plugin is found by the stock command line, on a folder with config.json and weights only."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

START_LIMIT_S = 200


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def is_healthy(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def test_vllm_serve_answers_with_the_models_tokens(
    checkpoint: Path,
    oracle: Any,
    prompts: list[list[int]],
    engine_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [Path(sys.executable).parent / "vllm", "serve", checkpoint, "--skip-tokenizer-init"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "sala"]
    command += ["--enforce-eager", "--max-model-len", "2048", "--kv-cache-memory-bytes", "64M"]
    log_path = tmp_path / "log"
    with log_path.open("w") as log:
        server = subprocess.Popen(
            [str(part) for part in command],
            # the stock process layout: API server and engine apart
            env=engine_environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline_s = time.monotonic() + START_LIMIT_S
        base_url = f"http://127.0.0.1:{port}"
        while not is_healthy(base_url):
            assert server.poll() is None, log_path.read_text()[-5000:]
            assert time.monotonic() < deadline_s, log_path.read_text()[-5000:]
            time.sleep(0.5)
        body = {"model": "sala", "prompt": prompts[1], "max_tokens": 8, "temperature": 0}
        body |= {"return_token_ids": True, "ignore_eos": True}
        answer = post(f"{base_url}/v1/completions", body)
    finally:
        server.terminate()
        server.wait(timeout=60)
    tokens = answer["choices"][0]["token_ids"]
    assert tokens == oracle.next_tokens(prompts[1], tokens)
