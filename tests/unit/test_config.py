"""Configs: what is right is completed, what is wrong is told in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.compat.methods.baselines import Lwf
from pipeline.compat.methods.bct import Bct
from pipeline.config import RunConfig, default_home, differing_keys, load_config
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"

MINIMAL = """
name: mine
defaults: {training: {steps: 5, optimiser: {learning_rate: 0.5}}}
generations:
  v1: {training: {steps: 7}}
  v2: {parents: [v1]}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_lie_under_every_generation(minimal: Path) -> None:
    config = load_config(minimal)
    assert [config.generations[name].training.steps for name in ("v1", "v2")] == [7, 5]
    assert {one.training.optimiser.learning_rate for one in config.generations.values()} == {0.5}
    assert list(config.generations) == ["v1", "v2"]


def test_overrides_are_yaml_and_reach_any_depth(minimal: Path) -> None:
    config = load_config(minimal, ["generations.v2.training.optimiser.name=sgd", "seed=3", "data.test=null"])
    assert config.generations["v2"].training.optimiser.name == "sgd"
    assert config.generations["v1"].training.optimiser.name == "adamw"
    assert config.seed == 3
    assert config.data.test is None


def test_printed_config_reads_back_as_the_same(minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal, [f"home={tmp_path}"])
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["generations.v1.trainning.steps=3"], "unknown key generations.v1.trainning, did you mean training?"),
        (["generations.v2.margin.sacle=3"], "unknown key generations.v2.margin.sacle, did you mean scale?"),
        (["clutser.workers=3"], "unknown key clutser, did you mean cluster?"),
        (
            ["generations.v1.training.steps=0"],
            "training.steps: Input should be greater than or equal to 1",
        ),
        (["generations.v1.training.steps=many"], "generations.v1.training.steps: Input should be a valid integer"),
        (["generations.v1.training.engine.zero_stage=4"], "generations.v1.training.engine.zero_stage: Input should be"),
        (["generations.v1.backbone.name=iresnet5"], "did you mean 'iresnet50'?"),
        (["generations.v1.margin.name=arcface"], "margin 'arcface' needs m2 above 0"),
        (["generations.v1.margin={name: cosface, m2: 0.5, m3: 0.1}"], "margin 'cosface' takes no m2"),
        (["generations.v1.backbone.image_size=64"], "takes 64 px images"),
        (["generations.v2.compat.method=independent"], "'independent' takes no parents"),
        (
            ["generations.v2.compat.method=bct-sis"],
            "unknown generations.v2.compat.method 'bct-sis', did you mean bct-sys?",
        ),
        (["generations.v2.compat.method=zzz"], "unknown generations.v2.compat.method 'zzz'; known are bct, bct-kd, "),
        (
            ["generations.v2.compat={method: bct-sys, confidance: 0.3}"],
            ": unknown key generations.v2.compat.confidance, did you mean confidence?",
        ),
        (["generations.v2.compat.wieght=0.3"], ": unknown key generations.v2.compat.wieght, did you mean weight?"),
        (["generations.v2.compat={method: l2, margin: 0}"], ": unknown key generations.v2.compat.margin"),
        (
            ["generations.v2.compat={method: lwf, temperature: 0}"],
            ": generations.v2.compat.temperature: Input should be greater than 0 (given: 0)",
        ),
        (["generations.v2.compat=bct"], ": generations.v2.compat: Input should be a valid dictionary"),
        (["generations.v1.compat.method=finetune"], "'finetune' needs exactly one parent"),
        (["generations.v2.paragon_of=v9"], "paragon_of names 'v9', which is not in this run"),
        (["generations.v2.parents=[v2]"], "names itself"),
        (["generations.v2.parents=[v3]", "generations.v3.seed=1"], "trained after"),
        (["cluster.workers=1000"], "less than one sample for each of 1000 workers"),
        (["cluster.min_workers=3"], "cluster: min_workers=3 is more than workers=2"),
        (
            ["cluster.min_workers=1", "generations.v2.compat={method: nccl}"],
            "cluster.min_workers changes the number of workers, but generations.v2.compat.method 'nccl' compares",
        ),
        (
            ["cluster.min_workers=1", "generations.v1.classifier.shard_ranks=2"],
            "but generations.v1.classifier.shard_ranks must divide it",
        ),
        (
            ["cluster.min_workers=1", "generations.v1.classifier.fused_update=true"],
            "but generations.v1.classifier.fused_update leaves no room for accumulation",
        ),
        (["cluster.backend=nccl"], "cluster: backend=nccl needs gpu=true"),
        (["cluster.environment={NCCL_DEBUG: INFO, WANDB_API_KEY: x}"], "WANDB_API_KEY looks like a secret"),
        (["cluster.environment={PROXY: 'http://me:word@host'}"], "leave the secret out"),
        (["name=a/b"], "name: String should match pattern"),
        (["steps"], "override 'steps' is not of the form key.sub=value"),
        (["name.sub=1"], "override 'name.sub=1': name holds a value, not a section"),
        (["name={a"], "is no YAML"),
    ],
)
def test_mistakes_are_told_in_one_line(minimal: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, overrides)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_range_of_workers_is_free_where_the_result_does_not_hang_on_it(minimal: Path) -> None:
    config = load_config(minimal, ["cluster.min_workers=1"])
    assert (config.cluster.fewest, config.cluster.workers) == (1, 2)
    assert load_config(minimal, ["generations.v2.compat={method: nccl}"]).cluster.fewest == 2


