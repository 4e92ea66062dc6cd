"""The chart, rendered by the real helm command."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "sala-serve"


def load_script(name: str) -> Any:
    """Import a file of scripts/, which is no package."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


HELM_CLI = load_script("helm_cli")
PRODUCTS = load_script("chart")
"""Writes what follows from values.yaml and the code."""
APIS: tuple[str, ...] = PRODUCTS.API_VERSIONS


class Refused(Exception):  # noqa: N818 - named for what happened
    """Helm refuses these values; the message is its own."""


@dataclass
class Chart:
    """Renders values; the same ones once."""

    helm: Path
    folder: Path
    _known: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False)
    num_runs: int = 0

    Refused = Refused

    def run(self, *arguments: str) -> str:
        """Run helm; return its output."""
        process = subprocess.run(
            [self.helm, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"HELM_CACHE_HOME": str(self.folder)},
        )
        if process.returncode:
            raise Refused(process.stderr)
        return process.stdout

    def render(
        self,
        values: dict[str, Any] | Path | None = None,
        *,
        apis: tuple[str, ...] = APIS,
        kube_version: str = "1.37.0",
        release: str = "sala-serve",
    ) -> list[dict[str, Any]]:
        """Return the objects that helm makes of values, or of a file of them.

        Raises:
            Refused: the schema or a template refuses them.
        """
        key = json.dumps([str(values) if isinstance(values, Path) else values, apis, release])
        key += kube_version
        if key in self._known:
            return self._known[key]
        path = values
        if not isinstance(path, Path):
            self.num_runs += 1
            path = self.folder / f"values-{self.num_runs}.json"
            path.write_text(json.dumps(values or {}))
        arguments = ["template", release, str(CHART), "--namespace", "llm", "--values", str(path)]
        arguments += ["--kube-version", kube_version, "--api-versions", ",".join(apis)]
        text = self.run(*arguments)
        documents = [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]
        self._known[key] = documents
        return documents


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Chart:
    try:
        helm = HELM_CLI.helm_path()
    except HELM_CLI.HelmUnavailable as error:
        pytest.skip(f"no helm: the chart is NOT rendered ({error})")
    return Chart(helm, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def products() -> Any:
    return PRODUCTS


EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))


@pytest.fixture(params=[None, *EXAMPLES], ids=["defaults", *(path.stem for path in EXAMPLES)])
def objects(request: pytest.FixtureRequest, chart: Chart) -> list[dict[str, Any]]:
    """What the defaults and each example become."""
    return chart.render(request.param)


@pytest.fixture(scope="session")
def validate() -> Callable[[list[dict[str, Any]], str], None]:
    """Check objects against the strict schemas of a Kubernetes version, or of a resource definition."""
    spec = importlib.util.spec_from_file_location("crds", Path(__file__).parent / "crds.py")
    assert spec is not None
    assert spec.loader is not None
    crds = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(crds)

    def check(objects: list[dict[str, Any]], version: str) -> None:
        for each in objects:
            schema = crds.schema_of(each["apiVersion"], each["kind"])
            if schema is None:
                kubernetes_validate.validate(each, version, strict=True)
                continue
            jsonschema.validate(each, schema)
            if each["kind"] == "LeaderWorkerSet":
                group = each["spec"]["leaderWorkerTemplate"]
                for role in ("leaderTemplate", "workerTemplate"):
                    metadata = {"name": role, **group[role]["metadata"]}
                    pod = {"apiVersion": "v1", "kind": "Pod", **group[role], "metadata": metadata}
                    kubernetes_validate.validate(pod, version, strict=True)

    return check
