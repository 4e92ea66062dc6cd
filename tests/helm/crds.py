"""Strict schemas of the kinds that Kubernetes itself does not have, as far as the chart uses them.

Written after the custom resource definitions of Gateway API 1.x, the Prometheus operator 0.93, KEDA 2.20 and
LeaderWorkerSet 0.7; what the chart does not use is left out, and so refused.
"""

from __future__ import annotations

from typing import Any

TEXT, WHOLE = {"type": "string", "minLength": 1}, {"type": "integer"}
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
DURATION = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}


def thing(required: str, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object; ``required`` names fields with spaces between."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


def some(items: Any, least: int = 1) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


METADATA = thing("name namespace labels", name=TEXT, namespace=TEXT, labels=LABELS)
SELECTOR = thing("matchLabels", matchLabels=LABELS)
ENDPOINT = thing(
    "port path interval",
    port=TEXT,
    path={"type": "string", "pattern": "^/"},
    interval={"type": "string", "pattern": "^[1-9][0-9]*(s|m)$"},
)
RULE = thing(
    "alert expr",
    alert=TEXT,
    expr=TEXT,
    labels=LABELS,
    annotations=LABELS,
    **{"for": {"type": "string", "pattern": "^[0-9]+(s|m|h)$"}},
)
POLICIES = some(
    thing(
        "type value periodSeconds", type={"enum": ["Pods", "Percent"]}, value=WHOLE,
        periodSeconds={"type": "integer", "minimum": 1, "maximum": 1800},
    )
)  # fmt: skip
SCALING = thing(
    "stabilizationWindowSeconds policies",
    stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
    policies=POLICIES,
    selectPolicy={"enum": ["Max", "Min", "Disabled"]},
)
POD = {"type": "object", "required": ["metadata", "spec"]}
"""Its parts are checked as a Pod's."""

SPECS: dict[tuple[str, str], dict[str, Any]] = {
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): thing(
        "parentRefs rules",
        parentRefs=some(thing("name", name=TEXT, namespace=TEXT, sectionName=TEXT)),
        hostnames=some(TEXT),
        rules=some(
            thing(
                "matches backendRefs timeouts",
                matches=some(
                    thing(
                        "path",
                        path=thing(
                            "type value",
                            type={"enum": ["Exact", "PathPrefix", "RegularExpression"]},
                            value=TEXT,
                        ),
                    )
                ),
                backendRefs=some(thing("name port", name=TEXT, port=WHOLE)),
                timeouts=thing("request", request=DURATION, backendRequest=DURATION),
            )
        ),
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): thing(
        "selector endpoints",
        selector=SELECTOR,
        endpoints=some(ENDPOINT),
        namespaceSelector=thing("matchNames", matchNames=some(TEXT)),
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): thing(
        "selector podMetricsEndpoints",
        selector=SELECTOR,
        podMetricsEndpoints=some(ENDPOINT),
        namespaceSelector=thing("matchNames", matchNames=some(TEXT)),
        podTargetLabels=some(TEXT),
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): thing(
        "groups", groups=some(thing("name rules", name=TEXT, rules=some(RULE)))
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): thing(
        "scaleTargetRef triggers",
        scaleTargetRef=thing("name", apiVersion=TEXT, kind=TEXT, name=TEXT),
        pollingInterval=WHOLE,
        minReplicaCount=WHOLE,
        maxReplicaCount=WHOLE,
        advanced=thing(
            "horizontalPodAutoscalerConfig",
            horizontalPodAutoscalerConfig=thing(
                "behavior", behavior=thing("", scaleUp=SCALING, scaleDown=SCALING)
            ),
        ),
        triggers=some(
            thing(
                "type metadata",
                type={"const": "prometheus"},
                metricType={"enum": ["AverageValue", "Value"]},
                metadata=thing(
                    "serverAddress query threshold",
                    serverAddress=TEXT,
                    query=TEXT,
                    threshold=TEXT,
                    activationThreshold=TEXT,
                ),
            )
        ),
    ),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): thing(
        "leaderWorkerTemplate",
        replicas=WHOLE,
        rolloutStrategy=thing(
            "type",
            type={"const": "RollingUpdate"},
            rollingUpdateConfiguration=thing("", maxUnavailable=WHOLE, maxSurge=WHOLE),
        ),
        leaderWorkerTemplate=thing(
            "workerTemplate",
            size={"type": "integer", "minimum": 1},
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "None"]},
            leaderTemplate=POD,
            workerTemplate=POD,
        ),
    ),
}


def schema_of(api_version: str, kind: str) -> dict[str, Any] | None:
    """Return the schema of a whole object, None for a kind that is not here."""
    if (spec := SPECS.get((api_version, kind))) is None:
        return None
    return thing("metadata spec", apiVersion=TEXT, kind=TEXT, metadata=METADATA, spec=spec)
