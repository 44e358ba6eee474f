"""What each rank tells of its own speed, and the trace that it writes."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.compat.methods.bct import Bct
from pipeline.config import load_config
from pipeline.generation import Generation
from pipeline.model.backbone_cost import count_backbone
from pipeline.model.classifier import ClassifierConfig
from pipeline.model.flops import flops_of
from pipeline.parts import PARTS
from pipeline.training.checkpoint_config import CheckpointConfig
from pipeline.training.loop import train
from pipeline.training.meter import ObserveConfig, Telemetry
from pipeline.training.profiling import ProfileConfig
from pipeline.training.trainer import Trainer, TrainingConfig
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import BACKBONE, MARGIN, TABLE, Notes, batches, make_parent, record

CONFIG = TrainingConfig(
    steps=7,
    global_batch=9,
    checkpoints=CheckpointConfig(every=4, asynchronous=False),
    log_every=3,
    observe=ObserveConfig(peak_tflops=0.001),
    profile=ProfileConfig(start=2, steps=2, ranks=(1,)),
)
Told = list[tuple[int, dict[str, float]]]


def measured(rank: int, world_size: int, folder: str) -> tuple[Told, Told]:
    """Train v2 towards v1; what this rank was told of itself, and what its observer was told."""
    home, own, notes = Path(folder), Notes([]), Notes([])
    parents = [Generation(home / "parent")]
    arguments = (BACKBONE, MARGIN, Bct(weight=0.5), CONFIG, ClassifierConfig(), "digest", 3, torch.device("cpu"))
    trainer = Trainer("v2", TABLE, parents, *arguments)
    telemetry = Telemetry(own.report, home / "traces")
    places = home / "checkpoints", home / "v2"
    parts, described = partial(batches, global_batch=9, rank=rank, world_size=world_size), record(CONFIG, "v2")
    train(trainer, parts, notes, *places, described, TABLE, home / "incidents", telemetry=telemetry)
    return own.seen, notes.seen


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def told(home: Path) -> list[tuple[Told, Told]]:
    run_ranks(1, make_parent, str(home))
    return run_ranks(2, measured, str(home))


def test_each_rank_tells_of_itself_and_rank_0_of_the_run(told: list[tuple[Told, Told]]) -> None:
    assert [[step for step, _ in own] for own, _ in told] == [[3, 6, 7], [3, 6, 7]]
    assert [[step for step, _ in run] for _, run in told] == [[3, 6, 7], []]
    names = {"time/step", *(f"time/{part}" for part in PARTS), "flops_per_s", "mfu", "checkpoint/age_s"}
    for own, run in told:
        assert all(figures.keys() == names | {"data/quarantined", "data/queue"} for _, figures in own)
        assert not any(names & figures.keys() for _, figures in run), "what is repeated is repeated exactly"


def test_every_part_of_a_step_is_timed_and_they_add_up(told: list[tuple[Told, Told]]) -> None:
    for own, _ in told:
        for step, figures in own:
            assert sum(figures[f"time/{part}"] for part in PARTS) == pytest.approx(figures["time/step"])
            idle = {part for part in PARTS if not figures[f"time/{part}"]}
            assert idle == (set() if step == 6 else {"save"}), step  # saved after 4 steps, and 7, which is told before
        assert own[2][1]["checkpoint/age_s"] < own[0][1]["checkpoint/age_s"] + sum(
            steps * figures["time/step"] for steps, (_, figures) in zip((0, 3, 1), own, strict=True)
        )


def test_arithmetic_is_the_planners_and_mfu_its_share_of_the_peak(told: list[tuple[Told, Told]]) -> None:
    forward = count_backbone(BACKBONE).forward_flops
    of_all_ranks = sum(flops_of(forward, 9, 9, (11, 6), [(4, 6)]).values())
    for reports in zip(*(own for own, _ in told), strict=True):
        done = sum(figures["flops_per_s"] * figures["time/step"] for _, figures in reports)
        assert done == pytest.approx(of_all_ranks)
        assert all(figures["mfu"] == pytest.approx(figures["flops_per_s"] / 1e9) for _, figures in reports)


def test_the_trace_of_the_chosen_steps_names_the_parts(told: list[tuple[Told, Told]], home: Path) -> None:
    assert told
    assert [path.name for path in (home / "traces").iterdir()] == ["trace-00001-000002.json.gz"]
    with gzip.open(home / "traces" / "trace-00001-000002.json.gz") as stream:
        trace: dict[str, Any] = json.load(stream)
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert all({"ts", "dur", "pid", "tid", "name"} <= span.keys() for span in spans)
    named = [span["name"] for span in spans if span.get("cat") == "user_annotation"]
    assert set(PARTS) <= set(named) | {"save"}
    assert named.count("load") == 2, "two steps"
    assert any("aten::" in span["name"] for span in spans)
    exchanges = [span for span in spans if span["name"] == "exchange"]
    inside = [span for span in spans if span["name"] == "classifier" and holds(span, exchanges[0])]
    assert inside, "an exchange lies within the classifier's pass"


def holds(outer: dict[str, Any], inner: dict[str, Any]) -> bool:
    start: float = outer["ts"]
    return bool(start <= inner["ts"] and inner["ts"] + inner["dur"] <= start + outer["dur"])


def test_what_is_observed_shapes_no_training() -> None:
    tiny = Path(__file__).parents[2] / "configs" / "tiny.yaml"
    plain, seen = (
        load_config(tiny, overrides).shaping("v1")
        for overrides in (
            [],
            ["generations.v1.training.profile={start: 3}", "generations.v1.training.observe.peak_tflops=1.0"],
        )
    )
    assert plain == seen
