"""Turn pip's resolution report into a lock file, without the packages that must never arrive.

Run by ``scripts/lock``. What only an excluded package asks for is left out with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

PROJECT = canonicalize_name("sala-serve")

EXCLUDED = {
    # the PyPI builds are CUDA ones; beside a CPU torch they break `import transformers`
    "torchvision",
    "torchaudio",
    "torchcodec",
    # deploys to a vendor's cloud; brings telemetry and five packages, and nothing imports it
    "fastapi-cloud-cli",
}

HEADER = """\
# Every package of the CPU environment; installed by scripts/install with `pip install --no-deps`.
# Written by scripts/lock (`make lock`) on Python {python}, {platform}. Do not edit by hand.
# Left out on purpose, with what only they need: {excluded}.
"""


def required_names(
    packages: dict[NormalizedName, dict[str, Any]], environment: dict[str, str], extras: set[str]
) -> set[NormalizedName]:
    """Return every package that the project with ``extras`` reaches without passing an excluded one."""
    seen: set[tuple[NormalizedName, str]] = set()
    todo = [(PROJECT, extra) for extra in {"", *extras}]
    while todo:
        name, extra = node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        for line in packages[name].get("requires_dist", []):
            requirement = Requirement(line)
            target = canonicalize_name(requirement.name)
            marker = requirement.marker
            wanted = marker is None or marker.evaluate({**environment, "extra": extra})
            if wanted and target not in EXCLUDED:
                todo += [(target, wish) for wish in {"", *requirement.extras}]
    return {name for name, _ in seen} - {PROJECT}


def main() -> None:
    """Print the lock file for the report named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="file written by `pip install --report`")
    report = json.loads(parser.parse_args().report.read_text(encoding="utf-8"))
    packages = {canonicalize_name(i["metadata"]["name"]): i["metadata"] for i in report["install"]}
    extras = {extra for i in report["install"] if i["requested"] for extra in i["requested_extras"]}
    environment = report["environment"]
    header = HEADER.format(
        python=environment["python_version"],
        platform=f"{environment['platform_system']} {environment['platform_machine']}",
        excluded=", ".join(sorted(EXCLUDED)),
    )
    print(header, end="")
    for name in sorted(required_names(packages, environment, extras)):
        print(f"{name}=={packages[name]['version']}")


if __name__ == "__main__":
    main()
