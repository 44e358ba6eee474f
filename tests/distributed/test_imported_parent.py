"""A trainer held to a parent of which only embeddings are left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.embedding_files import EmbeddingFile
from pipeline.errors import GenerationError
from pipeline.importing import Import, seal_embeddings
from pipeline.model.margins import MarginConfig
from tests import dense
from tests.distributed.ranks import run_ranks
from tests.distributed.small_parents import (
    SEED,
    TABLE,
    backbone_config,
    drawn,
    make_trainer,
    plain,
    use_plain_backbones,
)

OLD_DIM, NEW_DIM = 5, 8
KEYS = ("id03", "gone", "id00", "id08", "id05")
VECTORS = np.random.default_rng(6).standard_normal((4 * len(KEYS), OLD_DIM))
SETTINGS = ({"method": "bct"}, {"method": "bct", "prototypes": "means"})


def make_imported(home: Path) -> None:
    path = home / "train.parquet"
    pq.write_table(pa.table({"identity": KEYS * 4, "vector": VECTORS.tolist()}), path)
    seal_embeddings(Import("v0", EmbeddingFile(path)), "test", home / "v0")


def first_losses(_rank: int, _world_size: int, home: Path) -> tuple[list[dict[str, float]], str]:
    """Of a step towards the imported parent by each setting; and what is said where its backbone is asked for."""
    use_plain_backbones()
    make_imported(home)
    trainers = [make_trainer(home, settings, ["v0"], NEW_DIM) for settings in SETTINGS]
    losses = [trainer.step(*drawn(0), 0)[0].tolist() for trainer in trainers]
    with pytest.raises(GenerationError) as error:
        make_trainer(home, {"method": "bct-sys"}, ["v0"], NEW_DIM)
    return [dict(zip(trainer.loss_names, loss, strict=True)) for trainer, loss in zip(trainers, losses, strict=True)], (
        str(error.value)
    )


def test_bct_is_held_to_the_class_means_of_the_embeddings(tmp_path: Path) -> None:
    told, refused = run_ranks(1, first_losses, tmp_path)[0]
    images, labels = drawn(0)
    torch.manual_seed(SEED)
    features = plain(backbone_config(NEW_DIM)).double()(images.double())
    unit = VECTORS.astype(np.float32).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    means = torch.from_numpy(unit.reshape(4, len(KEYS), OLD_DIM).mean(axis=0))
    columns = torch.tensor([KEYS.index(key) if (key := TABLE.keys[row]) in KEYS else -1 for row in labels.tolist()])
    wanted = dense.influence_loss(features, means, columns, MarginConfig(name="norm_softmax", scale=20.0), OLD_DIM)
    assert (columns >= 0).any()
    for losses in told:
        assert list(losses) == ["v2", "v0"]
        assert losses["v0"] == pytest.approx(wanted.item(), rel=1e-5)
    assert refused.startswith("compat.method 'bct-sys' needs the backbone of parent 'v0'")
