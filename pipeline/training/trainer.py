"""What a training run is made of: the engine, the sharded classifier, its optimiser, and their state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from pipeline.compat.parents import CompatConfig, load_parent_head
from pipeline.generation import Generation
from pipeline.identities import IdentityTable
from pipeline.model.backbones import BackboneConfig, build_backbone
from pipeline.model.classifier import ShardedClassifier
from pipeline.model.margins import MarginConfig
from pipeline.model.rows import batch_parts
from pipeline.schema import Config
from pipeline.training import checkpoint
from pipeline.training.engine import BackboneEngine, EngineConfig
from pipeline.training.optimiser import OptimiserConfig, build_optimiser, learning_rate, set_learning_rate


class TrainingConfig(Config):
    """Length and pace of a training run."""

    steps: int = Field(1000, ge=1, description="updates of the weights")
    global_batch: int = Field(256, ge=2, description="samples of one update, over all ranks")
    optimiser: OptimiserConfig = OptimiserConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    log_every: int = Field(10, ge=1, description="steps between logged losses")
    nonfinite_limit: int = Field(3, ge=0, description="steps with a loss that is no number before the run gives up")


class Trainer:
    """One rank's part of a training run.

    Args:
        name: of the generation; the key of its own loss. Those of the influence losses are the parents' names.
        identities: the run's table: row r of the classifier is its key r.
        parents: verified artefacts of the parents.
        config_digest: of all that shapes the run; a checkpoint of another one is not resumed.
        seed: of the initial weights and of dropout.
    """

    def __init__(
        self,
        name: str,
        identities: IdentityTable,
        parents: Sequence[Generation],
        backbone: BackboneConfig,
        margin: MarginConfig,
        compat: CompatConfig,
        training: TrainingConfig,
        config_digest: str,
        seed: int,
        device: torch.device,
    ) -> None:
        self.config, self.config_digest, self.seed, self.device = training, config_digest, seed, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(seed)
        samples = batch_parts(training.global_batch, self.world_size)[self.rank]
        self.engine = BackboneEngine(build_backbone(backbone).to(device), training.optimiser, training.engine, samples)
        heads = [load_parent_head(parent, identities, self.rank, self.world_size) for parent in parents]
        self.classifier = ShardedClassifier(
            name, len(identities), backbone.embedding_dim, margin, heads, seed, dist.group.WORLD
        ).to(device)
        self.row_optimiser = build_optimiser(
            training.optimiser,
            [{"params": [self.classifier.weight_CD], "weight_decay": training.optimiser.classifier_weight_decay}],
        )
        self.weight_H = torch.tensor([1.0, *(compat.weight for _ in heads)], device=device)
        self.head_names = [head.name for head in self.classifier.heads]

    def losses(self, images_bCHW: Tensor, labels_b: Tensor, step: int) -> Tensor:
        """(heads,) losses of the global batch: the new classifier's, then each parent's influence loss."""
        torch.manual_seed(_stream(self.seed, step, self.rank))  # dropout needs no state to be resumed
        features_bD = self.engine.features(images_bCHW)
        losses_H: Tensor = self.classifier(features_bD, labels_b, self.config.global_batch)
        return losses_H

    def update(self, losses_H: Tensor, step: int) -> None:
        """One step of both optimisers on L = L_new + lambda * sum of influence losses (Shen et al. 2020, Eq. 8)."""
        rate = learning_rate(self.config.optimiser, step, self.config.steps)
        self.row_optimiser.zero_grad(set_to_none=True)
        self.engine.step((losses_H * self.weight_H).sum(), rate)
        set_learning_rate(self.row_optimiser, rate)
        self.row_optimiser.step()

    def save(self, folder: Path, step: int) -> None:
        """Write a checkpoint after `step` updates. Collective."""
        checkpoint.save(folder, step, self.config_digest, self._state())

    def restore(self, folder: Path) -> int:
        """Load this run's newest checkpoint, if any, and return how many updates are done. Collective."""
        found = checkpoint.latest(folder, self.config_digest)
        if found is None:
            return 0
        state = self._state()
        step = checkpoint.load(found, state)
        self.engine.load_state(state["backbone"], step)
        checkpoint.set_row_steps(self.classifier, self.row_optimiser, step)
        return step

    def _state(self) -> dict[str, dict[str, Tensor]]:
        return {
            "backbone": self.engine.state(),
            "classifier": checkpoint.rows_state(self.classifier, self.row_optimiser),
        }


def _stream(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:7])
