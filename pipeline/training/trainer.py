"""What a training run is made of: the engine, the sharded classifier, its optimiser, and their state."""

from __future__ import annotations

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
from pipeline.generation import Generation
from pipeline.identities import IdentityTable
from pipeline.model.backbones import BackboneConfig, build_backbone
from pipeline.model.classifier import ClassifierConfig, ShardedClassifier, Window
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.parts import part
from pipeline.schema import Config
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.checkpoint_config import CheckpointConfig
from pipeline.training.checkpoint_state import State, rows_state
from pipeline.training.engine import BackboneEngine, EngineConfig
from pipeline.training.guards import GuardConfig, all_finite
from pipeline.training.meter import ObserveConfig
from pipeline.training.micro_batches import first_sample, micro_parts
from pipeline.training.optimiser import OptimiserConfig, learning_rate
from pipeline.training.profiling import ProfileConfig
from pipeline.training.row_optimiser import RowOptimiser, clip_rows_
from pipeline.training.setting import stream, updates_tile_by_tile
from pipeline.training.stopping import Listen, Wish
from pipeline.training.watchdog import Pulse


class TrainingConfig(Config):
    """Length and pace of a training run."""

    steps: int = Field(1000, ge=1, description="updates of the weights")
    global_batch: int = Field(256, ge=2, description="samples of one update, over all ranks")
    accumulation: int = Field(1, ge=1, description="micro-batches that an update is computed in, to save memory")
    optimiser: OptimiserConfig = OptimiserConfig()
    engine: EngineConfig = EngineConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    log_every: int = Field(10, ge=1, description="steps between logged losses")
    guards: GuardConfig = GuardConfig()
    observe: ObserveConfig = ObserveConfig()
    profile: ProfileConfig | None = Field(None, description="steps that a trace is written of; none: no trace")


def listen_to_nobody() -> Wish:
    """Where nobody asks."""
    return Wish.GO_ON


