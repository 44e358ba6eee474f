"""Tars of others adopted as they are, with real Ray: what is listed, what is not, and that nothing is touched."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import webdataset
from wds2idx import IndexCreator  # type: ignore[import-untyped]

from jobs.pack import main
from pipeline.data.adopting import NOTED, adopt, note_tar
from pipeline.data.catalogue import Catalogue
from pipeline.data.manifest import Manifest
from pipeline.data.packing import PackConfig, pack
from pipeline.data.shards import index_path, read_components
from pipeline.data.sources import WebDatasetConfig, WebDatasetSource
from pipeline.data.spool import ReadConfig, read_columns, samples_path
from pipeline.errors import ConfigError, DataError
from tests.pictures import encode, noise, ramp

PEOPLE = ["ann", "bob", "Chloé", "ann", "bob", "ann"]
ANIMATED = encode(ramp(), "WEBP", save_all=True, append_images=[ramp().rotate(180)])


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="bct-ray-", dir="/tmp") as folder:
        ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        yield
        ray.shutdown()


Images = list[tuple[str, bytes]]


def write(path: Path, samples: Images, broken: bytes | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as stream, webdataset.TarWriter(stream, encoder=False) as writer:
        for number, (person, image) in enumerate(samples):
            if number == 1 and broken is not None:
                writer.write({"__key__": "broken", "jpg": broken, "cls": b"ann"})
            writer.write({"__key__": f"{number:05d}", "png": image, "cls": person.encode(), "json": b'{"a": 1}'})


@pytest.fixture
def images(tmp_path: Path) -> Images:
    """Two tars of six images; the first has a broken one as well."""
    made = [(person, encode(noise(number))) for number, person in enumerate(PEOPLE * 2)]
    write(tmp_path / "tars" / "b.tar", made[:6], broken=b"no image")
    write(tmp_path / "tars" / "c.tar", made[6:])
    return made


def run(tmp_path: Path, config: ReadConfig | None = None) -> Manifest:
    source = WebDatasetSource(WebDatasetConfig(path=tmp_path / "tars"))
    return adopt(source, tmp_path / "tars", config or ReadConfig())


def content(manifest: Manifest) -> Images:
    """(identity by the catalogue's row, image by its span) of every sample."""
    keys = manifest.identities().keys
    catalogue = Catalogue.load(manifest.folder, np.array([entry.samples for entry in manifest.shards]))
    found = []
    for number, entry in enumerate(manifest.shards):
        raw = (manifest.folder / entry.name).read_bytes()
        spans = catalogue.shard(number)
        found += [(keys[one["row"]], raw[one["offset"] : one["offset"] + one["size"]]) for one in spans]
    return found


def test_every_sample_is_listed_and_no_tar_is_touched(tmp_path: Path, images: Images) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "tars").iterdir()}
    manifest = run(tmp_path)
    assert content(manifest) == images
    assert manifest.identities().keys == ("Chloé", "ann", "bob")
    assert manifest.rejects == {"no image of a known format": 1}
    assert [(entry.name, entry.samples) for entry in manifest.shards] == [("b.tar", 6), ("c.tar", 6)]
    manifest.verify(digests=True)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    made = {"manifest.json", "catalogue.npy", "identities.parquet", "rejects.jsonl", "summary.png", "summary.txt"}
    assert {path.name for path in (tmp_path / "tars").iterdir()} == {"b.tar", "b.idx", "c.tar", "c.idx", *made}


