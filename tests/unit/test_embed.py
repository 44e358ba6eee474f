"""Embedding real images with a real, tiny generation on real Ray: what is written, gone on with, and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.data.finishing import write_data_set
from pipeline.data.loader import iterate_images
from pipeline.data.manifest import Manifest
from pipeline.data.preprocess import PreprocessConfig
from pipeline.data.sources import (
    FolderSource,
    FolderSourceConfig,
    ListSource,
    ListSourceConfig,
    Sample,
    folder_key,
)
from pipeline.data.store_remote import StoreConfig
from pipeline.embed import EmbedConfig, embed
from pipeline.embedding.output import Header, Output, PartRecord
from pipeline.embedding.parts import Images, Parts, ShardParts, SourceParts
from pipeline.embedding.worker import PartEmbedder
from pipeline.errors import ClusterError, DataError, GenerationError
from pipeline.generation import Generation
from pipeline.identities import IdentityTable
from pipeline.schema import digest_json
from pipeline.stamp import Stamp
from pipeline.vectors import Dtype, Float32, Vectors, read_vectors, vector_files, write_vectors
from tests.pictures import encode, noise
from tests.unit.test_registry import make_generation

ROOT = Path(__file__).parents[2]
IDENTITIES = tuple(f"id-{number}" for number in range(4))
SIZES = (7, 5, 1, 6)
GALLERY = (0, 3, 8, 12)  # the only one of the third shard, none of the fourth
HERE = EmbedConfig(batch=3, actors=0)
BROKEN = {9: b"no image at all", 10: encode(noise(10, 32), "JPEG")[:60], 18: encode(noise(18, 32))[:50]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="bct-ray-", dir="/tmp") as folder:
        ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generations, a sound data set, and one with images that do not decode."""
    home = tmp_path_factory.mktemp("embed")
    for name, seed in (("v1", 0), ("v2", 1)):
        make_generation(home, name, seed=seed)
    make_shards(home / "shards", {})
    make_shards(home / "broken", BROKEN)
    return home


def role(number: int) -> str:
    return "gallery" if number in GALLERY else "query"


def make_shards(folder: Path, broken: dict[int, bytes]) -> Manifest:
    """Pictures of noise in shards of SIZES, sample n of identity n % 4."""
    table, numbers = IdentityTable(IDENTITIES), iter(range(sum(SIZES)))
    shards = []
    for size in SIZES:
        taken = [next(numbers) for _ in range(size)]
        shards.append(
            [
                Sample(f"s{n:03d}", broken.get(n, encode(noise(n, 32))), "png", IDENTITIES[n % 4], {"role": role(n)})
                for n in taken
            ]
        )
    return write_data_set(folder, folder.name, table, shards)


def v1(home: Path) -> Generation:
    return Generation(home / "v1.0")


def shards(folder: Path, where: tuple[str, str] | None = None) -> ShardParts:
    return ShardParts(str(folder), StoreConfig(), where)


def expected(home: Path, folder: Path) -> dict[str, Float32]:
    """The generation's own features of a sound data set, of length 1, by key."""
    generation = v1(home)
    preprocess = generation.record.preprocess
    assert preprocess is not None
    with torch.no_grad():
        blocks = [
            generation.load_backbone()(images)
            for images, _ in iterate_images(folder, Manifest.load(folder), preprocess, 5)
        ]
    return dict(zip((f"s{n:03d}" for n in range(sum(SIZES))), F.normalize(torch.cat(blocks)).numpy(), strict=True))


def written(out: Path) -> dict[str, tuple[str, Float32]]:
    vectors = read_vectors(vector_files(out))
    columns = zip(vectors.keys.to_pylist(), vectors.identities.to_pylist(), vectors.vectors_ND, strict=True)
    return {key: (identity, vector) for key, identity, vector in columns}


def check(home: Path, out: Path, without: tuple[int, ...] = ()) -> None:
    """Each image has one vector, the generation's own."""
    of_key, there = expected(home, home / "shards"), written(out)
    assert sorted(there) == [f"s{n:03d}" for n in range(sum(SIZES)) if n not in without]
    for key, (identity, vector) in there.items():
        assert identity == IDENTITIES[int(key[1:]) % 4]
        np.testing.assert_allclose(vector, of_key[key], atol=1e-5, rtol=0)