def test_method_without_a_name_is_bct(minimal: Path) -> None:
    config = load_config(minimal, ["generations.v2.compat.weight=0.3"])
    assert config.generations["v2"].compat == Bct(weight=0.3)
    assert config.generations["v1"].compat == Bct()
    config = load_config(minimal, ["generations.v2.compat={method: lwf, temperature: 3}"])
    assert config.generations["v2"].compat == Lwf(temperature=3.0)


def test_missing_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is missing"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: }")
    with pytest.raises(ConfigError, match="is no YAML") as caught:
        load_config(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="no mapping"):
        load_config(tmp_path / "list.yaml")


def test_shaping_leaves_out_what_does_not_shape_the_weights(minimal: Path) -> None:
    first, second = load_config(minimal), load_config(minimal, ["cluster.workers=1", "generations.v2.paragon_of=v1"])
    assert first.shaping("v2") == second.shaping("v2")
    other = load_config(minimal, ["generations.v2.training.optimiser.momentum=0.5", "preprocess.std=1"])
    assert differing_keys(first.shaping("v2"), other.shaping("v2")) == [
        "preprocess.std (was 127.5, now 1.0)",
        "training.optimiser.momentum (was 0.9, now 0.5)",
    ]


def test_home_is_absolute_and_has_a_default_from_the_environment(
    minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_config(minimal, ["home=relative/place"]).home.is_absolute()
    monkeypatch.setenv("BCT_HOME", "/somewhere")
    assert load_config(minimal).home == Path("/somewhere")
    monkeypatch.delenv("BCT_HOME")
    monkeypatch.setattr(sys, "prefix", "/checkout/.venv")
    assert default_home() == Path("/checkout")


def test_every_config_of_the_repository_is_valid() -> None:
    configs = sorted(set((ROOT / "configs").glob("*.yaml")) - {ROOT / "configs" / "paper_table.yaml"})  # a grid of runs
    assert QUICKSTART in configs
    assert all(isinstance(load_config(path), RunConfig) for path in configs)


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "train_bct.py"), *arguments]
    environment = {**os.environ, "BCT_HOME": "/none"}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)


def test_job_tells_a_mistake_without_a_traceback() -> None:
    done = job("generations.v1.stepz=1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "unknown key generations.v1.stepz" in done.stderr


def test_job_prints_the_resolved_config_and_its_help() -> None:
    printed = job("--print-config", "generations.v2.compat.weight=0.125")
    assert printed.returncode == 0, printed.stderr
    assert "weight: 0.125" in printed.stdout
    assert "home: /none" in printed.stdout
    helped = job("--help")
    assert helped.returncode == 0
    assert all(word in helped.stdout for word in ("--config", "--print-config", "--fresh", "key.sub=value"))
