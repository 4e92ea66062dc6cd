"""Write what of the chart follows from values.yaml and the code: README.md, values.schema.json, rendered examples.

``scripts/chart.py`` writes them, ``scripts/chart.py --check`` says which are not as they would be written.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import yaml
from helm_cli import helm_path

from sala_serve.config import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

CHART = Path(__file__).parents[1] / "helm" / "sala-serve"
API_VERSIONS = (
    "monitoring.coreos.com/v1",
    "gateway.networking.k8s.io/v1",
    "keda.sh/v1alpha1",
    "leaderworkerset.x-k8s.io/v1",
)
"""Of the kinds that a cluster may lack."""
SECRET_SETTINGS = {
    ("server", "api_keys"),
    ("tenants", "secret"),
    ("tenants", "secret_file"),
    ("admin", "token"),
    ("state", "url"),
}
"""They come from the Secret: a ConfigMap is no place for them."""
CHART_SETTINGS = {
    ("server", "host"),
    ("server", "port"),
    ("server", "drain_timeout_s"),
    ("admin", "host"),
    ("admin", "port"),
    ("tokens", "tokenizer"),
}
"""Probes, Services and grace periods depend on them."""

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
OBJECT, OBJECTS = {"type": "object"}, {"type": "array", "items": {"type": "object"}}
NAME = {"type": "string", "pattern": "^([a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?)?$"}
KEY = {"type": "string", "pattern": "^[-._a-zA-Z0-9]{1,253}$"}
QUANTITY = {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
AMOUNT = {"anyOf": [QUANTITY, {"type": "integer", "minimum": 0}]}
AMOUNTS = {"type": "object", "additionalProperties": AMOUNT}
COUNT = {"type": "integer", "minimum": 1, "maximum": 1000}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
SECONDS = {"type": "integer", "minimum": 0, "maximum": 86400}
SHARE = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": 1000},
        {"type": "string", "pattern": "^[0-9]{1,2}%$"},
    ]
}
INTERVAL = {"type": "string", "pattern": "^[1-9][0-9]{0,3}(s|m)$"}
PRINTABLE = "^[ -~]*$"

BY_NAME: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("commonLabels", "podLabels", "podAnnotations", "annotations", "nodeSelector", "labels"),
        TEXTS,
    ),
    **dict.fromkeys(("tolerations", "topologySpreadConstraints", "extraEnv"), OBJECTS),
    **dict.fromkeys(("extraVolumes", "extraVolumeMounts", "extraObjects", "parentRefs"), OBJECTS),
    **dict.fromkeys(("clients", "admins", "scrapers", "gatewayEgress", "engineEgress"), OBJECTS),
    **dict.fromkeys(("existingSecret", "tlsSecret", "existingClaim", "claimName"), NAME),
    **dict.fromkeys(
        ("nameOverride", "fullnameOverride"),
        {"type": "string", "pattern": "^([a-z]([-a-z0-9]{0,38}[a-z0-9])?)?$"},
    ),
    **dict.fromkeys(("priorityClassName", "runtimeClassName", "storageClass", "className"), NAME),
    **dict.fromkeys(("adminTokenKey", "serverSecretKey", "redisPasswordKey", "apiKeysKey"), KEY),
    **dict.fromkeys(("urlKey", "tokenKey", "key"), KEY),
    **dict.fromkeys(("size", "shmSize", "tmpSize"), QUANTITY),
    **dict.fromkeys(("requests", "limits"), AMOUNTS),
    **dict.fromkeys(("minReplicas", "maxReplicas", "nodes", "tensorParallelSize"), COUNT),
    **dict.fromkeys(("preStopSeconds", "marginSeconds", "requestTimeoutSeconds"), SECONDS),
    "imagePullSecrets": {"type": "array", "items": {**NAME, "minLength": 1}},
    "affinity": OBJECT,
    "longestRequestSeconds": {"type": "integer", "minimum": 60, "maximum": 86400},
    "terminationGracePeriodSeconds": {"anyOf": [SECONDS, {"type": "null"}]},
    "maxPositionEmbeddings": {"anyOf": [COUNT | {"maximum": 1 << 30}, {"type": "null"}]},
    "startupSeconds": {"type": "integer", "minimum": 10, "maximum": 86400},
    "queuedTokensPerReplica": {"type": "integer", "minimum": 1, "maximum": 1 << 40},
    "replicas": {"type": "integer", "minimum": 0, "maximum": 1000},
    "maxUnavailable": SHARE,
    "interval": INTERVAL,
    "port": PORT,
    "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "repository": {"type": "string", "pattern": "^([A-Za-z0-9]+([._/-]+[A-Za-z0-9]+)*)?$"},
    "tag": {"type": "string", "pattern": "^([A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$"},
    **dict.fromkeys(
        ("registry", "imageRegistry"),
        {"type": "string", "pattern": "^([A-Za-z0-9]+([.:/-][A-Za-z0-9]+)*)?$"},
    ),
    "sha256": {"type": "string", "pattern": "^([0-9a-f]{64})?$"},
    "revision": {"type": "string", "pattern": "^([0-9a-f]{40})?$"},
    "url": {"type": "string", "pattern": "^(https?://[!-~]+)?$"},
    "prometheusAddress": {"type": "string", "pattern": "^https?://[!-~]+$"},
    "metricName": {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_.-]*$"},
    "source": {"enum": ["pvc", "uri", "hub"]},
    "profile": {"enum": ["gpu", "cpu"]},
    "mode": {"enum": ["internal", "external", "none"]},
    "dtype": {"enum": ["", "auto", "float32", "bfloat16", "float16"]},
    "path": {"type": "string", "pattern": "^[-._/A-Za-z0-9]*$"},
    "servedModelName": {"type": "string", "pattern": "^[-._/:A-Za-z0-9]{0,128}$"},
    "maxModelLen": {"type": "string", "pattern": "^([0-9]+[kKmM]?|auto)?$"},
    "gpuResource": {"type": "string", "pattern": "^([a-z0-9.-]+/[A-Za-z0-9._-]+)?$"},
    "extraArgs": {"type": "array", "items": {"type": "string", "pattern": PRINTABLE}},
    "hostnames": {"type": "array", "items": {**NAME, "minLength": 1}},
    "host": NAME,
    "value": {"type": "integer", "minimum": -2147483648, "maximum": 1000000000},
}
BY_PATH: dict[str, dict[str, Any]] = {
    "gateway.service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "engine.defaults.autoscaling.type": {"enum": ["none", "hpa", "keda"]},
    "gateway.replicas": COUNT,
}
POOL_NAME = "^[a-z]([-a-z0-9]{0,18}[a-z0-9])?$"


def values_schema() -> dict[str, Any]:
    """Return the schema of values.yaml: what is not in there is refused, at every level."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    schema = _of(values, ())
    sections = schema["properties"]
    sections["gateway"]["properties"]["settings"] = _settings_schema()
    engine = sections["engine"]["properties"]
    profiles = engine["profiles"]["properties"]
    engine["profiles"]["properties"] = {name: {"$ref": "#/$defs/profile"} for name in profiles}
    pool = engine["defaults"] | {
        "type": ["object", "null"],  # null removes a pool
        "properties": engine["defaults"]["properties"] | profiles["gpu"]["properties"],
    }
    engine["pools"] = {
        "type": "object",
        "propertyNames": {"pattern": POOL_NAME},
        "additionalProperties": {"$ref": "#/$defs/pool"},
    }
    # helm adds it to the values of every chart
    sections["global"]["type"] = "object"
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart sala-serve",
        **schema,
        "$defs": {"pool": pool, "profile": profiles["gpu"]},
    }


