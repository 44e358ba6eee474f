"""Galleries of stamped vectors: against a plain search at odd sizes, what is refused, and what is on disk."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import search as job
from pipeline.errors import DataError
from pipeline.gallery.hits import Hits
from pipeline.gallery.index import IndexConfig
from pipeline.gallery.store import DIGEST, GalleryFolder
from pipeline.schema import digest_json
from pipeline.search import Gallery
from pipeline.stamp import Verdict, Verdicts
from pipeline.vectors import Vectors, write_vectors
from tests.unit.stamped import drawn, held, stamp, stamped

Kind = Literal["flat", "ivf", "hnsw"]
KINDS: tuple[Kind, ...] = ("flat", "ivf", "hnsw")
ALLOWED = held("v3/v2", "v3/v1", "v2/v1")


def plain(queries: Vectors, galleries: list[Vectors], k: int) -> list[list[tuple[str, str, float]]]:
    """(key, generation, cosine) of the k nearest of each query, in float64, one pair at a time."""
    found = []
    for query_D in queries.vectors_ND.astype(float):
        scored = []
        for gallery in galleries:
            cut_D = query_D[: gallery.stamp.dim]
            for key, item_D in zip(gallery.keys.to_pylist(), gallery.vectors_ND.astype(float), strict=True):
                cosine = cut_D @ item_D / np.linalg.norm(cut_D) / np.linalg.norm(item_D)
                scored.append((key, gallery.stamp.generation, float(cosine)))
        found.append(sorted(scored, key=lambda one: (-round(one[2], 7), one[0]))[:k])
    return found


def same(hits: Hits, expected: list[list[tuple[str, str, float]]]) -> None:
    assert hits.keys_QK.tolist() == [[key for key, _, _ in row] for row in expected]
    assert hits.generations_QK.tolist() == [[generation for _, generation, _ in row] for row in expected]
    np.testing.assert_allclose(hits.scores_QK, [[score for *_, score in row] for row in expected], atol=2e-7)


def recall(found: Hits, exact: Hits) -> float:
    pairs = zip(found.keys_QK, exact.keys_QK, strict=True)
    return float(np.mean([len(set(one) & set(other)) / len(other) for one, other in pairs]))


@pytest.mark.parametrize(
    ("sizes", "dims", "k"), [((1,), (3,), 5), ((23,), (7,), 5), ((19, 1), (5, 5), 7), ((13, 29, 7), (5, 3, 11), 4)]
)
def test_a_flat_gallery_is_a_plain_search(sizes: tuple[int, ...], dims: tuple[int, ...], k: int) -> None:
    galleries = [
        drawn(f"v{place + 1}", size, dim, seed=place, first=100 * place)
        for place, (size, dim) in enumerate(zip(sizes, dims, strict=True))
    ]
    queries = drawn("v3", 17, max(dims) + (len(sizes) < 3), seed=9)
    gallery = Gallery.of(galleries)
    assert len(gallery) == sum(sizes)
    same(gallery.search(queries, k, ALLOWED), plain(queries, galleries, k))


def test_a_larger_query_is_cut_and_renormalised() -> None:
    old = stamped("v1", [[1, 0], [0.6, 0.8]])
    query = stamped("v2", [[3, 4, 100]], ["q"])
    hits = Gallery.of([old]).search(query, 2, ALLOWED)
    assert hits.keys_QK.tolist() == [["k001", "k000"]]
    np.testing.assert_allclose(hits.scores_QK, [[0.6 * 0.6 + 0.8 * 0.8, 0.6]], atol=1e-7)
    with pytest.raises(DataError, match="all zeros"):
        Gallery.of([old]).search(stamped("v2", [[0, 0, 1]], ["q"]), 2, ALLOWED)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_stand_in_the_order_of_keys_however_the_gallery_is_cut(kind: Kind) -> None:
    config = IndexConfig(kind=kind, lists=1, probes=1, links=64, ef=200)
    random = np.random.default_rng(0)
    vectors_ND = random.standard_normal((90, 6))
    vectors_ND[10:50] = vectors_ND[10] * random.uniform(0.5, 2, (40, 1))  # more equal items than are fetched at first
    keys = [f"k{key:03d}" for key in random.permutation(90)]
    queries = stamped("v1", np.vstack([vectors_ND[10] + 0.3 * random.standard_normal((30, 6)), vectors_ND[10]]))
    whole = stamped("v1", vectors_ND, keys)
    hits = Gallery.of([whole], config).search(queries, 5, ALLOWED)
    assert hits.keys_QK[-1].tolist() == sorted(keys[10:50])[:5]
    if kind == "hnsw":
        return  # a graph of the same vectors in other parts is another graph
    for edges in ((0, 40, 90), (0, 12, 33, 90)):
        parts = [whole.take(np.arange(first, last)) for first, last in itertools.pairwise(edges)]
        cut = Gallery.folded([Gallery.of([part], config).segments[0] for part in parts], config)
        assert len(cut.segments) == len(parts)
        for found in (
            cut.search(queries, 5, ALLOWED),
            Hits.stacked([cut.search(queries.take(np.array([place])), 5, ALLOWED) for place in range(31)]),
        ):
            assert found.keys_QK.tolist() == hits.keys_QK.tolist()
            assert found.scores_QK.tolist() == hits.scores_QK.tolist()


def clustered(generation: str, seed: int, count: int = 2000) -> Vectors:
    centre = np.random.default_rng(5).standard_normal((100, 24))
    random = np.random.default_rng(seed)
    return stamped(
        generation,
        centre[np.arange(count) % 100] + 0.4 * random.standard_normal((count, 24)),
        [f"k{place:05d}" for place in range(count)],
    )


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_fast_indexes_find_nearly_all(kind: Kind) -> None:
    gallery, queries = clustered("v1", 1), clustered("v1", 2, 50)
    exact = Gallery.of([gallery]).search(queries, 10, ALLOWED)
    fast = Gallery.of([gallery], IndexConfig(kind=kind, probes=12))
    assert recall(fast.search(queries, 10, ALLOWED), exact) > 0.95
    # So they do among the few that are left of an old generation.
    moved = clustered("v2", 3).take(np.random.default_rng(0).permutation(2000)[:1900])
    left, mixed = (one.with_part(Gallery.of([moved], one.config).segments[0]) for one in (fast, Gallery.of([gallery])))
    old, exact_old = (Gallery(one.segments[:1], one.config) for one in (left, mixed))
    assert len(old) == 100
    assert recall(old.search(queries, 10, ALLOWED), exact_old.search(queries, 10, ALLOWED)) > 0.9
    queries = clustered("v2", 4, 50)
    assert recall(left.search(queries, 10, ALLOWED), mixed.search(queries, 10, ALLOWED)) > 0.9


def test_all_lists_probed_is_a_flat_search_and_few_pad() -> None:
    gallery, queries = clustered("v1", 1, 400), clustered("v1", 2, 20)
    exact = Gallery.of([gallery]).search(queries, 7, ALLOWED)
    every = Gallery.of([gallery], IndexConfig(kind="ivf", lists=9, probes=9)).search(queries, 7, ALLOWED)
    assert every.keys_QK.tolist() == exact.keys_QK.tolist()
    assert every.scores_QK.tolist() == exact.scores_QK.tolist()
    one = Gallery.of([gallery], IndexConfig(kind="ivf", lists=10, probes=1)).search(queries, 300, ALLOWED)
    padding = one.scores_QK == -np.inf
    assert padding.any()
    assert not padding.all(axis=1).any()
    assert ((one.keys_QK == "") == padding).all()
    assert ((one.generations_QK == "") == padding).all()


def test_a_key_is_found_where_it_came_last() -> None:
    old, new = drawn("v1", 30, 4, seed=1), drawn("v2", 12, 4, seed=2, first=9)
    gallery = Gallery.of([old]).with_part(Gallery.of([new]).segments[0])
    assert sorted(gallery.keys().to_pylist()) == old.keys.to_pylist()
    assert gallery.generations() == {"v1": 18, "v2": 12}
    queries = drawn("v2", 11, 4, seed=3)
    left = old.take(np.array([*range(9), *range(21, 30)]))
    same(gallery.search(queries, 30, ALLOWED), plain(queries, [left, new], 30))
    joined = gallery.joined()
    assert [len(one.keys) for one in joined.segments] == [18, 12]
    assert joined.search(queries, 30, ALLOWED).keys_QK.tolist() == gallery.search(queries, 30, ALLOWED).keys_QK.tolist()
    assert gallery.first(1).generations() == {"v1": 30}


def test_what_may_not_be_compared_is_refused() -> None:
    gallery = Gallery.of([drawn("v1", 5, 4, seed=1), drawn("v2", 5, 4, seed=2, first=10)])
    queries = drawn("v3", 2, 4, seed=3)
    with pytest.raises(DataError, match=r"'v3' on a gallery of 'v1': no verdict is recorded") as caught:
        gallery.search(queries, 1, held("v3/v2"))
    assert "\n" not in str(caught.value)
    no = Verdicts(
        [Verdict(stamp("v3", 4).digest, stamp(older, 4).digest, older == "v1", "rank1 -3.0") for older in ("v1", "v2")]
    )
    with pytest.raises(DataError, match=r"'v3' on a gallery of 'v2'.*incompatible \(rank1 -3.0\)"):
        gallery.search(queries, 1, no)
    with pytest.raises(DataError, match="families 'others' and 'toys' share no space"):
        gallery.search(stamped("v3", np.ones((1, 4)), family="others"), 1, ALLOWED)
    with pytest.raises(DataError, match="queries of 'v3' have 3 dimensions, the gallery of 'v1' has 4"):
        gallery.search(drawn("v3", 2, 3, seed=3), 1, ALLOWED)
    # Its own generation needs no verdict, but then none of the others may be in the gallery.
    with pytest.raises(DataError, match="'v1' on a gallery of 'v2'"):
        gallery.search(drawn("v1", 2, 4, seed=3), 1, Verdicts())
    assert len(Gallery.of([drawn("v1", 5, 4, seed=1)]).search(drawn("v1", 2, 4, seed=3), 1, Verdicts())) == 2


def test_a_key_twice_is_refused() -> None:
    with pytest.raises(DataError, match="key 'k004' comes in two"):
        Gallery.of([drawn("v1", 5, 4, seed=1), drawn("v2", 5, 4, seed=1, first=4)])
    one = drawn("v1", 9, 4, seed=1)
    assert len(Gallery.of([one.take(np.arange(4)), one.take(np.arange(4, 9))]).segments) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_finds_the_same(kind: Kind, tmp_path: Path) -> None:
    old, new = clustered("v1", 1, 300), clustered("v2", 2, 500).take(np.arange(300, 500))
    gallery = Gallery.of([old, new], IndexConfig(kind=kind, lists=7))
    gallery.save(tmp_path / "g")
    loaded = Gallery.load(tmp_path / "g")
    assert loaded.config == gallery.config
    assert [one.stamp for one in loaded.segments] == [one.stamp for one in gallery.segments]
    assert [one.stamp.generation for one in loaded.segments] == ["v1", "v2"]
    queries = clustered("v2", 3, 40)
    hits, again = (one.search(queries, 9, ALLOWED) for one in (gallery, loaded))
    assert hits.keys_QK.tolist() == again.keys_QK.tolist()
    assert hits.scores_QK.tolist() == again.scores_QK.tolist()
    with pytest.raises(DataError, match="holds a gallery already"):
        gallery.save(tmp_path / "g")
    assert not list(tmp_path.rglob("*.tmp"))


def damage(how: str, file: Path) -> None:
    match how:
        case "cut":
            file.write_bytes(file.read_bytes()[:-9])
        case "changed":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "missing":
            file.unlink()


@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
@pytest.mark.parametrize("name", ["gallery.json", "parts/00001.parquet", "parts/00002.faiss"])
def test_a_damaged_file_is_refused(how: str, name: str, tmp_path: Path) -> None:
    Gallery.of([drawn("v1", 5, 4, seed=1), drawn("v2", 5, 4, seed=2, first=10)]).save(tmp_path)
    damage(how, tmp_path / name)
    with pytest.raises(DataError) as caught:
        Gallery.load(tmp_path)
    assert name in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_stamp_is_refused(tmp_path: Path) -> None:
    Gallery.of([drawn("v1", 5, 4, seed=1)]).save(tmp_path / "g")
    keys, record = tmp_path / "g" / "parts" / "00001.parquet", tmp_path / "g" / "gallery.json"
    text, content = record.read_text(), keys.read_bytes()
    table = pq.read_table(keys)
    pq.write_table(table.replace_schema_metadata({"bct.stamp": stamp("v9", 4).model_dump_json()}), keys)
    with pytest.raises(DataError, match=r"parts/00001.parquet is not the file that was written"):
        Gallery.load(tmp_path / "g")
    keys.write_bytes(content)
    record.write_text(text.replace('"v1"', '"v9"'))
    with pytest.raises(DataError, match=r"gallery.json was changed"):
        Gallery.load(tmp_path / "g")
    value = json.loads(text.replace('"v1"', '"v9"'))
    value.pop(DIGEST)
    record.write_text(json.dumps(value | {DIGEST: digest_json(value)}))
    with pytest.raises(DataError, match=r"stamped by generation 'v1' .* says 'v9'"):
        Gallery.load(tmp_path / "g")
    record.write_text("[]")
    with pytest.raises(DataError, match="cannot be read"):
        Gallery.load(tmp_path / "g")
    record.write_text(text)
    assert len(Gallery.load(tmp_path / "g")) == 5


def test_a_build_that_died_leaves_no_gallery(tmp_path: Path) -> None:
    gallery = Gallery.of([drawn("v1", 5, 4, seed=1)])
    place = GalleryFolder(tmp_path)
    with place.locked(new=True):
        place.write(gallery.segments[0])
    with pytest.raises(DataError, match="holds no gallery"):
        Gallery.load(tmp_path)
    gallery.save(tmp_path)
    assert sorted(file.name for file in place.parts.iterdir()) == ["00001.faiss", "00001.parquet"]
    with pytest.raises(DataError, match="holds no gallery"):
        Gallery.load(tmp_path / "other")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    gallery = Gallery.of([drawn("v1", 5, 4, seed=1)])
    with GalleryFolder(tmp_path).locked(new=True), pytest.raises(DataError, match="another process changes"):
        gallery.save(tmp_path)
    gallery.save(tmp_path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Vector files of two generations, and verdicts."""
    paths = {name: tmp_path / name for name in ("old", "new.parquet", "queries.parquet", "yes.json", "gallery")}
    old = drawn("v1", 20, 4, seed=1)
    write_vectors(paths["old"] / "0.parquet", old.take(np.arange(9)))
    write_vectors(paths["old"] / "1.parquet", old.take(np.arange(9, 20)))
    write_vectors(paths["new.parquet"], drawn("v2", 5, 4, seed=2, first=50))
    write_vectors(paths["queries.parquet"], drawn("v2", 3, 4, seed=3))
    entry: dict[str, Any] = {"newer": stamp("v2", 4).digest, "older": stamp("v1", 4).digest, "held": True}
    paths["yes.json"].write_text(json.dumps([entry]))
    return paths


