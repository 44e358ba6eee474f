"""Checkpoints that are damaged, cut off, poisoned, or cannot be written: the one before is used, and nobody is left."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.training import checkpoint as module
from pipeline.training import checkpoint_files, checkpoint_state
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.checkpoint_config import CheckpointConfig
from pipeline.training.checkpoint_files import unpickle_metadata
from pipeline.training.checkpoint_place import CheckpointRecord, DamagedError, FileEntry, Place
from tests.distributed.ranks import run_ranks

DIGEST, OTHER = "a" * 64, "b" * 64
STATE_ROWS = 37


def state(value: float) -> dict[str, dict[str, Tensor]]:
    """Plain tensors that all ranks hold, some more than a file's worth."""
    return {"backbone": {f"weight.{n}": torch.full((STATE_ROWS, n + 1), value + n) for n in range(5)}}


def small_files() -> None:
    checkpoint_files.FILE_BYTES = 500


def written(rank: int, _world_size: int, where: str, steps: list[int], settings: dict[str, Any]) -> list[str]:
    """Save a state a step and say what was told."""
    small_files()
    with listening() as told, Checkpoints(CheckpointConfig(**settings), DIGEST) as checkpoints:
        for step in steps:
            checkpoints.save(where, step, state(float(step)), {"nonfinite": step + rank})
    return told.getvalue().splitlines()


def listening() -> redirect_stdout[io.StringIO]:
    """To what this rank says."""
    return redirect_stdout(io.StringIO())


def restored(_rank: int, _world_size: int, where: str) -> tuple[int | None, float, list[str], str]:
    """Step, a value, what was told, and the error."""
    into = state(-1.0)
    with listening() as told:
        try:
            record = Checkpoints(CheckpointConfig(), DIGEST).restore(where, into)
        except TrainingError as error:
            return None, -1.0, told.getvalue().splitlines(), str(error)
    if record is not None:
        assert record.counters == {"nonfinite": record.step}, "rank 0's"
        assert all(torch.equal(a, b) for a, b in zip(_flat(into), _flat(state(record.step)), strict=True))
    step = None if record is None else record.step
    return step, float(into["backbone"]["weight.0"][0, 0]), told.getvalue().splitlines(), ""


def _flat(state: dict[str, dict[str, Tensor]]) -> list[Tensor]:
    return [tensor for part in state.values() for tensor in part.values()]


def data_folder(where: Path, step: int) -> Path:
    record = json.loads((where / f"step-{step:08d}" / "checkpoint.json").read_text())
    return where / f"step-{step:08d}" / str(record["folder"])


def test_newest_are_kept_and_milestones_for_ever(tmp_path: Path) -> None:
    settings = {"every": 1, "keep": 2, "milestone_every": 3}
    run_ranks(2, written, str(tmp_path), list(range(1, 9)), settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (3, 6, 7, 8)]
    record = json.loads((tmp_path / "step-00000008" / "checkpoint.json").read_text())
    assert (record["step"], record["world_size"], record["config_digest"]) == (8, 2, DIGEST)
    assert {path.name for path in data_folder(tmp_path, 8).iterdir()} == record["files"].keys()
    assert len(record["files"]) > 3, "each rank writes files of a bounded size"
    assert run_ranks(2, restored, str(tmp_path))[0][:2] == (8, 8.0)
    run_ranks(1, written, str(tmp_path), [5], settings)
    assert run_ranks(1, restored, str(tmp_path))[0][0] == 5, "a run that went back leaves its later steps"
    assert not (tmp_path / "step-00000006").exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("bit", lambda folder: flip(folder / "__1_0.distcp"), "__1_0.distcp has another sha256 than was written"),
    ("cut", lambda folder: os.truncate(folder / "__0_0.distcp", 100), "__0_0.distcp has 100 of"),
    ("gone", lambda folder: (folder / "__0_1.distcp").unlink(), "__0_1.distcp is missing"),
    ("metadata", lambda folder: flip(folder / ".metadata"), ".metadata has another sha256"),
    ("json", lambda folder: flip(folder.parent / "checkpoint.json"), "checkpoint.json"),
    ("json cut", lambda folder: os.truncate(folder.parent / "checkpoint.json", 40), "checkpoint.json cannot be read"),
]


@pytest.mark.parametrize(("damage", "told"), [case[1:] for case in DAMAGE[:-2]], ids=[case[0] for case in DAMAGE[:-2]])
def test_damaged_checkpoint_is_told_and_the_one_before_used(
    tmp_path: Path, damage: Callable[[Path], object], told: str
) -> None:
    run_ranks(2, written, str(tmp_path), [3, 6], {})
    damage(data_folder(tmp_path, 6))
    first, second = run_ranks(2, restored, str(tmp_path))
    assert first[:2] == second[:2] == (3, 3.0)
    (line,) = first[2]
    assert told in line
    assert "step 6" in line
    assert "\n" not in line
    assert second[2] == [], "rank 0 tells"