class Trainer:
    """One rank's part of a training run.

    Attributes:
        pulse: the phase of the step that this rank is in.
        kept: tensors of the loop's that checkpoints hold too, by name; `restore` fills them in place.
        listen: what this rank has been asked; heard once a step.
        wish: the strongest of what any rank has been asked, as of the last step.
        sound_here: whether the last step's losses and features' gradients were finite on this very rank.

    Args:
        name: of the generation; the key of its own loss. Those of the influence losses are the parents' names.
        identities: the run's table: row r of the classifier is its key r.
        parents: verified artefacts of the parents.
        compat: the method that holds the generation to them.
        images_of: gives each image of some of the table's identities once, with its row, for methods that ask for
            class means.
        config_digest: of all that shapes the run; a checkpoint of another one is not resumed.
        seed: of the initial weights and of dropout.

    Attributes:
        checkpoints: where its state goes.
        counters: of the run so far, kept in each checkpoint.
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
        self.backbone = backbone
        self.checkpoints, self.counters = Checkpoints(training.checkpoints, config_digest), dict[str, int]()
        self.rank = dist.get_rank()
        self.mesh = ClassMesh.of_world(device.type, classifier.shard_ranks)
        self.pulse, self.sound_here = Pulse(), True
        self.listen: Listen = listen_to_nobody
        self.wish = self._asked = Wish.GO_ON
        self.kept: dict[str, Tensor] = {}
        self.parts = micro_parts(training.global_batch, training.accumulation, self.mesh.ranks)
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
        self.fused = self.classifier.fused = updates_tile_by_tile(classifier, training, self.mesh)

    @property
    def loss_names(self) -> list[str]:
        """Of what `step` returns."""
        return self.classifier.loss_names

    def step(self, images_bCHW: Tensor, labels_b: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        """One update on L = L_new + lambda * sum of the losses towards the parents (Shen et al. 2020, Eq. 8).

        Nobody moves if a loss or a gradient of any rank is no finite number. All that can be is looked at before any
        of it is spent. The losses and the features' gradients: all ranks agree on them before a micro-batch goes back
        into the backbone. The backbone's gradient: by its norm over all ranks, before its update. The prototypes move
        after that, also where their gradient only exists tile by tile: its pass is kept back until then. It needs no
        look of its own: it is a mean of features times factors which are in the features' gradients too, and finite
        if they are.

        Args:
            images_bCHW: this rank's part of the global batch.
            labels_b: (b,) rows of the identity table.
            step: updates done before; it sets the learning rate, dropout and the sampled prototypes.

        Returns:
            (losses,) of the global batch by `loss_names`: the new classifier's, then those towards the parents; and
            the norms of the gradients, as far as they are known: none if nobody moved.
        """
        window = None
        if self.config.accumulation > 1:
            with part("gather"):
                window = self.classifier.window(labels_b, [sum(parts) for parts in zip(*self.parts, strict=True)], step)
        rate = learning_rate(self.config.optimiser, step, self.config.steps)
        weight_L = torch.full((len(self.loss_names),), self.compat.weight_at(step, self.config.steps))
        weight_L[0] = 1.0
        weight_L = weight_L.to(self.device)
        total_L, sizes = torch.zeros_like(weight_L), [parts[self.rank] for parts in self.parts]
        self.engine.begin()
        self._asked = self.listen()  # once a step, so that its micro-batches agree
        for micro, (images, labels) in enumerate(
            zip(torch.split(images_bCHW, sizes), torch.split(labels_b, sizes), strict=True)
        ):
            # Dropout needs no state to be resumed, and is the same for the same samples at any world size.
            torch.manual_seed(stream(self.seed, step, first_sample(self.parts, self.rank, micro)))
            losses_L, loss, sound = self._forward(images, labels, micro, step, window, weight_L)
            total_L += losses_L
            if not sound:
                self.engine.discard(loss, begun=micro > 0)
                self.classifier.forget()
                return total_L, {}
            with self.pulse("backward"):
                self.engine.backward(loss, last=micro == len(sizes) - 1)
        with self.pulse("update"):
            return total_L, self._update(rate)

    def _forward(
        self, images_bCHW: Tensor, labels_b: Tensor, micro: int, step: int, window: Window | None, weight_L: Tensor
    ) -> tuple[Tensor, Tensor, bool]:
        """A micro-batch as far as the gradient of its features.

        Returns:
            (losses,), a loss that carries that gradient on into the backbone, and whether all of it is finite on all
            ranks.
        """
        with self.pulse("forward"):
            guides_bE = self._guide(images_bCHW)
            features_bD, locals_bK = self.engine.features(images_bCHW, guides_bE, labels_b)
        with self.pulse("losses"):
            losses_L = self.classifier(features_bD, labels_b, self.parts[micro], step, window, guides_bE, locals_bK)
            learned = [output for output in (features_bD, locals_bK) if output.requires_grad]
            gradients = torch.autograd.grad((losses_L * weight_L).sum(), learned)
            loss = torch.stack([(a * b).sum() for a, b in zip(learned, gradients, strict=True)]).sum()
            with part("other"):
                self.sound_here, sound, self.wish = all_finite([losses_L.detach(), *gradients], self._asked)
        return losses_L.detach(), loss, sound

    def _guide(self, images_bCHW: Tensor) -> Tensor:
        """(b, E) the parents' features of a batch, side by side; (b, 0) where nothing asks for them."""
        with torch.no_grad(), part("parents"):
            features = [guide(images_bCHW).float() for guide in self.guides]
        return torch.cat(features, dim=1) if features else images_bCHW.new_zeros(len(images_bCHW), 0)

    def _update(self, rate: float) -> dict[str, float]:
        """Move the backbone and the prototypes, each clipped by its own norm, or neither."""
        norm = self.engine.step(rate)
        if norm is None:
            self.classifier.forget()
            return {}
        norms = {"grad_norm/backbone": norm}
        if self.fused:
            self.classifier.spend(partial(self.row_optimiser.apply, rate=rate))
        else:
            gradient_KD = self.classifier.gradient.total(self.mesh.replica_group)
            if (largest := self.config.optimiser.classifier_clip) is not None:
                norms["grad_norm/classifier"] = clip_rows_(gradient_KD, largest, self.mesh.shard_group)
            self.row_optimiser.step(self.classifier.gradient.columns, gradient_KD, rate)
            self.classifier.gradient.clear()
        with part("parents"):
            self.classifier.followers.move()
        return norms

    def save(self, where: str | Path, step: int) -> None:
        """Begin to write a checkpoint after `step` updates; `checkpoints.join` waits for it. Collective.

        Raises:
            TrainingError: as `Checkpoints.save`.
        """
        self.checkpoints.save(where, step, self._state(), self.counters)

    def restore(self, where: str | Path) -> int:
        """Load this run's newest checkpoint, if any, and return how many updates are done. Collective.

        Raises:
            TrainingError: as `Checkpoints.restore`.
        """
        state = self._state()
        found = self.checkpoints.restore(where, state)
        if found is None:
            return 0
        self.engine.load_state(state["backbone"], found.step)
        self.counters = dict(found.counters)
        return found.step

    def _state(self) -> State:
        return {
            "backbone": self.engine.state(),
            "classifier": rows_state(self.classifier, self.row_optimiser),
            "loop": self.kept,
        }

    def state_bytes(self) -> int:
        """Bytes of a checkpoint, over all ranks."""
        moving = [head.weight_CD for head in self.classifier.followers.heads]
        rows = [self.classifier.weight_CD, *self.row_optimiser.slots.values(), *moving]
        row_bytes = sum(part.shape[1] * part.element_size() for part in rows)
        return self.engine.state_bytes() + self.classifier.rows * row_bytes
