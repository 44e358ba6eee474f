"""What a run does when values are no numbers, losses leap, ranks hang, and disks or memory are full. Real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.model.classifier import ClassifierConfig
from pipeline.training.checkpoint_config import CheckpointConfig
from pipeline.training.engine import EngineConfig
from pipeline.training.guards import GuardConfig
from pipeline.training.optimiser import OptimiserConfig
from pipeline.training.trainer import Trainer, TrainingConfig
from pipeline.training.watchdog import STUCK
from tests.distributed.ranks import TIMEOUT_S, exit_codes, mortal_ranks, run_ranks
from tests.distributed.small_run import make_trainer, part, run
from tests.distributed.test_training import tensors
from tests.e2e.cluster import free_ports
from tests.faults import Fault, happened, install

CONFIG = TrainingConfig(
    steps=7,
    global_batch=9,
    checkpoints=CheckpointConfig(every=3, asynchronous=False),
    log_every=1,
    optimiser=OptimiserConfig(learning_rate=0.01),
)
NAN_IN_IMAGES = Fault("nan", "before forward", rank=1)
NAN_IN_GRADIENT = Fault("nan", "in losses", rank=1)
OVERFLOW = Fault("overflow", rank=0)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that an update may move, as this rank holds it."""
    state = {name: value.clone() for name, value in trainer.engine.state().items()}  # averages batch norm's statistics
    state |= {f"slot.{name}": slot.clone() for name, slot in trainer.row_optimiser.slots.items()}
    state |= {f"here.{n}": buffer.clone() for n, buffer in enumerate(trainer.engine._engine.module.buffers())}
    return state | {"rows": trainer.classifier.weight_CD.clone()}


def spoilt_step(rank: int, world_size: int, folder: str, settings: list[tuple[Any, ...]]) -> list[list[str]]:
    """What moved in a spoilt step or was left of it in the next, for each setting and fault."""
    out = []
    for number, (stage, precision, accumulation, fused, fault) in enumerate(settings):
        engine = EngineConfig(zero_stage=stage, precision=precision)
        config = CONFIG.model_copy(update={"engine": engine, "accumulation": accumulation})
        trainer, twin = (make_trainer(config, ClassifierConfig(fused_update=fused)) for _ in range(2))
        batches = [part(step, config, rank, world_size) for step in range(2)]
        for each in (trainer, twin):
            each.step(batches[0].images_BCHW, batches[0].labels_B, 0)
        before = everything(trainer)
        install([fault], Path(folder) / str(number))
        _, norms = trainer.step(batches[1].images_BCHW, batches[1].labels_B, 1)
        assert not norms
        after = everything(trainer)
        moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
        twin_before = everything(twin)  # as above: it averages
        assert twin_before.keys() == before.keys()
        for each in (trainer, twin):
            assert each.step(batches[1].images_BCHW, batches[1].labels_B, 1)[1]
        left, wanted = everything(trainer), everything(twin)
        moved += [f"left in {name}" for name, value in wanted.items() if not torch.equal(value, left[name])]
        out.append(moved)
        assert trainer.fused == (fused is None)
    return out


def test_value_that_is_no_number_on_one_rank_moves_nothing_on_any(tmp_path: Path) -> None:
    """In the images, in the features' gradient, and where only the backbone's own gradient overflows."""
    settings = [
        (0, "fp32", 1, None, OVERFLOW),
        (1, "fp32", 1, None, OVERFLOW),
        (1, "fp32", 1, None, NAN_IN_IMAGES),
        (1, "fp32", 1, None, NAN_IN_GRADIENT),
        (1, "fp32", 1, False, OVERFLOW),
        (2, "bf16", 1, None, OVERFLOW),
        (3, "fp32", 1, None, OVERFLOW),
        (3, "bf16", 1, None, NAN_IN_GRADIENT),
        (0, "fp32", 2, False, NAN_IN_GRADIENT),
        (2, "fp32", 2, False, OVERFLOW),
    ]
    for results in run_ranks(2, spoilt_step, str(tmp_path), settings):
        for setting, moved in zip(settings, results, strict=True):
            assert not moved, setting
    assert all(happened(tmp_path / str(number)) == ["fault-0"] for number in range(len(settings)))


