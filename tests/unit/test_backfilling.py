"""Backfill of a stored gallery: its orders, its curve, and that every key is found once whenever it dies."""

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import backfill as job
from pipeline.backfill.curve import Judge
from pipeline.backfill.moving import BackfillConfig, StoredVectors, backfill, prune, roll_back
from pipeline.backfill.order import OrderConfig, ambiguity, counts_of, keys_in_order
from pipeline.errors import DataError
from pipeline.evaluation import backfill as evaluated
from pipeline.evaluation.figures import Images
from pipeline.evaluation.settings import EvaluationConfig
from pipeline.gallery.index import IndexConfig
from pipeline.gallery.store import GalleryFolder
from pipeline.search import Gallery
from pipeline.stamp import Verdicts
from pipeline.vectors import Vectors, write_vectors
from tests.unit.embeddings import GROUP, IDENTITY, embed
from tests.unit.stamped import drawn, held, stamp, stamped
from tests.unit.swapped import rank1_by_hand, right_and_wrong

ALLOWED = held("v2/v1", "v3/v2", "v3/v1")
KEYS = 60
NEW = stamp("v2", 5)

# One process imports all that is needed, and each backfill to be killed is a fork of it: it starts in a moment.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__])


def old_and_new() -> tuple[Vectors, Vectors]:
    """The gallery's vectors by v1, and by v2, which has one dimension more, in another order."""
    new = drawn("v2", KEYS, 5, seed=2)
    return drawn("v1", KEYS, 4, seed=1), new.take(np.random.default_rng(0).permutation(KEYS))


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """A folder of a gallery by v1; new vectors are beside it."""
    old, new = old_and_new()
    Gallery.of([old]).save(tmp_path / "gallery")
    write_vectors(tmp_path / "new" / "0.parquet", new.take(np.arange(25)))
    write_vectors(tmp_path / "new" / "1.parquet", new.take(np.arange(25, KEYS)))
    return tmp_path / "gallery"


def move(folder: Path, verdicts: Verdicts = ALLOWED, queries: Vectors | None = None, **config: Any) -> Any:
    source = StoredVectors.read(folder.parent / "new")
    return backfill(folder, source, BackfillConfig(**config), verdicts, queries)


def state(gallery: Gallery) -> dict[str, str]:
    """Key -> generation, having checked that each key is there once, with that generation's vector."""
    assert sorted(gallery.keys().to_pylist()) == [f"k{place:03d}" for place in range(KEYS)]
    vectors = {
        one.stamp.generation: dict(zip(one.keys.to_pylist(), one.vectors_ND, strict=True)) for one in old_and_new()
    }
    where = {}
    for segment in gallery.segments:
        live = segment.live_vectors()
        for key, found_D in zip(live.keys.to_pylist(), live.vectors_ND, strict=True):
            expected_D = vectors[segment.stamp.generation][key]
            np.testing.assert_allclose(found_D, expected_D / np.linalg.norm(expected_D), atol=1e-6)
            where[key] = segment.stamp.generation
    return where


def moved(folder: Path) -> list[str]:
    return [key for key, generation in sorted(state(Gallery.load(folder)).items()) if generation == "v2"]


# The orders.


def test_uncertainty_is_that_of_the_evaluation() -> None:
    old = embed("v1", 0.9, seed=2)
    images = Images.of(old, EvaluationConfig(far=(), bootstrap=0))
    enrolled = GROUP == 2
    vectors = stamped("v1", old.vectors_ND[enrolled], identities=[f"i{one}" for one in IDENTITY[enrolled]])
    (segment,) = Gallery.of([vectors]).segments
    expected_G = evaluated.ambiguity(old, images)
    np.testing.assert_allclose(ambiguity(segment, [segment]), expected_G, atol=2e-7)
    keys = keys_in_order(Gallery.of([vectors]), NEW, OrderConfig())
    assert keys.to_pylist() == [f"k{place:03d}" for place in np.argsort(-expected_G, kind="stable")]


