"""Two small parents on disk, a trainer held to them, and the parents as the paper sees them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import generation as generation_module
from pipeline.compat.base import Method
from pipeline.compat.methods import CompatConfig
from pipeline.data.preprocess import PreprocessConfig
from pipeline.generation import Generation, GenerationRecord, seal, write_classifier_part
from pipeline.identities import IdentityTable
from pipeline.model.backbones import BackboneConfig
from pipeline.model.classifier import ClassifierConfig
from pipeline.model.margins import MarginConfig
from pipeline.training import trainer as trainer_module
from pipeline.training.trainer import Trainer, TrainingConfig
from tests import dense

MARGIN = MarginConfig(name="cosface", scale=11.0, m3=0.15)
SEED, BATCH, STEPS, RATE = 3, 13, 3, 0.3
TABLE = IdentityTable(tuple(f"id{row:02d}" for row in range(11)))
OLD_TABLES = {
    "v1": IdentityTable(("id07", "gone", "id02", "id09")),
    "v0": IdentityTable(("id00", "also-gone", "id03", "id08", "id05")),
}
OLD_MARGINS = {"v1": MarginConfig(name="cosface", scale=10.0, m3=0.1), "v0": MarginConfig(name="softmax", scale=1.0)}
OLD_DIMS = {"v1": 6, "v0": 5}
POOL_ROWS = torch.tensor([0, 7, 1, 2, 3, 9, 1, 0, 4, 6, 8, 6, 1, 5, 2, 6, 8])  # row 10 has no image, row 4 one

# Method, its parents, and the new dimension.
CASES: list[tuple[dict[str, Any], list[str], int]] = [
    ({"method": "independent"}, [], 6),
    ({"method": "bct"}, ["v1"], 6),
    ({"method": "bct"}, ["v1", "v0"], 8),
    ({"method": "bct", "margin": 0.0}, ["v1"], 6),
    ({"method": "bct", "margin": 0.3}, ["v1", "v0"], 6),
    ({"method": "bct", "prototypes": "means"}, ["v1"], 8),
    ({"method": "bct", "prototypes": "means"}, ["v0"], 6),
    ({"method": "bct-kd"}, ["v1", "v0"], 6),
    ({"method": "bct-kd"}, ["v0"], 8),
    ({"method": "bct-sys"}, ["v1"], 6),
    ({"method": "bct-sys", "confidence": 0.9}, ["v1", "v0"], 8),
    ({"method": "l2"}, ["v1", "v0"], 8),
    ({"method": "lwf"}, ["v1", "v0"], 8),
    ({"method": "lwf", "temperature": 0.5}, ["v0"], 6),
    ({"method": "finetune"}, ["v1"], 6),
    ({"method": "live"}, ["v1"], 6),
    ({"method": "live", "margin": 0.3}, ["v1", "v0"], 8),
]


def plain(config: BackboneConfig) -> nn.Module:
    """Without batch norm, whose statistics are those of a rank's part."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, config.embedding_dim))


def use_plain_backbones() -> None:
    trainer_module.build_backbone = plain  # type: ignore
    generation_module.build_backbone = plain  # type: ignore


def backbone_config(dim: int, **changes: Any) -> BackboneConfig:
    return BackboneConfig(name="small", embedding_dim=dim, image_size=8, **changes)


def make_parent(home: Path, name: str) -> None:
    torch.manual_seed(len(OLD_TABLES[name]))
    config, table, folder = backbone_config(OLD_DIMS[name]), OLD_TABLES[name], home / f"{name}-beside"
    network, weight = plain(config), torch.randn(len(table), OLD_DIMS[name]) * 1.7
    folder.mkdir(parents=True)
    write_classifier_part(folder, weight, 0, len(table))
    record = GenerationRecord(
        family="test",
        name=name,
        backbone=config,
        preprocess=PreprocessConfig(size=8, resize=8),
        margin=OLD_MARGINS[name],
        identities=len(table),
        config={},
        config_digest="c",
        data_digest="d",
        code_version="test",
    )
    seal(folder, home / name, record, network.state_dict(), table, torch.randn(3, 1, 8, 8))


def pool() -> Tensor:
    return torch.randn(len(POOL_ROWS), 1, 8, 8, generator=torch.Generator().manual_seed(8))


def images_of(first_row: int, end_row: int) -> Iterator[tuple[Tensor, Tensor]]:
    inside = (first_row <= POOL_ROWS) & (end_row > POOL_ROWS)
    yield from zip(pool()[inside].split(4), POOL_ROWS[inside].split(4), strict=True)


def drawn(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 1, 8, 8, generator=generator), torch.randint(len(TABLE), (BATCH,), generator=generator)