def test_damaged_checkpoints_and_none_before_end_the_run(tmp_path: Path) -> None:
    run_ranks(2, written, str(tmp_path), [3, 6], {})
    (data_folder(tmp_path, 6) / "__0_0.distcp").unlink()
    os.truncate(tmp_path / "step-00000003" / "checkpoint.json", 40)
    for result in run_ranks(2, restored, str(tmp_path)):
        assert "is whole; step 3: checkpoint.json cannot be read" in result[3]
        assert "\n" not in result[3]
    assert run_ranks(1, restored, str(tmp_path / "none"))[0] == (None, -1.0, [], "")


def test_orphans_are_reaped_but_not_those_of_another_config(tmp_path: Path) -> None:
    run_ranks(1, written, str(tmp_path), [3], {})
    own, other = f"{DIGEST[:16]}-00000000", f"{OTHER[:16]}-00000000"
    for step, name in ((3, own), (3, other), (6, own), (9, own), (9, other)):
        folder = tmp_path / f"step-{step:08d}" / name
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "step-00000006" / ".checkpoint.json.7.tmp").write_text("{")
    foreign = CheckpointRecord(step=12, config_digest=OTHER, folder=other, files={}, world_size=1)
    Place(tmp_path).commit(foreign)
    assert run_ranks(1, restored, str(tmp_path))[0][:3] == (3, 3.0, [])
    left = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*.distcp")}
    assert left == {
        f"step-00000003/{data_folder(tmp_path, 3).name}", f"step-00000003/{other}", f"step-00000009/{other}"
    }  # fmt: skip
    assert not (tmp_path / "step-00000006").exists()
    assert Place(tmp_path).record(12) == foreign


def failing(rank: int, _world_size: int, where: str, victim: int, asynchronous: bool) -> tuple[int, str]:
    """Save steps 1 to 4, of which one rank cannot write the third; the step at which it is raised, and what."""
    checkpoints = Checkpoints(CheckpointConfig(asynchronous=asynchronous), DIGEST)
    step = 0
    try:
        with checkpoints:
            for step in range(1, 5):
                if step == 3:
                    checkpoints.join()
                if step == 3 and rank == victim:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
                checkpoints.save(where, step, state(float(step)), {"nonfinite": step})
    except TrainingError as error:
        dist.barrier()
        return step, str(error)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_rank_that_cannot_write_is_raised_on_all_and_the_one_before_stands(
    tmp_path: Path, victim: int, asynchronous: bool
) -> None:
    for step, told in run_ranks(2, failing, str(tmp_path), victim, asynchronous):
        assert step == (4 if asynchronous else 3)
        assert f"checkpoint of step 3 could not be written on rank {victim}: OSError: [Errno 27]" in told
        assert "\n" not in told
    assert run_ranks(2, restored, str(tmp_path))[0][:3] == (2, 2.0, [])
    assert not (tmp_path / "step-00000003").exists(), "the orphan is reaped"


def overlapping(rank: int, world_size: int, where: str) -> tuple[list[str], bool]:
    """Change the state while it is written; what was told, and whether the write outlived `save`."""
    small_files()
    Gate.where = Path(where)
    pytest.MonkeyPatch().setattr(module, "Writer", Gate)
    checkpoints, mine = Checkpoints(CheckpointConfig(keep=3), DIGEST), state(1.0)
    checkpoints.save(where, 1, mine, {"nonfinite": 1})
    for tensor in _flat(mine):
        tensor.fill_(99.0)
    dist.all_reduce(torch.ones(1))  # the step's collectives go on beside the writer's
    outlived = Place(where).record(1) is None
    if rank == world_size - 1:
        (Path(where) / "open").touch()
    with listening() as told:
        for step in (2, 3):
            checkpoints.save(where, step, state(float(step)), {"nonfinite": step})
        checkpoints.join()
    return told.getvalue().splitlines(), outlived


class Gate(checkpoint_files.Writer):
    """Does not write before a file is there, nor quickly."""

    where: Path

    def write_data(self, *arguments: Any) -> Any:
        while not (self.where / "open").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        return super().write_data(*arguments)


def test_training_goes_on_while_its_state_of_before_is_written(tmp_path: Path) -> None:
    results = run_ranks(2, overlapping, str(tmp_path))
    assert all(outlived for _, outlived in results)
    (line,) = results[0][0]
    assert "checkpoint of step 1 is not written yet, and that of step 2 is due: training waits" in line
    assert results[1][0] == []
    assert run_ranks(2, restored, str(tmp_path))[0][:2] == (3, 3.0)
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"step-{step:08d}")
    assert run_ranks(2, restored, str(tmp_path))[0][:2] == (1, 1.0), "the state of then, not of later"


