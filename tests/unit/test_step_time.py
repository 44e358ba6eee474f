"""The planner's step time: against published speeds, against hand counts, and by what must not happen."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jobs.plan import main
from pipeline.errors import ConfigError
from pipeline.model.backbone_cost import BackboneCost, count_backbone
from pipeline.model.backbones import BackboneConfig
from pipeline.planning.calibration import Rates, assumed_rates
from pipeline.planning.config import PlanConfig, Setting
from pipeline.planning.links import Links
from pipeline.planning.measured import CLASSIFIER, measured_links, measured_parts, predicted_parts
from pipeline.planning.profiles import PROFILES
from pipeline.planning.published import FITTED, FURTHER, SPEEDS, fit, predicted_speed, published_config
from pipeline.planning.scale import efficiency, scale_plan, waiting_seconds
from pipeline.planning.speed import WAITING, seconds_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "planning.md"
TINY = BackboneConfig(name="small", embedding_dim=128)
COST = BackboneCost(parameters=70_001, activations=0, forward_flops=3_000_003)
RATES = Rates("by hand", 1e13, 0.25, 1e11, 0.125, 5000.0)
LINKS = Links(per_node=8, bandwidth=1e11, latency=3e-6, network_bandwidth=2e10, network_latency=7e-6)
SCALE = "--identities 100000 --dim 128 --batch 256 --backbone small --image-size 32 --gpus 4 --gpu-memory 8 --scale"


@pytest.fixture(scope="module")
def resnet() -> BackboneCost:
    return count_backbone(published_config(1).backbone)


def make(**changed: Any) -> PlanConfig:
    usual: dict[str, Any] = {"identities": 1_000_003, "batch": 1021, "backbone": TINY, "gpus": 6, "gpu_memory": 80.0}
    return PlanConfig(**usual | changed)


def step(setting: Setting | None = None, **changed: Any) -> float:
    config = make(**changed)
    return sum(seconds_of(config, setting or Setting(config.gpus, config.gpus, 1.0), COST, RATES).values())


# Published speeds


@pytest.mark.parametrize("point", [*SPEEDS, *FURTHER], ids=str)
def test_published_speeds_are_met_within_a_fifth(point: tuple[float, int], resnet: BackboneCost) -> None:
    rates = assumed_rates(published_config(1))
    assert predicted_speed(point, resnet, rates) == pytest.approx((SPEEDS | FURTHER)[point], rel=0.2)


def test_the_profile_is_what_the_fit_to_three_of_them_gives(resnet: BackboneCost) -> None:
    fitted, profile = fit(FITTED, resnet), PROFILES["v100-32g"]
    assert profile.backbone_fraction == pytest.approx(fitted.backbone_fraction, rel=1e-3)
    assert profile.eager_fraction == pytest.approx(fitted.fraction_of_matmul, rel=1e-3)
    assert profile.eager_row_bytes == pytest.approx(fitted.eager_row_bytes, rel=1e-3)
    for point in FITTED:
        assert predicted_speed(point, resnet, fitted) == pytest.approx(SPEEDS[point], rel=1e-3)


@pytest.mark.parametrize("left_out", SPEEDS, ids=str)
def test_each_published_speed_is_predicted_from_the_others(left_out: tuple[float, int], resnet: BackboneCost) -> None:
    rates = fit([point for point in SPEEDS if point != left_out], resnet)
    assert predicted_speed(left_out, resnet, rates) == pytest.approx(SPEEDS[left_out], rel=0.06)


def test_the_fit_finds_speeds_that_it_is_told(resnet: BackboneCost, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = Rates("made up", 125e12, 0.03, 0.9e12, 0.25, 9000.0)
    for point in SPEEDS:
        monkeypatch.setitem(SPEEDS, point, predicted_speed(point, resnet, truth))
    found = fit(FITTED, resnet)
    assert (found.fraction_of_matmul, found.backbone_fraction, found.eager_row_bytes) == pytest.approx(
        (0.03, 0.25, 9000.0)
    )


def test_the_page_has_the_predictions(resnet: BackboneCost) -> None:
    rates, published = assumed_rates(published_config(1)), SPEEDS | FURTHER
    rows = [
        line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if re.match(r"\| \d+,[\d,]+ \| ", line)
    ]
    assert {(float(row[1]), int(row[0].replace(",", ""))) for row in rows} == published.keys()
    for count, rate, speed, kind, *told in rows:
        point = float(rate), int(count.replace(",", ""))
        by_all, by_others = (
            predicted_speed(point, resnet, one) for one in (rates, fit([p for p in SPEEDS if p != point], resnet))
        )
        assert int(speed) == published[point]
        assert kind == ("fitted" if point in FITTED else "predicted")
        errors = (f"{one / published[point] - 1:+.1%}" for one in (by_all, by_others))
        assert told == [f"{by_all:,.0f}", *errors], point


def test_the_page_tells_speeds_of_several_machines_as_the_model_does(resnet: BackboneCost) -> None:
    def speed(gpus: int, batch: int, network: float) -> float:
        update = {"gpus": gpus, "batch": batch, "network_bandwidth": network}
        config = published_config(2_059_906).model_copy(update=update)
        return batch / sum(seconds_of(config, Setting(gpus, gpus, 0.2), resnet, assumed_rates(config)).values())

    slow, medium, fast = (f"{speed(32, 4096, network):,.0f}" for network in (3.125, 12.5, 25.0))
    text = " ".join(PAGE.read_text().split())
    assert f"says {slow} at 3.125 GB/s a node, {medium} at 12.5, {fast} at 25." in text
    assert f"it says {speed(8, 4096, 25.0):,.0f}: 28 % too few" in text


def test_the_pages_command_gives_its_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = PAGE.read_text()
    (command,) = re.findall(r"^    python jobs/plan.py (.*--plot .*)$", page, re.MULTILINE)
    picture = tmp_path / "scaling.png"
    assert main(command.replace("docs/images/scaling.png", str(picture)).split()) == 0
    assert picture.stat().st_size > 10_000
    told = [line.strip() for line in capsys.readouterr().out.splitlines() if re.match(r" +[\d,]+ +[\d,]+ ", line)]
    assert len(told) == 8
    assert all(f"    {line}\n" in re.sub(r"^ +", "    ", page, flags=re.MULTILINE) for line in told)


# Formulas by hand


def test_collectives_of_a_node_are_rings() -> None:
    assert LINKS.gather(5, 1e9) == pytest.approx(4 * 3e-6 + 0.8 * 1e9 / 1e11)
    assert LINKS.all_reduce(5, 1e9) == pytest.approx(2 * (4 * 3e-6 + 0.8 * 1e9 / 1e11))
    assert LINKS.all_reduce(5, 4) == pytest.approx(3 * (3e-6 + 4 / 1e11))  # by doubling: three rounds
    assert LINKS.gather(1, 1e9) == LINKS.all_reduce(1, 1e9) == 0


def test_collectives_of_nodes_meet_over_the_network_first() -> None:
    within, across = 7 * 3e-6 + 7 / 8 * 1e9 / 1e11, 2 * 7e-6 + 2 / 3 * 1e9 / 2e10
    assert LINKS.gather(24, 1e9) == pytest.approx(within + across)
    assert LINKS.all_reduce(24, 1e9) == pytest.approx(2 * (within + across))
    doubling = 3 * (3e-6 + 4 / 1e11) + 2 * (7e-6 + 4 / 2e10)
    assert LINKS.all_reduce(24, 4) == pytest.approx(doubling)


def test_groups_that_meet_at_the_same_time_share_a_nodes_network() -> None:
    # Every 8th rank: one in each node, and 8 such groups at once. Every 2nd: 4 in each of 3 nodes, 2 groups at once.
    assert LINKS.gather(3, 1e9, stride=8) == pytest.approx(2 * (7e-6 + 8 * 1e9 / 3 / 2e10))
    within = 3 * (3e-6 + 1e9 / 4 / 1e11)
    assert LINKS.gather(12, 1e9, stride=2) == pytest.approx(within + 2 * (7e-6 + 2 * 1e9 / 3 / 2e10))
    assert LINKS.gather(3, 1e9, stride=100) == LINKS.gather(3, 1e9, stride=8)


def test_a_step_is_the_sum_of_its_items_by_hand() -> None:
    config = make(
        parents=(500_001,),
        parent_dim=(64,),
        optimiser="sgd",
        zero_stage=2,
        overlap=0.25,
        gpus_per_node=3,
        bandwidth=100.0,
        latency=3.0,
        network_bandwidth=20.0,
        network_latency=7.0,
        loader_images_per_s=2000.0,
        checkpoint_every=100,
        checkpoint_bandwidth=4.0,
    )
    items = seconds_of(config, Setting(6, 3, 0.3), COST, RATES)
    samples, group_batch, rows, old_rows = 171, 511, 333_335, 166_667  # ceilings of 1021 / 6, / 2, and of rows / 3
    sampled = math.ceil(0.3 * rows)
    backbone = 3 * 3_000_003 * samples / (1e13 * 0.125)
    classifier = 8 * group_batch * sampled * 128 / 2.5e12
    weights = 2 * (3e-6 + 4 * 70_001 / 3 / 1e11) + 7e-6 + 4 * 70_001 / 2 / 2e10
    expected = {
        "backbone": backbone,
        "sampling": (29 * 16 * rows + 2 * 4 * 128 * 5 * sampled) / 1e11,
        "classifier": classifier,
        "parents": 4 * group_batch * old_rows * 64 / 2.5e12,
        "row update": 2 * 4 * 3 * 128 * sampled / 1e11,
        "gather of features": 2 * (3e-6 + group_batch * (4 * 128 + 8) / 3 / 1e11),
        "softmax statistics": 2 * (3e-6 + 3 * 2 * group_batch * 12 / 3 / 1e11),
        "feature gradients": max(0.0, 2 * (3e-6 + group_batch * 512 / 3 / 1e11) - classifier / 2),
        "row gradients of replicas": 7e-6 + 3 * 4 * 128 * sampled / 2e10,  # of two: by doubling
        "backbone gradients": max(0.0, 2 * weights - 0.25 * 2 / 3 * backbone) + weights,
        "agreement": 2 * (2 * (3e-6 + 4 / 1e11) + 7e-6 + 4 / 2e10),
    }
    assert items["feature gradients"] == 0, "beneath the second pass"
    for name, seconds in expected.items():
        assert items[name] == pytest.approx(seconds, rel=1e-12), name
    assert items["loader"] == pytest.approx(samples / 2000 - sum(expected.values()))
    assert items["checkpoint"] == pytest.approx(4 * 2 * (128 * rows + 70_001) / 4e9 / 100)
    assert items.keys() == expected.keys() | {"loader", "checkpoint"}


@pytest.mark.parametrize(("stage", "parts"), [(0, 2), (1, 3), (2, 3), (3, 3)])
def test_the_backbone_travels_as_often_as_deepspeed_sends_it(stage: int, parts: int) -> None:
    config = make(zero_stage=stage, overlap=0.0)
    items = seconds_of(config, Setting(6, 6, 1.0), COST, RATES)
    assert items["backbone gradients"] == pytest.approx(parts * config.links.gather(6, 4 * 70_001))


# What must not happen


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("bandwidth", (0.1, 3.0, 400.0)),
        ("network_bandwidth", (0.1, 3.0, 400.0)),
        ("overlap", (0.0, 0.3, 1.0)),
        ("loader_images_per_s", (10.0, 1000.0, 1e6)),
        ("checkpoint_every", (1, 30, 1000)),
        ("checkpoint_bandwidth", (1.0, 10.0, 100.0)),
        ("latency", (50.0, 5.0, 0.0)),
        ("network_latency", (50.0, 5.0, 0.0)),
    ],
)
@pytest.mark.parametrize("implementation", ["ours", "eager"])
def test_what_is_faster_never_makes_a_step_slower(field: str, values: tuple[float, ...], implementation: str) -> None:
    strictly = False
    for stage in range(4):
        for ranks, group in ((12, 12), (12, 4), (12, 1), (5, 5)):
            common: dict[str, Any] = {
                "gpus": ranks,
                "gpus_per_node": 4,
                "checkpoint_every": 50,
                "implementation": implementation,
                "zero_stage": stage,
            }
            setting = Setting(ranks, ranks if implementation == "eager" else group, 0.5)
            steps = [step(setting, **common | {field: value}) for value in values]
            assert all(slower >= faster for slower, faster in pairwise(steps)), (stage, ranks, group)
            strictly |= steps[0] > steps[-1]
    assert strictly, f"{field} has no effect"


def test_a_loader_stalls_only_when_it_is_slower_than_the_step() -> None:
    fast = step()
    assert step(loader_images_per_s=171 / fast * 1.01) == fast
    assert step(loader_images_per_s=171 / fast * 0.5) == pytest.approx(2 * fast)


def test_one_gpu_waits_for_nobody() -> None:
    (one,) = scale_plan(make(batch=60), RATES, [1]).points
    assert waiting_seconds(one) == 0
    assert efficiency(one) == 1
    assert set(WAITING) <= one.seconds.keys()


def test_overlap_is_that_of_deepspeed_as_it_is_started() -> None:
    assert [make(zero_stage=stage).hidden_share for stage in range(4)] == [0, 0, 0, 0.5]
    assert make(overlap=0.2).hidden_share == 0.2


# On more and more GPUs


def test_a_scale_keeps_the_samples_of_a_gpu_and_takes_the_fastest_group() -> None:
    config = make(batch=600, network_bandwidth=5.0)
    plan = scale_plan(config, RATES, [64, 8, 8, 24])
    assert [one.setting.ranks for one in plan.points] == [8, 24, 64]
    assert [one.batch for one in plan.points] == [800, 2400, 6400]
    assert all(0 < efficiency(one) < 1 for one in plan.points)
    slow = scale_plan(config.model_copy(update={"class_group": 8}), RATES, [64]).points[0]
    assert slow.setting.class_group == 8
    assert plan.points[-1].step_seconds <= slow.step_seconds


def test_the_job_prints_writes_and_draws_a_scale(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture, target = tmp_path / "new" / "scale.png", tmp_path / "scale.json"
    assert main(f"{SCALE} 4 16 --sample-rate 0.5 --plot {picture} --json {target}".split()) == 0
    out = capsys.readouterr().out
    assert "64 samples a GPU, 100,000 identities, sample rate 0.5" in out
    assert "efficiency" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    points = json.loads(target.read_text())["scale"]
    assert [(one["ranks"], one["batch"]) for one in points] == [(4, 256), (16, 1024)]
    for one in points:
        assert one["images_per_s"] == pytest.approx(one["batch"] / sum(one["seconds"].values()))
        waiting = sum(one["seconds"][name] for name in WAITING)
        assert one["efficiency"] == pytest.approx(1 - waiting / one["step_seconds"])
        assert one["bound_by"].split()[0] in " ".join(one["seconds"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("0", "--scale 0 is not a number of GPUs from 1 to 65536"),
        ("4 6 --class-group 4", "--class-group 4 does not divide --scale 6"),
        ("1 2 --identities 90000000", "nothing fits: the smallest setting (--gpus 2"),
        ("4 --overlap 1.5", "--overlap: Input should be less than or equal to 1"),
        ("4 --scaling nowhere.json", "--scaling nowhere.json: No such file"),
    ],
)
def test_a_mistake_is_told_in_one_line(capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    code, (out, err) = main(f"{SCALE} {options}".split()), capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_picture_needs_a_scale(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"{SCALE.removesuffix(' --scale')} --plot a.png".split()) == 2
    assert capsys.readouterr().err == "error: --plot draws what --scale plans: give both\n"


# Beside the scaling benchmark

DOCUMENT: dict[str, Any] = {
    "batch": 8,
    "rows": 1000,
    "dim": 16,
    "backbone": "small",
    "size": 32,
    "zero_stage": 1,
    "parameters": 250_000,
    "machine": {"cores": 2},
    "links": {"latency": 100.0, "bandwidth": 0.5},
    "alone_parts_ms": {"1": {"forward": 10.0, "losses": 4.0, "backward": 20.0, "update": 7.0}},
    "parts_ms": {"4": {"forward": 25.0, "losses": 40.0, "backward": 50.0, "update": 60.0, "softmax statistics": 2.0}},
}


def test_one_process_and_two_predict_four_by_hand() -> None:
    parts = predicted_parts(DOCUMENT, 4)
    assert parts["backbone, both ways"] == pytest.approx(2 * 30.0)  # four processes on two cores
    assert parts[CLASSIFIER] == pytest.approx(2 * (2 * 4.0 * 4 + 3.0))  # twice the scan of four times the images
    ring = 3 * (0.1 + 1e6 / 4 / 0.5e9 * 1e3)  # of a million bytes, milliseconds
    assert parts["backbone gradients"] == pytest.approx(2 * 3 * ring)
    assert parts["softmax statistics"] == pytest.approx(2 * 3 * (0.1 + 32 * 12 / 0.5e9 * 1e3))
    measured = measured_parts(DOCUMENT, 4)
    assert measured.keys() == parts.keys()
    assert (measured[CLASSIFIER], measured["softmax statistics"], measured["agreement"]) == (100.0, 2.0, 0.0)


def test_links_of_a_benchmark_are_taken_unless_they_are_given(tmp_path: Path) -> None:
    path, target = tmp_path / "scaling.json", tmp_path / "plan.json"
    path.write_text(json.dumps(DOCUMENT))
    assert main(f"{SCALE} 4 --scaling {path} --latency 7 --json {target}".split()) == 0
    config = json.loads(target.read_text())["config"]
    assert (config["latency"], config["bandwidth"]) == (7.0, 0.5)
    path.write_text(json.dumps(DOCUMENT | {"links": None}))
    with pytest.raises(ConfigError, match=r"links\.latency is missing: measure again with jobs/benchmark.py scaling"):
        measured_links(path)


def test_the_page_has_the_measured_parts_beside_the_predicted() -> None:
    document = json.loads((ROOT / "docs" / "benchmarks" / "scaling-cpu.json").read_text())
    rows = [
        line.strip("| ").split(" | ")
        for line in PAGE.read_text().splitlines()
        if re.match(r"\| [a-z ,]+ \| \d+ \| \d+ \| ", line)
    ]
    assert {row[0] for row in rows} >= {CLASSIFIER, "backbone gradients", "a step"}
    for name, *told in rows:
        expected = []
        for world in (1, 2, 4):
            predicted, measured = (
                parts | {"a step": sum(parts.values())}
                for parts in (predicted_parts(document, world), measured_parts(document, world))
            )
            ratio = f"{predicted[name] / measured[name]:.2f}" if measured[name] >= 0.5 else "—"
            expected += [f"{predicted[name]:,.0f}", f"{measured[name]:,.0f}", ratio]
        assert told == expected, name
