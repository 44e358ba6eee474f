"""A training on a private Ray that a real Prometheus looks at."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipeline.data.finishing import write_data_set
from pipeline.data.sources import Sample
from pipeline.identities import IdentityTable
from tests.e2e.cluster import PrivateRay, free_ports
from tests.e2e.servers import Server

ROOT = Path(__file__).parents[2]
OBSERVABILITY = ROOT / "kube" / "observability"


class Prometheus:
    """Asks a server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series of an instant query; AssertionError where Prometheus refuses it."""
        parts = urllib.parse.urlencode({"query": query})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{parts}", timeout=30) as answer:
                told = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from None
        assert told["status"] == "success", told
        result: list[dict[str, Any]] = told["data"]["result"]
        return result


@contextmanager
def prometheus(ray: PrivateRay, folder: Path) -> Iterator[Prometheus]:
    """The project's own configuration, but for Ray's place and a few seconds between looks."""
    tree = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())
    tree["global"] = dict.fromkeys(tree["global"], "3s")
    tree["rule_files"] = [str(OBSERVABILITY / name) for name in tree["rule_files"]]
    tree["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(ray.targets)], "refresh_interval": "1s"}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(tree))
    (port,) = free_ports(1)
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'series'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with Server(command, f"http://127.0.0.1:{port}/-/ready", folder / "prometheus.log", {}):
        yield Prometheus(f"http://127.0.0.1:{port}")


@contextmanager
def training(ray: PrivateRay, home: Path, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """One generation, trained until the end of the context, which the driver is told by SIGTERM."""
    write_images(home / "data" / "train")
    tree = {
        "name": "watched",
        "data": {"train": "data/train", "test": None},
        "preprocess": {"size": 32, "resize": 32, "channels": 1},
        "generations": {
            "v1": {
                "backbone": {"name": "small", "embedding_dim": 16, "width": 8, "depth": 0},
                "training": {"steps": 1_000_000, "global_batch": 16, "log_every": 5, **settings},
            }
        },
        "cluster": {"workers": 2},
    }
    (home / "watched.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "jobs/train_bct.py", "--config", str(home / "watched.yaml")]
    environment = {**ray.environment, "RAY_ADDRESS": ray.gcs}
    with (home / "out").open("w") as out, (home / "err").open("w") as err:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)
    try:
        yield driver
        driver.send_signal(signal.SIGTERM)
        driver.wait(120)
    finally:
        driver.kill()
        driver.wait()


def write_images(folder: Path) -> None:
    """Noise around a grey that is each identity's own."""
    rng, table = np.random.default_rng(1), IdentityTable(tuple(f"id-{number}" for number in range(10)))

    def drawn(identity: int) -> bytes:
        pixels = rng.integers(0, 100, (32, 32), dtype=np.uint8) + np.uint8(15 * identity)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "png")
        return out.getvalue()

    images = [Sample(f"s{n:03d}", drawn(n % 10), "png", f"id-{n % 10}", {}) for n in range(160)]
    write_data_set(folder, "made by hand", table, [images])
