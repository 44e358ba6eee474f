"""A classifier's rows from one world size to another, and from one generation to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import planner_helpers
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pipeline.compat.methods.bct import Bct
from pipeline.compat.parents import start_from
from pipeline.data.preprocess import PreprocessConfig
from pipeline.generation import Generation, GenerationRecord, seal, write_classifier_part
from pipeline.identities import IdentityTable
from pipeline.model.backbones import BackboneConfig, build_backbone
from pipeline.model.classifier import ClassifierConfig, ShardedClassifier
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.model.rows import batch_parts, initial_rows, row_range
from pipeline.training import checkpoint_state
from pipeline.training.checkpoint_files import Reader
from pipeline.training.checkpoint_place import CheckpointRecord, Place
from pipeline.training.trainer import Trainer, TrainingConfig
from tests.distributed.ranks import run_ranks

MARGIN = MarginConfig(name="cosface", scale=10.0, m3=0.1)
BACKBONE = BackboneConfig(name="small", embedding_dim=6, image_size=8, width=4)
ROWS, BATCH = 101, 12


def make_trainer(optimiser: str, shard_ranks: int | None = None) -> Trainer:
    checkpoint_state.BLOCK_ROWS = 8
    table = IdentityTable(tuple(f"id{row:03d}" for row in range(ROWS)))
    config = TrainingConfig.model_validate({"global_batch": BATCH, "optimiser": {"name": optimiser}, "steps": 50})
    classifier = ClassifierConfig(sample_rate=0.5, shard_ranks=shard_ranks)
    return Trainer("v1", table, [], BACKBONE, MARGIN, Bct(), config, classifier, "digest", 3, torch.device("cpu"))


def one_step(trainer: Trainer, step: int, rank: int, world_size: int) -> list[float]:
    generator = torch.Generator().manual_seed(step)
    images, labels = torch.randn(BATCH, 1, 8, 8, generator=generator), torch.arange(BATCH) * 7 % ROWS
    parts = batch_parts(BATCH, world_size)
    mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    losses, _ = trainer.step(images[mine], labels[mine], step)
    return losses.tolist()


def train_and_save(rank: int, world_size: int, folder: str, optimiser: str, shard_ranks: int | None) -> Any:
    trainer = make_trainer(optimiser, shard_ranks)
    for step in range(3):
        one_step(trainer, step, rank, world_size)
    trainer.save(Path(folder), 3)
    trainer.checkpoints.join()
    return held(trainer)


def held(trainer: Trainer) -> list[Any]:
    """This rank's first row, weights and optimiser state."""
    slots = trainer.row_optimiser.slots
    return [trainer.classifier.first_row, trainer.classifier.weight_CD, *(slots[name] for name in sorted(slots))]


def load_and_save(rank: int, world_size: int, source: str, target: str | None, optimiser: str) -> Any:
    """Rows, momentum and the next step's losses after a resume; saved once more before that step.

    The first loss is that of given features: batch norm makes the second one's depend on the number of ranks.
    """
    trainer = make_trainer(optimiser)
    assert trainer.restore(Path(source)) == 3
    if target is not None:
        trainer.save(Path(target), 3)
        trainer.checkpoints.join()
    state = [value.clone() if isinstance(value, Tensor) else value for value in held(trainer)]
    features, parts = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(0)), batch_parts(BATCH, world_size)
    mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    loss = trainer.classifier(features[mine], torch.arange(BATCH)[mine], parts, step=3)
    return [*state, [loss.item(), *one_step(trainer, 3, rank, world_size)]]


def whole(results: list[Any], parts: int) -> list[Tensor]:
    by_row = sorted({result[0]: result for result in results if len(result[1])}.items())
    return [torch.cat([result[part] for _, result in by_row]) for part in range(1, parts)]


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_rows_pass_from_4_to_3_to_1_to_2_ranks_bit_by_bit(tmp_path: Path, optimiser: str) -> None:
    folders = [str(tmp_path / name) for name in "abcd"]
    saved = run_ranks(4, train_and_save, folders[0], optimiser, None)
    parts = len(saved[0])
    expected = whole(saved, parts)
    assert all(bool(tensor.any()) for tensor in expected)
    losses = {}
    for world_size, source, target in ((3, 0, 1), (1, 1, 2), (2, 2, 3)):
        results = run_ranks(world_size, load_and_save, folders[source], folders[target], optimiser)
        assert all(torch.equal(a, b) for a, b in zip(whole(results, parts), expected, strict=True)), world_size
        losses[world_size] = results[0][-1]
    straight = run_ranks(2, load_and_save, folders[0], None, optimiser)
    assert losses[2] == straight[0][-1], "the chain leaves no trace"
    assert losses[3][0] == pytest.approx(losses[2][0], rel=1e-6)
    assert losses[1][0] == pytest.approx(losses[2][0], rel=1e-6)


