"""`jobs/embed.py` as it is called: a registered generation, a packed data set, a private Ray, and users' mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.registry import Registry
from pipeline.stamp import Stamp
from pipeline.vectors import read_vectors, vector_files
from tests.e2e.cluster import PrivateRay, private_ray
from tests.unit.test_embed import BROKEN, SIZES, make_shards
from tests.unit.test_registry import make_generation, start

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a config, a registered generation, and two data sets."""
    home = tmp_path_factory.mktemp("home")
    registry = Registry(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}", "glyphs", home / "mlflow" / "artifacts")
    registry.register(start(registry, "v1"), make_generation(home / "artefacts", "v1"), {})
    config = {"name": "glyphs", "home": str(home), "generations": {"v1": {}}}
    (home / "run.yaml").write_text(yaml.safe_dump(config))
    make_shards(home / "shards", {})
    make_shards(home / "broken", BROKEN)
    return home


@pytest.fixture(scope="module")
def ray(home: Path) -> Iterator[PrivateRay]:
    with private_ray(home) as running:
        yield running


def embed(home: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/embed.py", "--out", str(home / "vectors"), "--batch", "3", *arguments]
    environment = {name: value for name, value in environment.items() if name != "MLFLOW_TRACKING_URI"}
    return subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)


def nobody(home: Path) -> dict[str, str]:
    """An environment without a Ray: it must not be asked."""
    return {**os.environ, "BCT_HOME": str(home), "RAY_ADDRESS": "127.0.0.1:1"}


def registered(home: Path, data: str, name: str = "v1") -> list[str]:
    return ["--config", str(home / "run.yaml"), "--generation", name, "--data", str(home / data)]


def refused(done: subprocess.CompletedProcess[str], *told: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    (message,) = (line for line in done.stderr.splitlines() if "_parser] " not in line)  # DALI's own
    assert message.startswith("error: ")
    assert all(words in message for words in told), message


def test_a_registered_generation_embeds_a_data_set(ray: PrivateRay, home: Path) -> None:
    environment = {**ray.environment, "RAY_ADDRESS": ray.gcs}
    done = embed(home, environment, *registered(home, "broken"), "--dtype", "float16", "--limit", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{sum(SIZES) - 3} of {sum(SIZES)} images" in done.stdout
    assert "3 images have none" in done.stdout
    assert f"{len(SIZES)}/{len(SIZES)} parts" in done.stdout
    assert "Traceback" not in done.stderr
    assert "error:" not in done.stderr
    vectors = read_vectors(vector_files(home / "vectors"))
    assert vectors.keys.to_pylist() == [f"s{n:03d}" for n in range(sum(SIZES)) if n not in BROKEN]
    assert (vectors.stamp.family, vectors.stamp.generation) == ("glyphs", "v1")

    before = {path: path.stat().st_mtime_ns for path in (home / "vectors").iterdir()}
    artefact = next((home / "artefacts").iterdir())
    assert Stamp.model_validate(json.loads((home / "vectors" / "_embed.json").read_text())["stamp"]) == vectors.stamp
    again = embed(home, nobody(home), "--artefact", str(artefact), "--data", str(home / "broken"), "--dtype", "float16")
    assert again.returncode == 0, again.stderr
    del before[home / "vectors" / "_embed.json"], before[home / "vectors" / ".lock"]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (home / "vectors").iterdir()}.items()
    refused(embed(home, nobody(home), *registered(home, "shards")), "holds vectors of data 'broken'", "not 'shards'")


def test_mistakes_are_told_in_one_line(home: Path) -> None:
    out = ["--out", str(home / "elsewhere")]
    refused(embed(home, nobody(home), *registered(home, "shards", "v7"), *out), "generation 'v7'")
    refused(embed(home, nobody(home), *registered(home, "nothing"), *out), "does not exist; run jobs/pack.py")
    refused(embed(home, nobody(home), *registered(home, "shards"), *out, "--batch", "0"), "--batch 0: Input should be")
    generation = ["--artefact", str(next((home / "artefacts").iterdir())), "--data", str(home / "broken")]
    refused(
        embed(home, nobody(home), *generation, *out, "--actors", "0", "--limit", "1"),
        "more than --limit 1",
        "last: 's0",
    )