def changes(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}


def open_output(generation: Generation, parts: Parts, out: Path, dtype: Dtype = "float32") -> Output:
    stamp = Stamp.of(generation)
    cut = digest_json(parts.names)
    header = Header(stamp=stamp, dtype=dtype, data=parts.name, data_digest=parts.digest, parts_digest=cut)
    return Output(out, header, parts.names)


def embedder(generation: Generation, parts: Parts, output: Output, limit: int = 0) -> PartEmbedder:
    assert generation.record.preprocess is not None
    model, preprocess = generation.load_backbone(), generation.record.preprocess
    device = torch.device("cpu")
    return PartEmbedder(model, preprocess, parts, output, batch=3, limit=limit, threads=1, device=device)


def embed_and_die(home: Path, out: Path) -> None:
    """Embed the first part, and be killed while the second one's vectors are on their way to the disk."""
    parts = shards(home / "shards")
    output = open_output(v1(home), parts, out)
    mine = embedder(v1(home), parts, output)
    with output.alone():
        output.begin()
        mine.embed(0)
        os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)  # noqa: ARG005
        mine.embed(1)


def test_every_image_has_the_generations_own_vector(home: Path, tmp_path: Path) -> None:
    told = embed(v1(home), shards(home / "shards"), tmp_path / "out", HERE)
    check(home, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "_embed.json").read_text()) == told
    assert (told["samples"], told["rows"], told["rejected"], told["complete"]) == (19, 19, 0, True)
    assert [(one["part"], one["samples"]) for one in told["parts"]] == [
        (f"shard-{n:06d}.tar", size) for n, size in enumerate(SIZES)
    ]
    assert [one["file"] for one in told["parts"]] == sorted(changes(tmp_path / "out"))
    stamp = read_vectors(vector_files(tmp_path / "out")).stamp
    assert stamp == Stamp.of(v1(home)) == Stamp.model_validate(told["stamp"])
    assert told["data_digest"] == Manifest.load(home / "shards").digest
    assert {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".parquet"} == {"_embed.json", ".lock"}
    before = changes(tmp_path / "out")
    assert embed(v1(home), shards(home / "shards"), tmp_path / "out", HERE) == told
    assert changes(tmp_path / "out") == before


def test_samples_are_chosen_by_an_attribute(home: Path, tmp_path: Path) -> None:
    gallery, queries, of_key = tmp_path / "gallery", tmp_path / "queries", expected(home, home / "shards")
    told = embed(v1(home), shards(home / "shards", ("role", "gallery")), gallery, HERE)
    assert (told["rows"], told["samples"]) == (len(GALLERY), len(GALLERY))
    there = written(gallery)
    assert sorted(there) == [f"s{n:03d}" for n in GALLERY]
    for key, (identity, vector) in there.items():
        assert identity == IDENTITIES[int(key[1:]) % 4]
        np.testing.assert_allclose(vector, of_key[key], atol=1e-5, rtol=0)
    with pytest.raises(DataError, match=r"of data 'shards, role=gallery' .*, not 'shards, role=query'"):
        embed(v1(home), shards(home / "shards", ("role", "query")), gallery, HERE)
    embed(v1(home), shards(home / "shards", ("role", "query")), queries, HERE)
    assert sorted(written(gallery) | written(queries)) == sorted(of_key)
    with pytest.raises(DataError, match=r"'s0\d\d' has no attribute 'colour' for --where; its .json has identity"):
        embed(v1(home), shards(home / "shards", ("colour", "red")), tmp_path / "none", HERE)


def test_a_killed_run_is_gone_on_with(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "import sys; from pathlib import Path; from tests.unit.test_embed import embed_and_die as die; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}die(Path({str(home)!r}), Path({str(out)!r}))"], cwd=ROOT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    before = changes(out)
    assert list(before) == ["part-000000.parquet"]
    assert len(list(out.glob(".part-000001.parquet.*.tmp"))) == 1, "the second part is half written"
    embed(v1(home), shards(home / "shards"), out, HERE)
    check(home, out)
    assert changes(out).items() >= before.items(), "the first part was left as it was"
    assert not list(out.glob(".*.tmp"))