def compat(settings: dict[str, Any]) -> Method:
    made: Method = TypeAdapter(CompatConfig).validate_python(settings)
    return made


def make_trainer(
    home: Path,
    settings: dict[str, Any],
    parents: list[str],
    dim: int,
    accumulation: int = 1,
    shard_ranks: int | None = None,
    **changes: Any,
) -> Trainer:
    optimiser = {"name": "sgd", "learning_rate": RATE, "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0}
    training = TrainingConfig.model_validate(
        {"steps": STEPS, "global_batch": BATCH, "accumulation": accumulation, "optimiser": optimiser}
    )
    classifier = ClassifierConfig(shard_ranks=shard_ranks)
    generations = [Generation(home / name) for name in parents]
    backbone, device = backbone_config(dim, **changes), torch.device("cpu")
    arguments = (backbone, MARGIN, compat(settings), training, classifier, "digest", SEED, device, images_of)
    return Trainer("v2", TABLE, generations, *arguments)


class PlainParent:
    """A parent as the paper sees it: whole, in float64."""

    def __init__(self, home: Path, name: str) -> None:
        generation = Generation(home / name)
        self.name, self.margin, self.table = name, OLD_MARGINS[name], OLD_TABLES[name]
        self.weight = generation.read_classifier_rows(torch.arange(len(self.table)).numpy()).double()
        self.backbone = generation.load_backbone().double()

    def columns(self, labels: Tensor) -> Tensor:
        return torch.tensor([self.table.row_of_key.get(TABLE.keys[row], -1) for row in labels.tolist()])

    def features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.backbone(images.double())
        return out

    def means(self) -> dict[int, Tensor]:
        """Of the rows that have images."""
        unit = F.normalize(self.features(pool()))
        return {row: unit[row == POOL_ROWS].mean(dim=0) for row in sorted(set(POOL_ROWS.tolist()))}

    def live(self) -> Tensor:
        """Where the moving prototypes of all rows start: class means of length 1, 0 without images."""
        weight = torch.zeros(len(TABLE), self.weight.shape[1], dtype=torch.float64)
        for row, mean in self.means().items():
            weight[row] = F.normalize(mean, dim=0)
        return weight

    def synthesised(self, confidence: float) -> tuple[Tensor, dict[int, int]]:
        """Prototypes with those of unknown identities behind them, and the column of each row of the new table."""
        column_of = {TABLE.row_of_key[key]: row for row, key in enumerate(self.table.keys) if key in TABLE.row_of_key}
        length, weight = self.weight.norm(dim=1).mean(), list(self.weight)
        for row, mean in self.means().items():
            if row not in column_of and mean.norm() > confidence:
                column_of[row] = len(weight)
                weight.append(mean / mean.norm() * length)
        return torch.stack(weight), column_of


def plain_losses(
    parent: PlainParent, method: Any, features: Tensor, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """The losses towards one parent, by name."""
    dim, columns, old = parent.weight.shape[1], parent.columns(labels), parent.features(images)
    if method.method == "l2":
        return {parent.name: dense.regression_loss(features, old)}
    if method.method == "lwf":
        cooler = parent.margin.model_copy(update={"scale": parent.margin.scale / method.temperature})
        everyone = torch.ones_like(columns).bool()
        return {parent.name: dense.distilled_loss(features, old, parent.weight, everyone, cooler)}
    if method.method == "finetune":
        return {}
    weight, margin = parent.weight, parent.margin
    if method.method == "bct-sys":
        weight, column_of = parent.synthesised(method.confidence)
        columns = torch.tensor([column_of.get(row, -1) for row in labels.tolist()])
    elif method.method == "live":
        weight, columns = parent.live(), labels
        margin = margin if margin.normalised else MarginConfig(name="norm_softmax", scale=MARGIN.scale)
    elif method.prototypes == "means":
        means = parent.means()
        weight, columns = (
            torch.stack(list(means.values())),
            torch.tensor([list(means).index(row) if row in means else -1 for row in labels.tolist()]),
        )
        margin = margin if margin.normalised else MarginConfig(name="norm_softmax", scale=MARGIN.scale)
    if method.margin is not None and margin.normalised:
        name = {"name": "cosface", "m3": method.margin} if method.margin else {"name": "norm_softmax"}
        margin = MarginConfig.model_validate({"scale": margin.scale, **name})
    losses = {parent.name: dense.influence_loss(features, weight, columns, margin, dim)}
    if method.method == "bct-kd":
        losses[f"{parent.name}/kd"] = dense.distilled_loss(features, old, parent.weight, columns < 0, parent.margin)
    return losses
