"""What each job is told, needs and does when it fails; and that configs and manifests mean the same machines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import RunConfig, load_tree
from tests.kube.manifests import JOBS, KUBE, ROOT, Pod, Tree, named, overlays, pods, quantity, rendered
from tests.kube.policies import environment, gpus

FOLDERS = {f"{name}/{job}": folder / job for name, folder in overlays().items() for job in JOBS}
SECRETS = {"mlflow-auth", "mlflow-database", "artifact-store", "data-store"}


def job_of(folder: Path) -> Tree:
    [job] = rendered(folder)
    return job


def pod_of(documents: list[Tree], component: str) -> Pod:
    [found] = [pod for pod in pods(documents) if pod.component == component]
    return found


def run_config(overlay: str) -> RunConfig:
    """The config that is mounted in every Ray pod."""
    configs = named(rendered(overlays()[overlay]))
    text = configs["ConfigMap", "run"]["data"]["run.yaml"]
    return load_tree(yaml.safe_load(text), Path("run.yaml"))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_job_ends_whatever_happens_and_goes_on_where_it_stood(name: str) -> None:
    spec = job_of(FOLDERS[name])["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in spec, "excluded by shutdownAfterJobFinishes, which no schema says"
    assert "clusterSelector" not in spec, "excluded by suspend, which no schema says"
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["submissionMode"] == "K8sJobMode"
    overlay = name.partition("/")[0]
    assert spec["backoffLimit"] == {"dev": 0, "gpu": 3, "spot": 20, "kueue": 3}[overlay]
    assert spec.get("suspend", False) is (overlay == "kueue")
    head = spec["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0", "work goes to the workers, never beside the driver"
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("name", FOLDERS)
def test_the_submitters_shell_can_fill_in_the_line(name: str) -> None:
    job = job_of(FOLDERS[name])
    line = job["spec"]["entrypoint"]
    python, script, *_ = line.split()
    assert python == "python"
    assert (ROOT / script).is_file()
    asked = set(re.findall(r"\$\{?(\w+)", line))
    [submitter] = pod_of([job], "ray-submitter").containers
    [head] = pod_of([job], "ray-head").containers
    for container in (submitter, head):
        told = {name: entry.get("value") for name, entry in environment(container).items()}
        assert {variable: told[variable] for variable in asked} == {
            variable: {"BCT_HOME": "/bct", "BCT_CONFIG": "/etc/bct/run.yaml"}[variable] for variable in asked
        }


@pytest.mark.parametrize("overlay", overlays())
def test_what_jobs_refer_to_stands(overlay: str) -> None:
    standing = rendered(overlays()[overlay])
    there = set(named(standing))
    everything = [*standing, *(job_of(FOLDERS[f"{overlay}/{job}"]) for job in JOBS)]
    secrets = set()
    for pod in pods(everything):
        assert ("ServiceAccount", pod.spec["serviceAccountName"]) in there
        claimed = {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in pod.volumes.values()
            if "persistentVolumeClaim" in volume
        }
        assert {("PersistentVolumeClaim", name) for name in claimed} <= there
        configs = {volume["configMap"]["name"] for volume in pod.volumes.values() if "configMap" in volume}
        assert {("ConfigMap", name) for name in configs} <= there
        for container in pod.every:
            references = [entry["valueFrom"]["secretKeyRef"] for entry in container["env"] if "valueFrom" in entry]
            secrets |= {reference["name"] for reference in references}
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            templates = {"data"} if pod.component == "postgres" else set()
            assert mounted <= set(pod.volumes) | templates
    assert secrets == SECRETS
    assert not any(kind == "Secret" for kind, _ in there), "they are made by hand, and lie in no repository"
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    assert all(f"create secret generic {name}" in page for name in SECRETS)


@pytest.mark.parametrize("overlay", overlays())
def test_the_config_means_the_machines_of_the_manifests(overlay: str) -> None:
    cluster = run_config(overlay).cluster
    job = job_of(FOLDERS[f"{overlay}/train"])
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    worker = pod_of([job], "ray-worker")
    limits = worker.containers[0]["resources"]["limits"]
    cores = quantity(limits["cpu"])
    assert cores == int(cores), "KubeRay tells Ray whole cores"
    assert cluster.gpu is bool(gpus(worker))
    fits = int(cores // cluster.cpus_per_worker)
    a_pod = min(fits, int(gpus(worker))) if cluster.gpu else fits
    assert cluster.workers == a_pod * group["maxReplicas"]
    assert cluster.fewest == a_pod * group["minReplicas"]
    assert group["replicas"] == group["maxReplicas"]
    line = worker.containers[0]["lifecycle"]["preStop"]["exec"]["command"]
    assert cluster.preemption_deadline_s < float(line[line.index("--wait") + 1])


def test_spot_keeps_what_must_stay_on_nodes_that_stay() -> None:
    for job in JOBS:
        for pod in pods([job_of(FOLDERS[f"spot/{job}"])]):
            spot = "cloud.google.com/gke-spot" in {one["key"] for one in pod.spec.get("tolerations", [])}
            accelerated = pod.component == "ray-worker" and job in ("train", "embed")
            assert spot is accelerated
            assert pod.component == "ray-submitter" or pod.spec["nodeSelector"] == {
                "bct/pool": "gpu-spot" if accelerated else "cpu"
            }
    cluster = run_config("spot").cluster
    assert cluster.fewest < cluster.workers


def demands(job: Tree) -> dict[str, dict[str, float]]:
    """What all pods of a job ask for at once, by the pool that they go to."""
    found: dict[str, dict[str, float]] = {}
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for pod in pods([job]):
        count = groups[0]["maxReplicas"] if pod.component == "ray-worker" else 1
        pool = found.setdefault("gpu" if gpus(pod) else "cpu", {})
        for container in pod.containers:
            for what, much in container["resources"]["requests"].items():
                pool[what] = pool.get(what, 0) + count * quantity(much)
    return found


def test_kueues_queue_has_room_for_any_one_job() -> None:
    """No schema of Kueue's is to be had here: that its parts name each other, and what they hold, is checked."""
    documents = named(rendered(KUBE / "overlays" / "kueue"))
    queues = {kind: document for (kind, _), document in documents.items() if "kueue" in document["apiVersion"]}
    assert queues.keys() == {"ResourceFlavor", "ClusterQueue", "LocalQueue"}
    assert documents["LocalQueue", "bct"]["spec"] == {"clusterQueue": "bct"}
    spec = documents["ClusterQueue", "bct"]["spec"]
    assert spec["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "bct"}}
    [group] = spec["resourceGroups"]
    quotas: dict[str, Any] = {}
    for flavor in group["flavors"]:
        assert [one["name"] for one in flavor["resources"]] == group["coveredResources"], "in this order, says Kueue"
        pool = documents["ResourceFlavor", flavor["name"]]["spec"]["nodeLabels"]["bct/pool"]
        quotas[pool] = {one["name"]: quantity(one["nominalQuota"]) for one in flavor["resources"]}
    assert list(quotas) == ["cpu", "gpu"], "what needs no GPU is tried on nodes without, first"
    for job in JOBS:
        document = job_of(FOLDERS[f"kueue/{job}"])
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "bct"
        for pool, asked in demands(document).items():
            assert all(much <= quotas[pool][what] for what, much in asked.items()), (job, pool, asked)