def _of(value: Any, path: tuple[str, ...]) -> dict[str, Any]:
    dotted, name = ".".join(path), path[-1] if path else ""
    if known := BY_PATH.get(dotted) or BY_NAME.get(name):
        return known
    match value:
        case dict():
            return {
                "type": "object",
                "additionalProperties": False,
                "properties": {key: _of(each, (*path, key)) for key, each in value.items()},
            }
        case bool():
            return {"type": "boolean"}
        case str():
            return {"type": "string", "pattern": PRINTABLE}
    raise ValueError(f"{dotted}: expected an entry in BY_NAME or BY_PATH")


def _settings_schema() -> dict[str, Any]:
    """Return the schema of the gateway's settings, as its code has them, less those that are not the user's."""
    sections = {}
    for name, definition in Settings.model_fields.items():
        kind: Any = definition.annotation
        if name == "engines":  # the chart lists them
            continue
        left_out = {each for section, each in SECRET_SETTINGS | CHART_SETTINGS if section == name}
        fields = {each: field for each, field in kind.model_fields.items() if each not in left_out}
        if fields:
            sections[name] = _section_schema(kind, left_out)
    return {"type": "object", "additionalProperties": False, "properties": sections}


def _section_schema(kind: Any, left_out: set[str]) -> dict[str, Any]:
    if left_out & set(kind.model_fields):
        fields = {
            name: (field.annotation, field)
            for name, field in kind.model_fields.items()
            if name not in left_out
        }
        create_model: Any = pydantic.create_model  # its overloads know no mapping of fields
        kind = create_model(kind.__name__, __config__=pydantic.ConfigDict(extra="forbid"), **fields)
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})
    plain: dict[str, Any] = _plain(schema, definitions)
    return plain


