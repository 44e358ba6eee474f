"""MLflow: a run for each training, a registered model for each family, a version of it for each generation.

Lineage is kept twice: as MLflow's inputs and outputs of runs, for the UI, and as explicit tags (names, digests and
model ids of the parents), which are what the code reads. Only clients bound to one URI are used, none of MLflow's
process-wide state, so that a registry works in Ray workers and in threads.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

# First of all: they set the environment that MLflow reads when it is imported.
from pipeline import registry_records as records
from pipeline.registry_records import CONFIG_DIGEST, DatasetInput, RegisteredGeneration
from pipeline.registry_store import TrackingConfig, check_answers, connect, first_line, redacted, tracking_location
from pipeline.registry_tracker import MlflowTracker  # isort: split

from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import RegistryError
from pipeline.generation import Generation

__all__ = ["DatasetInput", "MlflowTracker", "RegisteredGeneration", "Registry", "TrackingConfig", "tracking_location"]

CANDIDATE = "candidate"
_NAME = re.compile(r"\w[\w.-]*")
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class Registry:
    """The runs and generations of one family.

    Args:
        uri: of the tracking store, absolute (see `tracking_location`).
        family: names the experiment and the registered model; both are made if they are missing.
        artifact_root: folder for the artefacts of a new experiment; None leaves it to the server.

    Raises:
        RegistryError: the store does not answer, or refuses.
    """

    def __init__(self, uri: str, family: str, artifact_root: Path | None = None) -> None:
        _check_name("family", family)
        self.uri = uri
        self.family = family
        check_answers(uri)
        with self._errors("opening it"):
            self._client = connect(uri)
            self._experiment_id = self._ensure_experiment(artifact_root)
            _unless_there(lambda: self._client.create_registered_model(family))

    def start_run(
        self,
        generation: str,
        params: dict[str, object],
        tags: dict[str, str],
        dataset: DatasetInput,
        parents: Sequence[RegisteredGeneration] = (),
    ) -> str:
        """Start the run that trains `generation`, or take up its unfinished one of the same config.

        Args:
            generation: name of the generation.
            params: logged once; those that a resumed run has already stay as they are.
            tags: must hold `config_digest`, by which an unfinished run is found again.
            dataset: logged as the run's input, and its digest as the tag `data_digest`.
            parents: logged as the run's inputs, and as the tag `parents`.

        Returns:
            The run's id.

        Raises:
            RegistryError: the store does not answer, or refuses.
        """
        _check_name("generation", generation)
        assert CONFIG_DIGEST in tags, "an unfinished run is found by its config digest"
        tags = tags | {
            "generation": generation,
            "data_digest": dataset.digest,
            "parents": records.parents_json(parents),
        }
        with self._errors(f"starting the run of {generation!r}"):
            run_id = records.unfinished_run(self._client, self._experiment_id, generation, tags[CONFIG_DIGEST])
            if run_id is None:
                run_id = self._client.create_run(self._experiment_id, tags=tags, run_name=generation).info.run_id
            else:
                self._client.update_run(run_id, status="RUNNING")
            records.log_params(self._client, run_id, params)
            records.log_inputs(self._client, run_id, dataset, parents)
        return run_id

    def tracker(self, run_id: str) -> MlflowTracker:
        """A tracker for the run; a worker builds its own as `MlflowTracker(uri, run_id)`."""
        return MlflowTracker(self.uri, run_id)

    def finish_run(self, run_id: str, status: RunStatus = "FINISHED") -> None:
        """End the run; one that did not finish is taken up again by `start_run`."""
        with self._errors(f"ending run {run_id}"):
            self._client.set_terminated(run_id, status)

    def register(
        self, run_id: str, generation: Generation, metrics: dict[str, float], candidate: bool = False
    ) -> RegisteredGeneration:
        """Make the generation a version of the family's registered model.

        The version is created last, so that whoever finds one finds all of it; an attempt that was cut off is
        completed by the next. A generation that is registered already is returned as it is.

        Args:
            run_id: of the run that trained it.
            generation: the artefact; its files are copied to the logged model.
            metrics: of the finished generation, logged for the model and for the run.
            candidate: move the alias `candidate` to it.

        Raises:
            RegistryError: another generation has the name, a parent is not registered, or the store refuses.
        """
        record = generation.record
        _check_name("generation", record.name)
        if record.family != self.family:
            raise RegistryError(
                f"generation {record.name!r} at {generation.path} is of family {record.family!r}, "
                f"this registry of {self.family!r}: register it in its own"
            )
        found = self.find(record.name)
        if found is None:
            parents = self._parents_of(generation)
            with self._errors(f"registering {record.name!r}"):
                model_id = records.log_model(self._client, self._experiment_id, run_id, generation, metrics)
                found = records.create_version(self._client, run_id, model_id, generation, parents)
        elif found.digest != generation.digest:
            raise RegistryError(
                f"generation {record.name!r} is registered in {self._where} as version {found.version} with another "
                f"digest ({found.digest[:12]}, this one {generation.digest[:12]}): train under a new name"
            )
        if candidate:
            self.promote_candidate(record.name)
        return found

    def promote_candidate(self, name: str) -> None:
        """Move the alias `candidate` to a registered generation.

        Raises:
            RegistryError: it is not registered, or the store refuses.
        """
        version = self.get(name).version
        with self._errors(f"moving the alias {CANDIDATE!r}"):
            self._client.set_registered_model_alias(self.family, CANDIDATE, version)

    def forget(self) -> None:
        """Delete the family's registered versions and runs, so that its names are free again."""
        with self._errors(f"forgetting {self.family!r}"):
            self._client.delete_registered_model(self.family)
            for run in self._client.search_runs([self._experiment_id]):
                self._client.delete_run(run.info.run_id)
            self._client.create_registered_model(self.family)

    def description(self) -> dict[str, object]:
        """Where the family is to be found: the store, the registered model, and its versions by generation."""
        versions = {name: int(one.version) for name, one in self.versions().items()}
        return {"tracking_uri": redacted(self.uri), "model": self.family, "versions": versions}

    def versions(self) -> dict[str, RegisteredGeneration]:
        """All registered generations by name, oldest first."""
        with self._errors("reading the versions"):
            found = records.read_versions(self._client, self.family)
        by_name: dict[str, RegisteredGeneration] = {}
        for version in found:
            by_name.setdefault(version.name, version)
        return by_name

    def find(self, name: str) -> RegisteredGeneration | None:
        """The generation of that name, if it is registered."""
        return self.versions().get(name)

    def get(self, name: str) -> RegisteredGeneration:
        """The generation of that name, its artefact proven to be the registered one; `open` loads it.

        Raises:
            RegistryError: it is not registered.
            GenerationError: its artefact is gone or has changed.
        """
        found = self.find(name)
        if found is None:
            raise RegistryError(f"parent {name!r} is not registered in {self._where}; train it first")
        found.open()
        return found

    def log_evaluation(self, target: str, metrics: dict[str, float], plots: Sequence[Path] = ()) -> None:
        """Log metrics and plots of an evaluation.

        Args:
            target: a generation's name (its run and its model get them) or a run's id.
            metrics: name to value.
            plots: files, kept under `plots/` of the run.

        Raises:
            RegistryError: there is no such generation or run, or the store refuses.
        """
        found = self.find(target)
        run_id, model_id = (found.run_id, found.model_id) if found else (target, None)
        with self._errors(f"logging the evaluation of {target!r}"):
            records.log_metrics(self._client, run_id, metrics, model_id=model_id)
            for plot in plots:
                self._client.log_artifact(run_id, str(plot), "plots")

    def ui_command(self) -> str:
        """The shell command that opens the UI on a database, or the address of the server's UI."""
        if self.uri.startswith("http"):
            return f"{self.uri}/#/experiments/{self._experiment_id}"
        if redacted(self.uri) != self.uri:  # a password is not to be printed
            return 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI" --port 5000'
        return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)} --port 5000"

    @property
    def _where(self) -> str:
        return f"family {self.family!r} of {redacted(self.uri)}"

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise RegistryError(f"MLflow's store {redacted(self.uri)}: {doing} failed: {first_line(error)}") from None

    def _ensure_experiment(self, artifact_root: Path | None) -> str:
        location = (artifact_root / self.family).resolve().as_uri() if artifact_root else None
        _unless_there(lambda: self._client.create_experiment(self.family, artifact_location=location))
        experiment = self._client.get_experiment_by_name(self.family)
        assert experiment is not None
        if experiment.lifecycle_stage != "active":
            raise RegistryError(
                f"experiment {self.family!r} of {redacted(self.uri)} was deleted: restore it in MLflow "
                f"(mlflow experiments restore -x {experiment.experiment_id}), or name another family"
            )
        return str(experiment.experiment_id)

    def _parents_of(self, generation: Generation) -> list[RegisteredGeneration]:
        registered = self.versions()
        for name, digest in generation.record.parents.items():
            if name not in registered:
                raise RegistryError(f"parent {name!r} is not registered in {self._where}; train it first")
            if (known := registered[name].digest) != digest:
                raise RegistryError(
                    f"generation {generation.record.name!r} was trained against another {name!r} (digest "
                    f"{digest[:12]}) than the one registered in {self._where} ({known[:12]}): train it again"
                )
        return [registered[name] for name in generation.record.parents]


def _check_name(what: str, name: str) -> None:
    """Names stand in MLflow's filters and paths."""
    if not _NAME.fullmatch(name):
        raise RegistryError(f"{what} {name!r} cannot be registered: use letters, digits, '.', '_' and '-' only")


def _unless_there(create: Callable[[], object]) -> None:
    """Create, unless somebody was quicker."""
    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
