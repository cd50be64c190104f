"""The manifests for Kubernetes: what KubeRay would refuse, and what we promise of them."""

import copy
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppo_ray.config import RayConfig
from tests.cluster.kuberay import Document, problems

FOLDER = Path(__file__).parents[2] / "cluster" / "kuberay"
PROMISED = ("rayjob.yaml", "raycluster.yaml")


def documents(name: str) -> list[Document]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def cluster_spec(name: str) -> Document:
    (document,) = documents(name)
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


def pods(name: str) -> dict[str, Document]:
    """Return the pod specs of a manifest by the names of their groups."""
    spec = cluster_spec(name)
    groups = {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def variables(pod: Document) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}


def gibibytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("name", PROMISED)
def test_kuberay_accepts_it(name: str) -> None:
    (document,) = documents(name)
    assert problems(document) == []


def change(**values: Any) -> Callable[[Document], None]:
    """Return what sets keys of a RayJob's spec: `rayClusterSpec__rayVersion="1"` sets one further down."""

    def apply(document: Document) -> None:
        for path, value in values.items():
            node, keys = document["spec"], path.split("__")
            for key in keys[:-1]:
                node = node[int(key)] if isinstance(node, list) else node[key]
            node[keys[-1]] = value

    return apply


WORKER = "rayClusterSpec__workerGroupSpecs__0__"
HEAD = "rayClusterSpec__headGroupSpec__template__spec__"


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        (change(entrypoints="x"), "entrypoints"),
        (change(submissionMode="Batch"), "submissionMode is none of"),
        (change(backoffLimit="3"), "spec/backoffLimit: '3' is not of type 'integer'"),
        (change(**{WORKER + "maxReplica": 3}), "maxReplica"),
        (change(**{HEAD + "terminationGracePeriod": 3}), "terminationGracePeriod"),
        (change(**{HEAD + "containers__0__resources__limits__memory": "16 GB"}), "memory"),
        (change(rayClusterSpec__authOptions={"mode": "on"}), "is not one of"),
        (change(shutdownAfterJobFinishes=False), "ttlSecondsAfterFinished without"),
        (change(submissionMode="InteractiveMode"), "backoffLimit makes new clusters"),
        (change(submissionMode="SidecarMode"), "SidecarMode has no submitter"),
        (change(activeDeadlineSeconds=0), "is not above 0"),
        (change(runtimeEnvYAML="env_vars"), "no mapping"),
        (change(rayClusterSpec__rayVersion="2.51.0"), "needs rayVersion 2.52"),
        (change(rayClusterSpec__authOptions={"mode": "token", "enableK8sTokenAuth": True}), "not for a RayJob"),
        (change(rayClusterSpec__gcsFaultToleranceOptions={"backend": "rocksdb"}), "feature gate"),
        (change(rayClusterSpec__networkPolicy={}), "networkPolicy needs a feature gate"),
        (change(**{HEAD + "restartPolicy": "Always"}), "restartPolicy is not for autoscaler v2"),
        (change(**{HEAD + "containers__0__env": [{"name": "REDIS_PASSWORD", "value": "x"}]}), "sets itself"),
        (change(**{WORKER + "minReplicas": 9}), "gpu: minReplicas above maxReplicas"),
        (change(**{WORKER + "rayStartParams": {"labels": "a=b"}}), "gpu: labels belong to the group"),
        (change(rayClusterSpec__headGroupSpec__resources={"CPU": "1"}), "head: resources in rayStartParams"),
        (lambda document: document["metadata"].update(name="p" * 48), "more than 47 characters"),
        (lambda document: document["metadata"].update(name="1-run"), "DNS-1035"),
    ],
)
def test_what_kuberay_would_refuse_is_found(planted: Callable[[Document], None], complaint: str) -> None:
    (document,) = documents("rayjob.yaml")
    document = copy.deepcopy(document)
    planted(document)
    assert [problem for problem in problems(document) if complaint in problem]


def test_a_job_and_a_cluster_have_the_same_pods() -> None:
    assert cluster_spec("rayjob.yaml") == cluster_spec("raycluster.yaml")


def test_authentication_is_on_and_no_secret_is_in_a_file() -> None:
    spec = cluster_spec("rayjob.yaml")
    assert spec["authOptions"]["mode"] == "token"
    assert spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    every = [document for path in FOLDER.glob("*.yaml") for document in documents(path.name)]
    assert "Secret" not in {document["kind"] for document in every}


def test_its_ray_is_ours() -> None:
    assert cluster_spec("rayjob.yaml")["rayVersion"] == metadata.version("ray")


