"""What KubeRay's operator refuses: by the schemas of its resources, and by the rules of its controller.

The rules are those of `ray-operator/controllers/ray/utils/validation.go` (v1.7, all feature gates as they are by
default), as far as our manifests come near them.
"""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Document = dict[str, Any]

_CRDS = Path(__file__).with_name("crds")
_LONGEST = {"RayCluster": 53, "RayJob": 47}
"""Characters of a name, from which those of pods and services are made."""
_MODES = {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}
_RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}


def closed(schema: Any) -> Any:
    """Turn Kubernetes' dialect into JSON Schema that refuses unknown keys."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        pattern = {"pattern": schema["pattern"]} if "pattern" in schema else {}
        return {"anyOf": [{"type": "integer"}, {"type": "string", **pattern}]}
    result = {key: closed(value) for key, value in schema.items() if key not in ("format", "properties")}
    if "properties" in schema:
        result["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    return result


def schema_of(kind: str) -> Document:
    """Read the schema of a RayCluster or RayJob."""
    schema = closed(json.loads(gzip.decompress((_CRDS / f"{kind.lower()}.json.gz").read_bytes())))
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema


def problems(document: Document) -> list[str]:
    """Return everything that is wrong with a RayCluster or RayJob, each with its place."""
    errors = jsonschema.Draft202012Validator(schema_of(document["kind"])).iter_errors(document)
    found = ["{}: {}".format("/".join(map(str, error.absolute_path)), error.message) for error in errors]
    return found or list(_broken_rules(document))


def _broken_rules(document: Document) -> Iterator[str]:
    kind, name, spec = document["kind"], document["metadata"]["name"], document["spec"]
    if len(name) > _LONGEST[kind]:
        yield f"the name has more than {_LONGEST[kind]} characters"
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield "the name is no DNS-1035 label"
    if kind == "RayJob":
        yield from _broken_rules_of_a_job(spec)
        spec = spec["rayClusterSpec"]
    yield from _broken_rules_of_a_cluster(spec)


def _broken_rules_of_a_job(spec: Document) -> Iterator[str]:
    if spec["submissionMode"] not in _MODES:
        yield f"submissionMode is none of {sorted(_MODES)}"
    if spec.get("ttlSecondsAfterFinished", 0) and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if spec.get("backoffLimit", 0) and (spec.get("clusterSelector") or spec["submissionMode"] == "InteractiveMode"):
        yield "backoffLimit makes new clusters: not with clusterSelector or InteractiveMode"
    if spec["submissionMode"] == "SidecarMode" and ("submitterConfig" in spec or "submitterPodTemplate" in spec):
        yield "SidecarMode has no submitter of its own"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield f"{key} is not above 0"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"
    if spec["rayClusterSpec"].get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is not for a RayJob"


def _broken_rules_of_a_cluster(spec: Document) -> Iterator[str]:
    groups = [("head", spec["headGroupSpec"]), *((group["groupName"], group) for group in spec["workerGroupSpecs"])]
    for name, group in groups:
        params = group.get("rayStartParams", {})
        if _RESOURCES & params.keys() and group.get("resources"):
            yield f"{name}: resources in rayStartParams and in the group"
        if "labels" in params:
            yield f"{name}: labels belong to the group"
        if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
            yield f"{name}: minReplicas above maxReplicas"
        version = spec.get("autoscalerOptions", {}).get("version")
        if version == "v2" and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: restartPolicy is not for autoscaler v2"
    head = {variable["name"] for variable in spec["headGroupSpec"]["template"]["spec"]["containers"][0].get("env", [])}
    if head & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}:
        yield "head: what the operator sets itself is in env"
    storage = spec.get("gcsFaultToleranceOptions", {})
    if storage.get("backend") == "rocksdb":
        yield "the backend rocksdb needs a feature gate that is off"
    if "storage" in storage:
        yield "gcsFaultToleranceOptions.storage is for rocksdb"
    for key in ("networkPolicy", "tlsOptions", "historyServerOptions"):
        if key in spec:
            yield f"{key} needs a feature gate that is off"
    if spec.get("authOptions", {}).get("mode") == "token" and _version(spec.get("rayVersion", "0")) < (2, 52):
        yield "token authentication needs rayVersion 2.52"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
