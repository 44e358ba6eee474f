"""A run's evaluation from shards and artefacts to files and MLflow, with real, tiny, untrained generations."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipeline import assessment
from pipeline.assessment import evaluate_run, trained
from pipeline.config import RunConfig
from pipeline.data.finishing import write_data_set
from pipeline.data.manifest import Manifest
from pipeline.data.sources import Sample
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import embedding
from pipeline.evaluation.embedding import embed, read_labels
from pipeline.generation import Generation
from pipeline.identities import IdentityTable
from pipeline.registry import Registry
from tests.pictures import encode, noise
from tests.unit.test_registry import make_generation, start

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

IDENTITIES, GROUPS = 6, 4


def write_images(folder: Path) -> None:
    """Each identity's noise, with noise of each image's own over it."""
    samples = []
    for identity in range(IDENTITIES):
        for group in range(GROUPS):
            pixels = np.asarray(noise(identity, 32)) // 2 + np.asarray(noise(100 + 10 * identity + group, 32)) // 2
            about = {"group": f"font-{group}", "role": "gallery" if group == 1 else "query"}
            image = encode(Image.fromarray(pixels))
            samples.append(Sample(f"s{identity}-{group}", image, "png", f"id-{identity}", about))
    table = IdentityTable(tuple(f"id-{number}" for number in range(IDENTITIES)))
    write_data_set(folder, "noise", table, [samples[:9], samples[9:]])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two sets of images, and a family of three that is trained and registered."""
    home = tmp_path_factory.mktemp("home")
    write_images(home / "test")
    shutil.copytree(home / "test", home / "validation")
    registry = registry_of(home)
    v1 = make_generation(home / "artefacts", "v1")
    registry.register(start(registry, "v1"), v1, {})
    for name, parents, seed in (("v2", {"v1": v1.digest}, 1), ("v2-paragon", {}, 2)):
        registry.register(start(registry, name), make_generation(home / "artefacts", name, parents, seed=seed), {})
    return home


def config_of(home: Path, **evaluation: Any) -> RunConfig:
    generation = {"backbone": {"name": "small", "embedding_dim": 8}}
    return RunConfig.model_validate(
        {
            "name": "glyphs",
            "home": home,
            "data": {"test": "test", "validation": "validation"},
            "generations": {
                "v1": generation,
                "v2": {**generation, "parents": ["v1"]},
                "v2-paragon": {**generation, "paragon_of": "v2", "compat": {"method": "independent"}},
            },
            "evaluation": {"far": [0.05], "bootstrap": 20, **evaluation},
        }
    )


