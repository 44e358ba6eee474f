"""The Kubernetes base, checked as the API server would: by KubeRay's own schema, with unknown fields refused.

The schema holds whole pod, service and volume claim specs, so that it checks MLflow's resources too.
"""

import copy
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "kube" / "base"
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay-crds"))

Tree = dict[str, Any]

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def render(folder: Path) -> list[Tree]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # kustomize warns of deprecated fields there
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def strict(schema: Any) -> Any:
    """Close every object: a structural schema lets the API server drop unknown fields, it does not refuse them."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and "type" in schema and isinstance(schema["type"], str):
        closed.setdefault("additionalProperties", False)
    return closed


def problems(document: Any, schema: Tree) -> list[str]:
    errors = jsonschema.Draft7Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def inside(schema: Tree, *path: str) -> Tree:
    """The schema of a field, found by its path; '*' is a list's item."""
    for step in path:
        schema = schema["items"] if step == "*" else schema["properties"][step]
    return schema


@pytest.fixture(scope="module")
def resources() -> dict[tuple[str, str], Tree]:
    return {(document["kind"], document["metadata"]["name"]): document for document in render(BASE)}


@pytest.fixture(scope="module")
def rayjob(resources: dict[tuple[str, str], Tree]) -> Tree:
    return resources["RayJob", "train-bct"]


@pytest.fixture(scope="module")
def schema() -> Tree:
    path = CRDS / "ray.io_rayjobs.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's CRDs are not at {CRDS}; name their folder in KUBERAY_CRDS")
    definition = yaml.load(path.read_text(), yaml.CSafeLoader)
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    closed: Tree = strict(version["schema"]["openAPIV3Schema"])
    return closed


def test_the_rayjob_is_valid(rayjob: Tree, schema: Tree) -> None:
    assert problems(rayjob, schema) == []


def test_mlflow_and_the_volumes_are_valid(resources: dict[tuple[str, str], Tree], schema: Tree) -> None:
    head = inside(schema, "spec", "rayClusterSpec", "headGroupSpec")
    pod = inside(head, "template")
    volume = inside(pod, "spec", "volumes", "*", "ephemeral", "volumeClaimTemplate", "spec")
    assert problems(resources["Deployment", "mlflow"]["spec"]["template"], pod) == []
    assert problems(resources["Service", "mlflow"], inside(head, "headService")) == []
    claims = [document for (kind, _), document in resources.items() if kind == "PersistentVolumeClaim"]
    assert [problems(claim["spec"], volume) for claim in claims] == [[], []]


@pytest.mark.parametrize(
    ("path", "key", "value", "complaint"),
    [
        ((), "specs", {}, "'specs' was unexpected"),
        (("spec",), "entryPoint", "python", "'entryPoint' was unexpected"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0), "replica", 2, "'replica' was unexpected"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0), "replicas", "2", "'2' is not of type 'integer'"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"), "num-cpus", 0, "0 is not of type 'string'"),
        (
            ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "resources"),
            "limit",
            {},
            "'limit' was unexpected",
        ),
        (
            ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits"),
            "memory",
            "8 gigabytes",
            "does not match",
        ),
        (("spec", "rayClusterSpec", "authOptions"), "mode", "tokens", "'tokens' is not one of"),
    ],
)
def test_the_check_itself_finds_a_mistake(
    rayjob: Tree, schema: Tree, path: tuple[str | int, ...], key: str, value: Any, complaint: str
) -> None:
    broken: Any = copy.deepcopy(rayjob)
    place = broken
    for step in path:
        place = place[step]
    place[key] = value
    found = problems(broken, schema)
    assert len(found) == 1
    assert complaint in found[0]


