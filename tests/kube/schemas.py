"""What documents are checked against: Kubernetes' own schemas, and KubeRay's, with unknown fields refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema
import pytest
import yaml

from tests.kube.manifests import CRDS, Tree

RAY = {"RayJob": "ray.io_rayjobs.yaml", "RayCluster": "ray.io_rayclusters.yaml"}
KUEUE = "kueue.x-k8s.io/v1beta2"  # no schema of it is to be had: test_kueue.py checks what it can


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


@cache
def ray_schema(kind: str) -> Tree:
    """KubeRay's schema of a kind; skips the test where its CRDs are not."""
    path = CRDS / RAY[kind]
    if not path.is_file():
        pytest.skip(f"KubeRay's CRDs are not at {CRDS}; name their folder in KUBERAY_CRDS")
    definition = yaml.load(path.read_text(), yaml.CSafeLoader)
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    closed: Tree = strict(version["schema"]["openAPIV3Schema"])
    return closed


def ray_problems(document: Tree) -> list[str]:
    """What KubeRay's schema says of a document of its own."""
    errors = jsonschema.Draft7Validator(ray_schema(document["kind"])).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def native_problem(document: Tree) -> str | None:
    """What the newest Kubernetes' schema says of a document, strictly."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="`make install` brings it")
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return None
