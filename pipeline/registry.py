"""MLflow: a run for each training, a registered model for each family, a version of it for each generation.

Lineage is kept twice: as MLflow's inputs and outputs of runs, for the UI, and as explicit tags (names, digests and
model ids of the parents), which are what the code reads. Only clients bound to one URI are used, none of MLflow's
process-wide state, so that a registry works in Ray workers and in threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

# First of all: they set the environment that MLflow reads when it is imported.
from pipeline.tracking import records, store
from pipeline.tracking.journal import Journal
from pipeline.tracking.records import DatasetInput
from pipeline.tracking.store import TrackingConfig, tracking_location
from pipeline.tracking.tracker import JournalSender, MlflowTracker  # isort: split

from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import RegistryError
from pipeline.generation import Generation
from pipeline.redaction import redacted
from pipeline.stamp import Verdicts
from pipeline.tracking import pages, versions
from pipeline.tracking.verdicts import all_verdicts
from pipeline.tracking.versions import CONFIG_DIGEST, RegisteredGeneration

__all__ = ["DatasetInput", "MlflowTracker", "RegisteredGeneration", "Registry", "TrackingConfig", "tracking_location"]

CANDIDATE = "candidate"
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
        store.check_name("family", family)
        self.uri = uri
        self.family = family
        store.check_answers(uri)
        with self.errors("opening it"):
            self.client = store.connect(uri)
            self._experiment_id = records.ensure_experiment(self.client, uri, family, artifact_root)
            store.unless_there(self._create_model)

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
            RegistryError: the name is registered with another config; or the store does not answer, or refuses.
        """
        store.check_name("generation", generation)
        assert CONFIG_DIGEST in tags, "an unfinished run is found by its config digest"
        tags = tags | {
            "generation": generation,
            "data_digest": dataset.digest,
            "parents": versions.parents_json(parents),
        }
        versions.refuse_other_config(self.find(generation), tags[CONFIG_DIGEST], self.where)
        with self.errors(f"starting the run of {generation!r}"):
            run_id = records.unfinished_run(self.client, self._experiment_id, generation, tags[CONFIG_DIGEST])
            if run_id is None:
                run_id = self.client.create_run(self._experiment_id, tags=tags, run_name=generation).info.run_id
            else:
                self.client.update_run(run_id, status="RUNNING")
            records.log_params(self.client, run_id, params)
            records.log_inputs(self.client, run_id, dataset, parents)
        return run_id

    def tracker(self, run_id: str, journal: Path) -> MlflowTracker:
        """A tracker for the run; a worker builds its own as `MlflowTracker(uri, run_id, journal)`."""
        return MlflowTracker(self.uri, run_id, journal)

    def log_journal(self, run_id: str, journal: Path) -> None:
        """Log what a training has reported, and its tracker could not send before it ended."""
        with self.errors(f"logging {journal}"):
            JournalSender(self.client, run_id, Journal(journal)).send()

    def finish_run(self, run_id: str, status: RunStatus = "FINISHED") -> None:
        """End the run; one that did not finish is taken up again by `start_run`."""
        with self.errors(f"ending run {run_id}"):
            self.client.set_terminated(run_id, status)

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
        store.check_name("generation", record.name)
        if record.family != self.family:
            raise RegistryError(
                f"generation {record.name!r} at {generation.path} is of family {record.family!r}, "
                f"this registry of {self.family!r}: register it in its own"
            )
        known = self.versions()
        found = known.get(record.name)
        if found is None:
            parents = versions.parents_of(generation, known, self.where)
            with self.errors(f"registering {record.name!r}"):
                model_id = records.log_model(self.client, self._experiment_id, run_id, generation, metrics)
                drafted = versions.draft(generation, run_id, model_id, parents)
                description = pages.log_first_page(self.client, generation, drafted, known)
                found = versions.create_version(self.client, self.family, drafted, description)
        versions.refuse_other(found, generation.digest, self.where)
        if candidate:
            self.promote_candidate(record.name)
        return found

    def promote_candidate(self, name: str) -> None:
        """Move the alias `candidate` to a registered generation.

        Raises:
            RegistryError: it is not registered, or the store refuses.
        """
        version = self.get(name).version
        with self.errors(f"moving the alias {CANDIDATE!r}"):
            self.client.set_registered_model_alias(self.family, CANDIDATE, version)

    def forget(self) -> None:
        """Delete the family's registered versions, models and runs, so that its names are free again."""
        with self.errors(f"forgetting {self.family!r}"):
            self.client.delete_registered_model(self.family)
            while models := self.client.search_logged_models([self._experiment_id]):
                for model in models:
                    self.client.delete_logged_model(model.model_id)
            for run in self.client.search_runs([self._experiment_id]):
                self.client.delete_run(run.info.run_id)
            self._create_model()

    def _create_model(self) -> None:
        self.client.create_registered_model(self.family, description=pages.about(self.family))

    def description(self) -> dict[str, object]:
        """Where the family is to be found: the store, the registered model, and its versions by generation."""
        numbers = {name: int(one.version) for name, one in self.versions().items()}
        return {"tracking_uri": redacted(self.uri), "model": self.family, "versions": numbers}

    def versions(self) -> dict[str, RegisteredGeneration]:
        """All registered generations by name, oldest first."""
        with self.errors("reading the versions"):
            found = versions.read_versions(self.client, self.family)
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
            raise RegistryError(f"parent {name!r} {self.why_missing(name)}")
        found.open()
        return found

    def why_missing(self, name: str) -> str:
        """What to tell of a generation that no version has the name of: never there, or deleted by hand."""
        with self.errors(f"looking for {name!r}"):
            return versions.why_missing(self.client, self._experiment_id, name, self.where)

    def verdicts(self) -> Verdicts:
        """What evaluations have found of all registered generations and their ancestors; the newest version's counts.

        Raises:
            RegistryError: a verdict was changed by hand, or the store refuses.
        """
        with self.errors("reading the verdicts"):
            return Verdicts(all_verdicts(versions.read_versions(self.client, self.family)))

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
        with self.errors(f"logging the evaluation of {target!r}"):
            records.log_metrics(self.client, run_id, metrics, model_id=model_id)
        with store.artefact_errors(f"copying the pictures of {target!r} to MLflow's artefacts", "evaluate"):
            for plot in plots:
                self.client.log_artifact(run_id, str(plot), "plots")

    def ui_command(self) -> str:
        """The shell command that opens the UI on a database, or the address of the server's UI."""
        return store.ui_command(self.uri, self._experiment_id)

    @property
    def where(self) -> str:
        """The family and its store, for errors."""
        return f"family {self.family!r} of {redacted(self.uri)}"

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turn what the store raises into one line."""
        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            told = f"{doing} failed: {store.first_line(error)}"
            raise RegistryError(f"MLflow's store {redacted(self.uri)}: {told}") from None
