"""The images cannot be built here: their files are linted, and what they run is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "helm/containers").glob("*.Containerfile"))


def instructions(path):
    """Return name and text of each instruction, with lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", "\n")
    parts = re.split(r"^([A-Z]+) ", text, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_is_linted(path):
    hadolint = Path(sys.executable).with_name("hadolint")
    process = subprocess.run([hadolint, path], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stdout


def test_lint_finds_a_planted_mistake(tmp_path):
    path = tmp_path / "Containerfile"
    path.write_text("FROM python\nRUN cd /x && sudo pip install a\n")
    hadolint = Path(sys.executable).with_name("hadolint")
    process = subprocess.run([hadolint, path], capture_output=True, text=True, timeout=60)
    assert process.returncode != 0
    assert {"DL3006", "DL3004"} <= set(re.findall(r"DL\d+", process.stdout))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_images_are_pinned_not_root_and_start_the_program(path):
    found = instructions(path)
    names = [name for name, _ in found]
    for name, text in found:
        if name == "FROM":
            assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-bookworm( AS build)?", text)
    (user,) = [text for name, text in found if name == "USER"]
    assert user == "10001:10001"
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert ("ENTRYPOINT", '["sala-serve"]') in found
    for name, text in found:
        if name == "COPY" and "--from" not in text:
            *sources, _ = text.split()
            assert all((ROOT / source).exists() for source in sources), text


@pytest.mark.slow
def test_gateway_image_is_what_its_steps_make(tmp_path):
    """Its first stage, run in a folder and a virtual environment instead of an image."""
    source, venv = tmp_path / "src", tmp_path / "venv"
    stage = instructions(ROOT / "helm/containers/gateway.Containerfile")
    stage = stage[: [name for name, _ in stage].index("FROM", 1)]
    for name, text in stage:
        if name == "COPY":
            *sources, target = text.split()
            for each in sources:
                place = source / (each if target == "./" else target)
                place.parent.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
                copy(ROOT / each, place)
    (run,) = [text for name, text in stage if name == "RUN"]
    run = run.replace("/opt/venv", str(venv)).replace("python -m", f"{sys.executable} -m")
    process = subprocess.run(
        ["sh", "-ec", run], cwd=source, capture_output=True, text=True, timeout=500,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    packages = {
        path.name.partition("-")[0] for path in venv.glob("lib/*/site-packages/*.dist-info")
    }
    assert "sala_serve" in packages
    assert not {"torch", "vllm", "transformers", "pytest"} & packages
    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements/cpu.lock").read_text().splitlines()
        if not line.startswith("#")
    )
    names = {name.replace("-", "_").lower() for name in pins}
    assert {name.lower() for name in packages} - {"pip", "setuptools", "sala_serve"} <= names
