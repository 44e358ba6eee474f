"""Every document of every folder, checked as the API server would."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.kube.manifests import KUBE, ROOT, Tree, applied, named, ray_clusters, render_all, rendered, title
from tests.kube.schemas import KUEUE, RAY, native_problem, ray_problems, ray_schema

BASE, TRAIN = KUBE / "base", KUBE / "jobs" / "train"


@pytest.fixture(scope="module")
def everything() -> dict[str, list[Tree]]:
    return render_all(applied())


def test_native_documents_are_valid(everything: dict[str, list[Tree]]) -> None:
    others = {"ray.io/v1", KUEUE}
    native = [(name, one) for name, every in everything.items() for one in every if one["apiVersion"] not in others]
    assert len(native) > 80
    checked: dict[str, str | None] = {}  # most stand in every overlay as they are
    wrong = []
    for name, one in native:
        told = repr(one)
        if told not in checked:
            checked[told] = native_problem(one)
        wrong += [(name, title(one), checked[told])] if checked[told] else []
    assert wrong == []


@pytest.mark.parametrize("kind", RAY)
def test_ray_documents_are_valid(everything: dict[str, list[Tree]], kind: str) -> None:
    ray_schema(kind)
    ours = [(name, one) for name, every in everything.items() for one in every if one["kind"] == kind]
    assert len(ours) == {"RayJob": 20, "RayCluster": 2}[kind]
    assert [(name, found) for name, one in ours if (found := ray_problems(one))] == []


def test_a_folder_of_a_job_makes_that_job_and_nothing_else(everything: dict[str, list[Tree]]) -> None:
    for name, documents in everything.items():
        *_, last = name.split("/")
        if name in ("base", *(f"overlays/{overlay}" for overlay in ("dev", "gpu", "spot", "kueue"))):
            assert ray_clusters(documents) == [], "what stands starts nothing"
        else:
            assert [title(one) for one in documents] == [
                "RayCluster develop" if last == "develop" else f"RayJob {last}"
            ]


def test_everything_lies_in_the_namespace(everything: dict[str, list[Tree]]) -> None:
    wide = {"Namespace", "ResourceFlavor", "ClusterQueue"}
    for name, documents in everything.items():
        places = {one["metadata"].get("namespace") for one in documents if one["kind"] not in wide}
        assert places == {"bct"}, name
        assert all("part-of" in str(one["metadata"]["labels"]) for one in documents), name
    assert ("Namespace", "bct") in named(everything["base"])


def test_every_ray_cluster_asks_for_a_token(everything: dict[str, list[Tree]]) -> None:
    clusters = [(name, cluster) for name, every in everything.items() for _, cluster in ray_clusters(every)]
    assert len(clusters) == 22
    assert [name for name, cluster in clusters if cluster["authOptions"] != {"mode": "token"}] == []


def test_ray_is_the_version_that_is_pinned(everything: dict[str, list[Tree]]) -> None:
    versions = {cluster["rayVersion"] for every in everything.values() for _, cluster in ray_clusters(every)}
    [version] = versions
    assert f'"ray[default,train]=={version}"' in (ROOT / "pyproject.toml").read_text()


def change(document: Tree, path: tuple[str | int, ...], value: Any) -> Tree:
    """A copy with another value at a place."""
    broken: Any = copy.deepcopy(document)
    place = broken
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    changed: Tree = broken
    return changed


HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
CONTAINER = (*HEAD, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("specs",), {}, "'specs' was unexpected"),
        (("spec", "entryPoint"), "python", "'entryPoint' was unexpected"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replica"), 2, "'replica' was unexpected"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"), "2", "'2' is not of type 'integer'"),
        ((*HEAD, "rayStartParams", "num-cpus"), 0, "0 is not of type 'string'"),
        ((*CONTAINER, "resources", "limit"), {}, "'limit' was unexpected"),
        ((*CONTAINER, "resources", "limits", "memory"), "8 gigabytes", "does not match"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens", "'tokens' is not one of"),
    ],
)
def test_kuberays_schema_finds_a_mistake(path: tuple[str | int, ...], value: Any, complaint: str) -> None:
    [job] = rendered(TRAIN)
    [found] = ray_problems(change(job, path, value))
    assert complaint in found


def test_kuberays_schema_finds_a_missing_field() -> None:
    [job] = rendered(TRAIN)
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert any("'headGroupSpec' is a required property" in problem for problem in ray_problems(job))


@pytest.mark.parametrize(
    ("key", "path", "value", "complaint"),
    [
        (("NetworkPolicy", "ray"), ("spec", "ingres"), [], "'ingres' was unexpected"),
        (("NetworkPolicy", "postgres"), ("spec", "ingress", 0, "port"), [], "'port' was unexpected"),
        (("PodDisruptionBudget", "mlflow"), ("spec", "minimumAvailable"), 1, "'minimumAvailable' was unexpected"),
        (("Deployment", "mlflow"), ("spec", "replicas"), "one", "'one' is not of type"),
        (("StatefulSet", "postgres"), ("spec", "volumeClaimTemplate"), [], "'volumeClaimTemplate' was unexpected"),
    ],
)
def test_kubernetes_schema_finds_a_mistake(
    key: tuple[str, str], path: tuple[str | int, ...], value: Any, complaint: str
) -> None:
    found = native_problem(change(named(rendered(BASE))[key], path, value))
    assert found is not None
    assert complaint in found
