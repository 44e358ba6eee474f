"""Every rule on every pod of every folder that may be applied; and each rule finds the mistakes that it is for."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.kube import policies
from tests.kube.manifests import JOBS, KUBE, Pod, applied, overlays, pods, render_all, rendered
from tests.kube.policies import GPU, RULES, Rule, problems


@pytest.fixture(scope="module")
def everything() -> dict[str, list[Pod]]:
    """All pods, by the folder that makes them."""
    return {name: pods(documents) for name, documents in render_all(applied()).items()}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_pod_of_every_overlay_keeps_every_rule(everything: dict[str, list[Pod]], rule: Rule) -> None:
    kept = {
        name: every
        for name, every in everything.items()
        if rule is not policies.has_a_pinned_image or "overlays" in name
    }
    assert {name: found for name, every in kept.items() for pod in every if (found := problems(pod, (rule,)))} == {}


def test_no_pod_is_overlooked(everything: dict[str, list[Pod]]) -> None:
    standing = {"mlflow": 1, "postgres": 1}
    for name in ("base", "overlays/gpu", "overlays/spot", "overlays/kueue"):
        assert Counter(pod.component for pod in everything[name]) == standing
    assert Counter(pod.component for pod in everything["overlays/dev"]) == {**standing, "object-store": 1}
    for overlay in overlays():
        for job in JOBS:
            workers = {} if job == "evaluate" else {"ray-worker": 1}
            found = Counter(pod.component for pod in everything[f"overlays/{overlay}/{job}"])
            assert found == {"ray-submitter": 1, "ray-head": 1, **workers}
    for overlay in ("dev", "gpu"):
        assert Counter(pod.component for pod in everything[f"overlays/{overlay}/develop"]) == {
            "ray-head": 1,
            "ray-worker": 1,
        }


def test_gpus_are_where_they_are_of_use(everything: dict[str, list[Pod]]) -> None:
    with_gpus = {name for name, every in everything.items() if any(policies.gpus(pod) for pod in every)}
    own = {f"overlays/{overlay}/{job}" for overlay in ("gpu", "spot", "kueue") for job in ("train", "embed")}
    assert with_gpus == own | {"overlays/gpu/develop"}


def put(*path: str | int, value: Any) -> Callable[[Any], None]:
    """A mistake: a value where it should not stand."""

    def plant(spec: Any) -> None:
        for step in path[:-1]:
            spec = spec[step]
        spec[path[-1]] = value

    return plant


def drop(*path: str | int) -> Callable[[Any], None]:
    """A mistake: something left out."""

    def plant(spec: Any) -> None:
        for step in path[:-1]:
            spec = spec[step]
        del spec[path[-1]]

    return plant


def more(*path: str | int, value: Any) -> Callable[[Any], None]:
    """A mistake: something besides."""

    def plant(spec: Any) -> None:
        for step in path:
            spec = spec[step]
        spec.append(value)

    return plant


C = ("containers", 0)
LEAVE = ["python", "-m", "pipeline.workers.leaving", "--deadline"]
MISTAKES: list[tuple[Rule, Callable[[Any], None]]] = [
    (policies.is_not_root, drop("securityContext")),
    (policies.is_not_root, put("securityContext", "runAsUser", value=0)),
    (policies.is_not_root, put(*C, "securityContext", "runAsUser", value=0)),
    (policies.has_seccomp, drop("securityContext", "seccompProfile")),
    (policies.has_seccomp, put(*C, "securityContext", "seccompProfile", value={"type": "Unconfined"})),
    (policies.has_no_privileges, put(*C, "securityContext", "privileged", value=True)),
    (policies.has_no_privileges, drop(*C, "securityContext", "allowPrivilegeEscalation")),
    (policies.has_no_privileges, put(*C, "securityContext", "capabilities", "add", value=["NET_ADMIN"])),
    (policies.has_no_privileges, put("initContainers", value=[{"name": "first", "image": "busybox:1"}])),
    (policies.cannot_write_its_root, put(*C, "securityContext", "readOnlyRootFilesystem", value=False)),
    (policies.cannot_write_its_root, put(*C, "volumeMounts", value=[])),
    (policies.cannot_write_its_root, put(*C, "env", 0, value={"name": "HOME", "value": "/root"})),
    (policies.touches_no_host, put("hostNetwork", value=True)),
    (policies.touches_no_host, more("volumes", value={"name": "host", "hostPath": {"path": "/"}})),
    (policies.touches_no_host, put(*C, "ports", 0, "hostPort", value=52365)),
    (policies.has_no_token, drop("automountServiceAccountToken")),
    (policies.has_no_token, drop("serviceAccountName")),
    (policies.knows_no_services, drop("enableServiceLinks")),
    (policies.is_bounded, drop(*C, "resources", "limits", "memory")),
    (policies.is_bounded, put(*C, "resources", "requests", "memory", value="1Ti")),
    (policies.is_bounded, drop(*C, "resources", "requests", GPU)),
    (policies.is_bounded, more("volumes", value={"name": "scratch", "emptyDir": {}})),
    (policies.is_probed, drop(*C, "livenessProbe")),
    (policies.is_probed, put(*C, "readinessProbe", "httpGet", "port", value="http")),
    (policies.takes_secrets_by_reference, more(*C, "env", value={"name": "MLFLOW_TRACKING_PASSWORD", "value": "x"})),
    (policies.takes_secrets_by_reference, more(*C, "env", value={"name": "URI", "value": "postgresql://me:pw@db/x"})),
    (policies.takes_secrets_by_reference, put(*C, "args", value=["--uri=postgresql://me:pw@db/x"])),
    (policies.has_a_pinned_image, put(*C, "image", value="registry.example:5000/bct-pipeline:latest")),
    (policies.has_a_pinned_image, put(*C, "image", value="registry.example:5000/bct-pipeline")),
    (policies.shares_memory, put("volumes", 3, value={"name": "shm", "emptyDir": {"sizeLimit": "64Gi"}})),
    (policies.shares_memory, put("volumes", 3, "emptyDir", "sizeLimit", value="500Gi")),
    (policies.shares_memory, put("volumes", 3, "emptyDir", "sizeLimit", value="1Gi")),
    (policies.is_spread, drop("topologySpreadConstraints")),
    (policies.is_spread, put("topologySpreadConstraints", 0, "whenUnsatisfiable", value="ScheduleAnyway")),
    (policies.finds_its_gpus, drop("nodeSelector")),
    (policies.finds_its_gpus, put("tolerations", value=[])),
    (policies.finds_its_gpus, put(*C, "env", value=[])),
    (policies.finds_its_gpus, put(*C, "resources", "limits", value={})),
    (policies.takes_leave, drop(*C, "lifecycle")),
    (policies.takes_leave, put("terminationGracePeriodSeconds", value=20)),
    (policies.takes_leave, put(*C, "lifecycle", "preStop", "exec", "command", value=[*LEAVE, "9", "--wait", "9"])),
]


@pytest.fixture(scope="module")
def worker() -> Pod:
    """A pod with all that rules look at: a training worker with GPUs, on preemptible nodes."""
    [found] = [pod for pod in pods(rendered(KUBE / "overlays" / "spot" / "train")) if pod.component == "ray-worker"]
    return found


@pytest.mark.parametrize(
    ("rule", "plant"), MISTAKES, ids=[f"{rule.__name__}-{number}" for number, (rule, _) in enumerate(MISTAKES)]
)
def test_each_rule_finds_a_planted_mistake(worker: Pod, rule: Rule, plant: Callable[[Any], None]) -> None:
    assert problems(worker) == []
    broken = Pod(worker.where, worker.component, copy.deepcopy(worker.spec))
    plant(broken.spec)
    assert problems(broken, (rule,)), rule.__name__


def test_every_rule_has_a_mistake_to_find(worker: Pod) -> None:
    assert problems(Pod(worker.where, "", worker.spec), (policies.is_known,))
    assert {rule for rule, _ in MISTAKES} | {policies.is_known} == set(RULES)
