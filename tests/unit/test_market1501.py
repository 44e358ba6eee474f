"""Market-1501 by the names of its release."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.sources_eval import Market1501Config, Market1501TestSource, Market1501TrainSource
from pipeline.errors import DataError
from tests.unit.eval_sets import encode, put, samples_of

TRAIN = ["0002_c1s1_000451_03.jpg", "0002_c2s1_000301_01.jpg", "1500_c6s3_086567_01.jpg"]
GALLERY = ["0001_c1s1_001051_00.jpg", "0001_c2s1_000301_00.jpg", "0003_c6s1_000001_01.jpg.jpg"]
DISTRACTORS = ["0000_c1s1_000151_01.jpg", "0000_c3s2_000376_03.jpg"]
JUNK = ["-1_c1s1_000401_03.jpg"]
QUERY = ["0001_c1s1_001051_00.jpg", "0003_c2s2_000001_00.jpg"]
FOLDERS = {"bounding_box_train": TRAIN, "bounding_box_test": GALLERY + DISTRACTORS + JUNK, "query": QUERY}


@pytest.fixture
def config(tmp_path: Path) -> Market1501Config:
    for first, (folder, files) in enumerate(FOLDERS.items()):
        for number, file in enumerate(files):
            put(tmp_path / "in" / folder / file, encode(100 * first + number))
        put(tmp_path / "in" / folder / "Thumbs.db", b"no image")
    return Market1501Config(path=tmp_path / "in", parts=3)


def test_the_training_people_have_cameras_and_no_roles(tmp_path: Path, config: Market1501Config) -> None:
    source = Market1501TrainSource(config)
    samples = {sample.attributes["file"]: sample for sample in samples_of(source, tmp_path).values()}
    assert {file: (s.identity, s.attributes["camera"]) for file, s in samples.items()} == {
        f"bounding_box_train/{TRAIN[0]}": ("0002", "1"),
        f"bounding_box_train/{TRAIN[1]}": ("0002", "2"),
        f"bounding_box_train/{TRAIN[2]}": ("1500", "6"),
    }
    assert not any("role" in sample.attributes for sample in samples.values())
    for file, sample in samples.items():
        assert sample.image == (config.path / file).read_bytes()


def test_the_test_people_are_searched_with_queries_and_junk_is_left_out(
    tmp_path: Path, config: Market1501Config
) -> None:
    samples = samples_of(source := Market1501TestSource(config), tmp_path)
    roles = source.protocol().roles
    assert roles is not None
    by_file = {samples[row["key"]].attributes["file"]: row for row in roles.to_pylist()}
    assert {file: (row["role"], row["identity"]) for file, row in by_file.items()} == {
        **{f"bounding_box_test/{file}": ("gallery", file[:4]) for file in GALLERY},
        **{f"bounding_box_test/{file}": ("gallery", f"distractor-{file[:-4]}") for file in DISTRACTORS},
        **{f"query/{file}": ("query", file[:4]) for file in QUERY},
    }
    for row in by_file.values():
        sample = samples[row["key"]]
        assert (sample.identity, sample.attributes["role"], sample.attributes["group"]) == (
            row["identity"], row["role"], row["group"]
        )  # fmt: skip


def test_groups_are_equal_for_one_person_by_one_camera_alone(config: Market1501Config) -> None:
    source = Market1501TestSource(config)
    samples = [sample for part in source.parts() for sample in source.read(part)]
    for a in samples:
        for b in samples:
            not_compared = (a.identity, a.attributes["camera"]) == (b.identity, b.attributes["camera"])
            assert (a.attributes["group"] == b.attributes["group"]) == not_compared


@pytest.mark.parametrize(
    "name",
    ["0002_c1s1_000451.jpg", "2_c1s1_000451_03.jpg", "cat.jpg", "-2_c1s1_000451_03.jpg", "0002_c1s1_000451_03_x.jpg"],
)
def test_other_names_are_told(config: Market1501Config, name: str) -> None:
    put(config.path / "query" / name, encode(1))
    with pytest.raises(DataError, match=rf"query/{name}: the name is not of the form 0002_c1s1_000451_03\.jpg"):
        Market1501TestSource(config)


def test_missing_and_empty_folders_are_told(config: Market1501Config) -> None:
    for path in (config.path / "query").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="query holds no jpg image"):
        Market1501TestSource(config)
    (config.path / "query").rmdir()
    with pytest.raises(DataError, match="query does not exist"):
        Market1501TestSource(config)
    assert Market1501TrainSource(config).parts() == ["0/3", "1/3", "2/3"]