def test_what_is_cut_or_replaced_is_embedded_again(home: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "out", shards(home / "shards")
    embed(v1(home), parts, out, HERE)
    before = changes(out)
    cut, other, gone = (out / f"part-00000{n}.parquet" for n in (0, 1, 3))
    cut.write_bytes(cut.read_bytes()[:-100])
    found = read_vectors([other])
    stamp = found.stamp.model_copy(update={"generation": "v9"})
    write_vectors(other, Vectors(stamp, found.keys, found.identities, -found.vectors_ND))
    gone.unlink()
    embed(v1(home), parts, out, HERE)
    check(home, out)
    after = changes(out)
    assert [name for name in after if after[name] == before[name]] == ["part-000002.parquet"]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("generation", r"holds vectors of generation glyphs/v1 \(\w{12}\), not glyphs/v2 \(\w{12}\); choose another"),
        ("data", r"holds vectors of data 'shards' \(\w{12}\), not 'broken' \(\w{12}\); choose another --out"),
        ("dtype", "holds vectors of type float32, not float16; choose another --out"),
        ("broken", r"_embed.json cannot be read \(JSONDecodeError\); choose another --out"),
        ("unknown", "holds part-000000.parquet, but no _embed.json that tells of what; choose another --out"),
    ],
)
def test_another_runs_folder_is_refused(home: Path, tmp_path: Path, what: str, told: str) -> None:
    parts = shards(home / "shards")
    with open_output(v1(home), parts, tmp_path).alone():
        open_output(v1(home), parts, tmp_path).begin()
    (tmp_path / "part-000000.parquet").touch()
    about = tmp_path / "_embed.json"
    generation = Generation(home / "v2.1") if what == "generation" else v1(home)
    if what == "broken":
        about.write_text("{")
    elif what == "unknown":
        about.unlink()
    there = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    config = HERE.model_copy(update={"dtype": "float16"}) if what == "dtype" else HERE
    with pytest.raises(DataError, match=told) as caught:
        embed(generation, shards(home / "broken") if what == "data" else parts, tmp_path, config)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == there


def test_two_runs_do_not_share_a_folder(home: Path, tmp_path: Path) -> None:
    parts = shards(home / "shards")
    with (
        open_output(v1(home), parts, tmp_path).alone(),
        pytest.raises(DataError, match=r"another run embeds into .*; wait for it"),
    ):
        embed(v1(home), parts, tmp_path, HERE)