def registry_of(home: Path) -> Registry:
    return Registry(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}", "glyphs", home / "mlflow" / "artifacts")


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_evaluation_writes_and_logs_everything(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate_run(config_of(home))
    folder = home / "runs" / "glyphs" / "evaluation"
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["generations"] == ["v1", "v2", "v2-paragon"]
    assert report["paragons"] == {"v2": "v2-paragon"}
    assert len(report["matrix"]["rank1"]) == 6
    assert [pair for pair, judged in report["criterion"].items() if judged["ancestor"]] == ["v2/v1"]
    written = {path.name for path in folder.iterdir()}
    assert written >= {"report.md", "det.png", "matrix-rank1.png", "matrix-tar-at-5e-2.png", "backfill-rank1.png"}
    assert ("flips-v2-v1.png" in written) == (report["negative_flips"]["v2/v1"]["negative"]["value"] > 0)
    assert "with v1" in capsys.readouterr().out
    found = registry_of(home).find("v2")
    assert found is not None
    uri = f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    logged = client.get_run(found.run_id).data.metrics
    assert logged["rank1/v2 on v1"] == report["matrix"]["rank1"]["v2/v1"]["value"]
    assert "rank1/v1 on v1" not in logged
    assert {Path(item.path).name for item in client.list_artifacts(found.run_id, "plots")} == written - {"report.json"}


def test_evaluating_again_embeds_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate_run(config_of(home))
    monkeypatch.setattr(Generation, "load_backbone", lambda _: pytest.fail("embedded again"))
    assert evaluate_run(config_of(home)) == first  # the report is there
    other = evaluate_run(config_of(home, bootstrap=0))  # the embeddings are
    assert other["matrix"]["rank1"]["v1/v1"] == {**first["matrix"]["rank1"]["v1/v1"], "low": None, "high": None}


def test_validation_has_its_own_folder_and_names(home: Path) -> None:
    evaluate_run(config_of(home), ["v2", "v1"], "validation")
    told = json.loads((home / "runs" / "glyphs" / "evaluation-validation" / "report.json").read_text())
    assert told["generations"] == ["v1", "v2"]  # in the config's order
    assert told["paragons"] == {}
    assert told["update_gain"]["v2/v1"] == {"rank1": None, "tar@5e-2": None}
    found = registry_of(home).find("v1")
    assert found is not None
    uri = f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"
    assert "validation/rank1/v1 on v1" in MlflowClient(uri, uri).get_run(found.run_id).data.metrics


def test_mistakes_are_told(home: Path) -> None:
    config = config_of(home)
    with pytest.raises(ConfigError, match="--generations names 'v9', which is not in the run; choose of v1, v2"):
        evaluate_run(config, ["v1", "v9"])
    with pytest.raises(ConfigError, match="names one twice: v1,v1"):
        evaluate_run(config, ["v1", "v1"])
    more = config.model_copy(update={"generations": {**config.generations, "v3": config.generations["v1"]}})
    with pytest.raises(ConfigError, match="generation 'v3' is not trained yet"):
        evaluate_run(more, ["v3"])
    assert list(trained(more, registry_of(home), None)) == ["v1", "v2", "v2-paragon"]
    nothing = config.model_copy(update={"generations": {"v7": config.generations["v1"]}})
    with pytest.raises(ConfigError, match="no trained generation"):
        evaluate_run(nothing)
    bare = config.model_copy(update={"data": config.data.model_copy(update={"validation": None})})
    with pytest.raises(ConfigError, match=r"data\.validation names no shards"):
        evaluate_run(bare, None, "validation")


def test_embeddings_are_kept_by_what_they_are_made_of(home: Path, tmp_path: Path) -> None:
    generation, test = trained(config_of(home), registry_of(home), ["v1"])["v1"], home / "test"
    first = embed(generation, test, "group", cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    np.testing.assert_array_equal(embed(generation, test, "group").vectors_ND, first.vectors_ND)
    kept.write_bytes(kept.read_bytes()[:50])  # broken: made again
    np.testing.assert_array_equal(embed(generation, test, "group", cache=tmp_path).vectors_ND, first.vectors_ND)
    assert embedding._read(kept) is not None
    other = trained(config_of(home), registry_of(home), ["v2"])["v2"]
    assert not np.array_equal(embed(other, test, "group", cache=tmp_path).vectors_ND, first.vectors_ND)
    assert len(list(tmp_path.iterdir())) == 2


def test_labels_are_those_of_the_samples(home: Path) -> None:
    labels = read_labels(home / "test", Manifest.load(home / "test"), "group")
    assert labels.keys == tuple(f"s{identity}-{group}" for identity in range(IDENTITIES) for group in range(GROUPS))
    np.testing.assert_array_equal(labels.identity_N, np.repeat(np.arange(IDENTITIES), GROUPS))
    np.testing.assert_array_equal(labels.group_N, np.tile(np.arange(GROUPS), IDENTITIES))
    np.testing.assert_array_equal(labels.is_gallery_N, labels.group_N == 1)
    with pytest.raises(DataError, match="needs the attributes 'camera' and 'role'"):
        read_labels(home / "test", Manifest.load(home / "test"), "camera")


def test_inputs_of_an_assessment_are_all_it_depends_on(home: Path) -> None:
    config, registry = config_of(home), registry_of(home)
    every = trained(config, registry, None)
    digest = assessment.inputs_digest(config, every, home / "test")
    assert digest == assessment.inputs_digest(config, dict(every), home / "test")
    assert digest != assessment.inputs_digest(config_of(home, bootstrap=21), every, home / "test")
    assert digest != assessment.inputs_digest(config, {"v1": every["v1"]}, home / "test")
