"""What the registry writes and reads, one record a function: each may be repeated, so that a cut-off attempt is
completed by running it again. Errors are MLflow's own; `Registry` turns them into one line.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# First of all: it sets the environment that MLflow reads when it is imported.
from pipeline.registry_store import first_line, metric_key  # isort: split

from mlflow import MlflowClient, entities
from mlflow.entities.model_registry import ModelVersion

from pipeline.errors import GenerationError, RegistryError
from pipeline.generation import RECORD, Generation

CONFIG_DIGEST = "config_digest"
_PARAMS_PER_BATCH = 100
_MAX_PARAM = 6000  # characters
_MAX_DATASET_DIGEST = 36  # characters; the whole digest is in the profile and in the run's tag `data_digest`


@dataclass(frozen=True)
class DatasetInput:
    """The data set that a run was trained on.

    Attributes:
        name: of the data set.
        path: folder or URI of its manifest.
        digest: of its manifest, 64 hex digits.
        samples: number of images.
        identities: number of identities.
        profile: JSON text of further figures for the UI.
    """

    name: str
    path: str
    digest: str
    samples: int
    identities: int
    profile: str = "{}"


@dataclass(frozen=True)
class RegisteredGeneration:
    """A generation as the registry knows it: a version of the family's registered model."""

    name: str
    version: str
    digest: str
    model_id: str
    path: Path
    run_id: str

    def open(self) -> Generation:
        """Load the artefact's record.

        Raises:
            GenerationError: there is no artefact at the recorded path, or it is not the one that was registered.
        """
        generation = Generation(self.path)
        if generation.digest != self.digest:
            raise GenerationError(
                f"generation {self.name!r} at {self.path} is not the one registered as version {self.version} (digest "
                f"{generation.digest[:12]}, registered {self.digest[:12]}): restore it, or train under a new name"
            )
        return generation


def unfinished_run(client: MlflowClient, experiment_id: str, generation: str, config_digest: str) -> str | None:
    """The latest run of the generation and config that did not finish: running, cut off, failed or killed."""
    runs = client.search_runs(
        [experiment_id],
        f"tags.generation = '{generation}' AND tags.{CONFIG_DIGEST} = '{config_digest}'",
        order_by=["attributes.start_time DESC"],
    )
    return next((str(run.info.run_id) for run in runs if run.info.status != "FINISHED"), None)


def log_params(client: MlflowClient, run_id: str, params: dict[str, object]) -> None:
    """Log those that the run does not have yet: MLflow's params never change."""
    logged = client.get_run(run_id).data.params
    new = [entities.Param(key, str(value)[:_MAX_PARAM]) for key, value in params.items() if key not in logged]
    for start in range(0, len(new), _PARAMS_PER_BATCH):
        client.log_batch(run_id, params=new[start : start + _PARAMS_PER_BATCH], synchronous=True)


def log_inputs(
    client: MlflowClient, run_id: str, dataset: DatasetInput, parents: Sequence[RegisteredGeneration]
) -> None:
    """Log the data set and the parents' models as inputs of the run."""
    figures = {"digest": dataset.digest, "samples": dataset.samples, "identities": dataset.identities}
    source = entities.Dataset(
        dataset.name,
        dataset.digest[:_MAX_DATASET_DIGEST],
        source_type=dataset.path.split("://")[0] if "://" in dataset.path else "local",
        source=json.dumps({"uri": dataset.path}),
        profile=json.dumps(figures | json.loads(dataset.profile)),
    )
    context = entities.InputTag("mlflow.data.context", "training")
    inputs = client.get_run(run_id).inputs
    known = {model.model_id for model in inputs.model_inputs} if inputs else set()
    models = [entities.LoggedModelInput(parent.model_id) for parent in parents if parent.model_id not in known]
    client.log_inputs(run_id, [entities.DatasetInput(source, [context])], models)


def log_metrics(
    client: MlflowClient, run_id: str, metrics: dict[str, float], step: int = 0, model_id: str | None = None
) -> None:
    """Log metrics of the run and, if `model_id` is given, of the model."""
    now = int(time.time() * 1000)
    values = [entities.Metric(metric_key(key), value, now, step, model_id) for key, value in metrics.items()]
    if values:
        client.log_batch(run_id, values, synchronous=True)


