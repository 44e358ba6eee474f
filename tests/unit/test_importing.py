"""Import of embeddings: what becomes of them, what is refused, and what the generation can and cannot do."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from pydantic import TypeAdapter

from jobs.import_generation import main
from pipeline.assessment import check_stored, evaluate_run, trained
from pipeline.compat.base import Method
from pipeline.compat.methods import METHODS, CompatConfig
from pipeline.config import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.preprocess import PreprocessConfig
from pipeline.embedding_files import ROWS, EmbeddingFile
from pipeline.errors import ConfigError, DataError, GenerationError, PipelineError, RegistryError
from pipeline.evaluation.embedding import embed, read_labels
from pipeline.evaluation.stored import stored_vectors
from pipeline.family import Member
from pipeline.generation import RECORD, Generation
from pipeline.generation_record import GenerationRecord
from pipeline.importing import Import, class_means, import_generation
from pipeline.model.backbones import BackboneConfig
from pipeline.model.margins import MarginConfig
from pipeline.registry import Registry
from pipeline.run import older_generations
from tests.unit.test_assessment import config_of, registry_of, write_images
from tests.unit.test_registry import make_generation, start

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

DIM = 5
Vectors = npt.NDArray[Any]


def draw(rows: int, dim: int = DIM, seed: int = 0) -> Vectors:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def write(path: Path, vectors: Any, kind: pa.DataType | None = None, **columns: Sequence[str | None]) -> EmbeddingFile:
    rows = [None if one is None else list(one) for one in vectors]
    pq.write_table(pa.table({**columns, "vector": pa.array(rows, kind or pa.list_(pa.float32()))}), path)
    return EmbeddingFile(path)


IDENTITY = tuple(f"id-{number}" for number in (3, 0, 3, 1, 5, 0, 3, 7))


@pytest.fixture
def train(tmp_path: Path) -> EmbeddingFile:
    return write(tmp_path / "train.parquet", draw(len(IDENTITY)), identity=IDENTITY)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a test set, and a registered v2 that has v0, imported, for a parent."""
    home = tmp_path_factory.mktemp("imported")
    write_images(home / "test")
    registry, keys = registry_of(home), keys_of(home)
    train = write(home / "train.parquet", draw(len(IDENTITY)), identity=IDENTITY)
    order = np.random.default_rng(1).permutation(len(keys))
    vectors = held_out_vectors(home)[order]
    test = write(home / "test.parquet", [*vectors, np.ones(DIM)], key=[*(keys[n] for n in order), "another set's"])
    v0 = import_generation(Import("v0", train, test), registry, home)
    v2 = make_generation(home / "artefacts", "v2", {"v0": v0.digest}, seed=1)
    registry.register(start(registry, "v2", (registry.get("v0"),)), v2, {})
    return home


def keys_of(home: Path) -> tuple[str, ...]:
    return read_labels(home / "test", Manifest.load(home / "test"), "group").keys


def held_out_vectors(home: Path) -> Vectors:
    """In the data set's order: near one direction an identity."""
    keys = keys_of(home)
    centres = {key.split("-")[0]: centre for key, centre in zip(keys[::4], draw(len(keys[::4]), seed=2), strict=True)}
    return np.stack([centres[key.split("-")[0]] for key in keys]) + 0.1 * draw(len(keys), seed=3)


def run_config(home: Path, method: dict[str, Any] | None = None) -> RunConfig:
    config = config_of(home)
    v2 = config.generations["v2"].model_copy(update={"parents": ("v0",)})
    if method is not None:
        v2 = v2.model_copy(update={"compat": compat(method)})
    return config.model_copy(update={"generations": {"v2": v2}})


def compat(settings: dict[str, Any]) -> Method:
    made: Method = TypeAdapter(CompatConfig).validate_python(settings)
    return made


# --- the artefact -----------------------------------------------------------------------------------------------------


def test_means_are_those_of_a_loop(tmp_path: Path) -> None:
    rows = 2 * ROWS + 7  # several batches
    identity = [f"k{number}" for number in np.random.default_rng(4).integers(0, 23, rows)]
    vectors = draw(rows) * np.geomspace(1e-3, 1e3, rows, dtype=np.float32)[:, None] + 0.5
    table, means = class_means(write(tmp_path / "t.parquet", vectors, identity=identity))
    assert table.keys == tuple(sorted(set(identity)))
    totals = {key: np.zeros(DIM) for key in table.keys}
    for key, vector in zip(identity, vectors.astype(np.float64), strict=True):
        totals[key] += vector / np.linalg.norm(vector)
    wanted = np.stack([totals[key] / np.linalg.norm(totals[key]) for key in table.keys])
    np.testing.assert_allclose(means, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), DIM)])
