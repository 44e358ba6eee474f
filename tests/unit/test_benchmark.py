"""The benchmark compares two ways of one mathematics, and tells what the docs say of it."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from jobs import benchmark
from pipeline.benchmarks.alone import join_nobody
from pipeline.benchmarks.crew import Crew
from pipeline.benchmarks.eager import MOMENTUM, RATE, EagerClassifier
from pipeline.benchmarks.evaluation import faces
from pipeline.benchmarks.plot import plot_results
from pipeline.errors import ClusterError
from pipeline.model.classifier import ClassifierConfig, ShardedClassifier
from pipeline.model.heads import Head
from pipeline.model.margins import MarginConfig
from pipeline.planning.measured import measured_parts, predicted_parts
from pipeline.training.optimiser import OptimiserConfig
from pipeline.training.row_optimiser import RowOptimiser

ROOT = Path(__file__).parents[2]
KEYS = {
    "step_ms",
    "extra_bytes",
    "weight_bytes",
    "ratio_step",
    "ratio_extra",
    "extra_over_weights",
    "parent_over_new",
    "fraction_of_matmul",
}


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_eager_and_ours_take_the_same_steps(sample_rate: float) -> None:
    margin = MarginConfig(name="cosface", scale=16.0, m3=0.2)
    parent = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    config = ClassifierConfig(sample_rate=sample_rate)
    ours = ShardedClassifier("new", 40, 6, margin, [Head("old", parent, range(40), margin)], config=config)
    rows = RowOptimiser(ours.weight_CD, OptimiserConfig(name="sgd", momentum=MOMENTUM))
    ours.fused = True
    theirs = ours.weight_CD.clone()
    eager = EagerClassifier(theirs, torch.zeros_like(theirs), margin, [parent], sample_rate)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        features = torch.randn(9, 6, generator=generator)
        labels = torch.randint(40, (9,), generator=generator)
        mine, other = (features.clone().requires_grad_() for _ in range(2))
        loss = ours(mine, labels, [9], step).sum()
        expected = eager.forward(other, labels, step)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        ours.spend(partial(rows.apply, rate=RATE))
        expected.backward()
        eager.update()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.weight_CD, theirs, rtol=1e-4, atol=1e-6)


def test_the_job_tells_and_writes_its_figures(tmp_path: Path) -> None:
    target = tmp_path / "new" / "result.json"
    command = [sys.executable, "jobs/benchmark.py", "classifier", "--classes", "3000", "--dim", "5", "--batch", "7"]
    command += ["--parents", "2", "--parent-classes", "500", "--sample-rate", "0.5", "--repeats", "2"]
    done = subprocess.run([*command, "--json", str(target)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(target.read_text())
    assert result.keys() >= KEYS
    assert result["implementation"] == "blocked"
    assert result["step_ms"].keys() == result["extra_bytes"].keys() == {"blocked", "eager"}
    assert result["weight_bytes"] == 3000 * 5 * 4
    assert result["ratio_step"] == pytest.approx(result["step_ms"]["blocked"] / result["step_ms"]["eager"])
    assert result["ratio_extra"] == pytest.approx(result["extra_bytes"]["blocked"] / result["extra_bytes"]["eager"])
    assert all(len(times) == 2 and min(times) > 0 for times in result["step_ms_all"].values())
    assert 0 < result["fraction_of_matmul"] < 1
    assert {"cpu", "cores", "memory_bytes", "torch"} <= result["machine"].keys()
    assert "of eager's time" in done.stdout
    picture = tmp_path / "cost.png"
    plot_results([target], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


EVALUATION = ["--templates", "190", "--pairs", "21000", "--gallery", "730", "--queries", "61", "--dim", "33"]


@pytest.mark.parametrize(("task", "rival"), [("verification", "roc_curve"), ("search", "faiss")])
def test_evaluation_agrees_with_the_public_way(tmp_path: Path, task: str, rival: str) -> None:
    target = tmp_path / "result.json"
    command = [sys.executable, "jobs/benchmark.py", "evaluation", "--task", task, *EVALUATION, "--repeats", "2"]
    done = subprocess.run([*command, "--json", str(target)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "extra memory" in done.stdout
    result: dict[str, Any] = json.loads(target.read_text())
    assert result["benchmark"] == "evaluation"
    assert result["extra_bytes"].keys() == result["seconds"].keys() >= {"pipeline", rival}
    assert all(len(times) == 2 and min(times) > 0 for times in result["seconds_all"].values())
    assert result["ratio"] > 0
    if task == "verification":
        assert result["genuine"] + result["impostors"] == 21000
        assert list(result["tar"]["pipeline"]) == ["0.1", "0.01", "0.001", "0.0001"], "a FAR needs its impostors"
        assert result["tar"]["pipeline"] == pytest.approx(result["tar"][rival])
        assert result["largest_difference_in_pairs"] == 0
        assert 0 < min(result["tar"]["pipeline"].values()) < 1
    else:
        ours, theirs = (result["figures"][way] for way in ("pipeline", rival))
        assert {rank: ours[rank] for rank in theirs} == pytest.approx(theirs)
        assert 0 < ours["rank1"] < ours["rank10"] < 1
        assert 0 < ours["tpir@0.1"] < 1
        assert "tpir@0.01" not in ours, "31 strangers are too few"
        assert result["faiss_first_below_best"] == 0


@pytest.mark.long
def test_checkpoints_are_saved_copied_and_loaded_by_fewer_ranks(tmp_path: Path) -> None:
    target, disk = tmp_path / "result.json", tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, "jobs/benchmark.py", "checkpoint", "--rows", "50000", "--stall-rows", "5000"]
    command += ["--writers", "3", "--readers", "2", "--repeats", "1", "--folder", str(disk), "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(target.read_text())
    assert result["bytes"] == 2 * 50000 * 128 * 4
    assert min(result[key] for key in ("stall_ratio", "resume_s", "reshard_over_copy")) > 0
    assert 0 <= result["reshard_extra_bytes"] <= 256 << 20
    (one,) = result["rounds"]["reshard"]
    assert result["reshard_over_copy"] == pytest.approx(one["copy_s"] / one["resume_s"])
    assert "memory of a rank beyond its own part" in done.stdout
    assert list(disk.iterdir()) == [], "nothing is left"


@pytest.mark.long
def test_scaling_is_measured_beside_processes_that_never_meet(tmp_path: Path) -> None:
    target, picture = tmp_path / "result.json", tmp_path / "scaling.png"
    command = [sys.executable, "jobs/benchmark.py", "scaling", "--workers", "2", "--batch", "3", "--rows", "50"]
    command += ["--dim", "8", "--backbone", "small", "--size", "32", "--repeats", "2", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "efficiency" in done.stdout
    result: dict[str, Any] = json.loads(target.read_text())
    worlds = {"1", "2"}
    assert all(result[key].keys() == worlds for key in ("step_ms", "alone_ms", "efficiency", "parts_ms"))
    for world in worlds:
        rounds = result["rounds_ms"][world]
        assert len(rounds) == 2
        assert result["efficiency"][world] == pytest.approx(
            np.median([one["alone"] / one["together"] for one in rounds])
        )
        assert all(ms >= 0 for ms in result["parts_ms"][world].values())
    exchanges = {"gather of features", "softmax statistics", "feature gradients"}
    assert exchanges & result["parts_ms"]["1"].keys() == set(), "one process has nobody to tell"
    for crew in ("parts_ms", "alone_parts_ms"):  # the same program, with others and without
        phases = {"forward", "losses", "backward", "update"}
        assert result[crew]["2"].keys() == phases | exchanges | {"backbone gradients", "agreement"}
    assert min(result["links"].values()) >= 0
    assert set(predicted_parts(result, 2)) == set(measured_parts(result, 2))
    plot_results([target], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def echo(rank: int, size: int, _folder: str, among: str) -> Callable[[Any], Any]:
    """A worker of a crew: alone, it says what the collectives of a group without others give."""
    if among == "nobody":
        join_nobody(rank, size)

    def answer(question: Any) -> Any:
        if question == "end":
            raise SystemExit("told to end")
        own = torch.tensor([rank, question], dtype=torch.float32)
        whole, part, total = torch.zeros(2 * size), torch.zeros(2), own.clone()
        if among == "nobody":
            dist.all_gather_single(whole, own)
            dist.reduce_scatter_single(part, torch.arange(2.0 * size))
            dist.all_reduce(total)
            dist.barrier()
        return rank, whole.tolist(), part.tolist(), total.tolist()

    return answer


def test_ranks_that_meet_nobody_take_their_own_part_for_everybodys() -> None:
    with Crew(3, echo, "nobody") as crew:
        assert crew.ask(5) == [(rank, [rank, 5] * 3, [2 * rank, 2 * rank + 1], [rank, 5]) for rank in range(3)]
        assert [rank for rank, *_ in crew.ask(6)] == [0, 1, 2]


def test_a_process_that_ends_is_told() -> None:
    with Crew(2, echo, "none") as crew, pytest.raises(ClusterError, match="has ended"):
        crew.ask("end")


def test_faces_of_one_identity_are_alike_whichever_rows_hold_them() -> None:
    identity = np.array([5, 9, 5, 102, 9])
    unit = faces(identity, 515, 0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit.T
    assert cosine[0, 2] > cosine[0, 3] > cosine[0, 1], "5 and 102 are of one family"
    np.testing.assert_array_equal(faces(identity, 515, 0), faces(identity, 515, 0))
    assert not np.array_equal(faces(identity, 515, 0), faces(identity, 515, 1))


def test_a_missing_rival_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    importlib.import_module("pipeline.gallery.index")  # a part of the product, which has its FAISS already
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.delitem(sys.modules, "pipeline.benchmarks.evaluation_rivals", raising=False)
    assert benchmark.main(["evaluation"]) == 2
    assert "faiss is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--task", "guess"], "--task guess: Input should be 'verification' or 'search'"),
        (["--task", "search", "--gallery", "900000000"], "lower --gallery or --dim"),
        (["--pairs", "90000000000"], "lower --pairs or --dim"),
    ],
)
def test_mistakes_of_evaluation_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert benchmark.main(["evaluation", *arguments]) == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert errors.count("\n") == 1


def test_a_checkpoint_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["checkpoint", "--rows", "900000000000"]) == 2
    errors = capsys.readouterr().err
    assert "of memory, of which" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--classes", "1"], "--classes 1: Input should be greater than or equal to 2"),
        (["--classes", "many"], "--classes many"),
        (["--sample-rate", "0"], "--sample-rate 0"),
        (["--classes", "900000000"], "this takes about"),
        (["--precision", "bf16"], "'bf16' needs the triton implementation"),
    ],
)
def test_mistakes_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert benchmark.main(["classifier", *arguments]) == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert errors.count("\n") == 1


def test_a_file_that_is_no_result_is_not_plotted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert benchmark.main(["plot", "--out", str(tmp_path / "a.png"), str(tmp_path / "a.json")]) == 2
    assert "is no result of jobs/benchmark.py" in capsys.readouterr().err


def test_tables_of_the_docs_are_the_measured_figures() -> None:
    """Each row of a table that names a JSON file tells that file's figures, in the columns' units."""
    text = (ROOT / "docs" / "classifier.md").read_text()
    rows = re.findall(r"^\| \[.*?\]\((benchmarks/.*?\.json)\) \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) >= 6
    for path, columns in rows:
        result = json.loads((ROOT / "docs" / path).read_text())
        name = result["implementation"]
        none = "—"
        expected = [
            f"{result['step_ms'][name]:,.0f}",
            f"{result['step_ms']['eager']:,.0f}" if "eager" in result["step_ms"] else none,
            f"{result['ratio_step']:.2f}" if result["ratio_step"] else none,
            f"{result['extra_bytes'][name] / 1e6:,.0f}",
            f"{result['extra_bytes']['eager'] / 1e6:,.0f}" if "eager" in result["extra_bytes"] else none,
            f"{result['extra_over_weights']:.1%}",
            f"{result['parent_over_new']:.2f}",
        ]
        assert [column.strip() for column in columns.split("|")] == expected, path
        assert result["command"].startswith("python jobs/benchmark.py classifier")
