"""What holds for every rendering: hardening, drains, selectors, ports, secrets, routes."""

from __future__ import annotations

import json
import re
import tempfile
import tomllib
from pathlib import Path

import yaml

from sala_serve.config import load_settings

ROOT = Path(__file__).parents[2]


def pods(objects):
    """Yield name, labels and specification of every pod that the objects lead to."""
    for each in objects:
        name = f"{each['kind']}/{each['metadata']['name']}"
        match each["kind"]:
            case "Pod":
                yield name, each["metadata"]["labels"], each["spec"]
            case "Deployment" | "StatefulSet":
                template = each["spec"]["template"]
                yield name, template["metadata"]["labels"], template["spec"]
            case "LeaderWorkerSet":
                group = each["spec"]["leaderWorkerTemplate"]
                for role in ("leaderTemplate", "workerTemplate"):
                    yield name, group[role]["metadata"]["labels"], group[role]["spec"]


def containers(objects):
    for name, _, spec in pods(objects):
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            yield f"{name}/{container['name']}", container


def of_kind(objects, *kinds):
    return [each for each in objects if each["kind"] in kinds]


def settings_of(objects):
    (text,) = [
        each["data"]["settings.toml"]
        for each in of_kind(objects, "ConfigMap")
        if "settings.toml" in each["data"]
    ]
    return text