# What a stranger may have put there


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def goes_on(_rank: int, _world_size: int, where: str) -> list[str]:
    """A group that saves step 3, is believed lost while another one goes on, and then would save step 6."""
    mine = Checkpoints(CheckpointConfig(keep=1), DIGEST)
    mine.restore(where, state(0.0))
    mine.save(where, 3, state(3.0), {"nonfinite": 3})
    mine.join()
    other = Checkpoints(CheckpointConfig(keep=1), DIGEST)
    found = other.restore(where, state(0.0))
    assert found is not None
    assert found.step == 3
    other.save(where, 9, state(9.0), {"nonfinite": 9})
    other.join()
    mine.save(where, 6, state(6.0), {"nonfinite": 6})
    told = [""]
    try:
        mine.join()
    except TrainingError as error:
        told = [str(error)]
    again = other.restore(where, state(0.0))  # as after a spike: it holds the place still
    assert again is not None
    other.save(where, 12, state(12.0), {"nonfinite": 12})
    other.join()
    return [*told, str(again.step)]


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_group_that_was_believed_lost_commits_nothing_and_removes_nothing(tmp_path: Path, scheme: str) -> None:
    where = f"{scheme}{tmp_path}"
    for line, again in run_ranks(1 if scheme else 2, goes_on, where):
        assert line.startswith("checkpoint of step 6 is not kept: process ")
        assert again == "9"
    if not scheme:
        assert [path.name for path in tmp_path.glob("step-*/checkpoint.json")] == ["checkpoint.json"]
        assert run_ranks(2, restored, where)[0][:2] == (12, 12.0)


def test_pickle_placed_as_metadata_does_not_run(tmp_path: Path) -> None:
    run_ranks(1, written, str(tmp_path), [3, 6], {})
    folder, ran = data_folder(tmp_path, 6), tmp_path / "ran"
    content = pickle.dumps(Malicious(ran))
    (folder / ".metadata").write_bytes(content)
    record = Place(tmp_path).record(6)
    assert record is not None
    forged = FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    Place(tmp_path).commit(record.model_copy(update={"files": {**record.files, ".metadata": forged}}))
    step, _, told, _ = run_ranks(1, restored, str(tmp_path))[0]
    assert step == 3
    assert len(told) == 1
    assert ".metadata names posix.mkdir, which no checkpoint needs" in told[0]
    assert not ran.exists()
    pickle.loads(content)
    assert ran.exists(), "elsewhere it would have run"


@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", pickle.dumps({"a": 1}), pickle.dumps(torch.float32)])
def test_what_is_no_metadata_is_told(content: bytes) -> None:
    with pytest.raises(DamagedError, match=r"\.metadata is no metadata"):
        unpickle_metadata(content)


@pytest.mark.parametrize("name", ["..", "a/b", "/etc/passwd", "", "a\n"])
def test_paths_in_the_json_stay_in_the_folder(name: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        CheckpointRecord(step=1, config_digest=DIGEST, folder=name, files={}, world_size=1)
    with pytest.raises(ValueError, match="pattern"):
        CheckpointRecord(
            step=1, config_digest=DIGEST, folder="a", files={name: FileEntry(size=0, sha256="")}, world_size=1
        )


# Elsewhere than on a disk


def in_memory(_rank: int, _world_size: int) -> list[Any]:
    where = "memory://bucket/run"
    written(0, 1, where, [1, 2, 3], {"asynchronous": False})
    found = restored(0, 1, where)
    Place(where).clear()
    return [found[:3], Place(where).steps(), restored(0, 1, where)[:3]]


def test_any_fsspec_url_will_do() -> None:
    assert run_ranks(1, in_memory)[0] == [(3, 3.0, []), [], (None, -1.0, [])]


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[str]:
    """A folder of a real S3 server."""
    import s3fs  # type: ignore[import-untyped]

    from tests.e2e.servers import s3_server

    server = s3_server(tmp_path)
    server.start()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as environment:
        for key, value in {**keys, "AWS_ENDPOINT_URL": server.url}.items():
            environment.setenv(key, value)
        try:
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
            yield "s3://bucket/runs/v1"
        finally:
            server.kill()


def with_environment(rank: int, world_size: int, environment: dict[str, str], where: str) -> Any:
    os.environ.update(environment)
    checkpoint_state.BLOCK_ROWS = 8
    written(rank, world_size, where, [1, 2, 3], {})
    if rank == 0:
        Place(where).fs.pipe_file(f"{where}/step-00000009/{DIGEST[:16]}-00000000/__0_0.distcp", b"half")
        record = Place(where).record(3)
        assert record is not None
        Place(where).fs.pipe_file(f"{Place(where).path(3, record.folder)}/__1_0.distcp", b"cut")
    return [restored(rank, world_size, where)[:3], Place(where).steps()]


def test_an_object_store_keeps_falls_back_and_is_reaped(s3: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    results = run_ranks(2, with_environment, environment, s3)
    assert results[0][0][:2] == results[1][0][:2] == (2, 2.0)
    assert "__1_0.distcp has 3 of" in results[0][0][2][0]
    assert results[0][1] == [3, 2], "the first was not kept, and the orphan is gone"