def test_uncertainty_looks_past_all_mates() -> None:
    """An identity of more items than are looked at first, and one item of another, near the first's edge."""
    angles = np.concatenate([np.linspace(0, 0.5, 40), [1.5]])
    vectors = stamped("v1", np.stack([np.cos(angles), np.sin(angles)], axis=1), identities=["a"] * 40 + ["b"])
    (segment,) = Gallery.of([vectors]).segments
    np.testing.assert_allclose(ambiguity(segment, [segment]), np.cos([*(1.5 - angles[:40]), 1.0]), atol=1e-6)
    # Of unknown identity, each stands alone: its nearest neighbour counts.
    (segment,) = Gallery.of([stamped("v1", vectors.vectors_ND)]).segments
    step = 0.5 / 39
    np.testing.assert_allclose(ambiguity(segment, [segment]), np.cos([*[step] * 40, 1.0]), atol=1e-6)
    (segment,) = Gallery.of([stamped("v1", [[1, 0]])]).segments
    assert ambiguity(segment, [segment]).tolist() == [-np.inf]


def test_uncertainty_compares_items_of_one_generation_only() -> None:
    first = stamped("v1", [[1, 0], [0.6, 0.8]], ["a", "b"], ["1", "2"])
    second = stamped("v2", [[1, 0], [0, 1], [0.8, 0.6]], ["c", "d", "e"], ["1", "2", "3"])
    gallery = Gallery.of([first, second])
    found = [ambiguity(segment, gallery.segments).tolist() for segment in gallery.segments]
    assert found[0] == pytest.approx([0.6, 0.6])
    assert found[1] == pytest.approx([0.8, 0.6, 0.8])
    assert keys_in_order(gallery, stamp("v3", 2), OrderConfig()).to_pylist() == ["c", "e", "a", "b", "d"]
    # What is the new generation's already is not due, and is no one's neighbour.
    assert keys_in_order(gallery, stamp("v2", 2), OrderConfig()).to_pylist() == ["a", "b"]


def test_the_other_orders(tmp_path: Path) -> None:
    keys = ["007", "7", "b", "c", "d"]
    gallery = Gallery.of([stamped("v1", np.eye(5), keys)])
    counts = tmp_path / "counts.csv"
    counts.write_text("key,count\nc,5\n007,2\nzebra,99\nc,4.5\nd,2\n")
    traffic = OrderConfig(order="traffic", traffic=counts)
    assert keys_in_order(gallery, NEW, traffic).to_pylist() == ["c", "007", "d", "7", "b"]
    parquet = tmp_path / "counts.parquet"
    pq.write_table(pa.table({"key": ["b", "7"], "count": [1, 3], "when": ["now", "now"]}), parquet)
    traffic = OrderConfig(order="traffic", traffic=parquet)
    assert keys_in_order(gallery, NEW, traffic).to_pylist() == ["7", "b", "007", "c", "d"]
    random = [keys_in_order(gallery, NEW, OrderConfig(order="random", seed=seed)).to_pylist() for seed in (3, 3, 4)]
    assert random[0] == random[1] == [keys[place] for place in np.random.default_rng([3, 5]).permutation(5)]
    assert sorted(random[2]) == sorted(keys)
    assert random[2] != random[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name,count\na,1\n", "no column 'key'"),
        ("key,count\na,1\nb,-2\n", "count of key 'b' is no number of at least 0"),
        ("key,count\na,\n", "count of key 'a' is no number"),
        ("key,count\na,many\n", "no counts can be read"),
        ("", "no counts can be read"),
    ],
)
def test_counts_that_cannot_be_used(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=told) as caught:
        counts_of(path, pa.array(["a", "b"], pa.large_string()))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no counts can be read"):
        counts_of(tmp_path / "none.parquet", pa.array(["a"], pa.large_string()))


# The curve.


def two_models() -> tuple[Vectors, Vectors, Vectors]:
    """Ten items and a query of each: the old model shows items 5 to 9 as the next one's; the new one is right."""
    (right, wrong), names = right_and_wrong(), [f"i{place}" for place in range(10)]
    queries = stamped("v2", right, [f"q{place}" for place in range(10)], names)
    return stamped("v1", wrong, identities=names), stamped("v2", right, identities=names), queries