def _plain(schema: Any, definitions: Any) -> Any:
    """Return the schema without references, titles and defaults."""
    if isinstance(schema, list):
        return [_plain(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if reference := schema.get("$ref"):
        return _plain(definitions[reference.rpartition("/")[2]], definitions)
    plain = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties"):
            plain[key] = {name: _plain(each, definitions) for name, each in value.items()}
        elif key not in ("title", "default", "description", "format"):
            plain[key] = _plain(value, definitions)
    return plain


def readme() -> str:
    """Return README.md: what the chart is, and its values by section."""
    lines = [README_HEAD]
    rows: list[tuple[str, str, str]] = []
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in (CHART / "values.yaml").read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("# -- "):
            comment = [text[5:]]
        elif text.startswith("#") and comment:
            comment.append(text[1:].strip())
        elif match := re.match(r"( *)([A-Za-z0-9]+):", line):
            indent = len(match[1])
            path = [each for each in path if each[0] < indent] + [(indent, match[2])]
            if comment:
                keys = [key for _, key in path]
                value: Any = values
                for key in keys:
                    value = value[key]
                rows.append((".".join(keys), json.dumps(value), " ".join(comment)))
            comment = []
    section = ""
    for key, default, meaning in rows:
        if (top := key.partition(".")[0]) != section and "." in key:
            section = top
            lines += [
                "",
                f"### `{top}`",
                "",
                "| value | default | meaning |",
                "| --- | --- | --- |",
            ]
        elif not section:
            section = " "
            lines += ["", "| value | default | meaning |", "| --- | --- | --- |"]
        elif "." not in key and top != section and section != " ":
            section = " "
            lines += ["", "### More", "", "| value | default | meaning |", "| --- | --- | --- |"]
        lines.append(f"| `{key}` | `{default}` | {meaning} |")
    return "\n".join(lines) + "\n"


README_HEAD = """\
# The chart sala-serve

Gateways, engine pools, Redis, and what Kubernetes wants beside them. [docs/deploy.md](../../docs/deploy.md) goes from nothing to a
deployment for several tenants, and says what was tried and what could not be. `examples/` holds values, `examples/rendered/`
what they become. This page is made from the comments of `values.yaml` by `scripts/chart.py`.

- **A pool** is a StatefulSet of engines (a LeaderWorkerSet where one engine lies on several nodes). The gateways know each engine by
  the name of its pod and look for themselves which are ready; one that does not run is down and costs nothing.
- **Time**: `longestRequestSeconds` is the one number. Deadlines, drains, grace periods, proxies' timeouts and the stabilisation of
  scaling down follow from it; values that contradict it are refused when the chart is rendered.
- **Secrets**: one Secret, made by you, named by `auth.existingSecret`. A setting that is a secret is refused in `gateway.settings`.
- **Only `/v1`** is routed from outside. Metrics, probes and the admin API stay in the cluster.

## Values"""


def rendered(example: Path) -> str:
    """Return what helm makes of an example."""
    command = [str(helm_path()), "template", "sala-serve", str(CHART), "--namespace", "llm"]
    command += ["--values", str(example), "--api-versions", ",".join(API_VERSIONS)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if process.returncode:
        raise ValueError(f"{example.name}: {process.stderr}")
    return process.stdout


def products() -> Iterator[tuple[Path, str]]:
    """Yield every file that this writes with what it should hold; the schema before helm reads it."""
    yield CHART / "README.md", readme()
    yield CHART / "values.schema.json", json.dumps(values_schema(), indent=1) + "\n"
    for example in sorted((CHART / "examples").glob("*.yaml")):
        yield CHART / "examples/rendered" / example.name, rendered(example)


def main() -> int:
    """Write the files, or compare them."""
    checks = "--check" in sys.argv
    num_differing = 0
    for path, text in products():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        num_differing += 1
        if checks:
            print(f"{path}: run scripts/chart.py")
        else:
            path.write_text(text, encoding="utf-8")
    return int(checks and num_differing > 0)


if __name__ == "__main__":
    sys.exit(main())
