"""What `kubectl kustomize` makes of kube/, each folder once a process, and the pods in it wherever they stand."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBE = ROOT / "kube"
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay-crds"))
COMPONENT = "app.kubernetes.io/component"
JOBS = ("pack", "train", "evaluate", "embed")

Tree = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod's template: where it stands, what it is (its component's label), and its spec."""

    where: str
    component: str
    spec: Tree

    @property
    def containers(self) -> list[Tree]:
        """Those that stay, not those that only begin."""
        found: list[Tree] = self.spec["containers"]
        return found

    @property
    def every(self) -> list[Tree]:
        """All containers."""
        return [*self.spec.get("initContainers", []), *self.containers]

    @property
    def volumes(self) -> dict[str, Tree]:
        """By name."""
        return {volume["name"]: volume for volume in self.spec.get("volumes", [])}


def overlays() -> dict[str, Path]:
    """The overlays' folders: what stands; the jobs are folders beneath them."""
    return {folder.name: folder for folder in sorted((KUBE / "overlays").iterdir())}


def applied() -> list[Path]:
    """Every folder that a user may apply."""
    below = [folder.parent for one in overlays().values() for folder in sorted(one.glob("*/kustomization.yaml"))]
    jobs = [folder for folder in below if folder.name != "settings"]
    return [KUBE / "base", *(KUBE / "jobs" / job for job in JOBS), *overlays().values(), *jobs]


def name_of(folder: Path) -> str:
    """As tests call it."""
    return str(folder.relative_to(KUBE))


@cache
def _rendered(folder: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # kustomize warns of deprecated fields there
    return done.stdout


def rendered(folder: Path) -> list[Tree]:
    """The documents that are applied; one's own, to be broken at will."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    return list(yaml.load_all(_rendered(folder), yaml.CSafeLoader))


def render_all(folders: Sequence[Path]) -> dict[str, list[Tree]]:
    """The documents of all folders, by the folders' names."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(map(name_of, folders), pool.map(rendered, folders), strict=True))


def title(document: Tree) -> str:
    """Kind and name."""
    return f"{document['kind']} {document['metadata']['name']}"


def named(documents: Sequence[Tree]) -> dict[tuple[str, str], Tree]:
    """By kind and name, which are there once."""
    found = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    assert len(found) == len(documents)
    return found


def ray_clusters(documents: Sequence[Tree]) -> list[tuple[str, Tree]]:
    """Ray clusters' specs, of jobs or by themselves."""
    jobs = [(title(one), one["spec"]["rayClusterSpec"]) for one in documents if one["kind"] == "RayJob"]
    return jobs + [(title(one), one["spec"]) for one in documents if one["kind"] == "RayCluster"]


def pods(documents: Sequence[Tree]) -> list[Pod]:
    """Every pod's template, wherever it stands."""

    def walk(value: Any, where: str) -> Iterator[Pod]:
        if isinstance(value, dict):
            if "containers" in value.get("spec", {}):
                labels = value.get("metadata", {}).get("labels", {})
                yield Pod(where, labels.get(COMPONENT, ""), value["spec"])
            for key, part in value.items():
                yield from walk(part, f"{where} {key}")
        elif isinstance(value, list):
            for part in value:
                yield from walk(part, where)

    return [pod for document in documents for pod in walk(document, title(document))]


UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3, "": 1}


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity as a number: bytes, cores, pieces."""
    number = str(text).rstrip("KMGTim")
    return float(number) * UNITS[str(text)[len(number) :]]
