"""The registry against a real MLflow store: sqlite in a temporary folder, no server, no doubles."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, RunInputs

from pipeline.data.preprocess import PreprocessConfig
from pipeline.errors import ConfigError, GenerationError, RegistryError
from pipeline.generation import RECORD, Generation, GenerationRecord, seal, write_classifier_part
from pipeline.identities import IdentityTable
from pipeline.model.backbones import BackboneConfig, build_backbone
from pipeline.model.margins import MarginConfig
from pipeline.redaction import redacted
from pipeline.registry import DatasetInput, RegisteredGeneration, Registry
from pipeline.tracking import records
from pipeline.tracking.store import TrackingConfig, metric_key, tracking_location

# MLflow's own queries, under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens on it
DIGEST = "d" * 64
DATASET = DatasetInput("glyphs", "/data/glyphs", DIGEST, samples=480, identities=6, profile='{"shards": 3}')
TAGS = {"config_digest": "c" * 64, "code_version": "test"}


def make_generation(
    folder: Path, name: str, parents: dict[str, str] | None = None, family: str = "glyphs", seed: int = 0
) -> Generation:
    """A real, tiny, untrained generation of six identities."""
    torch.manual_seed(seed)
    config = BackboneConfig(name="small", embedding_dim=8)
    building = folder / f"{name}.{seed}.building"
    building.mkdir(parents=True)
    write_classifier_part(building, torch.randn(6, 8), 0, 6)
    record = GenerationRecord(
        family=family,
        name=name,
        parents=parents or {},
        backbone=config,
        preprocess=PreprocessConfig(),
        margin=MarginConfig(name="norm_softmax"),
        identities=6,
        config={"seed": seed},
        config_digest=TAGS["config_digest"],
        data_digest=DIGEST,
        code_version="test",
        training={"steps": 30.0},
    )
    table = IdentityTable.from_keys(f"id{row}" for row in range(6))
    images = torch.randn(3, config.channels, config.image_size, config.image_size)
    return seal(building, folder / f"{name}.{seed}", record, build_backbone(config).state_dict(), table, images)


def start(registry: Registry, name: str, parents: tuple[RegisteredGeneration, ...] = ()) -> str:
    return registry.start_run(name, {"steps": 30, "backbone.name": "small"}, TAGS, DATASET, parents)


def train(registry: Registry, folder: Path, name: str) -> RegisteredGeneration:
    return registry.register(start(registry, name), make_generation(folder, name), {"rank1": 0.5})


def inputs(client: MlflowClient, run_id: str) -> RunInputs:
    found = client.get_run(run_id).inputs
    assert found is not None
    return found


def outputs(client: MlflowClient, run_id: str) -> list[LoggedModelOutput]:
    found = client.get_run(run_id).outputs
    assert found is not None
    return found.model_outputs


# --- runs -------------------------------------------------------------------------------------------------------------


def test_run_holds_params_tags_and_the_data_set(registry: Registry, client: MlflowClient, tmp_path: Path) -> None:
    run = client.get_run(start(registry, "v1"))
    assert run.info.run_name == "v1"
    assert run.info.status == "RUNNING"
    assert run.data.params == {"steps": "30", "backbone.name": "small"}
    assert run.data.tags["generation"] == "v1"
    assert run.data.tags["code_version"] == "test"
    assert run.data.tags["data_digest"] == DIGEST
    assert json.loads(run.data.tags["parents"]) == {}
    [logged] = inputs(client, run.info.run_id).dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("glyphs", DIGEST[:36])
    assert json.loads(logged.dataset.profile or "") == {"digest": DIGEST, "samples": 480, "identities": 6, "shards": 3}
    assert json.loads(logged.dataset.source) == {"uri": "/data/glyphs"}
    assert run.info.artifact_uri.startswith((tmp_path / "artifacts" / "glyphs").as_uri())


def test_an_unfinished_run_is_taken_up_again_and_a_finished_one_is_not(
    registry: Registry, client: MlflowClient
) -> None:
    first = start(registry, "v1")
    assert start(registry, "v1") == first, "the driver died without a word"
    registry.finish_run(first, "FAILED")
    again = registry.start_run("v1", {"steps": 31, "world_size": 2}, TAGS, DATASET)
    assert again == first
    run = client.get_run(first)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"steps": "30", "backbone.name": "small", "world_size": "2"}, "logged once"
    assert len(inputs(client, first).dataset_inputs) == 1
    assert registry.start_run("v1", {}, TAGS | {"config_digest": "e" * 64}, DATASET) != first, "another config"
    assert start(registry, "v2") != first, "another generation"
    registry.finish_run(first)
    assert client.get_run(first).info.status == "FINISHED"
    assert start(registry, "v1") != first


def test_more_params_than_one_request_takes_and_a_long_one(registry: Registry, client: MlflowClient) -> None:
    params: dict[str, object] = {f"p{index}": index for index in range(250)} | {"long": "x" * 10_000}
    logged = client.get_run(registry.start_run("v1", params, TAGS, DATASET)).data.params
    assert len(logged) == 251
    assert logged["p249"] == "249"
    assert logged["long"] == "x" * 6000


# --- generations ------------------------------------------------------------------------------------------------------


def test_register_makes_a_model_with_its_files_and_a_version_with_its_lineage(
    registry: Registry, client: MlflowClient, tmp_path: Path
) -> None:
    first = train(registry, tmp_path, "v1")
    run_id = start(registry, "v2.1", (first,))
    generation = make_generation(tmp_path, "v2.1", {"v1": first.digest}, seed=1)
    second = registry.register(run_id, generation, {"rank1": 0.75, "TAR@FAR=1e-3": 0.25})
    assert (second.name, second.version, second.digest) == ("v2.1", "2", generation.digest)
    assert second.path == generation.path
    assert second.open().digest == generation.digest

    version = client.get_model_version("glyphs", "2")
    lineage = {"v1": {"digest": first.digest, "model_id": first.model_id, "version": "1"}}
    assert json.loads(version.tags["parents"]) == lineage
    assert version.tags["config_digest"] == TAGS["config_digest"]
    assert version.tags["data_digest"] == DIGEST
    assert (version.tags["identities"], version.tags["dim"]) == ("6", "8")
    assert version.run_id == run_id
    assert version.description is not None
    assert version.description.startswith("v2.1 of glyphs.")
    assert "**v1**: not judged yet" in version.description

    run = client.get_run(run_id)
    assert json.loads(run.data.tags["parents"]) == lineage
    assert [model.model_id for model in inputs(client, run_id).model_inputs] == [first.model_id], (
        "and not the run's own model"
    )
    assert [(model.model_id, model.step) for model in outputs(client, run_id)] == [(second.model_id, 30)]
    assert run.data.metrics == {"rank1": 0.75, "TAR_FAR_1e-3": 0.25}

    model = client.get_logged_model(second.model_id)
    assert str(model.status) == "READY"
    assert model.source_run_id == run_id
    assert {metric.key: metric.value for metric in model.metrics or ()} == run.data.metrics
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "glyphs", "version": 2}]
    copied = {Path(entry.path).name for entry in client.list_logged_model_artifacts(second.model_id)}
    assert copied == {path.name for path in generation.path.iterdir()} | {"MLmodel"}
    assert version.source == model.artifact_location
    assert list(registry.versions()) == ["v1", "v2.1"]


def test_registering_again_changes_nothing_and_a_changed_generation_is_refused(
    registry: Registry, client: MlflowClient, tmp_path: Path
) -> None:
    run_id = start(registry, "v1")
    generation = make_generation(tmp_path, "v1")
    first = registry.register(run_id, generation, {"rank1": 0.5})
    assert registry.register(run_id, generation, {"rank1": 0.5}) == first
    assert len(client.search_model_versions("name = 'glyphs'")) == 1
    other = make_generation(tmp_path, "v1", seed=1)
    with pytest.raises(RegistryError, match=r"'v1' is registered in .* as version 1 with another digest"):
        registry.register(run_id, other, {})
    assert registry.find("v1") == first


def test_the_alias_moves_only_when_asked(registry: Registry, client: MlflowClient, tmp_path: Path) -> None:
    generations = {name: make_generation(tmp_path, name) for name in ("v1", "v2", "v3")}
    for name, candidate in (("v1", True), ("v2", True), ("v3", False)):
        registry.register(start(registry, name), generations[name], {}, candidate=candidate)
    assert client.get_model_version_by_alias("glyphs", "candidate").tags["generation"] == "v2"
    registry.register(start(registry, "v3"), generations["v3"], {}, candidate=True)
    assert client.get_model_version_by_alias("glyphs", "candidate").tags["generation"] == "v3"


@pytest.mark.parametrize("reached", ["model", "half a file", "files", "half of MLmodel", "outputs", "metrics"])
def test_a_cut_off_registration_is_completed(
    registry: Registry, client: MlflowClient, tmp_path: Path, reached: str
) -> None:
    """Bring the store by hand to each point at which an attempt may have ended."""
    run_id = start(registry, "v1")
    generation = make_generation(tmp_path, "v1")
    experiment = client.get_experiment_by_name("glyphs")
    assert experiment is not None
    if reached == "metrics":
        records.log_model(client, experiment.experiment_id, run_id, generation, {"rank1": 0.5})
    else:
        tags = {"generation": "v1", "digest": generation.digest}
        model = client.create_logged_model(experiment.experiment_id, "v1", run_id, tags, model_type="generation")
        if reached == "half a file":
            half = tmp_path / "half" / "backbone.safetensors"
            half.parent.mkdir()
            half.write_bytes((generation.path / half.name).read_bytes()[:1000])
            client.log_model_artifact(model.model_id, str(half))
        if reached in ("files", "half of MLmodel", "outputs"):
            client.log_model_artifacts(model.model_id, str(generation.path))
        if reached == "half of MLmodel":
            half = tmp_path / "MLmodel"
            half.write_text("flavors:\n")
            client.log_model_artifact(model.model_id, str(half))
        if reached == "outputs":
            client.finalize_logged_model(model.model_id, "READY")
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 30)])
    assert registry.find("v1") is None
    found = registry.register(run_id, generation, {"rank1": 0.5})
    assert registry.get("v1") == found
    [model] = client.search_logged_models([experiment.experiment_id])
    assert str(model.status) == "READY"
    assert found.model_id == model.model_id
    copy = Path(model.artifact_location.removeprefix("file://"))
    for path in generation.path.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()
    assert "pipeline.tracking.pyfunc" in (copy / "MLmodel").read_text()
    assert len(outputs(client, run_id)) == 1
    assert [metric.value for metric in client.get_metric_history(run_id, "rank1")] == [0.5]


def test_a_name_that_is_registered_with_another_config_is_refused_before_training(
    registry: Registry, client: MlflowClient, tmp_path: Path
) -> None:
    first = train(registry, tmp_path, "v1")
    with pytest.raises(RegistryError, match=r"'v1' is registered in .* as version 1, made with another config"):
        registry.start_run("v1", {}, TAGS | {"config_digest": "e" * 64}, DATASET)
    assert len(client.search_runs([client.get_run(first.run_id).info.experiment_id])) == 1
    assert start(registry, "v1") == first.run_id  # the same config; the run did not end


def test_a_version_deleted_by_hand_is_told_and_can_be_registered_again(
    registry: Registry, client: MlflowClient, tmp_path: Path
) -> None:
    first = train(registry, tmp_path, "v1")
    client.delete_model_version("glyphs", "1")
    with pytest.raises(RegistryError, match=rf"parent 'v1' is not .* its model {first.model_id} is there: its version"):
        registry.get("v1")
    again = registry.register(first.run_id, Generation(first.path), {"rank1": 0.5})
    assert (again.version, again.model_id) == ("2", first.model_id)
    assert registry.get("v1") == again


def test_forgotten_names_were_never_there(registry: Registry, client: MlflowClient, tmp_path: Path) -> None:
    train(registry, tmp_path, "v1")
    registry.forget()
    with pytest.raises(RegistryError, match=r"'v1' is not registered in family 'glyphs' of .*; train it first"):
        registry.get("v1")
    assert client.get_registered_model("glyphs").latest_versions == []
    assert train(registry, tmp_path / "again", "v1").version == "1"


def test_parents_must_be_registered_and_the_same(registry: Registry, client: MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"parent 'v1' is not registered in family 'glyphs' of .*; train it first"):
        registry.get("v1")
    run_id = start(registry, "v2")
    orphan = make_generation(tmp_path, "v2", {"v1": "f" * 64})
    with pytest.raises(RegistryError, match="parent 'v1' is not registered"):
        registry.register(run_id, orphan, {})
    train(registry, tmp_path, "v1")
    with pytest.raises(RegistryError, match="trained against another 'v1'"):
        registry.register(run_id, orphan, {})
    assert list(registry.versions()) == ["v1"]
    assert outputs(client, run_id) == [], "nothing is written for a generation that is refused"


def test_a_registered_artefact_that_changed_or_went_is_refused(registry: Registry, tmp_path: Path) -> None:
    found = train(registry, tmp_path, "v1")
    assert registry.get("v1") == found
    record = found.path / RECORD
    record.write_text(record.read_text().replace('"code_version": "test"', '"code_version": "other"'))
    with pytest.raises(GenerationError, match=r"not the one registered as version 1"):
        registry.get("v1")
    shutil.rmtree(found.path)
    with pytest.raises(GenerationError, match="no generation at"):
        registry.get("v1")


def test_another_family_is_refused_and_unseen(registry: Registry, uri: str, tmp_path: Path) -> None:
    stranger = make_generation(tmp_path, "v1", family="faces")
    with pytest.raises(RegistryError, match="is of family 'faces'"):
        registry.register(start(registry, "v1"), stranger, {})
    faces = Registry(uri, "faces", tmp_path / "artifacts")
    faces.register(start(faces, "v1"), stranger, {})
    assert registry.find("v1") is None
    assert list(faces.versions()) == ["v1"]


def test_a_version_made_by_hand_is_passed_over(registry: Registry, client: MlflowClient, tmp_path: Path) -> None:
    client.create_model_version("glyphs", (tmp_path / "elsewhere").as_uri(), await_creation_for=0)
    assert train(registry, tmp_path, "v1").version == "2"
    assert list(registry.versions()) == ["v1"]


def test_evaluation_reaches_the_run_the_model_and_its_plots(
    registry: Registry, client: MlflowClient, tmp_path: Path
) -> None:
    found = train(registry, tmp_path, "v1")
    plot = tmp_path / "roc.png"
    plot.write_bytes(b"png")
    registry.log_evaluation("v1", {"cross/rank1": 0.6}, [plot])
    assert client.get_run(found.run_id).data.metrics["cross/rank1"] == 0.6
    metrics = client.get_logged_model(found.model_id).metrics or []
    assert {metric.key: metric.value for metric in metrics} == {"rank1": 0.5, "cross/rank1": 0.6}
    assert [entry.path for entry in client.list_artifacts(found.run_id, "plots")] == ["plots/roc.png"]
    with pytest.raises(RegistryError, match=f"'{'0' * 32}' failed: .*not found"):
        registry.log_evaluation("0" * 32, {"rank1": 0.6})
    with pytest.raises(RegistryError, match=r"none\.png"):
        registry.log_evaluation("v1", {}, [tmp_path / "none.png"])


# --- the store --------------------------------------------------------------------------------------------------------


def test_opening_twice_finds_the_same_experiment_and_a_deleted_one_is_told(
    registry: Registry, uri: str, client: MlflowClient
) -> None:
    run_id = start(registry, "v1")
    assert start(Registry(uri, "glyphs"), "v1") == run_id
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    with pytest.raises(RegistryError, match=r"experiment 'glyphs' of .* was deleted: restore it"):
        Registry(uri, "glyphs")


def test_a_server_that_is_not_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RegistryError, match=r"does not answer .*refused.*tracking\.uri") as caught:
        Registry(CLOSED, "glyphs")
    assert "\n" not in str(caught.value)


def test_a_database_that_is_not_there_or_has_no_driver_is_told_at_once() -> None:
    port = CLOSED.rpartition(":")[2]
    with pytest.raises(RegistryError, match=r"me:\*\*\*@127.* does not answer .*refused.*tracking\.uri"):
        Registry(f"postgresql://me:secret@127.0.0.1:{port}/db", "glyphs")
    with pytest.raises(RegistryError, match="needs the Python package 'psycopg2', on every node: install it"):
        Registry(f"postgresql+psycopg2://me:secret@127.0.0.1:{port}/db", "glyphs")


def test_a_store_that_cannot_be_opened_is_one_clear_line(tmp_path: Path) -> None:
    rubbish = tmp_path / "mlflow.db"
    rubbish.write_bytes(b"this is no database" * 100)
    with pytest.raises(RegistryError, match="not a database"):
        Registry(f"sqlite:///{rubbish}", "glyphs")
    with pytest.raises(RegistryError, match="does not answer"):
        Registry(f"sqlite:///{rubbish / 'below' / 'mlflow.db'}", "glyphs")


@pytest.mark.parametrize("name", ["", "a/b", "it's", "a:b", ".hidden"])
def test_names_that_mlflow_cannot_hold_are_refused(uri: str, registry: Registry, name: str) -> None:
    with pytest.raises(RegistryError, match="letters, digits"):
        Registry(uri, name)
    with pytest.raises(RegistryError, match="letters, digits"):
        start(registry, name)


def test_a_new_database_is_made_without_noise(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Registry(f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}", "glyphs", tmp_path / "artifacts")
    assert capfd.readouterr() == ("", "")


def test_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    artifacts = tmp_path / "mlflow" / "artifacts"
    default = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert tracking_location(TrackingConfig(), tmp_path) == (default, artifacts)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000/")
    assert tracking_location(TrackingConfig(), tmp_path) == ("http://host:5000", None)
    postgres = "postgresql+psycopg2://me:secret@host/db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres)
    assert tracking_location(TrackingConfig(), tmp_path) == (postgres, artifacts)
    for bad in ("file:///tmp/mlruns", "./mlruns", "mlruns"):
        with pytest.raises(ConfigError, match="neither a server nor a database"):
            tracking_location(TrackingConfig(uri=bad), tmp_path)
    with pytest.raises(ConfigError, match="four slashes"):
        tracking_location(TrackingConfig(uri="sqlite:///mlflow.db"), tmp_path)


def test_how_to_open_the_ui(registry: Registry, uri: str) -> None:
    assert registry.ui_command() == f"mlflow ui --backend-store-uri {uri} --port 5000"


def test_names_and_addresses_as_printed() -> None:
    assert metric_key("self/TAR@FAR=1e-3") == "self/TAR_FAR_1e-3"
    assert redacted("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert redacted("http://host:5000/a@b") == "http://host:5000/a@b"