def gateway_settings(objects):
    """Return what the gateway itself makes of its file, or fail as it would."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "settings.toml")
        path.write_text(settings_of(objects), encoding="utf-8")
        return load_settings({}, file=path)


def seconds_before_kill(spec):
    (container,) = spec["containers"]
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {})
    return spec["terminationGracePeriodSeconds"] - sleep.get("seconds", 0)


def longest_request_s(objects):
    return tomllib.loads(settings_of(objects))["deadlines"]["total_s"]


def test_pods_are_hardened(objects):
    for name, _, spec in pods(objects):
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
    for name, container in containers(objects):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
        assert "memory" in container["resources"]["limits"], name
        assert {"name": "HOME", "value": "/tmp"} in container["env"] or "redis" in name, name
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_images_name_a_version(objects):
    for name, container in containers(objects):
        assert re.search(r":[^:/]+$|@sha256:[0-9a-f]{64}$", container["image"]), name
        assert not container["image"].endswith(":latest"), name


def test_pods_end_after_the_longest_request(objects):
    longest_s = longest_request_s(objects)
    settings = gateway_settings(objects)
    assert settings.server.drain_timeout_s == longest_s == settings.deadlines.total_s
    assert max(settings.deadlines.model_dump().values()) <= longest_s
    served = [
        (labels["app.kubernetes.io/component"], spec)
        for _, labels, spec in pods(objects)
        if labels["app.kubernetes.io/component"] in ("gateway", "engine")
    ]
    assert {component for component, _ in served} == {"gateway", "engine"}
    for component, spec in served:
        assert seconds_before_kill(spec) > longest_s, component
    for name, container in containers(objects):
        if name.endswith("/engine"):
            assert f"--shutdown-timeout={longest_s}" in container["args"]


def test_selectors_match_pods_and_only_theirs(objects):
    labels_of = [(name, labels) for name, labels, _ in pods(objects)]

    def chosen(selector):
        return {
            name for name, labels in labels_of if selector and selector.items() <= labels.items()
        }

    for each in of_kind(objects, "Deployment", "StatefulSet"):
        selector = each["spec"]["selector"]["matchLabels"]
        assert chosen(selector) == {f"{each['kind']}/{each['metadata']['name']}"}
    for each in of_kind(objects, "Service"):
        assert len(chosen(each["spec"]["selector"])) == 1, each["metadata"]["name"]
    for each in of_kind(objects, "PodDisruptionBudget"):
        assert len(chosen(each["spec"]["selector"]["matchLabels"])) == 1, each["metadata"]["name"]
    policies = of_kind(objects, "NetworkPolicy")
    isolated = {
        name
        for each in policies
        for name in chosen(each["spec"]["podSelector"]["matchLabels"])
        if set(each["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    }
    assert isolated == {name for name, _ in labels_of if not name.startswith("Pod/")}
    for each in of_kind(objects, "PodMonitor"):
        assert chosen(each["spec"]["selector"]["matchLabels"])
    services = [each["metadata"]["labels"] for each in of_kind(objects, "Service")]
    for each in of_kind(objects, "ServiceMonitor"):
        selector = each["spec"]["selector"]["matchLabels"]
        assert sum(selector.items() <= labels.items() for labels in services) == 1


def test_every_port_has_a_name_that_is_found(objects):
    for name, labels, spec in pods(objects):
        ports = [port for each in spec["containers"] for port in each.get("ports", [])]
        assert all(port["name"] for port in ports), name
        known = {port["name"] for port in ports}
        for container in spec["containers"]:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                for how in ("httpGet", "tcpSocket"):
                    if target := container.get(probe, {}).get(how):
                        assert target["port"] in known, name
        for service in of_kind(objects, "Service"):
            if service["spec"]["selector"].items() <= labels.items():
                for port in service["spec"]["ports"]:
                    assert port["name"], name
                    assert port["targetPort"] in known, name
    ports_of = {
        each["metadata"]["name"]: each["spec"]["ports"] for each in of_kind(objects, "Service")
    }
    for route in of_kind(objects, "Ingress"):
        for path in (path for rule in route["spec"]["rules"] for path in rule["http"]["paths"]):
            backend = path["backend"]["service"]
            assert backend["port"]["name"] in {port["name"] for port in ports_of[backend["name"]]}
    for route in of_kind(objects, "HTTPRoute"):
        for backend in (each for rule in route["spec"]["rules"] for each in rule["backendRefs"]):
            assert backend["port"] in {port["port"] for port in ports_of[backend["name"]]}


def test_routes_from_outside_lead_to_the_api_only_and_are_patient(objects):
    for each in of_kind(objects, "Ingress"):
        paths = [path["path"] for rule in each["spec"]["rules"] for path in rule["http"]["paths"]]
        assert paths == ["/v1"]
        for direction in ("read", "send"):
            name = f"nginx.ingress.kubernetes.io/proxy-{direction}-timeout"
            assert int(each["metadata"]["annotations"][name]) >= longest_request_s(objects)
    for each in of_kind(objects, "HTTPRoute"):
        for rule in each["spec"]["rules"]:
            assert [match["path"]["value"] for match in rule["matches"]] == ["/v1"]
            for timeout in rule["timeouts"].values():
                assert timeout == "0s" or int(timeout[:-1]) >= longest_request_s(objects)


def test_no_secret_is_in_a_config_map(objects):
    secrets = {
        value
        for each in of_kind(objects, "Secret")
        for value in each.get("stringData", {}).values()
    }
    for each in objects:
        if each["kind"] != "Secret":
            text = json.dumps(each)
            assert not [secret for secret in secrets if secret in text], each["metadata"]["name"]
    for name, container in containers(objects):
        for variable in container.get("env", []):
            if re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"], f"{name} {variable['name']}"


def test_gateways_know_every_engine_by_a_name_that_its_service_gives(objects):
    settings = gateway_settings(objects)
    known = {each.engine_id: each.url for each in settings.engines}
    wanted = set()
    scaled = {
        each["spec"]["scaleTargetRef"]["name"]: each["spec"].get("maxReplicas")
        or each["spec"]["maxReplicaCount"]
        for each in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
    }
    for each in of_kind(objects, "StatefulSet", "LeaderWorkerSet"):
        name = each["metadata"]["name"]
        if "-engine-" not in name:
            continue
        service = each["spec"].get("serviceName", name)  # a LeaderWorkerSet's controller makes it
        assert ("replicas" in each["spec"]) is (name not in scaled)
        for number in range(scaled.get(name) or each["spec"]["replicas"]):
            wanted.add(f"http://{name}-{number}.{service}.llm.svc:8001")
    assert set(known.values()) == wanted
    for each in of_kind(objects, "Service"):
        if "-engine-" in each["metadata"]["name"]:
            assert each["spec"]["clusterIP"] == "None"
            assert each["spec"]["publishNotReadyAddresses"] is True


def test_scaling_follows_queued_tokens_and_goes_down_slowly(objects):
    from sala_serve.telemetry import METRICS

    names = {spec.full_name for spec in METRICS}
    for each in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        spec = each["spec"]
        if each["kind"] == "HorizontalPodAutoscaler":
            behavior = spec["behavior"]
            (metric,) = [metric["external"]["metric"]["name"] for metric in spec["metrics"]]
        else:
            behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
            (trigger,) = spec["triggers"]
            metric = re.fullmatch(r"sum\((\w+)\{.*\}\)", trigger["metadata"]["query"])[1]
            assert trigger["metricType"] == "AverageValue"
        assert metric == "sala_gateway_queued_tokens"
        assert metric in names
        window_s = behavior["scaleDown"]["stabilizationWindowSeconds"]
        assert longest_request_s(objects) <= window_s <= 3600


def test_settings_change_restarts_gateways_and_nothing_else(chart):
    def checksums(values):
        return {
            each["metadata"]["name"]: each["spec"]["template"]["metadata"].get("annotations")
            for each in of_kind(chart.render(values), "Deployment", "StatefulSet")
        }

    before = checksums(None)
    after = checksums({"gateway": {"settings": {"server": {"max_running_requests": 7}}}})
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"sala-serve"}


def test_alerts_and_dashboards_are_the_ones_of_the_project(chart):
    monitoring = {
        "serviceMonitor": {"enabled": True},
        "podMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True},
        "dashboards": {"enabled": True},
    }
    objects = chart.render({"metrics": monitoring})
    (rule,) = of_kind(objects, "PrometheusRule")
    alerts = yaml.safe_load((ROOT / "helm/alerts/sala-serve.yaml").read_text(encoding="utf-8"))
    assert rule["spec"]["groups"] == alerts["groups"]
    (dashboards,) = [
        each["data"]
        for each in of_kind(objects, "ConfigMap")
        if each["metadata"]["name"].endswith("-dashboards")
    ]
    assert dashboards == {
        path.name: path.read_text(encoding="utf-8")
        for path in (ROOT / "helm/dashboards").glob("*.json")
    }


def test_alert_about_a_missing_engine_is_left_out_where_engines_come_and_go(chart):
    objects = chart.render(ROOT / "helm/sala-serve/examples/multi-tenant.yaml")
    (rule,) = of_kind(objects, "PrometheusRule")
    names = [each["alert"] for group in rule["spec"]["groups"] for each in group["rules"]]
    assert "SalaNoEngine" in names
    assert "SalaEngineDown" not in names