def test_curve_by_hand(tmp_path: Path) -> None:
    old, new, queries = two_models()
    folder = tmp_path / "gallery"
    Gallery.of([old]).save(folder)
    write_vectors(tmp_path / "new", new)
    expected = rank1_by_hand(np.random.default_rng([3, 10]).permutation(10).tolist())
    # In two runs: the second goes on with the curve of the first.
    move(folder, queries=queries, order="random", seed=3, batch=1, until=0.4)
    curve = move(folder, queries=queries, order="random", seed=3, batch=1)
    assert [point.moved for point in curve.points] == list(range(11))
    assert [point.share for point in curve.points] == pytest.approx(np.arange(11) / 10)
    assert [point.rank1 for point in curve.points] == pytest.approx(expected)
    assert json.loads((folder / "backfill.json").read_text()) == curve.model_dump(mode="json")
    assert (folder / "backfill.png").read_bytes().startswith(b"\x89PNG")
    # Points that a rollback has made void are measured anew.
    roll_back(folder)
    curve = move(folder, queries=queries, order="random", seed=3, batch=5)
    assert [point.rank1 for point in curve.points] == pytest.approx([expected[0], expected[5], expected[10]])


def test_a_query_does_not_find_itself() -> None:
    """Two items of one identity, one of another; all of them are queries, and one more that has no mate."""
    vectors, names = np.array([[1, 0], [0, 1], [0.6, 0.8], [1, 0]]), ["a", "a", "b", "c"]
    gallery = Gallery.of([stamped("v1", vectors[:3], identities=names[:3])])
    queries = stamped("v1", vectors, identities=names)
    # k000 finds k002 before its mate, k001 too; k002 and k003 have no mates and do not count.
    assert Judge(queries, gallery).rank1(gallery) == 0
    near = stamped("v1", [[1, 0], [0.9, 0.1], [0.6, 0.8]], identities=names[:3])
    assert Judge(queries, Gallery.of([near])).rank1(Gallery.of([near])) == 0.5
    with pytest.raises(DataError, match="none of the 2 queries has an item"):
        Judge(queries.take(np.array([2, 3])), gallery)
    with pytest.raises(DataError, match="query 'k000' has no identity"):
        Judge(stamped("v1", vectors), gallery)


def test_a_query_is_not_helped_by_many_equal_items() -> None:
    """Forty mates and one item of another identity, all with one vector: the tie goes against the query."""
    same, names = np.tile([[1.0, 0]], (41, 1)), ["a"] * 40 + ["b"]
    tied = Gallery.of([stamped("v1", same, identities=names)])
    query = stamped("v1", [[1, 0]], ["q"], ["a"])
    assert Judge(query, tied).rank1(tied) == 0
    alone = Gallery.of([stamped("v1", same[:40], identities=names[:40])])
    assert Judge(query, alone).rank1(alone) == 1


# Moving, stopping, going on, going back.


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_a_backfill_in_parts(kind: Any, tmp_path: Path) -> None:
    old, new = old_and_new()
    folder = tmp_path / "gallery"
    Gallery.of([old], IndexConfig(kind=kind, lists=2)).save(folder)
    write_vectors(tmp_path / "new", new)
    order = keys_in_order(Gallery.load(folder), NEW, OrderConfig()).to_pylist()
    move(folder, batch=7, until=0.25)
    assert moved(folder) == sorted(order[:15])
    assert [part.rows for part in GalleryFolder(folder).read().parts] == [60, 7, 7, 1]
    move(folder, batch=100, until=0.25)
    move(folder, until=0.5)
    assert moved(folder) == sorted(order[:30])
    assert [part.rows for part in GalleryFolder(folder).read().parts] == [60, 7, 7, 1, 3, 3, 3, 3, 3]
    queries = drawn("v2", 7, 5, seed=8)
    hits = Gallery.load(folder).search(queries, 60, ALLOWED)
    assert [sorted(row) for row in hits.keys_QK.tolist()] == [sorted(order)] * 7
    assert (hits.generations_QK == np.where(np.isin(hits.keys_QK, order[:30]), "v2", "v1")).all()
    with pytest.raises(DataError, match="'v1' on a gallery of 'v2'"):
        Gallery.load(folder).search(drawn("v1", 1, 4, seed=8), 1, ALLOWED)
    move(folder)
    assert Gallery.load(folder).generations() == {"v2": KEYS}


