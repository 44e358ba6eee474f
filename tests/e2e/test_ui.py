"""What a person sees of the generations in MLflow's own pages, in a real browser.

BCT_SCREENSHOTS=docs/images keeps the pictures for the docs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.registry import RegisteredGeneration, Registry
from tests.e2e.browser import Browser, chromium
from tests.e2e.servers import mlflow_server
from tests.unit.families import Family

# MLflow's own queries, under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

ROOT = Path(__file__).parents[2]
PLOT = ROOT / "docs" / "images" / "matrix-rank1.png"
FAMILY = "glyphs"


@dataclass(frozen=True)
class Site:
    """MLflow's pages on a store with three generations, and who looks at them."""

    url: str
    browser: Browser
    versions: dict[str, RegisteredGeneration]
    experiment: str

    def run(self, name: str, tab: str) -> str:
        """Address of the run that trained a generation."""
        return f"{self.url}/#/experiments/{self.experiment}/runs/{self.versions[name].run_id}/{tab}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("ui")
    with chromium(folder) as browser:
        store = f"sqlite:///{folder / 'mlflow.db'}"
        registry = Registry(store, FAMILY, folder / "artifacts")
        family = Family.make(registry, folder)
        family.record()
        registry.log_evaluation("v2", {"rank1/v2 on v1": 0.25}, [PLOT])
        registry.promote_candidate("v3")
        run = registry.client.get_run(registry.versions()["v2"].run_id)
        with registry.tracker(run.info.run_id, folder / "figures.jsonl") as tracker:
            for step in range(0, 300, 10):
                tracker.log(step, {"loss": 3.0 / (1 + step / 50)})
        with mlflow_server(folder, store, str(folder / "artifacts")) as server:
            yield Site(server.url, browser, registry.versions(), run.info.experiment_id)


def test_page_of_the_registered_model_shows_every_generation_and_the_alias(site: Site) -> None:
    seen = site.browser.open(f"{site.url}/#/models/{FAMILY}", "Version 1", "Version 3")
    site.browser.picture("mlflow-model")
    assert "Version 2" in seen
    assert seen.count("@ candidate") == 1
    for name, one in site.versions.items():
        assert f"generation : {name} digest : {one.digest}" in seen


def test_page_of_a_version_shows_its_card_and_its_verdicts(site: Site) -> None:
    url = f"{site.url}/#/models/{FAMILY}/versions/{site.versions['v3'].version}"
    seen = site.browser.open(url, "v3 of glyphs", "What it may search")
    site.browser.picture("mlflow-version")
    assert "Queries of v3 may search v2's gallery as it is" in seen
    assert "candidate" in seen


def test_page_of_a_run_shows_its_curve_its_lineage_and_its_plots(site: Site) -> None:
    site.browser.open(site.run("v2", "model-metrics"), "v2", "loss")
    site.browser.picture("mlflow-curves")
    for path, picture in (("lineage.png", "mlflow-lineage"), (f"plots/{PLOT.name}", "mlflow-plots")):
        site.browser.open(site.run("v2", f"artifacts/{path}"), PLOT.name if "/" in path else path)
        shown = site.browser.page.locator(".mlflow-artifact-view").locator("img:visible, image:visible").first
        shown.wait_for()
        loaded = site.browser.page.locator(".mlflow-artifact-view img").last  # what is shown is a copy of it
        assert loaded.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
        site.browser.picture(picture)
