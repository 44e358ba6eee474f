"""The rules that every pod keeps: each a small function from a pod to what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tests.kube.manifests import Pod, Tree, quantity

GPU = "nvidia.com/gpu"
RAY = ("ray-head", "ray-worker")
BRIEF = ("ray-submitter",)  # it ends by itself: nobody asks it how it is
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|API_KEY")
HALF = 0.5

Rule = Callable[[Pod], Iterator[str]]


def environment(container: Tree) -> dict[str, Tree]:
    """A container's variables by name."""
    return {entry["name"]: entry for entry in container.get("env", [])}


def mounts(container: Tree) -> dict[str, Tree]:
    """A container's mounts by path."""
    return {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}


def gpus(pod: Pod) -> float:
    """That it asks for."""
    return sum(quantity(one.get("resources", {}).get("limits", {}).get(GPU, 0)) for one in pod.containers)


def is_known(pod: Pod) -> Iterator[str]:
    """Network and disruption are told by the component's label."""
    if not pod.component:
        yield "no label app.kubernetes.io/component"


def is_not_root(pod: Pod) -> Iterator[str]:
    """Neither by the pod's say nor by a container's."""
    context = pod.spec.get("securityContext", {})
    if not (
        context.get("runAsNonRoot") is True and context.get("runAsUser", 0) > 0 and context.get("runAsGroup", 0) > 0
    ):
        yield "the pod may run as root"
    for container in pod.every:
        own = container.get("securityContext", {})
        if own.get("runAsNonRoot") is not True or own.get("runAsUser") == 0:
            yield f"{container['name']} may run as root"


def has_seccomp(pod: Pod) -> Iterator[str]:
    """The runtime's profile, for all of it."""
    contexts = [pod.spec.get("securityContext", {}), *(one.get("securityContext", {}) for one in pod.every)]
    profiles = [context["seccompProfile"] for context in contexts if "seccompProfile" in context]
    if not profiles or any(profile != {"type": "RuntimeDefault"} for profile in profiles):
        yield "no seccomp profile, or another than the runtime's"


def has_no_privileges(pod: Pod) -> Iterator[str]:
    """None to begin with, none to gain."""
    for container in pod.every:
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"{container['name']} may gain privileges"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']} keeps capabilities"


def cannot_write_its_root(pod: Pod) -> Iterator[str]:
    """The root file system is read-only; what it writes goes to /tmp, where its home is."""
    for container in pod.every:
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield f"{container['name']} can write its root file system"
        scratch = mounts(container).get("/tmp", {})
        if "emptyDir" not in pod.volumes.get(scratch.get("name", ""), {}):
            yield f"{container['name']} has no /tmp of its own"
        home = environment(container).get("HOME")
        if home is not None and home.get("value") != "/tmp":
            yield f"{container['name']} has a home that it cannot write"


def touches_no_host(pod: Pod) -> Iterator[str]:
    """Nothing of the node's."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield key
    yield from (f"hostPath {name}" for name, volume in pod.volumes.items() if "hostPath" in volume)
    ports = [port for container in pod.every for port in container.get("ports", [])]
    yield from (f"hostPort {port['hostPort']}" for port in ports if "hostPort" in port)


def has_no_token(pod: Pod) -> Iterator[str]:
    """An account of its own, and no token of the Kubernetes API."""
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield "a token of the API is mounted"
    if pod.spec.get("serviceAccountName", "default") == "default":
        yield "it runs under the namespace's default account"


def knows_no_services(pod: Pod) -> Iterator[str]:
    """A service named mlflow would set MLFLOW_PORT, which MLflow reads as its own."""
    if pod.spec.get("enableServiceLinks") is not False:
        yield "services are told in its environment"


def is_bounded(pod: Pod) -> Iterator[str]:
    """Requests and limits of CPU and memory; whole GPUs, asked for as they are limited; no scratch without a size."""
    for container in pod.every:
        resources = container.get("resources", {})
        asked, most = resources.get("requests", {}), resources.get("limits", {})
        for what in ("cpu", "memory"):
            if what not in asked or what not in most:
                yield f"{container['name']} has no bounds of {what}"
            elif quantity(asked[what]) > quantity(most[what]):
                yield f"{container['name']} asks for more {what} than it may have"
        if asked.get(GPU) != most.get(GPU):
            yield f"{container['name']} asks for other GPUs than it may have"
    for name, volume in pod.volumes.items():
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {name} has no size"


def is_probed(pod: Pod) -> Iterator[str]:
    """Whoever stays is asked whether it has started, is ready, and lives."""
    if pod.component in BRIEF:
        return
    for container in pod.containers:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe not in container:
                yield f"{container['name']} has no {probe}"
        ports = {port["name"] for port in container.get("ports", [])}
        asked = [container[probe]["httpGet"]["port"] for probe in container if "httpGet" in (container[probe] or {})]
        if set(asked) - ports:
            yield f"{container['name']} is asked at a port that it has not"


def takes_secrets_by_reference(pod: Pod) -> Iterator[str]:
    """None stands in a manifest, as a value or inside an address."""
    for container in pod.every:
        for name, entry in environment(container).items():
            if SECRET.search(name) and "secretKeyRef" not in entry.get("valueFrom", {}):
                yield f"{container['name']} has {name} in the open"
            if re.search(r"://[^/@]*:[^/@]*@", str(entry.get("value", ""))):
                yield f"{container['name']} has a password in {name}"
        said = " ".join([*container.get("command", []), *container.get("args", [])])
        if re.search(r"://[^/@\s]*:[^/@\s]*@", said):
            yield f"{container['name']} has a password in its arguments"


def has_a_pinned_image(pod: Pod) -> Iterator[str]:
    """A tag that is a version, or a digest."""
    for container in pod.every:
        _, _, tag = container["image"].rpartition("/")[2].partition(":")
        if not re.search(r"\d", tag):
            yield f"{container['name']} has the image {container['image']}, of no version"


def shares_memory(pod: Pod) -> Iterator[str]:
    """Ray's objects and NCCL: /dev/shm in memory, of a size that leaves as much for the rest; more of it with GPUs."""
    if pod.component not in RAY:
        return
    for container in pod.containers:
        shared = pod.volumes.get(mounts(container).get("/dev/shm", {}).get("name", ""), {}).get("emptyDir", {})
        if shared.get("medium") != "Memory" or "sizeLimit" not in shared:
            yield f"{container['name']} has no shared memory of a size"
            continue
        size, memory = quantity(shared["sizeLimit"]), quantity(container["resources"]["limits"]["memory"])
        if size > memory * HALF:
            yield f"{container['name']} may fill its memory with what is shared"
        if gpus(pod) and size < gpus(pod) * 2**30:
            yield f"{container['name']} has too little shared memory for its GPUs"