def test_back_to_what_it_was(gallery: Path) -> None:
    before = GalleryFolder(gallery).read()
    with pytest.raises(DataError, match="no backfill is open"):
        roll_back(gallery)
    move(gallery, until=0.5)
    roll_back(gallery)
    assert GalleryFolder(gallery).read() == before
    assert sorted(file.name for file in (gallery / "parts").iterdir()) == ["00001.faiss", "00001.parquet"]
    assert moved(gallery) == []
    move(gallery)
    assert len(moved(gallery)) == KEYS
    roll_back(gallery)
    assert moved(gallery) == []


def test_closing_it(gallery: Path) -> None:
    move(gallery, until=0.5)
    half = state(Gallery.load(gallery))
    prune(gallery)
    assert state(Gallery.load(gallery)) == half
    record = GalleryFolder(gallery).read()
    assert [(part.stamp.generation, part.rows) for part in record.parts] == [("v1", 30), ("v2", 30)]
    assert {file.stem for file in (gallery / "parts").iterdir()} == {part.name for part in record.parts}
    with pytest.raises(DataError, match="no backfill is open"):
        roll_back(gallery)
    move(gallery)
    roll_back(gallery)
    assert state(Gallery.load(gallery)) == half
    move(gallery, batch=KEYS)
    untouched = GalleryFolder(gallery).read().parts[1:]
    prune(gallery)
    assert [part.rows for part in GalleryFolder(gallery).read().parts] == [60]
    assert len(untouched) == 2
    prune(gallery)
    assert moved(gallery) == [f"k{place:03d}" for place in range(KEYS)]


def test_pruning_leaves_whole_parts_alone(gallery: Path) -> None:
    before = GalleryFolder(gallery).read()
    prune(gallery)
    assert GalleryFolder(gallery).read() == before


def test_identities_stay(tmp_path: Path) -> None:
    folder = tmp_path / "gallery"
    Gallery.of([stamped("v1", np.eye(3), identities=["a", "", ""])]).save(folder)
    write_vectors(tmp_path / "new", stamped("v2", np.eye(3), identities=["x", "b", ""]))
    move(folder, batch=2)
    found = Gallery.load(folder)
    assert dict(zip(found.keys().to_pylist(), found.identities().to_pylist(), strict=True)) == {
        "k000": "a",
        "k001": "b",
        "k002": "",
    }