def test_kinds_of_lists_are_read_alike(tmp_path: Path, train: EmbeddingFile, kind: pa.DataType) -> None:
    halves = draw(len(IDENTITY)).astype(np.float16)
    first, second = (
        write(tmp_path / "a.parquet", halves.astype(np.float32), identity=IDENTITY),
        write(
            tmp_path / "b.parquet",
            halves if kind.value_type == pa.float16() else halves.tolist(),
            kind,
            identity=IDENTITY,
        ),
    )
    np.testing.assert_array_equal(class_means(first)[1], class_means(second)[1])
    assert not np.array_equal(class_means(first)[1], class_means(train)[1])


def test_artefact_is_sealed_registered_and_told(home: Path) -> None:
    generation = Generation(home / "runs" / "glyphs" / "generations" / "v0")
    generation.verify()
    record = generation.record
    assert (record.backbone, record.preprocess, record.embedding_dim) == (None, None, DIM)
    assert (record.margin.name, record.margin.scale) == ("norm_softmax", 20.0)
    assert generation.identities().keys == ("id-0", "id-1", "id-3", "id-5", "id-7")
    np.testing.assert_array_equal(
        generation.read_classifier_rows(np.arange(5)).numpy(), class_means(EmbeddingFile(home / "train.parquet"))[1]
    )
    assert record.files.keys() == {path.name for path in generation.path.iterdir()} - {RECORD}
    assert not list(generation.path.parent.glob(".*"))
    known = registry_of(home).get("v0")
    assert known.open().digest == generation.digest
    uri = f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    run = client.get_run(known.run_id)
    assert (run.data.tags["imported"], run.info.status) == ("true", "FINISHED")
    version = client.get_model_version("glyphs", known.version)
    assert version.tags["imported"] == "true"
    assert "embeddings only, 5 dimensions, 5 identities" in str(version.description)


