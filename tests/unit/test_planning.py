"""The capacity planner: against a published table, against hand counts, and by what must not happen."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.plan import main
from pipeline.errors import ConfigError
from pipeline.model import backbone_cost as backbone_module
from pipeline.model.backbone_cost import BackboneCost, count_backbone
from pipeline.model.backbones import BackboneConfig
from pipeline.planning.calibration import Rates, assumed_rates, benchmark_rates
from pipeline.planning.config import GIB, PlanConfig, Setting
from pipeline.planning.memory import memory_of
from pipeline.planning.search import CapacityPlan, Estimate, estimate, make_plan
from pipeline.planning.speed import seconds_of, traffic_of

ROOT = Path(__file__).parents[2]
FACES = BackboneConfig(name="iresnet50", embedding_dim=512, image_size=112, channels=3)
TINY = BackboneConfig(name="small", embedding_dim=128)
FREE = BackboneCost(parameters=0, activations=0, forward_flops=0)  # the classifier alone is seen beside it

# InsightFace, recognition/arcface_torch/docs/speed_benchmark.md, "GPU memory cost": 8 V100 of 32 GB, D 512; MiB of a
# GPU by sample rate and identities. The file's test has R50 in fp16 at a batch of 1024; 8M ran out of memory at rate 1.
PUBLISHED = {
    1.0: {250_000: 5826, 500_000: 7114, 1_000_000: 9966, 2_000_000: 13978, 4_000_000: 23238, 5_500_000: 32188},
    0.1: {1_000_000: 5620, 4_000_000: 8284, 8_000_000: 12310, 16_000_000: 19950, 29_000_000: 32324},
}


def make(**changed: Any) -> PlanConfig:
    usual: dict[str, Any] = {"identities": 1_000_000, "batch": 1024, "backbone": FACES, "gpus": 8, "gpu_memory": 80.0}
    return PlanConfig(**usual | changed)


def memory(
    config: PlanConfig, group: int | None = None, rate: float = 1.0, cost: BackboneCost = FREE
) -> dict[str, int]:
    return memory_of(config, Setting(config.gpus, group or config.gpus, rate), cost, assumed_rates(config))


def seconds(config: PlanConfig, rates: Rates, group: int | None = None) -> dict[str, float]:
    return seconds_of(config, Setting(config.gpus, group or config.gpus, 1.0), FREE, rates)


def public(identities: int, rate: float) -> Estimate:
    """The published test as the planner sees it."""
    config = make(identities=identities, gpu_memory=32.0, implementation="eager", optimiser="sgd", zero_stage=0)
    return estimate(config, Setting(8, 8, rate), count_backbone(FACES), assumed_rates(config))


def benchmark(tmp_path: Path, **changed: Any) -> Path:
    document = {
        "classes": 500_000,
        "dim": 512,
        "batch": 1024,
        "parents": [],
        "sample_rate": 1.0,
        "implementation": "blocked",
        "device": "cuda",
        "precision": "bf16",
        "step_ms": {"blocked": 20.0, "eager": 100.0},
        "extra_bytes": {"blocked": 123_456_789, "eager": 10**10},
        "weight_bytes": 1_024_000_000,
        "fraction_of_matmul": 0.25,
        "ceilings": {"matmul_flops": 4e14, "copy_bytes": 1e12},
        "machine": {},
    }
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({key: value for key, value in (document | changed).items() if value is not None}))
    return path


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    code = main(line.split())
    return code, *capsys.readouterr()


SMALL_JOB = "--identities 100000 --dim 128 --batch 256 --backbone small --image-size 32 --gpus 4 --gpu-memory 8"


@pytest.mark.parametrize("rate", PUBLISHED)
def test_memory_of_public_code_grows_with_the_identities_as_published(rate: float) -> None:
    identities, published = list(PUBLISHED[rate]), list(PUBLISHED[rate].values())
    estimated = [public(count, rate).memory_bytes / 2**20 for count in identities]
    slope, expected = (np.polyfit(identities, values, 1)[0] for values in (estimated, published))
    assert slope == pytest.approx(expected, rel=0.05)


def test_memory_of_public_code_is_never_told_too_small_and_at_most_a_few_gib_too_large() -> None:
    for rate, series in PUBLISHED.items():
        for identities, published in series.items():
            excess = public(identities, rate).memory_bytes / 2**20 - published
            assert 0 < excess < 3 * 1024, (rate, identities)
    assert public(29_000_000, 0.1).memory_bytes / 2**20 == pytest.approx(32324, rel=0.05)


def test_what_ran_out_of_memory_in_public_does_not_fit() -> None:
    assert not public(8_000_000, 1.0).fits
    assert public(8_000_000, 0.1).fits


def test_backbones_are_counted_as_published() -> None:
    cost = count_backbone(FACES)
    assert cost.parameters == 43_590_848  # InsightFace's iresnet50
    assert cost.forward_flops == pytest.approx(2 * 6.3e9, rel=0.01)  # "6.3" multiply-adds in arcface_torch's README


def test_activations_are_the_outputs_of_leaf_modules_without_views() -> None:
    convolutions_and_norms = 2 * 32 * 16**2 + 4 * 64 * 8**2 + 4 * 128 * 4**2
    head = 128 * 4**2 + 128 + 128  # norm, linear, norm; the flattened maps are a view
    assert count_backbone(TINY).activations == convolutions_and_norms + head


def test_a_backbone_that_cannot_be_counted_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_config: BackboneConfig) -> None:
        raise RuntimeError("no meta kernel\nand a long story")

    with pytest.raises(ConfigError, match="timm"):
        count_backbone(BackboneConfig(name="timm:no_such_network"))
    monkeypatch.setattr(backbone_module, "build_backbone", fail)
    with pytest.raises(ConfigError, match=r"cannot be counted on the meta device: no meta kernel$"):
        count_backbone(TINY)


def test_row_memory_is_that_of_its_tensors() -> None:
    items = memory(make(identities=8_000_001, parents=(4_000_000,), parent_dim=(256,), optimiser="sgd"))
    rows, parent_rows = 1_000_001, 500_000
    assert items["rows"] == items["rows' optimiser"] == 4 * 512 * rows
    assert items["parents"] == 4 * 256 * parent_rows
    assert items["inverse lengths"] == 4 * (rows + parent_rows)
    assert items["row numbers of parents"] == 8 * parent_rows
    assert items["row gradient"] == items["sampled rows"] == 0
    assert memory(make(optimiser="adamw"))["rows' optimiser"] == (8 * 512 + 4) * 125_000


def test_buffers_of_tiles_do_not_grow_with_the_identities() -> None:
    names = ("tiles", "gathered features", "unit features and pull of each head", "feature gradient")
    few, many = (memory(make(identities=identities)) for identities in (10**6, 10**8))
    assert [few[name] for name in names] == [many[name] for name in names]
    assert sum(few[name] for name in names) < 0.1 * GIB


@pytest.mark.parametrize("implementation", ["ours", "eager"])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_more_identities_never_take_less_and_more_ranks_never_more(implementation: str, rate: float) -> None:
    cost = count_backbone(FACES)
    for optimiser in ("sgd", "adamw"):
        for stage in range(4):
            common = {
                "implementation": implementation,
                "optimiser": optimiser,
                "zero_stage": stage,
                "parents": (70_001,),
            }
            by_identities = [
                sum(memory(make(identities=count, **common), rate=rate, cost=cost).values())
                for count in (1, 7, 1000, 100_003, 10**6, 10**7)
            ]
            by_ranks = [
                sum(memory(make(gpus=gpus, **common), rate=rate, cost=cost).values()) for gpus in (1, 2, 4, 8, 64, 512)
            ]
            assert all(fewer <= more for fewer, more in pairwise(by_identities))
            assert all(fewer >= more for fewer, more in pairwise(by_ranks))


def test_items_are_not_negative_and_sum_to_the_whole() -> None:
    one = public(1_000_000, 0.1)
    assert sum(one.memory.values()) == one.memory_bytes
    assert sum(one.seconds.values()) == pytest.approx(one.step_seconds)
    assert min([*one.memory.values(), *one.seconds.values(), *one.traffic.values()]) >= 0


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_a_fused_update_drops_the_gradient_of_the_rows_and_nothing_else(optimiser: str, rate: float) -> None:
    fused = memory(make(optimiser=optimiser, fused_update=True), rate=rate)
    apart = memory(make(optimiser=optimiser, fused_update=False), rate=rate)
    assert {name for name in apart if apart[name] != fused[name]} == {"row gradient"}
    assert fused["row gradient"] == 0
    if rate == 1:
        assert apart["row gradient"] == apart["rows"]


def test_replicas_hold_a_gradient_even_where_the_update_could_be_fused() -> None:
    assert memory(make(), group=8)["row gradient"] == 0
    assert memory(make(), group=4)["row gradient"] == 4 * 512 * 250_000


def test_sampling_holds_a_copy_and_a_gradient_of_the_sampled_rows_instead_of_a_gradient_of_all() -> None:
    config = make(identities=80_000_000, fused_update=False)
    sampled, all_rows = memory(config, rate=0.1), memory(config)
    assert sampled["row gradient"] == sampled["sampled rows"] == pytest.approx(0.1 * all_rows["row gradient"], rel=0.01)
    assert sampled["rows"] == all_rows["rows"]
    few = make(identities=1000, fused_update=False)  # a batch may have them all
    assert memory(few, rate=0.1)["sampled rows"] == memory(few)["rows"]


def test_zero_divides_optimiser_state_then_gradients_then_weights() -> None:
    cost = BackboneCost(parameters=1000, activations=0, forward_flops=0)
    names = ("backbone weights", "backbone gradients", "backbone optimiser")
    by_stage = [[memory(make(zero_stage=stage), cost=cost)[name] for name in names] for stage in range(4)]
    assert by_stage == [[4000, 4000, 8000], [4000, 4000, 1000], [4000, 500, 1000], [500, 500, 1000]]


def test_activations_take_two_bytes_in_bf16_and_four_in_fp32() -> None:
    cost = BackboneCost(parameters=0, activations=1000, forward_flops=0)
    assert memory(make(precision="bf16"), cost=cost)["activations"] == 2 * 1000 * 128
    assert memory(make(precision="fp32"), cost=cost)["activations"] == 4 * 1000 * 128


def test_traffic_is_that_of_the_collectives() -> None:
    cost = BackboneCost(parameters=1000, activations=0, forward_flops=0)
    config = make(identities=8000, parents=(10,), zero_stage=1)
    assert traffic_of(config, Setting(8, 4, 0.5), cost) == {
        "features and labels": 0.75 * 512 * (4 * 512 + 8),
        "softmax statistics": 0.75 * 4 * 2 * 512 * 12,
        "feature gradients": 0.75 * 512 * 4 * 512,
        "row gradients of replicas": 2 * 0.5 * 4 * 512 * 1000,
        "backbone": 3 * 0.875 * 4000,
    }
    plain = traffic_of(make(zero_stage=0), Setting(8, 8, 1.0), cost)
    assert plain["backbone"] == 2 * 0.875 * 4000
    whole = traffic_of(make(zero_stage=3), Setting(8, 8, 1.0), cost)
    assert whole["backbone"] == 3 * 0.875 * 4000
    assert sum(traffic_of(make(gpus=1), Setting(1, 1, 1.0), cost).values()) == 0


def test_a_small_classifier_takes_a_small_group_and_a_huge_one_the_whole() -> None:
    few, many = (make(identities=count, batch=8192, sample_rate=1.0, gpu_memory=40.0) for count in (10**2, 4 * 10**7))
    traffic = [sum(traffic_of(few, Setting(8, group, 1.0), FREE).values()) for group in (1, 2, 4, 8)]
    assert traffic == sorted(traffic)
    assert [one.setting.class_group for one in best_by_ranks(few)] == [1, 1, 1, 1]
    assert [sum(memory(many, group).values()) <= 40 * GIB for group in (1, 2, 4, 8)] == [False, False, False, True]
    assert best_by_ranks(many)[-1].setting.class_group == 8


def best_by_ranks(config: PlanConfig) -> tuple[Estimate, ...]:
    tiny = TINY.model_copy(update={"embedding_dim": config.dim})
    return make_plan(config.model_copy(update={"backbone": tiny}), assumed_rates(config)).alternatives


def test_the_chosen_setting_is_the_cheapest_of_those_that_fit() -> None:
    config = make(identities=30_000_000, gpus=6)
    plan = make_plan(config, assumed_rates(config))
    assert {one.setting.ranks for one in plan.alternatives} == {1, 2, 4, 6}
    fitting = [one for one in plan.alternatives if one.fits]
    assert 0 < len(fitting) < len(plan.alternatives)
    assert plan.chosen.gpu_seconds_per_sample == min(one.gpu_seconds_per_sample for one in fitting)
    assert plan.unsampled is not None
    assert plan.unsampled.setting.sample_rate == 1
    assert plan.chosen.setting.sample_rate == 0.05


def test_without_a_benchmark_the_rates_are_assumed_and_it_is_said() -> None:
    rates = assumed_rates(make())
    assert not rates.calibrated
    assert rates.source.startswith("not calibrated")
    assert seconds(make(), rates)["row update"] > 0


def test_a_benchmark_sets_the_time_and_the_buffers_of_the_classifier(tmp_path: Path) -> None:
    config = make(identities=4_000_000)
    rates = benchmark_rates(benchmark(tmp_path), config)
    assert rates.calibrated
    assert "blocked on cuda in bf16" in rates.source
    assert seconds(config, rates)["classifier"] == pytest.approx(8 * 1024 * 500_000 * 512 / 1e14)
    assert seconds(config, rates)["row update"] == 0  # the measured step had it
    assert seconds(config, rates, group=4)["row update"] > 0  # rows twice as many, and half the samples for them
    items = memory_of(config, Setting(8, 8, 1.0), FREE, rates)
    assert items["buffers, measured"] == 123_456_789
    assert "tiles" not in items
    twice = memory_of(make(batch=2048), Setting(8, 8, 1.0), FREE, rates)
    assert twice["buffers, measured"] == 2 * 123_456_789


def test_a_benchmark_sets_the_time_of_public_code_by_its_step(tmp_path: Path) -> None:
    config = make(identities=4_000_000, implementation="eager")
    assert seconds(config, benchmark_rates(benchmark(tmp_path), config))["classifier"] == pytest.approx(0.1)


def test_a_benchmark_in_another_precision_is_told(tmp_path: Path) -> None:
    assert benchmark_rates(benchmark(tmp_path), make(precision="fp32")).source.endswith("the plan is for fp32")


@pytest.mark.parametrize(
    ("implementation", "changed", "message"),
    [
        ("ours", {"ceilings": {"matmul_flops": 1e12}}, r"benchmark\.json: ceilings\.copy_bytes is missing"),
        ("ours", {"ceilings": None}, r"ceilings\.matmul_flops is missing"),
        ("ours", {"fraction_of_matmul": 0}, r"fraction_of_matmul is 0, not a positive number"),
        ("ours", {"extra_bytes": {}}, r"extra_bytes\.blocked is missing"),
        ("ours", {"implementation": "eager"}, r"implementation is 'eager', the plan is of ours"),
        ("ours", {"parents": [1000]}, "measured with parents or a sample rate"),
        ("ours", {"sample_rate": 0.1}, "measured with parents or a sample rate"),
        ("eager", {"step_ms": {"blocked": 1.0}}, r"step_ms\.eager is missing"),
        ("eager", {"classes": "many"}, r"classes is 'many', not a positive number"),
    ],
)
def test_a_benchmark_without_what_is_needed_is_an_error(
    tmp_path: Path, implementation: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark_rates(benchmark(tmp_path, **changed), make(implementation=implementation))


def test_a_file_that_is_no_benchmark_is_an_error(tmp_path: Path) -> None:
    for content, message in (("{", "not JSON"), ("[]", "not a benchmark")):
        path = tmp_path / "file.json"
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            benchmark_rates(path, make())
    with pytest.raises(ConfigError, match="No such file"):
        benchmark_rates(tmp_path / "missing.json", make())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--identities -5", "--identities: Input should be greater than or equal to 1, not -5"),
        ("--parents 5 -1", "--parents: Input should be greater than 0, not -1"),
        ("--gpu-memory nan", "--gpu-memory: Input should be a finite number, not nan"),
        ("--sample-rate 1.5", "--sample-rate: Input should be less than or equal to 1, not 1.5"),
        ("--dim 1", "--dim: Input should be greater than or equal to 2, not 1"),
        ("--class-group 3", "--class-group 3 does not divide --gpus 4"),
        ("--batch 3", "--batch 3 leaves some of 4 GPUs without a sample"),
        ("--backbone resnet5", "did you mean 'resnet50'?"),
        ("--implementation eager --class-group 2", "--implementation eager knows one class group"),
        ("--implementation eager --fused-update", "--fused-update needs --implementation ours"),
        ("--class-group 2 --fused-update", "--fused-update needs --implementation ours and one class group"),
        ("--parents 5 6 7 --parent-dim 64 32", "--parent-dim has 2 dimensions for 3 parents"),
        ("--parents 5 --parent-dim 256", "--parent-dim 256 is more than --dim 128"),
        ("--benchmark nowhere.json", "--benchmark nowhere.json: No such file"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    code, out, err = run(capsys, f"{SMALL_JOB} {options}")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ("--identities 30000000", "use --gpus 8"),
        ("--identities 12000000 --class-group 1", "leave --class-group out"),
        ("--identities 11000000 --implementation eager --sample-rate 0.5", "leave --sample-rate out"),
        ("--identities 16000000 --implementation eager", "use --implementation ours"),
        ("--gpu-memory 1", "use GPUs with more memory, a smaller --batch or a smaller --backbone"),
    ],
)
def test_when_nothing_fits_one_line_says_by_how_much_and_what_to_change(
    capsys: pytest.CaptureFixture[str], options: str, change: str
) -> None:
    code, out, err = run(capsys, f"{SMALL_JOB} {options}")
    assert (code, out) == (2, "")
    assert err.startswith("error: nothing fits: the smallest setting (--gpus ")
    assert err.endswith(f"GiB more than there is: {change}\n")


def test_the_report_says_what_is_cheapest_with_and_without_sampling(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = run(capsys, f"{SMALL_JOB} --parents 1000 2000 --parent-dim 64 --json {tmp_path / 'plan.json'}")
    assert code == 0
    assert "not calibrated" in out
    last = out.splitlines()[-1]
    assert last.startswith("cheapest that fits: 1 GPU, class group 1, sample rate 0.05")
    assert "without sampling: 1 GPU, class group 1, sample rate 1" in last
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["chosen"] in plan["alternatives"]
    assert len(plan["alternatives"]) == 3 * 5
    assert sum(plan["chosen"]["memory"].values()) == plan["chosen"]["memory_bytes"]
    assert plan["config"]["parent_dim"] == [64]
    assert plan["calibrated"] is False


def test_what_is_fixed_is_not_searched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = f"--class-group 2 --sample-rate 0.3 --benchmark {benchmark(tmp_path)}"
    code, out, _ = run(capsys, f"{SMALL_JOB} {options} --json {tmp_path / 'plan.json'}")
    assert code == 0
    assert "without sampling" not in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    settings = [(one["ranks"], one["class_group"], one["sample_rate"]) for one in plan["alternatives"]]
    assert settings == [(2, 2, 0.3), (4, 2, 0.3)]
    assert plan["without_sampling"] is None
    assert plan["calibrated"] is True


def test_where_only_sampling_fits_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, f"{SMALL_JOB} --identities 11000000 --implementation eager --optimiser sgd")
    assert code == 0
    assert out.splitlines()[-1].endswith("without sampling nothing fits")


def test_the_job_runs_from_the_command_line() -> None:
    command = [sys.executable, "jobs/plan.py", *SMALL_JOB.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr
    assert "A GPU's share of a step: 1 GPU" in done.stdout
    assert "backbone optimiser" in done.stdout
    assert "cheapest that fits: 1 GPU" in done.stdout


def test_plans_can_be_made_without_the_command_line() -> None:
    config = make(backbone=TINY)
    plan = make_plan(config, assumed_rates(config))
    assert isinstance(plan, CapacityPlan)
    assert plan.chosen.fits