def is_spread(pod: Pod) -> Iterator[str]:
    """Workers of one cluster lie on several nodes; those with GPUs must."""
    if pod.component != "ray-worker":
        return
    rules = [
        rule
        for rule in pod.spec.get("topologySpreadConstraints", [])
        if rule["topologyKey"] == "kubernetes.io/hostname"
    ]
    if not rules:
        yield "it is not spread over the nodes"
    for rule in rules:
        if rule["labelSelector"]["matchLabels"] != {"app.kubernetes.io/component": pod.component}:
            yield "it is spread beside others than its like"
        if gpus(pod) and rule["whenUnsatisfiable"] != "DoNotSchedule":
            yield "nodes of GPUs may be shared"


def finds_its_gpus(pod: Pod) -> Iterator[str]:
    """GPU pods go to the pool of GPUs, others do not; NCCL knows its interface; the head has none."""
    selects, tolerated = pod.spec.get("nodeSelector", {}), {one["key"] for one in pod.spec.get("tolerations", [])}
    if not gpus(pod):
        if GPU in tolerated or "gpu" in selects.get("bct/pool", ""):
            yield "it has no GPUs, and would take the place of those that have"
        return
    if "gpu" not in selects.get("bct/pool", ""):
        yield "it does not choose the pool of GPUs"
    if GPU not in tolerated:
        yield "it does not tolerate the taint of GPU nodes"
    if pod.component != "ray-worker":
        yield "GPUs are for workers"
    if not all("NCCL_SOCKET_IFNAME" in environment(container) for container in pod.containers):
        yield "NCCL is told no interface"


def takes_leave(pod: Pod) -> Iterator[str]:
    """A worker that is told to go tells Ray, and has the time for it: wait < deadline <= grace period."""
    if pod.component != "ray-worker":
        return
    for container in pod.containers:
        line = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if line[:3] != ["python", "-m", "pipeline.workers.leaving"]:
            yield f"{container['name']} goes without a word"
            continue
        wait, deadline = (float(line[line.index(option) + 1]) for option in ("--wait", "--deadline"))
        if not wait < deadline <= pod.spec["terminationGracePeriodSeconds"]:
            yield f"{container['name']} is ended before it has taken leave"


RULES: tuple[Rule, ...] = (
    is_known,
    is_not_root,
    has_seccomp,
    has_no_privileges,
    cannot_write_its_root,
    touches_no_host,
    has_no_token,
    knows_no_services,
    is_bounded,
    is_probed,
    takes_secrets_by_reference,
    has_a_pinned_image,
    shares_memory,
    is_spread,
    finds_its_gpus,
    takes_leave,
)


def problems(pod: Pod, rules: tuple[Rule, ...] = RULES) -> list[str]:
    """All that is wrong with a pod."""
    return [f"{pod.where}: {problem} ({rule.__name__})" for rule in rules for problem in rule(pod)]