def test_again_nothing_changes_and_what_was_cut_off_is_completed(
    home: Path, tmp_path: Path, train: EmbeddingFile
) -> None:
    registry = Registry(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}", "again", tmp_path / "artifacts")
    first = import_generation(Import("v0", train), registry, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    version = registry.get("v0")
    assert import_generation(Import("v0", train), registry, tmp_path).digest == first.digest
    assert registry.get("v0") == version
    registry.forget()  # sealed, but not registered
    import_generation(Import("v0", train), registry, tmp_path)
    assert registry.get("v0").digest == first.digest
    assert times == {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    (first.path / RECORD).rename(tmp_path / "aside")
    with pytest.raises(RegistryError, match="registered as version 1, whose artefact is not at"):
        import_generation(Import("v0", train), registry, tmp_path)


def test_records_of_trained_generations_say_what_they_said() -> None:
    record = GenerationRecord(
        family="test",
        name="v1",
        backbone=BackboneConfig(name="small", embedding_dim=6, image_size=8, width=4),
        preprocess=PreprocessConfig(size=8, resize=8),
        margin=MarginConfig(name="cosface", scale=10.0, m3=0.1),
        identities=11,
        config={"steps": 3},
        config_digest="c",
        data_digest="d",
        code_version="test",
    )
    told = hashlib.sha256(json.dumps(record.told(), indent=2).encode()).hexdigest()
    assert told == "ca169504c1766587960225b56d5e34902219417e49ccb6eb76a08a1d8b5f2528"  # of before there were imports
    for wrong in ({"dim": 6}, {"backbone": None}, {"backbone": None, "preprocess": None}, {"preprocess": None}):
        with pytest.raises(ValueError, match="backbone and preprocess are both given, or dim alone is"):
            GenerationRecord.model_validate(record.model_dump() | wrong)
    assert GenerationRecord.model_validate(record.model_dump() | {"backbone": None, "preprocess": None, "dim": 3})


# --- what is refused --------------------------------------------------------------------------------------------------

GOOD = draw(4).tolist()
FOUR = ("a", "b", "a", "b")


def bad_vectors(row: int, value: Any) -> list[Any]:
    return [*GOOD[:row], value, *GOOD[row + 1 :]]


@pytest.mark.parametrize(
    ("vectors", "columns", "told"),
    [
        (GOOD, {}, "has no column 'identity', but 'vector'"),
        (GOOD, {"identity": ("a",) * 4}, "has 1 identity, 'a'; a classifier needs at least two"),
        (GOOD, {"identity": ("a", None, "b", "b")}, "column 'identity' must hold a string in every row"),
        ([], {"identity": pa.array([], pa.string())}, "has no row"),
        (bad_vectors(2, [1.0, 2.0]), {"identity": FOUR}, "row 2 (from 0) has another length than the 5 values"),
        (bad_vectors(3, None), {"identity": FOUR}, "row 3 (from 0) has another length"),
        (
            bad_vectors(1, [1.0, float("nan"), 0, 0, 0]),
            {"identity": FOUR},
            "row 1 (from 0) holds a value that is no number",
        ),
        (bad_vectors(1, [1.0, None, 0, 0, 0]), {"identity": FOUR}, "row 1 (from 0) holds a value that is no number"),
        (bad_vectors(0, [float("inf")] * 5), {"identity": FOUR}, "row 0 (from 0) holds a value that is no number"),
        (bad_vectors(3, [0.0] * 5), {"identity": FOUR}, "row 3 (from 0) is all zeros"),
        ([[1.0, 0], [0, 1.0], [-2.0, 0], [0, 1.0]], {"identity": FOUR}, "vectors of identity 'a' cancel out"),
    ],
)
def test_bad_training_files_are_told_in_one_line(
    tmp_path: Path, registry: Registry, vectors: Any, columns: dict[str, Any], told: str
) -> None:
    refuse(Import("v0", write(tmp_path / "bad.parquet", vectors, **columns)), registry, tmp_path, DataError, told)


@pytest.mark.parametrize(
    ("vectors", "columns", "told"),
    [
        (GOOD, {"identity": FOUR}, "has no column 'key', but 'identity', 'vector'"),
        (GOOD, {"key": FOUR}, "stands twice; a sample has one embedding"),
        (draw(2, DIM + 1), {"key": ("a", "b")}, "has vectors of 6 values, --train of 5"),
        ([], {"key": pa.array([], pa.string())}, "has no row"),
        (bad_vectors(3, [0.0] * 5), {"key": "abcd"}, "row 3 (from 0) is all zeros"),
    ],
)
def test_bad_test_files_are_told_in_one_line(
    tmp_path: Path, registry: Registry, train: EmbeddingFile, vectors: Any, columns: dict[str, Any], told: str
) -> None:
    columns = {name: list(values) if isinstance(values, str) else values for name, values in columns.items()}
    refuse(
        Import("v0", train, write(tmp_path / "bad.parquet", vectors, **columns)), registry, tmp_path, DataError, told
    )


def test_files_that_are_none_are_told_in_one_line(tmp_path: Path, registry: Registry, train: EmbeddingFile) -> None:
    for content, told in ((b"no parquet at all", "cannot be read as Parquet"), (b"", "cannot be read as Parquet")):
        (tmp_path / "broken.parquet").write_bytes(content)
        broken = EmbeddingFile(tmp_path / "broken.parquet")
        refuse(Import("v0", broken), registry, tmp_path, DataError, told)
        refuse(Import("v0", train, broken), registry, tmp_path, DataError, told)
    refuse(Import("v0", EmbeddingFile(tmp_path / "nowhere")), registry, tmp_path, DataError, "nowhere is missing")
    refuse(Import("v0", EmbeddingFile(tmp_path)), registry, tmp_path, DataError, "cannot be read")
    words = tmp_path / "words.parquet"
    pq.write_table(pa.table({"identity": FOUR, "vector": FOUR}), words)
    refuse(Import("v0", EmbeddingFile(words)), registry, tmp_path, DataError, "'vector' must hold lists of floats")
    refuse(Import("../v0", train), registry, tmp_path, ConfigError, "--name '../v0' cannot name a generation")
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        refuse(Import("v0", train, scale=scale), registry, tmp_path, ConfigError, "must be a number above 0")


def test_names_that_are_taken_are_refused(home: Path, tmp_path: Path) -> None:
    registry = registry_of(home)
    train, test = EmbeddingFile(home / "train.parquet"), EmbeddingFile(home / "test.parquet")
    with pytest.raises(GenerationError, match=r"was made of other content: scale \(was 20.0, now 30.0\); take another"):
        import_generation(Import("v0", train, test, scale=30.0), registry, home)
    with pytest.raises(GenerationError, match=r"was made of other content: imported.test"):
        import_generation(Import("v0", train), registry, home)
    (home / "runs" / "glyphs" / "generations").mkdir(parents=True, exist_ok=True)
    made = make_generation(tmp_path, "v5")
    made.path.rename(home / "runs" / "glyphs" / "generations" / "v5")
    with pytest.raises(GenerationError, match=r"'v5' at .* was trained here; take another name"):
        import_generation(Import("v5", train), registry, home)
    assert import_generation(Import("v0", train, test), registry, home).digest == registry.get("v0").digest


def refuse(source: Import, registry: Registry, home: Path, kind: type[PipelineError], told: str) -> None:
    """It is refused in one line, and nothing is left of it."""
    with pytest.raises(kind) as error:
        import_generation(source, registry, home)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((home / "runs").rglob("*.parquet"))
    assert registry.find(source.name) is None


@pytest.fixture(scope="module")
def registry(home: Path) -> Registry:
    return Registry(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}", "refusing", home / "refused")


# --- as a parent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"method": "bct"}, {"method": "bct", "prototypes": "means"}])
def test_bct_begins_with_it(home: Path, settings: dict[str, Any]) -> None:
    config = run_config(home, settings)
    assert list(older_generations(config, registry_of(home))) == ["v0"]
    Member(config, "v2", registry_of(home)).verify_parents()


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"bct", "independent"}))
def test_methods_that_need_its_backbone_refuse_it(home: Path, method: str) -> None:
    config, registry = run_config(home, {"method": method}), registry_of(home)
    for begin in (Member(config, "v2", registry).begin, lambda: older_generations(config, registry)):
        with pytest.raises(GenerationError) as error:
            begin()
        assert f"compat.method {method!r} needs the backbone of parent 'v0', of which only embeddings" in str(
            error.value
        )
        assert "\n" not in str(error.value)


