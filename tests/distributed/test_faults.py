"""Ranks that die at every place of a step: nothing is lost, and the weights are those of a run that never died."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.training.checkpoint_config import CheckpointConfig
from pipeline.training.optimiser import OptimiserConfig
from pipeline.training.trainer import TrainingConfig
from tests.distributed.ranks import exit_codes, run_ranks
from tests.distributed.small_run import run
from tests.distributed.test_training import tensors
from tests.faults import EXIT_CODE, ROOT, Fault, environment, happened

pytestmark = pytest.mark.faults

CONFIG = TrainingConfig(
    steps=7,
    global_batch=9,
    checkpoints=CheckpointConfig(every=2, asynchronous=False),
    log_every=1,
    optimiser=OptimiserConfig(learning_rate=0.01),
)
DEATHS = [  # in the order in which a run comes to them
    Fault("kill", "before load", rank=0, step=0),
    Fault("exception", "after forward", rank=1, step=1),
    Fault("exit", "before save", rank=0, step=1),
    Fault("kill", "before commit", rank=0, step=1),
    Fault("kill", "after commit", rank=0, step=1),
    Fault("exit", "after losses", rank=1, step=2),
    Fault("kill", "after backward", rank=0, step=3),
    Fault("terminate", "after update", rank=1, step=3),
    Fault("write_error", rank=1, step=3),
    Fault("exception", "after save", rank=0, step=5),
    Fault("exit", "before export", rank=1, step=7),
    Fault("kill", "after report", rank=0, step=6),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(2, run, str(folder), CONFIG)
    return tensors(folder / "v1")


@pytest.mark.timeout(900)  # a dozen starts of two processes
def test_run_that_dies_at_every_place_ends_with_the_weights_of_one_that_never_did(
    tmp_path: Path, whole: dict[str, torch.Tensor]
) -> None:
    starts = 1
    while exit_codes(2, run, str(tmp_path), CONFIG, DEATHS) != [0, 0]:
        starts += 1
        assert starts <= len(DEATHS) + 1, "a run died of something else"
    assert len(happened(tmp_path / "faults")) == len(DEATHS)
    got = tensors(tmp_path / "v1")
    assert got.keys() == whole.keys()
    assert all(torch.equal(value, got[name]) for name, value in whole.items())
    left = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.suffix}
    assert left == {"holder-digest.json"}, "no half a checkpoint"


def test_a_clock_that_goes_back_changes_nothing(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    faults = [Fault("clock", "before forward", rank=0, step=2), Fault("clock", "before save", rank=1, step=3)]
    seen = run_ranks(2, run, str(tmp_path), CONFIG, faults)[0]
    assert len(happened(tmp_path / "faults")) == 2
    assert all(figures["samples_per_s"] > 0 for _, figures in seen)
    assert all(torch.equal(value, whole[name]) for name, value in tensors(tmp_path / "v1").items())


def failing(rank: int, world_size: int, folder: str) -> None:
    """Say whether this rank's run raised."""
    try:
        run(rank, world_size, folder, CONFIG, [Fault("write_error", rank=1, step=3)])
    except BaseException as error:  # noqa: BLE001  torch's is no Exception
        (Path(folder) / f"raised-{rank}").write_text(str(error))


def test_write_that_fails_on_one_rank_is_raised_on_all_and_the_previous_checkpoint_loads(
    tmp_path: Path, whole: dict[str, torch.Tensor]
) -> None:
    assert exit_codes(2, failing, str(tmp_path)) == [0, 0]
    for rank in range(2):
        assert "No space left on device" in (tmp_path / f"raised-{rank}").read_text()
    seen = run_ranks(2, run, str(tmp_path), CONFIG)[0]
    assert [step for step, _ in seen] == [3, 4, 5, 6, 7], "goes on from the checkpoint of step 2"
    assert all(torch.equal(value, whole[name]) for name, value in tensors(tmp_path / "v1").items())


ALONE = """
import sys
import torch.distributed as dist
from pipeline.training.checkpoint_config import CheckpointConfig
from pipeline.training.trainer import TrainingConfig
from tests.distributed.small_run import run
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
config = TrainingConfig(steps=3, global_batch=4, checkpoints=CheckpointConfig(every=1, asynchronous=False), log_every=1)
print([step for step, _ in run(0, 1, sys.argv[1], config)])
"""


def test_a_process_that_is_started_has_the_faults_of_its_environment_once(tmp_path: Path) -> None:
    """As Ray's workers and jobs do; no product code asks for them."""
    faults = environment([Fault("exit", "after commit", rank=0, step=1)], tmp_path / "faults")
    command, outcomes = [sys.executable, "-c", ALONE, str(tmp_path)], []
    for _ in range(2):
        environ = {**os.environ, **faults, "LOCAL_RANK": "0"}
        done = subprocess.run(command, check=False, cwd=ROOT, env=environ, capture_output=True, text=True)
        outcomes.append((done.returncode, done.stdout.strip()))
    assert outcomes == [(EXIT_CODE, ""), (0, "[3]")]