def test_the_driver_stays_on_the_head_and_no_actor_does() -> None:
    (job,) = documents("rayjob.yaml")
    assert not [key for key in job["spec"] if key.startswith("entrypoint") and key != "entrypoint"]
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_a_run_that_is_started_again_goes_on_in_a_shared_folder() -> None:
    (job,) = documents("rayjob.yaml")
    command = job["spec"]["entrypoint"].split()
    assert command[:5] == ["python", "-P", "-m", "ppo_ray", "train"]  # -P: no file of the job's folder is a library
    assert "resume=auto" in command and job["spec"]["backoffLimit"] > 0
    paths = [word.removeprefix("output_dir=") for word in command if "/" in word]
    assert len(paths) == 2 and all(path.startswith("/shared/") for path in paths)
    (claim,) = [item for item in documents("shared.yaml") if item["metadata"]["name"] == "ppo-ray-shared"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods("rayjob.yaml").values():
        mounted = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounted["/shared"]]["persistentVolumeClaim"]["claimName"] == "ppo-ray-shared"


def test_each_limit_of_an_end_leaves_time_for_the_one_within() -> None:
    """The driver saves, the job's supervisor waits for it, the node drains, the pod is killed: in this order."""
    (job,) = documents("rayjob.yaml")
    stop_wait = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    for pod in pods("rayjob.yaml").values():
        drain = variables(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        limits = [RayConfig().stop_timeout_s, float(stop_wait), float(drain), pod["terminationGracePeriodSeconds"]]
        assert limits == sorted(set(limits))


def test_shared_memory_is_in_memory_and_holds_rays_object_store() -> None:
    """Ray's store takes 30 % of the container's memory; both count against its limit."""
    for pod in pods("rayjob.yaml").values():
        container = pod["containers"][0]
        (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        (shm,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == name]
        memory = gibibytes(container["resources"]["limits"]["memory"])
        assert shm["medium"] == "Memory"
        assert 0.3 * memory < gibibytes(shm["sizeLimit"]) < 0.5 * memory


def test_a_group_of_gpus_is_scaled() -> None:
    spec = cluster_spec("rayjob.yaml")
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    (group,) = [group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu"]
    assert 0 < group["minReplicas"] == group["replicas"] < group["maxReplicas"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]


def test_nobody_is_root_and_what_is_asked_for_is_the_limit() -> None:
    (job,) = documents("rayjob.yaml")
    everywhere = [*pods("rayjob.yaml").values(), job["spec"]["submitterPodTemplate"]["spec"]]
    everywhere += [
        item["spec"]["template"]["spec"] for item in documents("shared.yaml") if item["kind"] == "Deployment"
    ]
    for pod in everywhere:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"].keys() == container["resources"]["requests"].keys()
    for pod in pods("rayjob.yaml").values():  # Ray takes the limits for what there is
        assert pod["containers"][0]["resources"]["limits"] == pod["containers"][0]["resources"]["requests"]


def test_every_pod_is_one_that_a_restricted_namespace_takes() -> None:
    """The rules of Kubernetes' Pod Security Standard `restricted`, as far as the manifests come near them."""
    (job,) = documents("rayjob.yaml")
    (redis,) = [item for item in documents("shared.yaml") if item["kind"] == "Deployment"]
    submitter = job["spec"]["submitterPodTemplate"]["spec"]
    for pod in (*pods("rayjob.yaml").values(), submitter, redis["spec"]["template"]["spec"]):
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
        kinds = {kind for volume in pod.get("volumes", []) for kind in volume.keys() - {"name"}}
        assert kinds <= {"emptyDir", "persistentVolumeClaim"}
        assert not [
            port for container in pod["containers"] for port in container.get("ports", []) if "hostPort" in port
        ]
    autoscaler = job["spec"]["rayClusterSpec"]["autoscalerOptions"]["securityContext"]
    assert autoscaler == submitter["containers"][0]["securityContext"]
    assert "pod-security.kubernetes.io/enforce=restricted" in (FOLDER.parents[1] / "docs" / "clusters.md").read_text()
    tokens = {name: pod.get("automountServiceAccountToken", True) for name, pod in pods("rayjob.yaml").items()}
    assert tokens == {"head": True, "gpu": False, "cpu": False}  # the head's autoscaler needs one
    assert (
        submitter["automountServiceAccountToken"] is redis["spec"]["template"]["spec"]["automountServiceAccountToken"]
    )


LABELS = {
    "head": {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"},
    "worker": {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"},
    "redis": {"app.kubernetes.io/name": "ppo-ray-redis"},
    "submitter": {"app.kubernetes.io/name": "ppo-ray-submitter"},
    "other": {"app": "somebody-else"},
}
"""Labels of pods: KubeRay's own, and those of the manifests."""


def selects(selector: Document, labels: dict[str, str]) -> bool:
    return selector["podSelector"].get("matchLabels", {}).items() <= labels.items()


def ports_between(source: str, target: str) -> set[Any]:
    """Return the ports that the policies let one pod reach another by; `"all"` among them: any."""
    policies = [item["spec"] for item in documents("shared.yaml") if item["kind"] == "NetworkPolicy"]
    allowed = []
    for ours, theirs, direction, key in ((source, target, "egress", "to"), (target, source, "ingress", "from")):
        walls = [
            policy
            for policy in policies
            if selects(policy, LABELS[ours]) and direction.title() in policy["policyTypes"]
        ]
        rules = [rule for policy in walls for rule in policy.get(direction) or []]
        open_to = [
            rule
            for rule in rules
            if key not in rule
            or any(
                "podSelector" in peer and "namespaceSelector" not in peer and selects(peer, LABELS[theirs])
                for peer in rule[key]
            )
        ]
        if walls:
            allowed.append({port["port"] for rule in open_to for port in rule.get("ports", [{"port": "all"}])})
    narrow = [ports for ports in allowed if "all" not in ports]
    return set.intersection(*narrow) if narrow else {"all"}


@pytest.mark.parametrize(
    ("source", "target", "ports"),
    [
        ("head", "worker", {"all"}),
        ("worker", "head", {"all"}),
        ("worker", "worker", {"all"}),
        ("submitter", "head", {8265}),
        ("submitter", "worker", set()),
        ("head", "redis", {6379}),
        ("worker", "redis", set()),
        ("submitter", "redis", set()),
        ("other", "head", set()),
        ("other", "worker", set()),
        ("other", "redis", set()),
        ("other", "submitter", set()),
        ("redis", "head", set()),
        ("worker", "other", {53}),
        ("head", "other", {53}),
        ("redis", "other", set()),
    ],
)
def test_who_reaches_whom(source: str, target: str, ports: set[Any]) -> None:
    assert ports_between(source, target) == ports


def test_of_all_pods_the_head_alone_reaches_the_api_server() -> None:
    policies = [item["spec"] for item in documents("shared.yaml") if item["kind"] == "NetworkPolicy"]
    outside = [
        (policy["podSelector"]["matchLabels"], rule["ports"])
        for policy in policies
        for rule in policy.get("egress") or []
        if any("ipBlock" in peer for peer in rule.get("to", []))
    ]
    assert outside == [({"ray.io/node-type": "head"}, [{"port": 443}, {"port": 6443}])]


def test_the_policies_mean_the_pods_that_there_are() -> None:
    (job,) = documents("rayjob.yaml")
    (redis,) = [item for item in documents("shared.yaml") if item["kind"] == "Deployment"]
    assert job["spec"]["submitterPodTemplate"]["metadata"]["labels"] == LABELS["submitter"]
    assert redis["spec"]["template"]["metadata"]["labels"] == LABELS["redis"]


def test_redis_password_is_in_no_list_of_processes(tmp_path: Path) -> None:
    (redis,) = [item for item in documents("shared.yaml") if item["kind"] == "Deployment"]
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    server = tmp_path / "redis-server"
    server.write_text('#!/bin/sh\necho "$#: $*"; cat\n')
    server.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REDIS_PASSWORD": "a-secret"}
    said = subprocess.run(container["command"], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout.splitlines() == ["1: -", "appendonly yes", "requirepass a-secret"]
    assert "args" not in container and "REDIS_PASSWORD" not in str(container.get("readinessProbe"))


def test_the_redis_pod_is_one_that_kubernetes_knows() -> None:
    """KubeRay's schema holds that of a pod, which a Deployment has too."""
    (redis,) = [item for item in documents("shared.yaml") if item["kind"] == "Deployment"]
    (cluster,) = documents("raycluster.yaml")
    cluster["spec"]["workerGroupSpecs"][0]["template"] = redis["spec"]["template"]
    assert problems(cluster) == []
    labels = redis["spec"]["template"]["metadata"]["labels"]
    (service,) = [item for item in documents("shared.yaml") if item["kind"] == "Service"]
    assert redis["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    address = cluster["spec"]["gcsFaultToleranceOptions"]["redisAddress"]
    assert address == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"


def test_every_secret_that_is_referred_to_is_made_on_the_page() -> None:
    text = "".join(path.read_text() for path in FOLDER.glob("*.yaml"))
    names = set(re.findall(r"secretKeyRef: {name: ([\w-]+)", text)) | set(re.findall(r"secretName: ([\w-]+)", text))
    page = (FOLDER.parents[1] / "docs" / "clusters.md").read_text()
    assert names and all(f"kubectl create secret generic {name} " in page for name in names)
