"""What the registry writes of runs and logged models, one record a function: each may be repeated, so that a cut-off
attempt is completed by running it again. Errors are MLflow's own; `Registry` turns them into one line.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# First of all: it sets the environment that MLflow reads when it is imported.
from pipeline.tracking.store import artefact_errors, metric_key, unless_there  # isort: split

from mlflow import MlflowClient, entities

from pipeline.errors import RegistryError
from pipeline.generation import RECORD, Generation
from pipeline.redaction import redacted
from pipeline.stamp import Stamp
from pipeline.tracking.pyfunc import mlmodel
from pipeline.tracking.versions import CONFIG_DIGEST, RegisteredGeneration

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
        source=json.dumps({"uri": redacted(dataset.path)}),
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
    _upload(client, model, run_id, generation)
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


def _upload(client: MlflowClient, model: entities.LoggedModel, run_id: str, generation: Generation) -> None:
    """Copy the files that are not there whole, the record after the others; last, what makes it a pyfunc model."""
    copying = f"copying generation {generation.record.name!r} from {generation.path} to MLflow's artefacts"
    with artefact_errors(copying, "register"), tempfile.TemporaryDirectory() as folder:
        files = [generation.path / name for name in (*generation.record.files, RECORD)]
        if generation.record.backbone is not None:  # of embeddings alone nothing can be loaded
            files.append(Path(folder) / "MLmodel")
            mlmodel(model.model_id, run_id, model.creation_timestamp, Stamp.of(generation)).save(files[-1])
        there = {entry.path: entry.file_size for entry in client.list_logged_model_artifacts(model.model_id)}
        for path in files:
            if there.get(path.name) != path.stat().st_size:
                client.log_model_artifact(model.model_id, str(path))


def ensure_experiment(client: MlflowClient, uri: str, family: str, artifact_root: Path | None) -> str:
    """The id of the family's experiment, which is made if it is missing.

    Raises:
        RegistryError: it was deleted.
    """
    location = (artifact_root / family).resolve().as_uri() if artifact_root else None
    unless_there(lambda: client.create_experiment(family, artifact_location=location))
    experiment = client.get_experiment_by_name(family)
    assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise RegistryError(
            f"experiment {family!r} of {redacted(uri)} was deleted: restore it in MLflow "
            f"(mlflow experiments restore -x {experiment.experiment_id}), or name another family"
        )
    return str(experiment.experiment_id)