def entries(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_keys_of_a_batch_on_which_nobody_moved_are_written_down(tmp_path: Path) -> None:
    faults = [Fault("nan", "in losses", rank=1, step=4), Fault("overflow", rank=0, step=5)]
    seen = run_ranks(2, run, str(tmp_path), CONFIG, faults)[0]
    assert [figures.get("guards/unusable") for _, figures in seen] == [None, None, None, None, 1.0, 2.0, 2.0]
    for rank, samples in ((0, 4), (1, 5)):
        keys = [[f"{step}/{place}" for place in range(samples)] for step in (4, 5)]
        assert entries(tmp_path / "incidents", f"nonfinite-{rank:05d}.jsonl") == [
            {"step": 4, "rank": rank, "here": rank == 1, "keys": keys[0]},
            {"step": 5, "rank": rank, "here": False, "keys": keys[1]},
        ]
    assert all(value.isfinite().all() for value in tensors(tmp_path / "v1").values())


def test_a_spike_is_told_once_and_undone_by_going_back(tmp_path: Path) -> None:
    guards = GuardConfig(spike_factor=20, rewind=True, rewind_limit=1)
    config = CONFIG.model_copy(
        update={
            "steps": 26,
            "global_batch": 48,
            "checkpoints": CheckpointConfig(every=10, asynchronous=False),
            "guards": guards,
        }
    )
    seen = run_ranks(2, run, str(tmp_path / "spiked"), config, [], 22)[0]
    (spike,) = entries(tmp_path / "spiked" / "incidents", "spikes-00000.jsonl")
    assert (spike["step"], spike["back_to"]) == (22, 20)
    assert [step for step, _ in seen] == [*range(1, 23), *range(21, 27)]
    run_ranks(2, run, str(tmp_path / "without"), config, [], None, (20, 21, 22))
    killed = [Fault("kill", "before load", rank=0, step=24), Fault("kill", "after update", rank=1, step=25)]
    for _ in killed:
        exit_codes(2, run, str(tmp_path / "killed"), config, killed, 22)
    assert len(happened(tmp_path / "killed" / "faults")) == 2
    run_ranks(2, run, str(tmp_path / "killed"), config, [], 22)
    wanted = tensors(tmp_path / "without" / "v1")
    for name in ("spiked", "killed"):
        got = tensors(tmp_path / name / "v1")
        assert all(torch.equal(value, got[key]) for key, value in wanted.items()), name


@pytest.mark.parametrize(("place", "step"), [("before losses", 3), ("before load", 3), ("before save", 2)])
def test_a_rank_that_hangs_is_named_by_all_and_ends_them(tmp_path: Path, place: str, step: int) -> None:
    config = CONFIG.model_copy(update={"guards": GuardConfig(collective_timeout_s=3.0)})
    codes = exit_codes(2, run, str(tmp_path), config, [Fault("hang", place, rank=1, step=step)])
    assert codes == [STUCK, STUCK]
    for rank in range(2):
        line, _, stacks = (tmp_path / "incidents" / f"stuck-{rank:05d}.txt").read_text().partition("\n")
        assert line.startswith(f"rank 1 has not finished step {step}'s {place.split()[1]} for ")
        assert line.endswith(f"; rank {rank} gives up")
        assert "most recent call first" in stacks


def stopped(rank: int, world_size: int, folder: str, config: TrainingConfig, port: int) -> None:
    """As `run`, with a store that rank 0 holds, which is stopped in its step 3."""
    dist.barrier()  # not while the other is still connecting
    dist.destroy_process_group()
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    run(rank, world_size, folder, config, [Fault("stop", "before load", rank=0, step=3)])


def test_a_rank_ends_though_the_one_with_the_store_does_not_answer(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"guards": GuardConfig(collective_timeout_s=3.0)})
    (port,) = free_ports(1)
    with mortal_ranks(2, stopped, str(tmp_path), config, port) as processes:
        processes[1].join(TIMEOUT_S)
        assert processes[1].exitcode == STUCK
    line = (tmp_path / "incidents" / "stuck-00001.txt").read_text().partition("\n")[0]
    assert line.startswith("rank 1 waited ")
    assert line.endswith(", and rank 0 does not answer")


def told(rank: int, world_size: int, folder: str, config: TrainingConfig, fault: Fault) -> None:
    """Write down the one line with which a run ends."""
    line = "came to its end"
    try:
        run(rank, world_size, folder, config, [fault])
    except TrainingError as error:
        line = str(error)
    except RuntimeError:
        line = "the other is gone"
    (Path(folder) / f"told-{rank}").write_text(line)


def lines_of(folder: Path, fault: Fault) -> list[str]:
    assert exit_codes(2, told, str(folder), CONFIG, fault) == [0, 0]
    return [(folder / f"told-{rank}").read_text() for rank in range(2)]


def test_a_disk_that_is_almost_full_ends_all_ranks_before_the_save(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, Fault("no_room", rank=1, step=5))
    assert len(set(lines)) == 1
    assert "the checkpoint of step 6 needs 0.000 GiB" in lines[0]
    assert lines[0].endswith("it goes on from step 3")
    assert [step for step, _ in run_ranks(2, run, str(tmp_path), CONFIG)[0]] == [4, 5, 6, 7]


def test_memory_that_runs_out_names_the_setting_that_needs_less(tmp_path: Path) -> None:
    line, other = lines_of(tmp_path, Fault("no_memory", rank=0, step=2))
    assert line.startswith("rank 0 is out of memory in the update of step 2; set training.accumulation=2, or find")
    assert "python jobs/plan.py --identities 11 --dim 6 --batch 9 --gpus 2 --gpu-memory " in line
    assert other == "the other is gone"
