"""What a training run is made of: the engine, the sharded classifier, its optimiser, and their state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from pipeline.compat.base import Method
from pipeline.compat.parents import start_backbone_from, start_from
from pipeline.compat.views import ImagesOf, guides_of, view_parents
from pipeline.errors import ConfigError
from pipeline.generation import Generation
from pipeline.identities import IdentityTable
from pipeline.model.backbones import BackboneConfig, build_backbone
from pipeline.model.classifier import ClassifierConfig, ShardedClassifier
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.model.rows import batch_parts
from pipeline.schema import Config
from pipeline.training import checkpoint
from pipeline.training.engine import BackboneEngine, EngineConfig
from pipeline.training.optimiser import OptimiserConfig, learning_rate
from pipeline.training.row_optimiser import RowOptimiser, clip_rows_


class TrainingConfig(Config):
    """Length and pace of a training run."""

    steps: int = Field(1000, ge=1, description="updates of the weights")
    global_batch: int = Field(256, ge=2, description="samples of one update, over all ranks")
    accumulation: int = Field(1, ge=1, description="micro-batches that an update is computed in, to save memory")
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
        compat: the method that holds the generation to them.
        images_of: gives each image of some of the table's identities once, with its row, for methods that ask for
            class means.
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
        compat: Method,
        training: TrainingConfig,
        classifier: ClassifierConfig,
        config_digest: str,
        seed: int,
        device: torch.device,
        images_of: ImagesOf | None = None,
    ) -> None:
        self.compat = compat
        self.config, self.config_digest, self.seed, self.device = training, config_digest, seed, device
        self.rank = dist.get_rank()
        self.mesh = ClassMesh.of_world(device.type, classifier.shard_ranks)
        self.parts = _micro_parts(training.global_batch, training.accumulation, self.mesh.ranks)
        views = view_parents(parents, compat, identities, margin, self.mesh, device, images_of)
        self.guides = guides_of(parents, device) if compat.asks_features else []
        torch.manual_seed(seed)
        network, companion = build_backbone(backbone), compat.companion(backbone.embedding_dim, views)
        self.companion = companion
        if compat.starts_from_parent:
            start_backbone_from(network, backbone, parents[0])
        self.engine = BackboneEngine(
            network.to(device),
            training.optimiser,
            training.engine,
            self.parts[0][self.rank],
            training.accumulation,
            companion.to(device) if companion else None,
        )
        self.classifier = ShardedClassifier(
            name,
            len(identities),
            backbone.embedding_dim,
            margin,
            [head for view in views for head in compat.heads(view)],
            batch_losses=[loss for view in views for loss in compat.batch_losses(view)],
            local_losses=companion.losses if companion else (),
            seed=seed,
            mesh=self.mesh,
            config=classifier,
            device=device,
        )
        if classifier.start is not None:
            (start,) = (parent for parent in parents if parent.record.name == classifier.start)
            start_from(self.classifier.weight_CD, start, identities, self.mesh)
        self.row_optimiser = RowOptimiser(self.classifier.weight_CD, training.optimiser)
        self.fused = _fused(classifier, training, self.mesh)

    @property
    def loss_names(self) -> list[str]:
        """Of what `step` returns."""
        return self.classifier.loss_names

    def step(self, images_bCHW: Tensor, labels_b: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        """One update on L = L_new + lambda * sum of the losses towards the parents (Shen et al. 2020, Eq. 8).

        If a loss is no number, nothing moves. Losses are global, so that all ranks answer alike.

        Args:
            images_bCHW: this rank's part of the global batch.
            labels_b: (b,) rows of the identity table.
            step: updates done before; it sets the learning rate, dropout and the sampled prototypes.

        Returns:
            (losses,) of the global batch by `loss_names`: the new classifier's, then those towards the parents; and
            the norms of the gradients, as far as they are known.
        """
        window = None
        if self.config.accumulation > 1:
            window = self.classifier.window(labels_b, [sum(parts) for parts in zip(*self.parts, strict=True)], step)
        rate = learning_rate(self.config.optimiser, step, self.config.steps)
        if self.fused:
            self.classifier.update = partial(self.row_optimiser.apply, rate=rate)
        weight_L = torch.full((len(self.loss_names),), self.compat.weight_at(step, self.config.steps))
        weight_L[0] = 1.0
        weight_L = weight_L.to(self.device)
        total_L, sizes = torch.zeros_like(weight_L), [parts[self.rank] for parts in self.parts]
        for micro, (images, labels) in enumerate(
            zip(torch.split(images_bCHW, sizes), torch.split(labels_b, sizes), strict=True)
        ):
            torch.manual_seed(_stream(self.seed, step, self.rank, micro))  # dropout needs no state to be resumed
            guides_bE = self._guide(images)
            features_bD, locals_bK = self.engine.features(images, guides_bE, labels)
            losses_L = self.classifier(features_bD, labels, self.parts[micro], step, window, guides_bE, locals_bK)
            total_L += losses_L.detach()
            loss = (losses_L * weight_L).sum()
            if not torch.isfinite(total_L).all():
                self._discard(loss, begun=micro > 0)
                return total_L, {}
            self.engine.backward(loss, last=micro == len(sizes) - 1)
        return total_L, self._update(rate)

    def _guide(self, images_bCHW: Tensor) -> Tensor:
        """(b, E) the parents' features of a batch, side by side; (b, 0) where nothing asks for them."""
        with torch.no_grad():
            features = [guide(images_bCHW).float() for guide in self.guides]
        return torch.cat(features, dim=1) if features else images_bCHW.new_zeros(len(images_bCHW), 0)

    def _update(self, rate: float) -> dict[str, float]:
        """Move the backbone and the prototypes, each clipped by its own norm."""
        norms = {"grad_norm/backbone": self.engine.step(rate)}
        if not self.fused:
            gradient_KD = self.classifier.gradient.total(self.mesh.replica_group)
            if (largest := self.config.optimiser.classifier_clip) is not None:
                norms["grad_norm/classifier"] = clip_rows_(gradient_KD, largest, self.mesh.shard_group)
            self.row_optimiser.step(self.classifier.gradient.columns, gradient_KD, rate)
            self.classifier.gradient.clear()
        self.classifier.followers.move()
        return norms

    def _discard(self, loss: Tensor, begun: bool) -> None:
        if begun:
            self.engine.discard(loss)
        self.classifier.gradient.clear()
        self.classifier.followers.forget()

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
        return step

    def _state(self) -> dict[str, dict[str, Tensor]]:
        return {
            "backbone": self.engine.state(),
            "classifier": checkpoint.rows_state(self.classifier, self.row_optimiser),
        }


def _micro_parts(global_batch: int, accumulation: int, ranks: int) -> list[list[int]]:
    """Samples of each rank in each micro-batch of an update.

    Raises:
        ConfigError: some would have none.
    """
    if global_batch < accumulation * ranks:
        raise ConfigError(
            f"training.global_batch={global_batch} leaves nothing for some of {ranks} processes in "
            f"{accumulation} micro-batches; raise it, or lower training.accumulation or cluster.workers"
        )
    by_rank = [batch_parts(part, accumulation) for part in batch_parts(global_batch, ranks)]
    return [list(parts) for parts in zip(*by_rank, strict=True)]


def _fused(classifier: ClassifierConfig, training: TrainingConfig, mesh: ClassMesh) -> bool:
    """Whether prototypes are updated tile by tile in backward.

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


def _stream(seed: int, step: int, rank: int, micro: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}/{micro}".encode()).digest()[:7])
