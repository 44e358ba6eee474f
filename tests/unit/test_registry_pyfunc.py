"""Registered generations as MLflow loads them: real image bytes in, stamped embeddings out."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from torch.nn import functional as F

from pipeline.data.finishing import write_data_set
from pipeline.data.loader import iterate_images
from pipeline.data.manifest import Manifest
from pipeline.data.sources import Sample
from pipeline.errors import DataError, GenerationError
from pipeline.generation import BACKBONE
from pipeline.identities import IdentityTable
from pipeline.registry import Registry
from pipeline.stamp import Stamp
from pipeline.tracking import pyfunc
from tests.pictures import encode, noise, ramp
from tests.unit.test_registry import make_generation, start

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow warns of type hints of its own
    from mlflow.pyfunc import load_model

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def test_round_trip_gives_the_generations_own_features(
    registry: Registry, client: MlflowClient, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyfunc, "BATCH", 4)  # three batches, the last one short
    generation = make_generation(tmp_path, "v1.0")
    found = registry.register(start(registry, "v1.0"), generation, {}, candidate=True)
    names = {Path(entry.path).name for entry in client.list_logged_model_artifacts(found.model_id)}
    assert names == {path.name for path in generation.path.iterdir()} | {"MLmodel"}  # nothing is pickled
    raws = [encode(noise(number, 20 + 7 * number)) for number in range(8)]
    raws += [encode(ramp(), "JPEG"), encode(ramp(), "WEBP", lossless=True)]
    kinds = ["png"] * 8 + ["jpg", "webp"]
    samples = [Sample(f"s{n}", raw, kind, "id", {}) for n, (raw, kind) in enumerate(zip(raws, kinds, strict=True))]
    write_data_set(tmp_path / "data", "ten", IdentityTable(("id",)), [samples])
    manifest, preprocess = Manifest.load(tmp_path / "data"), generation.record.preprocess
    assert preprocess is not None
    [(images, _)] = iterate_images(tmp_path / "data", manifest, preprocess, 10)
    with torch.no_grad():
        expected_ND = F.normalize(generation.load_backbone()(images)).numpy()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    frame = pd.DataFrame({"image": raws}, index=range(5, 15))
    location = client.get_logged_model(found.model_id).artifact_location
    for place in ("models:/glyphs/1", "models:/glyphs@candidate", f"models:/{found.model_id}", location):
        told: Any = load_model(place).predict(frame)
        np.testing.assert_allclose(np.stack(list(told["vector"])), expected_ND, atol=2e-6)
        assert list(told.index) == list(frame.index)
        stamps = {Stamp.parse(text, "the answer") for text in told["stamp"]}
        assert stamps == {Stamp.of(generation)}
    model = load_model(location)
    assert model.model_id == found.model_id
    assert [(str(column.type), column.name) for column in model.metadata.signature.inputs] == [
        ("DataType.binary", "image")
    ]
    assert model.metadata.signature.outputs.input_names() == ["vector", "stamp"]
    assert (model.metadata.metadata or {})["stamp"]["digest"] == generation.digest
    assert len(model.predict(frame[:0])) == 0

    with pytest.raises(DataError, match=r"image 6 of the request .* does not decode"):
        model.predict(pd.DataFrame({"image": [*raws[:6], raws[6][:200], *raws[7:]]}))
    with pytest.raises(MlflowException, match="image"):
        model.predict(pd.DataFrame({"picture": raws}))


def test_a_copy_that_has_changed_is_not_loaded(registry: Registry, client: MlflowClient, tmp_path: Path) -> None:
    generation = make_generation(tmp_path, "v1")
    found = registry.register(start(registry, "v1"), generation, {})
    location = client.get_logged_model(found.model_id).artifact_location
    copy = Path(location.removeprefix("file://")) / BACKBONE
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(GenerationError, match="has changed since it was written"):
        load_model(location)
    copy.unlink()
    with pytest.raises(GenerationError, match="is missing"):
        load_model(location)


def test_the_file_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    stamp = Stamp.of(make_generation(tmp_path, "v1"))
    texts = {pyfunc.mlmodel("m-1", "r" * 32, 1_700_000_000_123, stamp).to_yaml() for _ in range(2)}
    assert len(texts) == 1
    assert "loader_module: pipeline.tracking.pyfunc" in texts.pop()