def test_what_is_refused_before_anything_moves(gallery: Path, tmp_path: Path) -> None:
    before = (gallery / "gallery.json").read_bytes()
    with pytest.raises(DataError, match="'v2' on a gallery of 'v1': no verdict is recorded"):
        move(gallery, Verdicts())
    with pytest.raises(DataError, match="queries are of generation 'v1', the new vectors of 'v2'"):
        move(gallery, queries=drawn("v1", 3, 4, seed=1))
    some = StoredVectors(tmp_path, old_and_new()[1].take(np.arange(50)))
    with pytest.raises(DataError, match=r"10 of 60 keys to be moved have no vector in .* \(first: 'k0"):
        backfill(gallery, some, BackfillConfig(), ALLOWED)
    with GalleryFolder(gallery).locked(), pytest.raises(DataError, match="another process changes this gallery"):
        move(gallery)
    with pytest.raises(DataError, match="holds no gallery"):
        prune(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    assert (gallery / "gallery.json").read_bytes() == before
    move(gallery, until=0.1)
    with pytest.raises(DataError, match="a backfill to 'v2' is open, not to 'v3': keep it"):
        backfill(gallery, StoredVectors(tmp_path, drawn("v3", KEYS, 5, seed=7)), BackfillConfig(), ALLOWED)


# Dying.


class Unhurried(StoredVectors):
    """New vectors that take a moment, as a model's do: whoever watches has time to see each batch."""

    def __call__(self, keys: pa.Array) -> Vectors:
        time.sleep(0.02)
        return super().__call__(keys)


def run_backfill(folder: Path) -> None:
    backfill(folder, Unhurried.read(folder.parent / "new"), BackfillConfig(batch=2), ALLOWED)


def run_to_and_fro(folder: Path) -> None:
    for close in (roll_back, prune):
        move(folder, batch=5, until=0.5)
        close(folder)
    move(folder, batch=5)
    prune(folder)


def start(what: Callable[[Path], None], folder: Path) -> Any:
    process = processes.Process(target=what, args=(folder,))
    process.start()
    return process


@pytest.mark.timeout(900)  # two dozen processes, on a busy machine
def test_killed_at_any_moment_every_key_is_there_once_and_it_goes_on(gallery: Path) -> None:
    random = np.random.default_rng(0)
    place, killed_at = GalleryFolder(gallery), []
    for _ in range(2 * KEYS):
        parts = len(place.read().parts)
        process = start(run_backfill, gallery)
        # Kill it a moment after it has moved a batch or two, be it within a file, between two, or after the swap.
        enough = parts + int(random.integers(1, 4))
        while process.is_alive() and len(place.read().parts) < enough:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        process.kill()  # SIGKILL; it may have ended by itself meanwhile
        process.join()
        found = moved(gallery)
        killed_at.append(len(found))
        if len(found) == KEYS:
            break
    assert killed_at == sorted(killed_at)
    assert len(set(killed_at) - {0, KEYS}) >= 5, "it was killed half way"
    move(gallery, batch=2)
    order = [part.rows for part in place.read().parts]
    assert order == [KEYS] + [2] * (KEYS // 2), "no batch came twice"
    assert {file.stem for file in place.parts.iterdir()} == {part.name for part in place.read().parts}
    assert Gallery.load(gallery).generations() == {"v2": KEYS}
    curve = json.loads((gallery / "backfill.json").read_text())
    assert [point["moved"] for point in curve["points"]] == sorted({point["moved"] for point in curve["points"]})


@pytest.mark.timeout(900)
def test_a_reader_always_sees_a_whole_gallery(gallery: Path) -> None:
    process = start(run_to_and_fro, gallery)
    seen = set()
    while process.is_alive():
        seen.add(len([one for one in state(Gallery.load(gallery)).values() if one == "v2"]))
    process.join()
    assert process.exitcode == 0
    assert seen <= set(range(0, KEYS + 1, 5))
    assert [part.rows for part in GalleryFolder(gallery).read().parts] == [KEYS]
    assert len(moved(gallery)) == KEYS


def test_the_job(gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yes = gallery.parent / "yes.json"
    yes.write_text(json.dumps([{"newer": NEW.digest, "older": stamp("v1", 4).digest, "held": True}]))
    counts = gallery.parent / "counts.csv"
    counts.write_text("key,count\nk017,3\nk003,8\n")
    here = ["--gallery", str(gallery)]
    go = [*here, "--vectors", str(gallery.parent / "new"), "--verdicts", str(yes)]
    assert job.main([*go, "--order", "traffic", "--traffic", str(counts), "--batch", "1", "--until", "0.034"]) == 0
    assert "60 keys: 58 of v1, 2 of v2" in capsys.readouterr().out
    assert moved(gallery) == ["k003", "k017"]
    assert job.main([*go, "--order", "random", "--seed", "4", "--until", "0.5"]) == 0
    assert job.main([*here, "--rollback"]) == 0
    assert "60 keys: 60 of v1" in capsys.readouterr().out
    assert job.main([*here, "--rollback"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    for wrong, told in (
        (["--until", "1.5"], "--until 1.5: Input should be less than or equal to 1"),
        (["--batch", "none"], "--batch none"),
        (["--order", "traffic"], "--order traffic --traffic FILE"),
        (["--traffic", str(counts)], "--order traffic --traffic FILE"),
    ):
        assert job.main([*go, *wrong]) == 2
        assert told in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
    assert job.main(go) == 0
    assert job.main([*here, "--prune"]) == 0
    assert "60 keys: 60 of v2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        job.main([*here, "--prune", "--seed", "1"])