def test_the_check_itself_finds_a_missing_field(rayjob: Tree, schema: Tree) -> None:
    broken = copy.deepcopy(rayjob)
    del broken["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert any("'headGroupSpec' is a required property" in problem for problem in problems(broken, schema))


def test_the_rayjob_runs_the_training_on_two_workers(rayjob: Tree) -> None:
    spec = rayjob["spec"]
    assert spec["entrypoint"] == "python jobs/train_bct.py"
    assert [group["replicas"] for group in spec["rayClusterSpec"]["workerGroupSpecs"]] == [2]
    assert spec["backoffLimit"] == 0  # each retry would start a new cluster
    assert spec["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in spec  # excluded by shutdownAfterJobFinishes, which no schema says


def test_ray_is_the_version_that_is_pinned(rayjob: Tree) -> None:
    version = rayjob["spec"]["rayClusterSpec"]["rayVersion"]
    assert f'"ray[default,train]=={version}"' in (ROOT / "pyproject.toml").read_text()


def test_ray_pods_share_one_home_and_know_the_tracking_server(
    rayjob: Tree, resources: dict[tuple[str, str], Tree]
) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    service = resources["Service", "mlflow"]
    uri = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]} == {
            "BCT_HOME": "/bct",
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": {"secretKeyRef": {"name": "mlflow-auth", "key": "password"}},
        }
        (mount,) = container["volumeMounts"]
        (volume,) = pod["volumes"]
        assert mount == {"name": volume["name"], "mountPath": "/bct"}
        claim = resources["PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def pods(resources: dict[tuple[str, str], Tree]) -> Iterator[Tree]:
    """Every pod spec, wherever it stands."""

    def walk(value: Any) -> Iterator[Tree]:
        if isinstance(value, dict):
            if "containers" in value:
                yield value
            for part in value.values():
                yield from walk(part)
        elif isinstance(value, list):
            for part in value:
                yield from walk(part)

    yield from walk(list(resources.values()))


def test_every_container_is_bounded_and_without_privileges(resources: dict[tuple[str, str], Tree]) -> None:
    found = list(pods(resources))
    assert len(found) == 4  # MLflow, the submitter, the head, the worker group
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] != 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["enableServiceLinks"] is False  # a service named mlflow would set MLFLOW_PORT
        for container in pod["containers"]:
            for bound in ("requests", "limits"):
                assert set(container["resources"][bound]) >= {"cpu", "memory"}
            assert container["securityContext"]["runAsNonRoot"] is True
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_everything_lies_in_the_namespace(resources: dict[tuple[str, str], Tree]) -> None:
    spaces = {document["metadata"].get("namespace") for (kind, _), document in resources.items() if kind != "Namespace"}
    assert spaces == {"bct"}
    assert ("Namespace", "bct") in resources


@pytest.mark.filterwarnings("ignore")  # MLflow warns of itself when it is imported
def test_mlflow_serves_under_the_name_that_the_workers_use(resources: dict[tuple[str, str], Tree]) -> None:
    from mlflow.cli import cli

    (container,) = resources["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    program, command = container["command"]
    assert program == "mlflow"
    arguments = cli.commands[command].make_context(command, list(container["args"])).params
    assert (arguments["host"], arguments["port"]) == ("0.0.0.0", container["ports"][0]["containerPort"])
    # MLflow 3 refuses a Host header that is not listed: the default lists private addresses, no service name
    assert "mlflow:*" in arguments["allowed_hosts"].split(",")
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "/mlflow" in mounts
    assert arguments["app_name"] == "basic-auth"
    secrets = [entry["valueFrom"]["secretKeyRef"]["name"] for entry in container["env"] if "valueFrom" in entry]
    assert secrets == ["mlflow-auth", "mlflow-auth"]
    assert ("Secret", "mlflow-auth") not in resources, "it is made by hand, and lies in no repository"
    assert arguments["backend_store_uri"].startswith("sqlite:////mlflow/")
    assert arguments["artifacts_destination"].startswith("/mlflow/")
    assert resources["Service", "mlflow"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        "/health"
    }


def test_an_overlay_sets_every_image_at_once(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    images = [{"name": "bct-pipeline", "newName": "registry.example/bct", "newTag": "1.2"}]
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump({"resources": ["../base"], "images": images}))
    documents = {(document["kind"], document["metadata"]["name"]): document for document in render(overlay)}
    found = {container["image"] for pod in pods(documents) for container in pod["containers"]}
    assert found == {"registry.example/bct:1.2"}
