"""What a process of the benchmark needs to find the project and to start vLLM on a host without a network."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SOURCES = (ROOT, ROOT / "kernels", ROOT / "training", ROOT / "kernels/bench")
PLUGIN_GROUP = "vllm.general_plugins"
PLUGINS = {
    "sala": ("sala_serve", "vllm_ext:register"),
    "sala_random_weights": ("sala_bench", "gpu.random_weights:register"),
}
"""Entry point -> distribution that declares it, and its target."""
PACKAGES = ("torch", "triton", "vllm", "fla-core")
"""Whose versions are stored, where they are installed."""
VARIABLES = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def declare_plugins(folder: Path) -> None:
    """Write the metadata by which vLLM finds plugins, for those that no installed package declares.

    Args:
        folder: goes on PYTHONPATH; made if needed.
    """
    installed = {entry.name for entry in entry_points(group=PLUGIN_GROUP)}
    for name, (distribution, target) in PLUGINS.items():
        if name in installed:
            continue
        metadata = folder / f"{distribution}-0.1.0.dist-info"
        metadata.mkdir(parents=True, exist_ok=True)
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution.replace('_', '-')}\nVersion: 0.1.0\n"
        )
        (metadata / "entry_points.txt").write_text(f"[{PLUGIN_GROUP}]\n{name} = {target}\n")


def child_environment(out: Path) -> dict[str, str]:
    """Return the environment of a stage; it declares the plugins under ``out``."""
    site = out / "site"
    declare_plugins(site)
    paths = [str(site), *map(str, SOURCES)]
    if inherited := os.environ.get("PYTHONPATH"):
        paths.append(inherited)
    return os.environ | VARIABLES | {"PYTHONPATH": os.pathsep.join(paths)}


def commit() -> str:
    """Return the commit and whether the measured code differs from it; "unknown" without git."""
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    try:
        read = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "kernels", "vllm_ext"],
            capture_output=True,
            check=False,
        )
    except OSError:
        return "unknown"
    if read.returncode:
        return "unknown"
    return read.stdout.strip() + ("+changes" if changed.returncode else "")


def gpu_field(name: str) -> str | None:
    """Return one field of ``nvidia-smi --query-gpu`` of the first GPU; None where there is none."""
    query = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        read = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return None
    return read.stdout.strip() if read.returncode == 0 else None


def package_version(name: str) -> str | None:
    """Return an installed package's version, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def conditions() -> dict[str, Any]:
    """Return what the figures depend on besides a stage's settings."""
    return {
        "device": gpu_field("name") or "cpu",
        "driver": gpu_field("driver_version"),
        "memory_mib": gpu_field("memory.total"),
        "versions": {name: number for name in PACKAGES if (number := package_version(name))},
        "commit": os.environ.get("BENCH_COMMIT") or commit(),
    }
