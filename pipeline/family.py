"""The generations of one family: each is trained unless it is there, and registered.

Everything is found again: what is complete is left alone, what was cut off goes on, and what was made with another
config is refused by the names of the keys that differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.code import code_version
from pipeline.config import RunConfig, differing_keys
from pipeline.console import say
from pipeline.data.manifest import Manifest
from pipeline.data.quarantine import read_quarantine
from pipeline.data.store_metadata import metadata_folder
from pipeline.errors import ConfigError, StoppedError
from pipeline.files import write_json
from pipeline.generation import RECORD, Generation, GenerationRecord
from pipeline.identities import IdentityTable
from pipeline.plan import Plan
from pipeline.registry import DatasetInput, RegisteredGeneration, Registry, RunStatus
from pipeline.schema import digest_json


@dataclass(frozen=True)
class Member:
    """One generation of a run's family: where it lies, what shapes it, and how it comes to be."""

    config: RunConfig
    name: str
    registry: Registry

    @property
    def artefact(self) -> Path:
        """Folder of the sealed generation."""
        return self.config.folder / "generations" / self.name

    @property
    def workplace(self) -> Path:
        """Folder of its training: config, identities, figures, checkpoints."""
        return self.config.folder / "training" / self.name

    @property
    def journal(self) -> Path:
        """The figures of its training."""
        return self.workplace / "figures.jsonl"

    @cached_property
    def manifest(self) -> Manifest:
        """Of the training shards."""
        return Manifest.load(metadata_folder(self.config.train_location, self.config.data.store))

    @cached_property
    def identities(self) -> IdentityTable:
        """The generation's table: all of the data set's identities, or as many of them as the config says."""
        every, count = self.manifest.identities(), self.config.generations[self.name].identities
        return every if count is None else every.subset(count, self.config.seed)

    @cached_property
    def parents(self) -> list[RegisteredGeneration]:
        """As registered. Raises RegistryError if one is not, or its artefact is no longer the registered one."""
        return [self.registry.get(parent) for parent in self.config.generations[self.name].parents]

    @cached_property
    def shaping(self) -> dict[str, Any]:
        """All that shapes the trained weights; its digest tells one training from another."""
        return {
            **self.config.shaping(self.name),
            "data_digest": self.manifest.digest,
            "identities_digest": self.identities.digest,
            "parents_digests": {parent.name: parent.digest for parent in self.parents},
        }

    def find(self) -> Generation | None:
        """The sealed generation, if it is there.

        Raises:
            ConfigError: it, or the beginning of its training, was made with another config.
        """
        if (self.artefact / RECORD).is_file():
            generation = Generation(self.artefact)
            if generation.record.backbone is None:
                raise ConfigError(
                    f"generation {self.name!r} at {self.artefact} was imported: it is not trained, so leave it out of "
                    "`generations`, and name it among the `parents` of others"
                )
            self._refuse_other(generation.record.config, self.artefact)
            return generation
        begun = self.workplace / "config.json"
        if begun.is_file():
            self._refuse_other(json.loads(begun.read_text()), self.workplace)
        return None

    def registered(self) -> Generation | None:
        """The sealed generation, if it is there and the registry knows it as it is."""
        generation, known = self.find(), self.registry.find(self.name)
        return generation if generation and known and known.digest == generation.digest else None

    def begin(self) -> Plan:
        """Verify the parents, open the run, and say how the generation is to be trained.

        Raises:
            ConfigError: as `find`.
            RegistryError: a parent is not registered; or the store does not answer.
            GenerationError: a parent's artefact has changed, no longer gives what it gave, or lacks what the method
                needs.
        """
        self.verify_parents()
        return self._plan(self._start_run())

    def complete(self, run_id: str) -> Generation:
        """Register the sealed generation and end its run, of which nothing is missing then."""
        generation = Generation(self.artefact)
        self.registry.log_journal(run_id, self.journal)
        self.registry.register(run_id, generation, generation.record.training)
        self.registry.finish_run(run_id)
        return generation

    def verify_parents(self) -> None:
        """Check that each parent has what the method needs, is what it was, and reproduces its self-test.

        All before workers are asked.
        """
        for parent in self.parents:
            generation = parent.open()
            self.config.generations[self.name].compat.check_parent(generation)
            generation.verify()
            generation.reproduce_selftest()

    def _plan(self, run_id: str) -> Plan:
        self.workplace.mkdir(parents=True, exist_ok=True)
        write_json(self.workplace / "config.json", self.shaping)
        self.identities.save(self.workplace / "identities.parquet")
        generation = self.config.generations[self.name]
        record = GenerationRecord(
            family=self.config.name,
            name=self.name,
            parents={parent.name: parent.digest for parent in self.parents},
            backbone=generation.backbone,
            preprocess=self.config.preprocess,
            margin=generation.margin,
            identities=len(self.identities),
            config=self.shaping,
            config_digest=digest_json(self.shaping),
            data_digest=self.manifest.digest,
            code_version=code_version(),
        )
        return Plan(
            config=self.config,
            record=record,
            data=self.config.train_location,
            identities=self.workplace / "identities.parquet",
            checkpoints=self.config.checkpoints(self.name),
            quarantine=self.workplace / "quarantine",
            journal=self.journal,
            destination=self.artefact,
            parents=tuple(Path(parent.path) for parent in self.parents),
            tracking_uri=self.registry.uri,
            run_id=run_id,
        )

    def _start_run(self) -> str:
        dataset = DatasetInput(
            name=self.config.train_location.rstrip("/").rpartition("/")[2],
            path=self.config.train_location,
            digest=self.manifest.digest,
            samples=self.manifest.samples,
            identities=len(self.identities),
        )
        tags = {"config_digest": digest_json(self.shaping), "code_version": code_version()}
        return self.registry.start_run(self.name, flat(self.shaping), tags, dataset, self.parents)

    def _refuse_other(self, theirs: dict[str, Any], where: Path) -> None:
        ours = json.loads(json.dumps(self.shaping))
        if differences := differing_keys(theirs, ours):
            told = ", ".join(differences[:5]) + (", ..." if len(differences) > 5 else "")
            raise ConfigError(
                f"generation {self.name!r} at {where} was made with another config: {told}; "
                "take another name, or start over with --fresh"
            )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested sections as dotted keys."""
    out: dict[str, object] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def train_missing(
    config: RunConfig, registry: Registry, train: Callable[[Sequence[Plan]], None]
) -> dict[str, Generation]:
    """Train and register those generations of a run that are not there yet.

    Generations that do not wait for one another are handed to `train` together.

    Args:
        config: of the run.
        registry: of its family.
        train: carries out plans; seals each artefact at its destination.

    Returns:
        All generations of the run by name, in the config's order.
    """
    members = [Member(config, name, registry) for name in config.generations]
    for together in levels(config):
        waiting = [member for member in members if member.name in together and member.registered() is None]
        plans = {member.name: member.begin() for member in waiting}
        outcome: RunStatus = "FAILED"  # of a run whose generation is not sealed; the next takes it up either way
        try:
            if missing := [plans[member.name] for member in waiting if member.find() is None]:
                train(missing)
        except (StoppedError, KeyboardInterrupt):
            outcome = "KILLED"
            raise
        finally:  # also what was sealed before a failure
            for member in waiting:
                _tell_quarantine(plans[member.name])
                if (member.artefact / RECORD).is_file():
                    member.complete(plans[member.name].run_id)
                else:
                    registry.finish_run(plans[member.name].run_id, outcome)
    return {member.name: Generation(member.artefact) for member in members}


def _tell_quarantine(plan: Plan) -> None:
    if entries := read_quarantine(plan.quarantine):
        say(f"{plan.record.name}: {len(entries)} samples did not decode and were replaced; see {plan.quarantine}")


def levels(config: RunConfig) -> list[set[str]]:
    """Generations by how long a line of parents they wait for, within the run."""
    depth: dict[str, int] = {}
    for name, generation in config.generations.items():  # parents stand before their children
        depth[name] = 1 + max((depth[parent] for parent in generation.parents if parent in depth), default=-1)
    return [{name for name in depth if depth[name] == level} for level in range(max(depth.values()) + 1)]