def test_the_index_is_the_one_of_wds2idx_less_the_rejects(tmp_path: Path, images: Images) -> None:
    assert images
    run(tmp_path)
    for name in ("b", "c"):
        tar = tmp_path / "tars" / f"{name}.tar"
        with IndexCreator(str(tar), str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        head, *lines = (tmp_path / "theirs.idx").read_text().splitlines()
        kept = [line for line in lines if "broken" not in line]
        assert index_path(tar).read_text().splitlines() == [head.replace("7", "6"), *kept]
        assert len(list(read_components(tar, index_path(tar)))) == 6


def test_identities_with_few_images_and_tars_without_a_sample_are_left_out(tmp_path: Path, images: Images) -> None:
    write(tmp_path / "tars" / "a.tar", [("dora", encode(noise(99)))])
    manifest = run(tmp_path, ReadConfig(min_images=3, namespace="web"))
    assert manifest.identities().keys == ("web:ann", "web:bob")
    assert content(manifest) == [(f"web:{person}", image) for person, image in images if person != "Chloé"]
    assert [entry.name for entry in manifest.shards] == ["b.tar", "c.tar"]
    assert manifest.rejects == {"identity has fewer than 3 images": 3, "no image of a known format": 1}


def test_a_data_set_that_was_adopted_is_returned_until_its_tars_change(tmp_path: Path, images: Images) -> None:
    assert images
    first = run(tmp_path)
    assert run(tmp_path) == first
    with pytest.raises(DataError, match="packed from another pack config"):
        run(tmp_path, ReadConfig(namespace="x"))
    write(tmp_path / "tars" / "d.tar", [("eve", encode(noise(98)))])
    with pytest.raises(DataError, match="packed from another source"):
        run(tmp_path)


def test_a_failure_leaves_no_manifest_and_the_next_run_takes_the_tars_as_they_are(
    tmp_path: Path, images: Images
) -> None:
    bad = tmp_path / "tars" / "d.tar"
    shutil.copy(tmp_path / "tars" / "c.tar", bad)
    with bad.open("rb+") as stream:
        stream.truncate(3000)
    with pytest.raises(DataError, match=r"d\.tar is cut off"):
        run(tmp_path)
    assert not (tmp_path / "tars" / "manifest.json").exists()
    write(tmp_path / "tars" / "c.tar", [("zoe", encode(noise(97)))])
    bad.unlink()
    manifest = run(tmp_path)
    assert content(manifest) == [*images[:6], ("zoe", encode(noise(97)))]
    manifest.verify(digests=True)


def test_a_tar_that_was_done_is_not_done_again_unless_it_changed(tmp_path: Path, images: Images) -> None:
    source, note = WebDatasetSource(WebDatasetConfig(path=tmp_path / "tars")), tmp_path / "note"
    inodes = []
    for _ in range(2):
        note_tar(source, "c.tar", note, ReadConfig())
        inodes.append(samples_path(note).stat().st_ino)
    assert inodes[0] == inodes[1]
    write(tmp_path / "tars" / "c.tar", images[:2])
    note_tar(source, "c.tar", note, ReadConfig())
    assert read_columns([samples_path(note)], NOTED).num_rows == 2


def test_tars_that_lie_elsewhere_are_not_adopted(tmp_path: Path, images: Images) -> None:
    assert images
    source = WebDatasetSource(WebDatasetConfig(path=tmp_path / "tars"))
    with pytest.raises(ConfigError, match=r"tars are adopted where they are, but --out is .*/out and the tars lie in"):
        adopt(source, tmp_path / "out", ReadConfig())


def test_tars_without_a_good_sample_are_told(tmp_path: Path) -> None:
    write(tmp_path / "tars" / "a.tar", [("ann", ANIMATED), ("bob", b"")])
    with pytest.raises(DataError, match=r"no sample that can be adopted \(1 x animated, 1 x empty\)"):
        run(tmp_path)


def test_the_same_tars_can_be_packed_anew(tmp_path: Path, images: Images) -> None:
    source = WebDatasetSource(WebDatasetConfig(path=tmp_path / "tars"))
    manifest = pack(source, tmp_path / "out", PackConfig(shard_size=5))
    assert sorted(content(manifest)) == sorted(images)
    assert [entry.samples for entry in manifest.shards] == [5, 5, 2]


def test_the_job_adopts(tmp_path: Path, images: Images, capsys: pytest.CaptureFixture[str]) -> None:
    tars, out = str(tmp_path / "tars"), str(tmp_path / "out")
    (tmp_path / "in" / "ann").mkdir(parents=True)
    (tmp_path / "in" / "ann" / "0.png").write_bytes(images[0][1])
    for options, told in (
        (["--source", "webdataset", "--path", tars, "--out", out], "tars are adopted where they are"),
        (["--source", "webdataset", "--path", tars, "--out", tars, "--seed", "1"], "--seed is no option of --source"),
        (["--source", "folder", "--path", str(tmp_path / "in"), "--out", tars], "--adopt is for WebDataset tars"),
    ):
        assert main([*options, "--adopt"]) == 2
        assert told in capsys.readouterr().err
    assert main(["--source", "webdataset", "--path", tars, "--out", tars]) == 2
    assert "is the folder of the tars that are packed; give another, or adopt them" in capsys.readouterr().err
    assert main(["--source", "webdataset", "--path", tars, "--out", tars, "--adopt", "--namespace", "web"]) == 0
    assert "tars: 12 samples of 3 identities in 2 shards" in capsys.readouterr().out
    assert Manifest.load(tmp_path / "tars").identities().keys == ("web:Chloé", "web:ann", "web:bob")
