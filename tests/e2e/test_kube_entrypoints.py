"""What the manifests run is run: each job's line, by a shell, in the order of the docs, on one home and a private Ray.

Compilers are taken away, since the image for CPUs has none.
"""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.vectors import read_vectors, vector_files
from tests.e2e.cluster import PrivateRay, private_ray
from tests.kube.manifests import JOBS, ROOT, overlays, pods, rendered
from tests.kube.policies import environment

IDENTITIES, HELD_OUT, IMAGES = 8, 6, 4
TINY = {
    "name": "tiny",
    "preprocess": {"size": 16, "resize": 16, "channels": 1},
    "defaults": {
        "backbone": {"name": "small", "embedding_dim": 8, "width": 4, "depth": 0, "image_size": 16, "channels": 1},
        "training": {"steps": 4, "global_batch": 8},
    },
    "generations": {"v1": {}, "v2": {"parents": ["v1"], "compat": {"method": "bct"}}},
    "evaluation": {"far": [0.1], "bootstrap": 0},
    "cluster": {"workers": 2},
}
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


def picture(path: Path, number: int, seed: int) -> None:
    """An image of somebody: their pattern, and noise."""
    pattern = np.random.default_rng(number).integers(0, 200, (16, 16))
    noise = np.random.default_rng(1000 + seed).integers(0, 55, (16, 16))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pattern + noise).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home as users fill it: images to pack, a test set and a gallery; and a config beside it."""
    home = tmp_path_factory.mktemp("home")
    for number in range(IDENTITIES):
        for seed in range(IMAGES):
            picture(home / "images" / f"person-{number}" / f"{seed}.png", number, seed)
    with (home / "held-out.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "identity", "role"])
        for number in range(IDENTITIES, IDENTITIES + HELD_OUT):
            for seed, role in enumerate(("gallery", "query", "query")):
                picture(home / "held-out" / f"{number}-{seed}.png", number, seed)
                rows.writerow([f"held-out/{number}-{seed}.png", f"person-{number}", role])
    (home / "tmp").mkdir()
    (home / "run.yaml").write_text(yaml.safe_dump(TINY))
    return home


@pytest.fixture(scope="module")
def ray(home: Path) -> Iterator[PrivateRay]:
    with private_ray(home) as running:
        yield running


@pytest.fixture(scope="module")
def lines() -> dict[str, str]:
    """Each job's line, which is the same in every overlay: what differs is the config, and the machines."""
    found: dict[str, set[str]] = {job: set() for job in JOBS}
    for folder in overlays().values():
        for job, said in found.items():
            said.add(rendered(folder / job)[0]["spec"]["entrypoint"])
    assert all(len(said) == 1 for said in found.values()), found
    return {job: said.pop() for job, said in found.items()}


def submit(job: str, line: str, ray: PrivateRay, home: Path) -> str:
    """Run a line as the submitter's shell and Ray's head would, with the variables of the head's manifest."""
    [pod] = [one for one in pods(rendered(overlays()["gpu"] / job)) if one.component == "ray-head"]
    told = {name: entry["value"] for name, entry in environment(pod.containers[0]).items() if "value" in entry}
    for name in [name for name in told if name.startswith("MLFLOW_")]:
        del told[name]  # there is a server in the cluster; here there is a file
    place = {"BCT_HOME": str(home), "BCT_CONFIG": str(home / "run.yaml"), "HOME": str(home / "tmp")}
    none = {"CC": "/bin/false", "CXX": "/bin/false", "RAY_ADDRESS": ray.gcs}
    given = {**ray.environment, **told, **place, **none, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], check=False, cwd=ROOT, env=given, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_each_jobs_line_runs_and_finds_what_the_one_before_left(
    lines: dict[str, str], ray: PrivateRay, home: Path
) -> None:
    submit("pack", lines["pack"], ray, home)
    assert json.loads((home / "data" / "train" / "manifest.json").read_text())["samples"] == IDENTITIES * IMAGES

    held_out = lines["pack"].partition(" --source")[0] + " --source query-gallery --path $BCT_HOME/held-out.csv"
    for place in ("test", "gallery"):
        submit("pack", f"{held_out} --out $BCT_HOME/data/{place}", ray, home)

    submit("train", lines["train"], ray, home)
    report = json.loads((home / "runs" / "tiny" / "report.json").read_text())
    assert report["generations"] == ["v1", "v2"]
    submit("train", lines["train"], ray, home)  # a second try of backoffLimit finds it all, and does nothing
    assert json.loads((home / "runs" / "tiny" / "report.json").read_text())["mlflow"] == report["mlflow"]

    submit("evaluate", lines["evaluate"], ray, home)
    again = json.loads((home / "runs" / "tiny" / "evaluation" / "report.json").read_text())
    assert again["matrix"] == report["matrix"]

    submit("embed", lines["embed"], ray, home)
    vectors = read_vectors(vector_files(home / "vectors" / "v2"))
    assert len(vectors.keys) == 3 * HELD_OUT
