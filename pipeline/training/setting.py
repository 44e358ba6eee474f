"""What a run's config comes to on a number of ranks."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.model.classifier import ClassifierConfig
from pipeline.model.mesh import ClassMesh

if TYPE_CHECKING:  # the trainer asks these
    from pipeline.training.trainer import TrainingConfig


def updates_tile_by_tile(classifier: ClassifierConfig, training: TrainingConfig, mesh: ClassMesh) -> bool:
    """Whether prototypes are updated tile by tile, so that their gradient never exists as a whole.

    Raises:
        ConfigError: the config asks for it beside what needs their whole gradient.
    """
    reasons = {
        "training.optimiser.classifier_clip": training.optimiser.classifier_clip is not None,
        "training.accumulation above 1": training.accumulation > 1,
        "classifier.shard_ranks below the number of processes": mesh.replicas > 1,
    }
    standing = [name for name, stands in reasons.items() if stands]
    if classifier.fused_update and standing:
        raise ConfigError(
            f"classifier.fused_update spends each tile's gradient at once, but {standing[0]} needs the whole; "
            "remove one of the two"
        )
    return not standing if classifier.fused_update is None else classifier.fused_update


def stream(seed: int, step: int, first_sample: int) -> int:
    """Seed of the random numbers of a micro-batch, by where it begins in the global batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{first_sample}".encode()).digest()[:7])
