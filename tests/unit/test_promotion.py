"""Promotion and rollback against a real registry: gates, history, two at once in real processes."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from jobs import promote as job
from pipeline.errors import ConfigError, DataError, PromotionRefusedError, RegistryError
from pipeline.generation import RECORD, SELFTEST, Generation, complete
from pipeline.promotion.lock import BesideLock, RowLock, lock_of, promoting
from pipeline.promotion.promoting import Galleries, promote, rollback, unlock
from pipeline.promotion.serving import HISTORY, MAX_HISTORY, Move, Serving
from pipeline.registry import Registry
from pipeline.stamp import Stamp
from pipeline.vectors import Vectors, write_vectors
from tests.unit.families import CONFIG, Family
from tests.unit.test_registry import make_generation, start

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

JUDGED = CONFIG.judged
ROOT = Path(__file__).parents[2]


@pytest.fixture
def family(registry: Registry, tmp_path: Path) -> Family:
    return Family.make(registry, tmp_path / "artefacts")


@pytest.fixture
def serving(family: Family) -> Serving:
    return Serving(family.registry)


def now(serving: Serving) -> str | None:
    one = serving.now()
    return None if one is None else one.name


def ends(move: Move) -> tuple[str, str | None]:
    """Names of the generations that it led to, and came from."""
    return move.to.generation, None if move.instead_of is None else move.instead_of.generation


def refused(capsys: pytest.CaptureFixture[str], call: Callable[[], None], *gates: str) -> str:
    """The call is refused for just these gates; returns what was printed."""
    capsys.readouterr()
    with pytest.raises(PromotionRefusedError) as caught:
        call()
    told = capsys.readouterr().out
    failed = [line.split(":")[0].removeprefix("gate ") for line in told.splitlines() if ": FAILED: " in line]
    assert failed == list(gates)
    assert str(caught.value).endswith(f"gates failed ({', '.join(gates)}); nothing has changed")
    assert "\n" not in str(caught.value)
    return told


def test_promotions_one_after_the_other_and_back(family: Family, serving: Serving, client: MlflowClient) -> None:
    family.record()
    registry = family.registry
    registry.promote_candidate("v2")
    promote(registry, "v1", JUDGED)
    assert now(serving) == "v1"
    promote(registry, None, JUDGED)  # the candidate
    assert now(serving) == "v2"
    assert serving.candidate() is None  # one step: it serves, and is no candidate any more
    versions = registry.versions()
    assert serving.galleries(versions["v2"]) == {"v1": versions["v1"].digest}
    promote(registry, "v3", JUDGED)
    assert serving.galleries(registry.versions()["v3"]).keys() == {"v1", "v2"}
    rollback(registry)
    assert now(serving) == "v2"
    assert serving.galleries(registry.versions()["v2"]).keys() == {"v1", "v3"}  # v3 may have embedded since
    rollback(registry)
    assert now(serving) == "v1"
    with pytest.raises(RegistryError, match=r"'v1' is the first that serves in .*: nothing served before it"):
        rollback(registry)
    told = [
        (move.kind, move.to.generation, move.instead_of and move.instead_of.generation) for move in serving.history()
    ]
    assert told == [
        ("promote", "v1", None),
        ("promote", "v2", "v1"),
        ("promote", "v3", "v2"),
        ("rollback", "v2", "v3"),
        ("rollback", "v1", "v2"),
    ]
    assert json.loads(client.get_registered_model("glyphs").tags[HISTORY])[0]["at"].endswith("+00:00")


def test_promoting_what_serves_changes_nothing(
    family: Family, serving: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    family.record()
    promote(family.registry, "v1", JUDGED)
    before = serving.history()
    capsys.readouterr()
    family.registry.promote_candidate("v1")  # as if it had been killed before its last write
    promote(family.registry, "v1", JUDGED)
    assert capsys.readouterr().out == "v1 serves already\n"
    assert serving.history() == before
    assert serving.candidate() is None


def test_the_criterion_must_hold_on_every_gallery(
    family: Family, serving: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = family.registry
    family.record(("v1", "v2"))
    promote(registry, "v1", JUDGED)
    promote(registry, "v2", JUDGED)
    gates = ("criterion on v1", "criterion on v2", "self-test")
    told = refused(capsys, lambda: promote(registry, "v3", JUDGED), *gates)
    assert "gate criterion on v1: FAILED: queries of 'v3' on a gallery of 'v1': no verdict is recorded" in told
    assert "'v3' and" not in told
    family.record(v3_v1=(0.1, 0.2))
    told = refused(capsys, lambda: promote(registry, "v3", JUDGED), "criterion on v1")
    assert "incompatible (rank1 -10.0 [-11.0, -9.0], tar@1e-3 +10.0 [+9.0, +11.0])" in told
    for files in ([tmp_path / "v1.parquet"], [tmp_path / "built"]):  # v1's gallery is there still
        write_stamped(tmp_path / "v1.parquet", family.generations["v1"])
        write_stamped(tmp_path / "built" / "parts" / "00001.parquet", family.generations["v1"])
        write_stamped(tmp_path / "built" / "parts" / "00002.parquet", family.generations["v3"])
        (tmp_path / "built" / "gallery.json").write_text("{}")
        refused(capsys, partial(promote, registry, "v3", JUDGED, Galleries(files)), "criterion on v1")
    assert now(serving) == "v2"
    write_stamped(tmp_path / "v2.parquet", family.generations["v2"])
    promote(registry, "v3", JUDGED, Galleries([tmp_path / "v2.parquet"], ["v3"]))  # v1's was moved over
    assert now(serving) == "v3"
    assert serving.galleries(registry.versions()["v3"]).keys() == {"v2"}
    with pytest.raises(RegistryError, match=r"generation 'v9' is not registered in .*; train it first"):
        promote(registry, "v1", JUDGED, Galleries(names=["v9"]))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "v2.parquet").read_bytes()[:100])
    with pytest.raises(DataError, match=r"cut\.parquet"):
        promote(registry, "v1", JUDGED, Galleries([tmp_path / "cut.parquet"]))


def write_stamped(path: Path, generation: Generation) -> None:
    stamp = Stamp.of(generation)
    keys = pa.array(["a", "b"], pa.large_string())
    write_vectors(path, Vectors(stamp, keys, keys, np.eye(2, stamp.dim, dtype=np.float32)))


def test_the_self_test_may_lose_a_margin(family: Family, serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    registry = family.registry
    family.record(v2_v2=(0.196, 0.15))
    promote(registry, "v1", JUDGED)
    told = refused(capsys, lambda: promote(registry, "v2", JUDGED, margin=0.3), "self-test")
    assert "gate self-test: FAILED: rank1 -0.40, tar@1e-3 +5.00 points against v1; 0.3 less are allowed" in told
    promote(registry, "v2", JUDGED, margin=0.4)
    assert now(serving) == "v2"
    family.record(("v1", "v3"), data="f" * 64)
    family.record(("v1", "v2"))
    told = refused(capsys, lambda: promote(registry, "v3", JUDGED, Galleries(names=["v1"])), "self-test")
    assert "measured on two test sets" in told
    told = refused(capsys, lambda: promote(registry, "v3", ["map"], Galleries(names=["v1"])), "self-test")
    assert "not both evaluated on map: run jobs/evaluate.py" in told
    with pytest.raises(ConfigError, match=r"--margin -1"):
        promote(registry, "v3", JUDGED, margin=-1)


def test_an_artefact_that_changed_or_went_may_not_serve(
    family: Family, serving: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    family.record()
    promote(family.registry, "v1", JUDGED)
    table = family.generations["v2"].path / "identities.parquet"
    kept = table.read_bytes()
    table.write_bytes(kept[:-1] + b"0")
    told = refused(capsys, lambda: promote(family.registry, "v2", JUDGED), "artefact", "reload")
    assert "identities.parquet has changed since it was written" in told
    assert "reload: FAILED: not tried" in told
    table.unlink()
    assert "is missing" in refused(capsys, lambda: promote(family.registry, "v2", JUDGED), "artefact", "reload")
    table.write_bytes(kept)
    promote(family.registry, "v2", JUDGED)
    shutil.rmtree(family.generations["v1"].path)
    told = refused(capsys, lambda: rollback(family.registry), "artefact", "reload")
    assert "no generation at" in told
    assert now(serving) == "v2"


def test_a_model_that_gives_other_features_may_not_serve(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = make_generation(tmp_path, "v1")
    test = load_file(generation.path / SELFTEST)
    save_file(test | {"features": -test["features"]}, generation.path / SELFTEST)
    (generation.path / RECORD).unlink()
    other = complete(generation.path, tmp_path / "other", generation.record)  # as if the code had changed since
    registry.register(start(registry, "v1"), other, {})
    told = refused(capsys, lambda: promote(registry, "v1", JUDGED), "reload")
    assert "does not reproduce its self-test" in told


def test_versions_deleted_by_hand_are_told(family: Family, serving: Serving, client: MlflowClient) -> None:
    family.record()
    promote(family.registry, "v1", JUDGED)
    promote(family.registry, "v2", JUDGED)
    client.delete_model_version("glyphs", "1")
    with pytest.raises(RegistryError, match=r"generation 'v1' is not registered .* was deleted by hand; run the job"):
        rollback(family.registry)
    client.delete_model_version("glyphs", "2")  # and with it the alias
    assert serving.now() is None
    with pytest.raises(RegistryError, match=r"nothing serves"):
        rollback(family.registry)
    with pytest.raises(RegistryError, match=r"'v2' \(version 2\) served last in .* deleted by hand: say whose"):
        promote(family.registry, "v3", JUDGED)
    promote(family.registry, "v3", JUDGED, Galleries(names=["v3"]))
    assert now(serving) == "v3"


def test_a_promotion_that_was_killed_between_its_writes_never_was(
    family: Family, serving: Serving, client: MlflowClient
) -> None:
    family.record()
    promote(family.registry, "v1", JUDGED)
    promote(family.registry, "v2", JUDGED)
    client.set_registered_model_alias("glyphs", "serving", "1")  # as before v2's last write
    with pytest.raises(RegistryError, match=r"'v1' is the first that serves"):
        rollback(family.registry)
    promote(family.registry, "v3", JUDGED)
    rollback(family.registry)
    assert now(serving) == "v1"
    client.delete_registered_model_alias("glyphs", "serving")  # by hand: whose galleries there are is known still
    with pytest.raises(PromotionRefusedError, match=r"criterion on v3"):
        promote(family.registry, "v2", JUDGED)
    promote(family.registry, "v3", JUDGED)
    assert serving.galleries(family.registry.versions()["v3"]).keys() == {"v1"}


def test_history_keeps_what_a_tag_has_room_for(family: Family, serving: Serving, client: MlflowClient) -> None:
    family.record()
    versions = family.registry.versions()
    for number in range(60):
        serving.move(versions["v2" if number % 2 else "v1"], versions["v1" if number % 2 else "v2"], {}, "promote")
    assert len(client.get_registered_model("glyphs").tags[HISTORY]) <= MAX_HISTORY
    assert 15 < len(serving.history()) < 60
    before = serving.before(versions["v2"])
    assert before is not None
    assert before.generation == "v1"
    client.set_registered_model_tag("glyphs", HISTORY, "[{}]")
    with pytest.raises(RegistryError, match=r"'promotions' of family 'glyphs' of .* changed by hand"):
        serving.history()


# --- two at once ------------------------------------------------------------------------------------------------------


def test_a_row_is_a_lock_where_there_is_no_file(family: Family, uri: str, client: MlflowClient) -> None:
    mine, theirs = RowLock(MlflowClient(uri, uri), "glyphs"), RowLock(client, "glyphs")
    assert mine.take()
    assert mine.take()  # a request that was sent again, since its answer was lost
    assert not theirs.take()
    assert f"process {os.getpid()} of " in theirs.holder
    with (
        pytest.raises(RegistryError, match=r"another promotion of 'glyphs' goes on \(process .*--unlock"),
        promoting(family.registry, 0.0, theirs),
    ):
        pytest.fail("held twice")
    theirs.release()  # is not theirs
    assert not theirs.take()
    mine.release()
    with promoting(family.registry, 0.0, theirs):
        assert not mine.take()
    assert mine.take()
    theirs.remove()  # as --unlock does
    assert theirs.take()
    mine.release()
    assert not mine.take()
    theirs.release()
    theirs.remove()  # what is gone already
    assert [model.name for model in client.search_registered_models()] == ["glyphs", "unused"]
    unlock(family.registry)
    assert isinstance(lock_of(family.registry), BesideLock)
    assert isinstance(lock_of(remote(family.registry)), RowLock)


def remote(registry: Registry) -> Registry:
    """The same, as if it were reached at another address."""
    other = object.__new__(Registry)
    other.__dict__.update(registry.__dict__)
    other.uri = "postgresql://host/db"
    return other


def config_file(home: Path, uri: str) -> Path:
    path = home / "run.yaml"
    path.write_text(
        json.dumps({"name": "glyphs", "home": str(home), "tracking": {"uri": uri}, "generations": {"v1": {}}})
    )
    return path


def test_two_processes_promote_one_after_the_other(family: Family, uri: str, tmp_path: Path) -> None:
    promote_two_at_once(family, config_file(tmp_path, uri), tmp_path)


def promote_two_at_once(family: Family, config: Path, folder: Path) -> None:
    """v3 can search all galleries, v2 not those of v3: whichever comes first, v3 serves in the end."""
    family.record()
    promote(family.registry, "v1", JUDGED)
    serving, processes = Serving(family.registry), {}
    logs = {name: folder / f"{name}.log" for name in ("v2", "v3")}
    with promoting(family.registry, 0.0):  # both come to the lock before either gets it
        for name, path in logs.items():
            command = [sys.executable, "-u", "jobs/promote.py", "--config", str(config), "--generation", name]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            with path.open("wb") as log:
                processes[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while not all("waiting for another promotion" in log.read_text() for log in logs.values()):
            assert all(one.poll() is None for one in processes.values()), [log.read_text() for log in logs.values()]
            time.sleep(0.1)  # bounded by pytest's timeout
        assert now(serving) == "v1"
    codes = {name: process.wait() for name, process in processes.items()}
    assert now(serving) == "v3", [log.read_text() for log in logs.values()]
    moves = [ends(move) for move in serving.history()]
    if codes == {"v2": 0, "v3": 0}:
        assert moves == [("v1", None), ("v2", "v1"), ("v3", "v2")]
    else:
        assert codes == {"v2": 3, "v3": 0}
        assert moves == [("v1", None), ("v3", "v1")]
        assert "gate criterion on v3: FAILED" in logs["v2"].read_text()


def test_the_job_says_what_it_did_and_exits_as_it_should(
    family: Family,
    serving: Serving,
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(config_file(tmp_path, uri))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["promote.py", "--config", config, *arguments])
        code = job.main()
        return code, *capsys.readouterr()

    family.record(v2_v1=(0.1, 0.1))
    capsys.readouterr()
    code, out, err = run("--generation", "v1")
    assert (code, err) == (0, "")
    assert out.endswith("v1 serves (version 1)\n")
    assert run("--generation", "v1") == (0, "v1 serves already\n", "")
    code, out, err = run("--generation", "v2")
    assert code == 3
    assert "gate criterion on v1: FAILED" in out
    assert err == "error: v2 may not serve: 1 of 4 gates failed (criterion on v1); nothing has changed\n"
    code, out, err = run("--generation", "v3", "--live", "v1", "--margin", "1")
    assert (code, err) == (0, "")
    assert out.endswith("v3 serves instead of v1 (version 3)\n")
    code, out, err = run("--rollback")
    assert (code, err) == (0, "")
    assert out.endswith("v1 (version 1) serves again instead of v3, whose vectors it cannot search\n")
    code, _, err = run("--rollback", "--live", "v3")
    assert code == 2
    assert err.startswith("error: 'v1' is the first that serves")
    code, _, err = run("--generation", "v9")
    assert (code, "generation 'v9' is not registered" in err) == (2, True)
    code, _, err = run()
    assert (code, "has no candidate" in err) == (2, True)
    assert run("--unlock")[0] == 0
    assert now(serving) == "v1"