def log_model(
    client: MlflowClient, experiment_id: str, run_id: str, generation: Generation, metrics: dict[str, float]
) -> str:
    """Make, or complete, the logged model: its files, its place among the run's outputs, its metrics.

    Returns:
        Its model id.
    """
    record = generation.record
    tags = {"generation": record.name, "digest": generation.digest}
    step = int(record.training.get("steps", 0))
    wanted = " AND ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
    # MLflow refuses dots in a model's name, but not in a tag.
    model = next(iter(client.search_logged_models([experiment_id], wanted)), None) or client.create_logged_model(
        experiment_id, re.sub(r"[^\w-]", "-", record.name), run_id, tags, model_type="generation"
    )
    _upload(client, model.model_id, generation)
    if model.status != entities.LoggedModelStatus.READY:
        client.finalize_logged_model(model.model_id, entities.LoggedModelStatus.READY)
    outputs = client.get_run(run_id).outputs
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
        # Finalising does not do it, and doing it twice is an error.
        client.log_outputs(run_id, [entities.LoggedModelOutput(model.model_id, step)])
    known = {metric.key for metric in model.metrics or ()}
    new = {key: value for key, value in metrics.items() if metric_key(key) not in known}
    log_metrics(client, run_id, new, step, model.model_id)
    return str(model.model_id)


def _upload(client: MlflowClient, model_id: str, generation: Generation) -> None:
    """Copy the files that are not there whole; the record last."""
    try:
        there = {entry.path: entry.file_size for entry in client.list_logged_model_artifacts(model_id)}
        for name in (*generation.record.files, RECORD):
            path = generation.path / name
            if there.get(name) != path.stat().st_size:
                client.log_model_artifact(model_id, str(path))
    except Exception as error:  # noqa: BLE001  an artefact store raises whatever its own client does
        raise RegistryError(
            f"copying generation {generation.record.name!r} from {generation.path} to MLflow's artefacts failed "
            f"({first_line(error)}): mend that and register again"
        ) from None


def create_version(
    client: MlflowClient,
    run_id: str,
    model_id: str,
    generation: Generation,
    parents: Sequence[RegisteredGeneration],
) -> RegisteredGeneration:
    """Make the logged model a version of the family's registered model, with all tags from the start."""
    record = generation.record
    dim, model = record.embedding_dim, record.backbone.name if record.backbone else "embeddings only"
    lineage = f"compatible with {', '.join(record.parents)}" if record.parents else "no parent"
    version = client.create_model_version(
        record.family,
        # Not `models:/ID`: the sqlite store would look that up at MLflow's process-wide URI.
        client.get_logged_model(model_id).artifact_location,
        run_id,
        tags={
            "generation": record.name,
            "digest": generation.digest,
            "path": str(generation.path.resolve()),
            "parents": parents_json(parents),
            CONFIG_DIGEST: record.config_digest,
            "data_digest": record.data_digest,
            "identities": str(record.identities),
            "dim": str(dim),
            "model_id": model_id,
        }
        | ({} if record.backbone else {"imported": "true"}),
        description=f"{record.name}: {model}, {dim} dimensions, {record.identities} identities, {lineage}",
        await_creation_for=0,
        model_id=model_id,
    )
    # The UI's link from the model to its version: a server sets it, the client of a database does not.
    link = json.dumps([{"name": record.family, "version": int(version.version)}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
    return read_version(version)


def read_versions(client: MlflowClient, family: str) -> list[RegisteredGeneration]:
    """All versions that are generations, oldest first."""
    found: list[ModelVersion] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name = '{family}'", 1000, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            break
    ours = (version for version in found if "generation" in version.tags)  # others are none of our business
    return [read_version(version) for version in sorted(ours, key=lambda version: int(version.version))]


def read_version(version: ModelVersion) -> RegisteredGeneration:
    """A version that `create_version` made."""
    tags = version.tags
    return RegisteredGeneration(
        name=tags["generation"],
        version=str(version.version),
        digest=tags["digest"],
        model_id=tags["model_id"],
        path=Path(tags["path"]),
        run_id=str(version.run_id),
    )


def parents_json(parents: Sequence[RegisteredGeneration]) -> str:
    """The tag `parents`: of each parent, by name, the digest, the model id and the version."""
    return json.dumps(
        {
            parent.name: {"digest": parent.digest, "model_id": parent.model_id, "version": parent.version}
            for parent in parents
        }
    )