def test_the_job(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    gallery = str(files["gallery"])
    build = ["build", "--vectors", str(files["old"]), "--vectors", str(files["new.parquet"]), "--gallery", gallery]
    assert job.main([*build, "--kind", "ivf", "--lists", "2"]) == 0
    assert "25 keys: 20 of v1, 5 of v2; ivf" in capsys.readouterr().out
    query = ["query", "--gallery", gallery, "--queries", str(files["queries.parquet"]), "-k", "4"]
    assert job.main([*query, "--verdicts", str(files["yes.json"])]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["query"] for row in told] == ["k000", "k001", "k002"]
    hits = Gallery.load(files["gallery"]).search(drawn("v2", 3, 4, seed=3), 4, ALLOWED)
    assert [[hit["key"] for hit in row["hits"]] for row in told] == hits.keys_QK.tolist()
    assert {hit["identity"] for row in told for hit in row["hits"]} == {None}
    for name in ("hits.json", "hits.parquet"):
        out = files["gallery"].parent / "out" / name
        assert job.main([*query, "--verdicts", str(files["yes.json"]), "--out", str(out)]) == 0
        if name == "hits.json":
            assert [json.loads(line) for line in out.read_text().splitlines()] == told
            continue
        rows = pq.read_table(out).to_pylist()
        assert [(row["query"], row["rank"], row["key"]) for row in rows] == [
            (one["query"], place + 1, hit["key"]) for one in told for place, hit in enumerate(one["hits"])
        ]


def test_the_job_refuses_in_one_line(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    gallery, queries = str(files["gallery"]), str(files["queries.parquet"])
    build = ["build", "--vectors", str(files["old"]), "--gallery", gallery]
    assert job.main([*build, "--kind", "tree"]) == 2
    assert capsys.readouterr().err.startswith("error: --kind tree: Input should be 'flat', 'ivf' or 'hnsw'")
    assert job.main([*build, "--probes", "0"]) == 2
    assert "--probes 0" in capsys.readouterr().err
    assert job.main(["query", "--gallery", gallery, "--queries", queries]) == 2
    assert "holds no gallery" in capsys.readouterr().err
    assert job.main(build) == 0
    for text, told in (
        ("[]", "no verdict is recorded"),
        ('[{"newer": "a"}]', "0.older: Field required"),
        ("{", "the file"),
    ):
        files["yes.json"].write_text(text)
        assert (
            job.main(["query", "--gallery", gallery, "--queries", queries, "--verdicts", str(files["yes.json"])]) == 2
        )
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    shutil.rmtree(files["old"])
    assert job.main(build) == 2
    assert "holds no vectors" in capsys.readouterr().err
