"""The versions of a family's registered model: what is written of each, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import GenerationError, RegistryError
from pipeline.generation import Generation

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CONFIG_DIGEST = "config_digest"


@dataclass(frozen=True)
class RegisteredGeneration:
    """A generation as the registry knows it: a version of the family's registered model."""

    name: str
    version: str
    digest: str
    model_id: str
    path: Path
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of the generations that it was trained against."""
        return tuple(json.loads(self.tags.get("parents", "{}")))

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


def draft(
    generation: Generation, run_id: str, model_id: str, parents: Sequence[RegisteredGeneration]
) -> RegisteredGeneration:
    """The version that a generation is about to become, with all its tags; it has no number yet."""
    record = generation.record
    tags = {
        "generation": record.name,
        "digest": generation.digest,
        "path": str(generation.path.resolve()),
        "parents": parents_json(parents),
        CONFIG_DIGEST: record.config_digest,
        "data_digest": record.data_digest,
        "identities": str(record.identities),
        "dim": str(record.embedding_dim),
        "model_id": model_id,
    }
    tags |= {} if record.backbone else {"imported": "true"}
    return RegisteredGeneration(record.name, "", generation.digest, model_id, generation.path, run_id, tags)


def create_version(
    client: MlflowClient, family: str, drafted: RegisteredGeneration, description: str
) -> RegisteredGeneration:
    """Make the logged model a version of the family's registered model, with all tags from the start."""
    version = client.create_model_version(
        family,
        # Not `models:/ID`: the sqlite store would look that up at MLflow's process-wide URI.
        client.get_logged_model(drafted.model_id).artifact_location,
        drafted.run_id,
        tags=dict(drafted.tags),
        description=description,
        await_creation_for=0,
        model_id=drafted.model_id,
    )
    # The UI's link from the model to its version: a server sets it, the client of a database does not.
    link = json.dumps([{"name": family, "version": int(version.version)}])
    client.set_logged_model_tags(drafted.model_id, {"mlflow.modelVersions": link})
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
        tags=dict(tags),
    )


def parents_of(
    generation: Generation, registered: Mapping[str, RegisteredGeneration], where: str
) -> list[RegisteredGeneration]:
    """A generation's parents as they are registered.

    Raises:
        RegistryError: one is not, or another one has its name.
    """
    for name, digest in generation.record.parents.items():
        if name not in registered:
            raise RegistryError(f"parent {name!r} is not registered in {where}; train it first")
        if (known := registered[name].digest) != digest:
            raise RegistryError(
                f"generation {generation.record.name!r} was trained against another {name!r} (digest "
                f"{digest[:12]}) than the one registered in {where} ({known[:12]}): train it again"
            )
    return [registered[name] for name in generation.record.parents]


def refuse_other_config(known: RegisteredGeneration | None, config_digest: str, where: str) -> None:
    """Refuse to train a generation under a name that is registered with another config: before hours are lost on it.

    Raises:
        RegistryError: it is.
    """
    if known is not None and known.tags[CONFIG_DIGEST] != config_digest:
        raise RegistryError(
            f"generation {known.name!r} is registered in {where} as version {known.version}, made with another config "
            f"({known.tags[CONFIG_DIGEST][:12]}, this one {config_digest[:12]}): train under a new name"
        )


def refuse_other(known: RegisteredGeneration, digest: str, where: str) -> None:
    """Refuse an artefact whose name is registered for another.

    Raises:
        RegistryError: it is.
    """
    if known.digest != digest:
        raise RegistryError(
            f"generation {known.name!r} is registered in {where} as version {known.version} with another "
            f"digest ({known.digest[:12]}, this one {digest[:12]}): train under a new name"
        )


def why_missing(client: MlflowClient, experiment_id: str, name: str, where: str) -> str:
    """What to tell of a generation that no version has the name of: never there, or deleted by hand."""
    left = client.search_logged_models([experiment_id], f"tags.generation = '{name}'")
    if not left:
        return f"is not registered in {where}; train it first"
    return (
        f"is not registered in {where}, though its model {left[0].model_id} is there: its version was deleted by hand; "
        "run the job that trained or imported it again, with the same config, to register it"
    )


def parents_json(parents: Sequence[RegisteredGeneration]) -> str:
    """The tag `parents`: of each parent, by name, the digest, the model id and the version."""
    return json.dumps(
        {
            parent.name: {"digest": parent.digest, "model_id": parent.model_id, "version": parent.version}
            for parent in parents
        }
    )
