"""What scripts/install promises about the environment that these tests run in."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_vllm_command_line_starts() -> None:
    vllm = Path(sys.executable).with_name("vllm")
    assert "--served-model-name" in run(str(vllm), "serve", "--help=all")


@pytest.mark.slow
def test_vllm_imports_and_sees_a_cpu() -> None:
    code = (
        "from vllm import LLM; from vllm.platforms import current_platform as p; print(p.is_cpu())"
    )
    assert run(sys.executable, "-P", "-c", code).split() == ["True"]


def test_vllm_plugins_are_announced_once() -> None:
    found = metadata.entry_points(group="vllm.general_plugins")
    assert len({point.name for point in found}) == len(found)
    assert "sala" in {point.name for point in found}


@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "torchcodec"])
def test_cuda_companions_of_torch_stay_out(name: str) -> None:
    assert find_spec(name) is None


def test_environment_is_the_lock_file() -> None:
    lines = (ROOT / "requirements/cpu.lock").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: metadata.version(name) for name in pins} == pins
    assert list(pins) == sorted(pins)
