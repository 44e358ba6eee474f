"""The artefact: what is written is what is read, and a change is noticed and named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.preprocess import PreprocessConfig
from pipeline.errors import GenerationError
from pipeline.generation import RECORD, Generation, GenerationRecord, seal, write_classifier_part
from pipeline.identities import IdentityTable
from pipeline.model.backbones import BackboneConfig, build_backbone
from pipeline.model.margins import MarginConfig

ROWS, DIM = 11, 6
TABLE = IdentityTable(tuple(f"id{row}" for row in range(ROWS)))
BACKBONE = BackboneConfig(name="small", embedding_dim=DIM, image_size=8, width=4)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def generation(tmp_path: Path, weight: torch.Tensor) -> Generation:
    beside = tmp_path / ".v1.tmp"
    beside.mkdir()
    for start, stop in ((0, 4), (4, 8), (8, 11), (11, 11)):  # as four ranks write it, the last one with nothing
        write_classifier_part(beside, weight[start:stop], start, stop)
    record = GenerationRecord(
        family="test",
        name="v1",
        backbone=BACKBONE,
        preprocess=PreprocessConfig(size=8, resize=8),
        margin=MarginConfig(name="cosface", scale=10.0, m3=0.1),
        identities=ROWS,
        config={"steps": 3},
        config_digest="c",
        data_digest="d",
        code_version="test",
    )
    torch.manual_seed(1)
    images = torch.randn(5, 1, 8, 8)
    return seal(beside, tmp_path / "v1", record, build_backbone(BACKBONE).state_dict(), TABLE, images)


def test_artefact_is_whole_and_reads_back(generation: Generation, weight: torch.Tensor) -> None:
    again = Generation(generation.path)
    again.verify()
    assert again.digest == generation.digest
    assert again.identities() == TABLE
    assert again.reproduce_selftest() > 0.9999
    assert not list(generation.path.parent.glob(".*.tmp"))
    rows = np.array([10, 3, 4, 3, 0, 8])
    assert torch.equal(again.read_classifier_rows(rows), weight[torch.from_numpy(rows)])
    assert again.read_classifier_rows(np.array([], np.int64)).shape == (0, DIM)


@pytest.mark.parametrize(
    "name", ["backbone.safetensors", "classifier-000000000004-000000000008.safetensors", "identities.parquet"]
)
def test_change_of_one_bit_is_named(generation: Generation, name: str) -> None:
    path = generation.path / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(GenerationError, match=f"{name} has changed since it was written"):
        Generation(generation.path).verify()


def test_missing_file_and_missing_artefact_are_named(generation: Generation, tmp_path: Path) -> None:
    (generation.path / "identities.parquet").unlink()
    with pytest.raises(GenerationError, match=r"identities\.parquet is missing"):
        Generation(generation.path).verify()
    with pytest.raises(GenerationError, match="no generation at"):
        Generation(tmp_path / "v7")


def test_record_decides_the_digest(generation: Generation) -> None:
    record = json.loads((generation.path / RECORD).read_text())
    record["margin"]["scale"] = 11.0
    (generation.path / RECORD).write_text(json.dumps(record))
    assert Generation(generation.path).digest != generation.digest


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 1, "surprise": 2}'])
def test_records_that_are_none_are_refused(generation: Generation, text: str) -> None:
    (generation.path / RECORD).write_text(text)
    with pytest.raises(GenerationError, match="is not a generation's record"):
        Generation(generation.path)


def test_unknown_format_is_refused(generation: Generation) -> None:
    record = json.loads((generation.path / RECORD).read_text())
    (generation.path / RECORD).write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(GenerationError, match="has format 2; this version reads format 1"):
        Generation(generation.path)


def test_backbone_of_another_training_fails_the_selftest(generation: Generation) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(99)
    save_file(build_backbone(BACKBONE).state_dict(), generation.path / "backbone.safetensors")
    with pytest.raises(GenerationError, match="does not reproduce its self-test"):
        Generation(generation.path).reproduce_selftest()


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, ("/tmp/bct-exploded", "w")  # type: ignore[return-value]


def test_pickle_in_place_of_weights_is_not_run(generation: Generation) -> None:
    Path("/tmp/bct-exploded").unlink(missing_ok=True)
    (generation.path / "backbone.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(GenerationError, match="cannot be loaded"):
        Generation(generation.path).reproduce_selftest()
    assert not Path("/tmp/bct-exploded").exists()