def test_two_groups_of_two_ranks_save_what_one_process_loads(tmp_path: Path) -> None:
    saved = run_ranks(4, train_and_save, str(tmp_path), "sgd", 2)
    assert [result[0] for result in saved] == [0, 51, 0, 51]
    assert torch.equal(saved[0][1], saved[2][1]), "replicas stay the same"
    loaded = run_ranks(1, load_and_save, str(tmp_path), None, "sgd")
    assert all(torch.equal(a, b) for a, b in zip(whole(loaded, 3), whole(saved, 3), strict=True))


def read_by(_rank: int, world_size: int, folder: str) -> tuple[int, list[int]]:
    """Rows of the classifier that this rank reads to resume."""
    trainer = make_trainer("sgd")
    place = Place(folder)
    record = place.record(3)
    assert isinstance(record, CheckpointRecord)
    metadata = Reader(place, record, verify=True).read_metadata()
    state = checkpoint_state.rows_state(trainer.classifier, trainer.row_optimiser)
    entry = metadata.state_dict_metadata["classifier.weight"]
    items = planner_helpers._create_read_items("classifier.weight", entry, state["weight"])
    assert world_size == 3
    assert isinstance(entry, TensorStorageMetadata)
    chunks = {item.storage_index.offset for item in items}
    sizes = {chunk.offsets: chunk.sizes[0] for chunk in entry.chunks}
    return trainer.classifier.end_row - trainer.classifier.first_row, [sizes[offset] for offset in chunks]  # type: ignore[index]


def test_a_rank_reads_only_the_blocks_that_hold_its_rows(tmp_path: Path) -> None:
    run_ranks(1, train_and_save, str(tmp_path), "sgd", None)
    for needed, blocks in run_ranks(3, read_by, str(tmp_path)):
        assert needed <= sum(blocks) <= needed + 2 * 7, "whole blocks of 8 rows, saved by a single process"


# Growth


OLD = IdentityTable(("b", "gone", "d", "a"))
NEW = IdentityTable(("a", "b", "c", "d", "e"))


def old_generation(folder: Path, dim: int) -> Generation:
    backbone = BackboneConfig(name="small", embedding_dim=dim, image_size=8, width=4)
    beside = folder / ".v1"
    beside.mkdir()
    rows = torch.arange(4.0 * dim).reshape(4, dim) + 1
    write_classifier_part(beside, rows, 0, 4)
    record = GenerationRecord(
        family="test",
        name="v1",
        backbone=backbone,
        preprocess=PreprocessConfig(size=8, resize=8),
        margin=MARGIN,
        identities=4,
        config={},
        config_digest="c",
        data_digest="d",
        code_version="test",
    )
    return seal(beside, folder / "v1", record, build_backbone(backbone).state_dict(), OLD, torch.zeros(2, 1, 8, 8))


def started(_rank: int, _world_size: int, folder: str, dim: int) -> Any:
    mesh = ClassMesh.of_world("cpu")
    classifier = ShardedClassifier("v2", len(NEW), dim, MARGIN, seed=3, mesh=mesh)
    start_from(classifier.weight_CD, Generation(Path(folder) / "v1"), NEW, mesh)
    return classifier.first_row, classifier.weight_CD


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("old_dim", "dim"), [(4, 4), (3, 5), (5, 3)])
def test_new_rows_start_from_the_parents_by_key(tmp_path: Path, world_size: int, old_dim: int, dim: int) -> None:
    parent = old_generation(tmp_path, old_dim)
    (rows,) = whole(run_ranks(world_size, started, str(tmp_path), dim), 2)
    old = parent.read_classifier_rows(np.arange(4))
    shared = min(old_dim, dim)
    for key in ("a", "b", "d"):
        assert torch.equal(rows[NEW.row_of_key[key], :shared], old[OLD.row_of_key[key], :shared])
    fresh, length = initial_rows(0, len(NEW), dim, 3), old.norm(dim=1).mean()
    for row in (2, 4):
        torch.testing.assert_close(rows[row], fresh[row] / fresh[row].norm() * length)
    assert [row_range(5, rank, 4) for rank in range(4)][-1] == (5, 5), "a rank without rows starts too"


def test_start_from_a_generation_that_is_no_parent_is_refused() -> None:
    from pydantic import ValidationError

    from pipeline.config import GenerationConfig

    with pytest.raises(ValidationError, match=r"classifier\.start 'v1' is none of the generation's parents"):
        GenerationConfig(classifier=ClassifierConfig(start="v1"))