def test_images_that_do_not_decode_are_recorded(home: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "out", shards(home / "broken")
    with pytest.raises(DataError, match=r"\d images have no vector, more than --limit 1; last: 's\d+' of shard-00000"):
        embed(v1(home), parts, out, EmbedConfig(batch=3, actors=0, limit=1))
    assert not json.loads((out / "_embed.json").read_text())["complete"]
    told = embed(v1(home), parts, out, EmbedConfig(batch=3, actors=0, limit=3))
    check(home, out, tuple(BROKEN))
    assert (told["samples"], told["rows"], told["rejected"]) == (19, 16, 3)
    rejects = {one["key"]: (part["part"], one["reason"]) for part in told["parts"] for one in part["rejects"]}
    assert {key: part for key, (part, _) in rejects.items()} == {
        "s009": "shard-000001.tar",
        "s010": "shard-000001.tar",
        "s018": "shard-000003.tar",
    }
    assert rejects["s009"][1] == "cannot identify image file"
    (out / "part-000001.parquet").unlink()
    assert embed(v1(home), parts, out, EmbedConfig(batch=3, actors=0, limit=3)) == told


def test_a_part_without_a_vector_has_no_file(home: Path, tmp_path: Path) -> None:
    lone = sum(SIZES[:2])  # alone in its shard
    make_shards(tmp_path / "shards", {lone: b"nothing"})
    parts, out = shards(tmp_path / "shards"), tmp_path / "out"
    told = embed(v1(home), parts, out, HERE)
    assert [one["file"] is None for one in told["parts"]] == [False, False, True, False]
    assert len(written(out)) == 18
    before = changes(out)
    assert embed(v1(home), parts, out, HERE) == told
    assert changes(out) == before
    make_shards(tmp_path / "none", dict.fromkeys(range(19), b"nothing"))
    with pytest.raises(DataError, match=r"no image of none was embedded \(cannot identify image file\); look there"):
        embed(v1(home), shards(tmp_path / "none"), tmp_path / "nothing", HERE)


def test_keys_that_come_twice_are_refused_before_work(home: Path, tmp_path: Path) -> None:
    samples = [[Sample("a", encode(noise(n, 32)), "png", IDENTITIES[0], {})] for n in range(2)]
    write_data_set(tmp_path / "shards", "twice", IdentityTable(IDENTITIES), samples)
    with pytest.raises(DataError, match=r"two samples have the key 'a'.*pack the tars anew"):
        embed(v1(home), shards(tmp_path / "shards"), tmp_path / "out", HERE)
    listed = tmp_path / "list.csv"
    (tmp_path / "1.png").write_bytes(encode(noise(1, 32)))
    listed.write_text("path,identity\n1.png,ann\n1.png,bob\n")
    with pytest.raises(DataError, match=r"list\.csv names '1\.png' twice; remove one of the rows"):
        embed(v1(home), SourceParts(ListSource(ListSourceConfig(path=listed))), tmp_path / "out", HERE)
    assert not (tmp_path / "out").exists()


def test_lists_and_folders_are_embedded_as_shards_are(home: Path, tmp_path: Path) -> None:
    rows = ["path,identity"]
    for n in range(sum(SIZES)):
        path = tmp_path / "images" / IDENTITIES[n % 4] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise(n, 32)))
        rows.append(f"images/{IDENTITIES[n % 4]}/{n}.png,{IDENTITIES[n % 4]}")
    (tmp_path / "list.csv").write_text("\n".join([*rows, "images/gone.png,nobody", "images/empty.png,nobody"]))
    (tmp_path / "images" / "empty.png").touch()
    config = ListSourceConfig(path=tmp_path / "list.csv", rows=8, skip_missing=True)
    told = embed(v1(home), SourceParts(ListSource(config)), tmp_path / "listed", HERE)
    assert [one["part"] for one in told["parts"]] == ["0-8", "8-16", "16-21"]
    assert [one for part in told["parts"] for one in part["rejects"]] == [
        {"key": folder_key("images/gone.png"), "reason": "file is missing"},
        {"key": folder_key("images/empty.png"), "reason": "empty"},
    ]
    source = FolderSource(FolderSourceConfig(path=tmp_path / "images", parts=3))
    embed(v1(home), SourceParts(source), tmp_path / "folder", HERE)
    of_key = expected(home, home / "shards")
    for out, prefix in (("listed", "images/"), ("folder", "")):
        there = written(tmp_path / out)
        assert len(there) == sum(SIZES)
        for n in range(sum(SIZES)):
            identity, vector = there[folder_key(f"{prefix}{IDENTITIES[n % 4]}/{n}.png")]
            assert identity == IDENTITIES[n % 4]
            np.testing.assert_allclose(vector, of_key[f"s{n:03d}"], atol=1e-5, rtol=0)
    recut = ListSourceConfig(path=tmp_path / "list.csv", rows=5, skip_missing=True)
    with pytest.raises(DataError, match=r"holds vectors of parts \w{12}, not \w{12}"):
        embed(v1(home), SourceParts(ListSource(recut)), tmp_path / "listed", HERE)


def test_half_precision_is_that_of_the_file_alone(home: Path, tmp_path: Path) -> None:
    parts = shards(home / "shards")
    output = open_output(v1(home), parts, tmp_path / "out", "float16")
    with output.alone():
        output.begin()
        record = embedder(v1(home), parts, output).embed(0)
    assert record.rows == SIZES[0]
    found, of_key = read_vectors([output.file(0)]), expected(home, home / "shards")
    np.testing.assert_allclose(found.vectors_ND, [of_key[key] for key in found.keys.to_pylist()], atol=1e-3)
    assert isinstance(output._find(0, None), PartRecord)