def test_it_has_no_backbone_and_nothing_to_reproduce(home: Path) -> None:
    generation = registry_of(home).get("v0").open()
    assert generation.reproduce_selftest() == 1.0
    with pytest.raises(GenerationError, match=r"'v0' at .* holds embeddings only, no backbone: .* 'bct'"):
        generation.load_backbone()


def test_it_is_not_trained(home: Path) -> None:
    config = run_config(home)
    listed = config.model_copy(update={"generations": {"v0": config.generations["v2"], **config.generations}})
    with pytest.raises(ConfigError, match=r"'v0' at .* was imported: it is not trained, so leave it out of"):
        Member(listed, "v0", registry_of(home)).find()


# --- evaluated --------------------------------------------------------------------------------------------------------


def test_embeddings_are_found_by_key(home: Path) -> None:
    v0 = registry_of(home).get("v0").open()
    embedded = embed(v0, home / "test", "group")
    np.testing.assert_array_equal(embedded.vectors_ND, held_out_vectors(home).astype(np.float32))
    keys = keys_of(home)
    some = [7, 2, 7]
    np.testing.assert_array_equal(
        stored_vectors(v0, [keys[n] for n in some], home), held_out_vectors(home).astype(np.float32)[some]
    )


def test_its_pairs_are_measured_like_any_others(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    report = evaluate_run(run_config(home))
    assert report["generations"] == ["v0", "v2"]
    assert report["matrix"]["rank1"].keys() == {"v0/v0", "v2/v0", "v2/v2"}
    assert report["matrix"]["rank1"]["v0/v0"]["value"] == 1.0
    assert report["criterion"]["v2/v0"]["ancestor"]
    assert not report["criterion"]["v2/v0"]["held"]


def test_missing_and_changed_embeddings_are_told(home: Path, tmp_path: Path) -> None:
    registry, keys = registry_of(home), keys_of(home)
    train, few = EmbeddingFile(home / "train.parquet"), write(tmp_path / "few.parquet", draw(20), key=keys[:20])
    partial = import_generation(Import("partial", train, few), registry, home)
    told = f"4 of 24 samples of {home / 'test'} have no embedding in generation 'partial', such as '{keys[20]}'"
    for check in (
        lambda: embed(partial, home / "test", "group"),
        lambda: check_stored(run_config(home), {"p": partial}),
    ):
        with pytest.raises(DataError) as error:
            check()
        assert told in str(error.value)
    path = partial.path / "test.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(GenerationError, match=r"test.safetensors has changed"):
        embed(partial, home / "test", "group")


def test_without_test_embeddings_it_is_left_out(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = registry_of(home)
    bare = import_generation(Import("bare", EmbeddingFile(home / "train.parquet")), registry, home)
    config = run_config(home)
    v2 = config.generations["v2"].model_copy(update={"parents": ("bare",)})
    config = config.model_copy(update={"generations": {"v2": v2}})
    assert list(older_generations(config, registry)) == ["bare"]
    assert list(trained(config, registry, None)) == ["v2"]
    assert "bare is not evaluated: it was imported without test embeddings" in capsys.readouterr().out
    with pytest.raises(GenerationError, match=r"'bare' at .* holds no test embeddings to evaluate"):
        embed(bare, home / "test", "group")


# --- the job ----------------------------------------------------------------------------------------------------------


def test_the_job_imports_and_refuses_in_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = tmp_path / "run.yaml"
    config.write_text(f"name: glyphs\nhome: {home}\ngenerations: {{v2: {{parents: [v0]}}}}\n")
    command = ["import_generation.py", "--name", "job", "--config", str(config), "--train"]
    monkeypatch.setattr(sys, "argv", [*command, str(home / "train.parquet")])
    assert main() == 0
    assert capsys.readouterr().out.startswith("job: 5 identities, 5 dimensions, at ")
    assert registry_of(home).get("job").open().record.margin.scale == 20.0
    monkeypatch.setattr(sys, "argv", [*command, str(home / "nowhere")])
    assert main() == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {home / 'nowhere'} is missing")
    assert told.count("\n") == 1