def test_a_feature_without_a_direction_is_refused(home: Path, tmp_path: Path) -> None:
    parts = shards(home / "shards")
    output = open_output(v1(home), parts, tmp_path)
    for value in (0.0, float("nan")):
        linear = nn.Linear(32 * 32, 8)
        nn.init.constant_(linear.weight, value)
        nn.init.constant_(linear.bias, value)
        model, device = nn.Sequential(nn.Flatten(), linear), torch.device("cpu")
        mine = PartEmbedder(model, PreprocessConfig(), parts, output, batch=3, limit=0, threads=1, device=device)
        with pytest.raises(GenerationError, match="generation 'v1' gives image 's000' a feature that is zero or no"):
            mine.embed(0)
    assert not changes(tmp_path)


@pytest.mark.usefixtures("cluster")
def test_actors_of_ray_do_the_same(home: Path, tmp_path: Path) -> None:
    told = embed(v1(home), shards(home / "shards"), tmp_path / "out", EmbedConfig(batch=3, actors=2))
    check(home, tmp_path / "out")
    assert told == embed(v1(home), shards(home / "shards"), tmp_path / "here", HERE)
    rejecting = EmbedConfig(batch=3, limit=1)  # as many actors as there is room for
    with pytest.raises(DataError, match=r"^\d images have no vector, more than --limit 1; last: 's\d+' of shard-00000"):
        embed(v1(home), shards(home / "broken"), tmp_path / "broken", rejecting)
    embed(v1(home), shards(home / "broken"), tmp_path / "broken", EmbedConfig(batch=3, limit=3))
    check(home, tmp_path / "broken", tuple(BROKEN))


class Deadly(ShardParts):
    """Its last shard ends whoever reads it, as a crash of a decoder does."""

    def read(self, number: int, size: int) -> Generator[Images, None, None]:
        if number == len(SIZES) - 1:
            os._exit(1)
        return super().read(number, size)

    def __reduce__(self) -> tuple[Any, ...]:
        return Deadly, super().__reduce__()[1]


@pytest.mark.faults
@pytest.mark.usefixtures("cluster")
def test_actors_that_die_are_replaced_a_few_times(home: Path, tmp_path: Path) -> None:
    deadly = Deadly(str(home / "shards"), StoreConfig())
    with pytest.raises(ClusterError, match=r"embedding on Ray failed \(.*run it again: it goes on"):
        embed(v1(home), deadly, tmp_path, EmbedConfig(batch=3, actors=1))
    embed(v1(home), shards(home / "shards"), tmp_path, HERE)
    check(home, tmp_path)


@pytest.mark.usefixtures("cluster")
def test_more_than_the_cluster_has_is_refused(home: Path, tmp_path: Path) -> None:
    for config, told in (
        (EmbedConfig(actors=3), "3 embedding processes need 1 CPU each, but the Ray cluster has 2; lower --actors"),
        (EmbedConfig(gpu=True), "1 embedding processes need 1 GPU each, but the Ray cluster has 0"),
    ):
        with pytest.raises(ClusterError, match=told):
            embed(v1(home), shards(home / "shards"), tmp_path / "out", config)


def test_a_changed_model_is_refused(home: Path, tmp_path: Path) -> None:
    generation = make_generation(tmp_path, "v1")
    weights = generation.path / "backbone.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(GenerationError, match=r"backbone\.safetensors has changed since it was written"):
        embed(generation, shards(home / "shards"), tmp_path / "out", HERE)


def test_the_benchmark_tells_and_writes_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/benchmark.py", "embed", "--backbone", "small", "--size", "32", "--grey"]
    command += ["--images", "23", "--shard-size", "9", "--batch", "5", "--dim", "8", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "a.json")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "of the model's forward alone" in done.stdout
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["images_per_s"].keys() == {"pipeline", "forward", "decode"}
    each = zip(*(result["images_per_s_all"][way] for way in ("pipeline", "forward")), strict=True)
    assert result["ratio_forward_all"] == pytest.approx([ours / alone for ours, alone in each])
    assert result["ratio_forward"] == pytest.approx(sum(result["ratio_forward_all"]) / 2)
