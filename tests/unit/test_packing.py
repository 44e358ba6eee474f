"""Packing real images with real Ray: what is packed, what is refused, and that it is the same every time."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from jobs.pack import main
from pipeline.data.catalogue import Catalogue
from pipeline.data.manifest import Manifest
from pipeline.data.packing import PackConfig, pack
from pipeline.data.shards import ShardIndex, index_path, read_attributes
from pipeline.data.sources import FolderSource, FolderSourceConfig, Sample, folder_key
from pipeline.data.summary import contact_sheet
from pipeline.errors import DataError

PEOPLE = {"ann": 5, "bob": 3, "Chloé": 7, "d e": 1}
SMALL = PackConfig(shard_size=6)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="bct-ray-", dir="/tmp") as folder:
        ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        yield
        ray.shutdown()


def encode(number: int, kind: str = "PNG", side: int = 24) -> bytes:
    """A picture of noise, different for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


@pytest.fixture
def images(tmp_path: Path) -> dict[str, tuple[str, bytes]]:
    """A folder of good images: key -> (identity, content)."""
    kinds = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("JPEG", "JPEG")]
    made = {}
    for number, (person, place) in enumerate((p, place) for p, count in PEOPLE.items() for place in range(count)):
        suffix, kind = kinds[number % 4]
        file = f"{person}/{'deep/' if place == 2 else ''}{place}.{suffix}"
        made[folder_key(file)] = (person, put(tmp_path / "in" / file, encode(number, kind)))
    return made


def source(tmp_path: Path, parts: int = 3) -> FolderSource:
    return FolderSource(FolderSourceConfig(path=tmp_path / "in", parts=parts))


def content(manifest: Manifest) -> list[tuple[str, str, bytes]]:
    """(key, identity by label, image) of every sample, in the shards' order."""
    keys, found = manifest.identities().keys, []
    for entry in manifest.shards:
        tar = manifest.folder / entry.name
        index = ShardIndex.load(tar, index_path(tar), len(keys))
        raw = tar.read_bytes()
        spans = zip(read_attributes(tar, index_path(tar)), index.offsets, index.sizes, index.rows, strict=True)
        for (key, attributes), offset, size, row in spans:
            assert attributes["identity"] == keys[row]
            found.append((key, keys[row], raw[offset : offset + size]))
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


Images = dict[str, tuple[str, bytes]]


def test_every_image_is_packed_once_under_its_identity(tmp_path: Path, images: Images) -> None:
    seen: list[tuple[int, int, str]] = []
    manifest = pack(source(tmp_path), tmp_path / "out", SMALL, lambda *step: seen.append(step))
    assert {key: (identity, image) for key, identity, image in content(manifest)} == images
    assert manifest.samples == len(images) == 16
    assert [entry.samples for entry in manifest.shards] == [6, 6, 4]
    assert manifest.identities().keys == ("Chloé", "ann", "bob", "d e")
    assert manifest.rejects == {}
    manifest.verify(digests=True)
    assert set(files(tmp_path / "out")) == {
        *(f"shard-00000{shard}.{suffix}" for shard in range(3) for suffix in ("tar", "idx")),
        *("manifest.json", "catalogue.npy", "identities.parquet", "rejects.jsonl", "summary.png", "summary.txt"),
    }
    assert [step for step in seen if step[0] == step[1]] == [
        (3, 3, "parts read and decoded"),
        (3, 3, "shards written"),
    ]


def test_what_does_not_decode_is_counted_by_reason_and_not_packed(tmp_path: Path, images: Images) -> None:
    folder = tmp_path / "in" / "ann"
    whole = encode(99, "JPEG", 64)
    gif, wrong = encode(98, "GIF"), encode(97, "PNG")
    put(folder / "cut.jpg", whole[: len(whole) // 2])
    put(folder / "cut.png", encode(96)[:-200])
    put(folder / "empty.png", b"")
    put(folder / "noise.jpg", bytes(range(256)) * 4)
    put(folder / "gif.png", gif)
    broken = bytearray(encode(95))
    broken[60:80] = bytes(20)  # inside the compressed pixels
    put(folder / "broken.png", bytes(broken))
    put(folder / "really-png.jpg", wrong)
    put(folder / ".hidden.jpg", whole)
    put(tmp_path / "in" / ".cache" / "x.jpg", whole)
    put(folder / "notes.txt", b"no image")
    manifest = pack(source(tmp_path), tmp_path / "out", SMALL)
    assert manifest.rejects == {
        "does not decode": 1,
        "empty": 1,
        "neither png, jpg nor webp": 1,
        "no image of a known format": 1,
        "truncated": 2,
    }
    good = {**images, folder_key("ann/really-png.jpg"): ("ann", wrong)}
    assert {key: (identity, image) for key, identity, image in content(manifest)} == good
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    expected = {"cut.jpg": "truncated", "cut.png": "truncated", "empty.png": "empty", "broken.png": "does not decode"}
    by_key = {reject["key"]: reject["reason"] for reject in listed}
    assert len(by_key) == 6
    assert {name: by_key[folder_key(f"ann/{name}")] for name in expected} == expected
    with (tmp_path / "out" / "shard-000000.tar").open("rb") as stream:
        assert stream.read(512)


def test_packs_are_byte_identical_however_the_work_is_cut(tmp_path: Path, images: Images) -> None:
    assert images
    put(tmp_path / "in" / "ann" / "bad.png", b"")
    pack(source(tmp_path, parts=1), tmp_path / "one", SMALL)
    pack(source(tmp_path, parts=4), tmp_path / "four", SMALL)
    assert files(tmp_path / "one") == files(tmp_path / "four")


def test_the_seed_draws_the_order_over_all_shards(tmp_path: Path, images: Images) -> None:
    orders = []
    for seed in range(3):
        manifest = pack(source(tmp_path), tmp_path / f"out{seed}", PackConfig(shard_size=6, seed=seed))
        orders.append([key for key, _, _ in content(manifest)])
        assert sorted(orders[-1]) == sorted(images)
        assert len({identity for _, identity, _ in content(manifest)[:6]}) > 1, "identities are mixed"
    assert orders[0] != orders[1] != orders[2]


def test_identities_with_too_few_images_are_left_out(tmp_path: Path, images: Images) -> None:
    put(tmp_path / "in" / "bob" / "bad.png", b"")  # bob has four files, three of them images
    manifest = pack(source(tmp_path), tmp_path / "out", PackConfig(min_images=4))
    assert manifest.identities().keys == ("Chloé", "ann")
    assert manifest.rejects == {"empty": 1, "identity has fewer than 4 images": 4}
    assert {identity for _, identity, _ in content(manifest)} == {"ann", "Chloé"}
    assert manifest.samples == sum(identity in ("ann", "Chloé") for identity, _ in images.values())


def test_a_finished_pack_is_returned_as_it_is(tmp_path: Path, images: Images) -> None:
    assert images
    first = pack(source(tmp_path), tmp_path / "out", SMALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = pack(source(tmp_path, parts=2), tmp_path / "out", SMALL)
    assert again == first
    assert again.digest == first.digest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(DataError, match="packed from another pack config: choose another destination"):
        pack(source(tmp_path), tmp_path / "out", PackConfig(shard_size=7))
    put(tmp_path / "in" / "new" / "0.png", encode(1000))
    with pytest.raises(DataError, match="packed from another source: choose another destination"):
        pack(source(tmp_path), tmp_path / "out", SMALL)


def test_a_finished_pack_that_lost_a_shard_is_not_returned(tmp_path: Path, images: Images) -> None:
    assert images
    pack(source(tmp_path), tmp_path / "out", SMALL)
    (tmp_path / "out" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
        pack(source(tmp_path), tmp_path / "out", SMALL)


def test_an_unfinished_pack_is_started_afresh_and_other_files_stay(tmp_path: Path, images: Images) -> None:
    assert images
    for name in (
        "shard-000000.tar",
        "shard-000077.tar",
        "shard-000077.idx",
        ".spool/part-000009",
        ".shard-1.tar.7.tmp",
    ):
        put(tmp_path / "out" / name, b"left over")
    put(tmp_path / "out" / "README", b"mine")
    pack(source(tmp_path), tmp_path / "out", SMALL)
    pack(source(tmp_path), tmp_path / "clean", SMALL)
    left = files(tmp_path / "out")
    assert left.pop("README") == b"mine"
    assert left == files(tmp_path / "clean")


def test_shards_that_no_pack_accounts_for_are_not_removed(tmp_path: Path, images: Images) -> None:
    assert images
    put(tmp_path / "out" / "shard-000000.tar", b"precious")
    with pytest.raises(DataError, match=r"holds shard-000000\.tar, but neither a manifest nor an unfinished pack"):
        pack(source(tmp_path), tmp_path / "out", SMALL)
    assert files(tmp_path / "out") == {"shard-000000.tar": b"precious"}


KILLED = """
import sys, time, ray
from pathlib import Path
from pipeline.data.packing import PackConfig, pack
from pipeline.data.sources import FolderSource, FolderSourceConfig

ray.init(address=sys.argv[1], log_to_driver=False)
source = FolderSource(FolderSourceConfig(path=Path(sys.argv[2]), parts=8))
def tell(done, total, what):
    print(what, done, flush=True)
    if what == "shards written" and done:
        time.sleep(60)

pack(source, Path(sys.argv[3]), PackConfig(shard_size=6), tell)
"""


def test_a_pack_that_is_killed_goes_on_where_it_was(tmp_path: Path, images: Images) -> None:
    assert images
    for number in range(40):
        put(tmp_path / "in" / f"p{number % 20}" / f"{number}.png", encode(number, side=100))
    pack(source(tmp_path, parts=5), tmp_path / "clean", SMALL)
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", KILLED, address, str(tmp_path / "in"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("shards written") and line != "shards written 0\n")
        process.kill()
    assert not (tmp_path / "out" / "manifest.json").exists()
    parts = inodes(tmp_path / "out", ".spool/part-*")
    done = {**parts, **inodes(tmp_path / "out", "shard-*.idx")}
    assert len(parts) == 24, "a spool file, its samples and its rejects for each of the parts"
    assert len(done) > 24
    seen: list[dict[Path, int]] = []

    def look(*_: object) -> None:
        seen.append({path: inode for path, inode in inodes(tmp_path / "out", "**/*").items() if path in done})

    pack(source(tmp_path, parts=8), tmp_path / "out", SMALL, look)
    assert all(step == done for step in seen), "what was finished is not made again"
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def inodes(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in folder.glob(pattern) if path.is_file()}


def test_a_pack_that_stops_while_it_reads_keeps_the_parts_that_are_finished(tmp_path: Path, images: Images) -> None:
    assert images

    def stop(done: int, *_: object) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source(tmp_path), tmp_path / "out", SMALL, stop)
    done = inodes(tmp_path / "out", ".spool/*.samples.arrow")
    seen: list[dict[Path, int]] = []
    pack(source(tmp_path), tmp_path / "out", SMALL, lambda *_: seen.append(inodes(tmp_path / "out", ".spool/*.arrow")))
    assert done
    assert all(done.items() <= step.items() for step in seen)
    pack(source(tmp_path), tmp_path / "clean", SMALL)
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def test_parts_that_are_cut_in_another_way_are_read_again(tmp_path: Path, images: Images) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == total and what == "shards written":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source(tmp_path, parts=3), tmp_path / "out", SMALL, stop)
    manifest = pack(source(tmp_path, parts=2), tmp_path / "out", SMALL)
    assert {key: (identity, image) for key, identity, image in content(manifest)} == images


def test_another_config_takes_over_what_of_an_unfinished_pack_it_would_make_again(
    tmp_path: Path, images: Images
) -> None:
    assert images
    put(tmp_path / "in" / "ann" / "bad.png", b"")

    def stop(done: int, total: int, what: str) -> None:
        if done == total and what == "shards written":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source(tmp_path), tmp_path / "out", SMALL, stop)
    spool = {path.name: path.stat().st_ino for path in (tmp_path / "out" / ".spool").glob("part-*")}
    other = PackConfig(shard_size=5)
    seen: list[dict[str, int]] = []

    def look(*_: object) -> None:
        seen.append({path.name: path.stat().st_ino for path in (tmp_path / "out" / ".spool").glob("part-*")})

    manifest = pack(source(tmp_path), tmp_path / "out", other, look)
    assert all(step == spool for step in seen), "the spool is the same at another shard size"
    assert [entry.samples for entry in manifest.shards] == [5, 5, 5, 1]
    pack(source(tmp_path), tmp_path / "clean", other)
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def mounts() -> bool:
    """Whether this machine lets us mount a small file system."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(not mounts(), reason="needs the right to mount; the next test asks the same of each writer")
@pytest.mark.parametrize("images_there", [40, 90])
def test_a_full_disk_is_told_and_packing_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Path, images_there: int
) -> None:
    """40 images of 15 kB fill it while shards are written, 90 while the spool is."""
    for number in range(images_there):
        put(tmp_path / "in" / f"p{number % 5}" / f"{number}.png", encode(number, side=70))
    with pytest.raises(DataError, match=r"packing into .* failed: .*No space left on device.*see to the disk") as error:
        pack(source(tmp_path), small_disk / "out", SMALL)
    assert "\n" not in str(error.value)
    left = files(small_disk / "out")
    assert "manifest.json" not in left
    clean = pack(source(tmp_path), tmp_path / "clean", SMALL)
    whole = files(clean.folder)
    assert all(content == whole[name] for name, content in left.items() if name.startswith("shard-"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    pack(source(tmp_path), small_disk / "out", SMALL)
    assert files(small_disk / "out") == whole


FULL = """
import resource, sys
from pathlib import Path
from pipeline.data.shards import write_shard
from pipeline.data.sources import FolderSource, FolderSourceConfig
from pipeline.data.spool import ReadConfig, spool_part

source, out = FolderSource(FolderSourceConfig(path=Path(sys.argv[1]), parts=1)), Path(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for write in (
    lambda: spool_part(source, "0/1", out / "part", ReadConfig(), 0),
    lambda: write_shard(out / "shard.tar", source.read("0/1"), {"ann": 0}),
):
    try:
        write()
    except OSError as error:
        print(error.strerror)
"""


def test_a_write_that_the_disk_refuses_leaves_nothing(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / "in" / "ann" / f"{number}.png", encode(number, side=60))
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", FULL, str(tmp_path / "in"), str(tmp_path / "out")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["File too large"] * 2
    assert files(tmp_path / "out") == {}


def test_shards_hold_to_a_size_in_bytes(tmp_path: Path) -> None:
    for number in range(60):
        put(tmp_path / "in" / "ann" / f"{number}.png", encode(number, side=20 + number % 40))
    put(tmp_path / "in" / "ann" / "large.png", encode(1000, side=200))
    manifest = pack(source(tmp_path), tmp_path / "out", PackConfig(shard_bytes=80_000, shard_size=11))
    assert len(content(manifest)) == 61
    large = [entry for entry in manifest.shards if entry.bytes > 80_000]
    assert [entry.samples for entry in large] == [1]
    assert max(entry.samples for entry in manifest.shards) == 11
    assert sum(entry.bytes > 50_000 for entry in manifest.shards) > len(manifest.shards) / 2


def test_identities_may_be_given_a_namespace(tmp_path: Path, images: Images) -> None:
    put(tmp_path / "in" / "ann" / "bad.png", b"")
    manifest = pack(source(tmp_path), tmp_path / "out", PackConfig(namespace="ours", shard_size=6))
    assert manifest.identities().keys == ("ours:Chloé", "ours:ann", "ours:bob", "ours:d e")
    assert {key: identity for key, identity, _ in content(manifest)} == {k: f"ours:{p}" for k, (p, _) in images.items()}
    assert json.loads((tmp_path / "out" / "rejects.jsonl").read_text())["identity"] == "ours:ann"


def test_a_name_that_is_not_utf8_is_a_reject(tmp_path: Path, images: Images) -> None:
    put(tmp_path / "in" / "ann" / os.fsdecode(b"caf\xe9.png"), encode(90))
    manifest = pack(source(tmp_path), tmp_path / "out", SMALL)
    assert manifest.rejects == {"name is not UTF-8": 1}
    assert manifest.samples == len(images)


def test_the_picture_shows_the_images_and_the_text_tells_their_sizes(tmp_path: Path) -> None:
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    for name, colour in colours.items():
        for number in range(12):
            buffer = io.BytesIO()
            Image.new("RGB", (30 + number, 60), colour).save(buffer, "PNG")
            put(tmp_path / "in" / name / f"{number}.png", buffer.getvalue())
    manifest = pack(source(tmp_path), tmp_path / "out", SMALL)
    assert (tmp_path / "out" / "summary.txt").read_text().splitlines()[1:] == [
        "  images per identity: 12 to 12, half have at most 12",
        "  width in pixels: 30 to 41, half have at most 36; height: 60 to 60, half have at most 60",
    ]
    with Image.open(tmp_path / "out" / "summary.png") as picture:
        assert picture.size == (1440, 840)
    catalogue = Catalogue.load(manifest.folder, np.array([entry.samples for entry in manifest.shards]))
    sheet = contact_sheet(manifest, [catalogue.shard(number) for number in range(len(manifest.shards))])
    shown = {tuple(sheet[48 + 96 * line, 48 + 96 * tile].tolist()) for line in range(3) for tile in range(12)}
    assert shown == set(colours.values())


def test_a_source_without_an_image_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"in does not exist"):
        source(tmp_path)
    (tmp_path / "in").mkdir()
    put(tmp_path / "in" / "loose.png", encode(0))  # not beneath a folder: whose is it?
    with pytest.raises(DataError, match="holds no jpg, png or webp image beneath a folder"):
        source(tmp_path)
    put(tmp_path / "in" / "ann" / "0.png", b"")
    with pytest.raises(DataError, match=r"source in has no image that can be packed \(1 x empty\)"):
        pack(source(tmp_path), tmp_path / "out", SMALL)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_destination_that_cannot_be_written_is_told(tmp_path: Path, images: Images) -> None:
    assert images
    put(tmp_path / "file", b"")
    with pytest.raises(DataError, match=r"packing into .*/file/out failed"):
        pack(source(tmp_path), tmp_path / "file" / "out", SMALL)


@dataclass(frozen=True)
class ListSource:
    """Samples given one by one, each a part of its own."""

    samples: tuple[tuple[str, str], ...]
    name: str = "list"
    min_images: int = 1

    def fingerprint(self) -> str:
        return "0" * 64

    def parts(self) -> list[str]:
        return [str(number) for number in range(len(self.samples))]

    def read(self, part: str) -> Iterator[Sample]:
        key, identity = self.samples[int(part)]
        yield Sample(key, encode(int(part)), "png", identity)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ((("a", "x"), ("b", "x"), ("a", "y")), "sample key 'a' stands twice in source list"),
        ((("a/b", "x"),), "sample 'a/b' of identity 'x' needs an identity of one line and a key of"),
        ((("a.b", "x"),), "sample 'a.b'"),
        ((("k" * 81, "x"),), "sample 'kkk"),
        ((("a", ""),), "sample 'a' of identity ''"),
        ((), "no image at all"),
    ],
)
def test_a_source_that_breaks_the_rules_is_refused(
    tmp_path: Path, samples: tuple[tuple[str, str], ...], message: str
) -> None:
    with pytest.raises(DataError) as error:
        pack(ListSource(samples), tmp_path / "out", SMALL)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert type(error.value) is DataError


def test_a_sources_own_minimum_counts(tmp_path: Path) -> None:
    samples = (("a", "x"), ("b", "x"), ("c", "y"))
    manifest = pack(ListSource(samples, min_images=2), tmp_path / "out", SMALL)
    assert manifest.identities().keys == ("x",)
    assert manifest.rejects == {"identity has fewer than 2 images": 1}


def test_a_data_set_that_changed_is_refused(tmp_path: Path, images: Images) -> None:
    assert images
    folder = tmp_path / "out"
    manifest = pack(source(tmp_path), folder, SMALL)
    kept = files(folder)
    tar = folder / "shard-000001.tar"
    flipped = bytearray(kept[tar.name])
    flipped[2000] ^= 1
    tar.write_bytes(flipped)
    manifest.verify(digests=False)
    with pytest.raises(DataError, match=r"shard-000001\.tar has another sha256: it was changed after packing"):
        manifest.verify(digests=True)
    tar.write_bytes(kept[tar.name][:-1])
    with pytest.raises(DataError, match=r"shard-000001\.tar has \d+ bytes, not \d+: it was changed"):
        manifest.verify(digests=False)
    tar.write_bytes(kept[tar.name])
    index = folder / "shard-000002.idx"
    index.write_bytes(kept["shard-000000.idx"])
    with pytest.raises(DataError, match=r"shard-000002\.idx has another sha256"):
        manifest.verify(digests=True)
    index.unlink()
    with pytest.raises(DataError, match=r"shard-000002\.idx is missing"):
        manifest.verify(digests=False)
    index.write_bytes(kept[index.name])
    manifest.verify(digests=True)
    type(manifest.identities())(("ann", "bob", "Chloé", "d e")).save(folder / "identities.parquet")
    with pytest.raises(DataError, match=r"identities\.parquet changed after packing"):
        manifest.verify(digests=False)


def test_a_data_set_can_be_moved(tmp_path: Path, images: Images) -> None:
    assert images
    digest = pack(source(tmp_path), tmp_path / "out", SMALL).digest
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    moved = Manifest.load(tmp_path / "elsewhere")
    moved.verify(digests=True)
    assert moved.digest == digest
    assert moved.digest != moved.model_copy(update={"samples": 17}).digest


def test_a_manifest_that_is_not_there_or_broken_is_told(tmp_path: Path, images: Images) -> None:
    assert images
    pack(source(tmp_path), tmp_path / "out", SMALL)
    path = tmp_path / "out" / "manifest.json"
    good = json.loads(path.read_text())
    cases: list[tuple[str, str]] = [
        ("{", "cannot be read"),
        ("[]", "is no manifest"),
        (json.dumps({**good, "format": 2}), "is broken at 'format'"),
        (json.dumps({**good, "shards": []}), "is broken at 'shards'"),
        (json.dumps({**good, "surplus": 1}), "is broken at 'surplus'"),
        (json.dumps({**good, "samples": 17}), "do not add up to 17 samples"),
        (json.dumps({**good, "shards": [{**good["shards"][0], "name": "../x.tar"}]}), r"is broken at 'shards.0.name'"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(DataError) as error:
            Manifest.load(tmp_path / "out")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json; run jobs/pack\.py"):
        Manifest.load(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is empty; run jobs/pack\.py"):
        Manifest.load(tmp_path / "empty")
    with pytest.raises(DataError, match=r"does not exist; run jobs/pack\.py"):
        Manifest.load(tmp_path / "nowhere")


def test_the_job_packs_and_tells(tmp_path: Path, images: Images, capsys: pytest.CaptureFixture[str]) -> None:
    assert images
    put(tmp_path / "in" / "ann" / "bad.png", b"")
    command = ["--source", "folder", "--path", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main([*command, "--shard-size", "6"]) == 0
    told = capsys.readouterr().out
    assert "in: 16 samples of 4 identities in 3 shards" in told
    assert "not packed: 1 (empty)" in told
    Manifest.load(tmp_path / "out").verify(digests=True)
    assert ray.is_initialized(), "a Ray that was there before stays"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "folder"], "--source folder needs --path"),
        (["--source", "folder", "--path", "/nowhere/images"], "image folder /nowhere/images does not exist"),
        (["--source", "folder", "--path", "/tmp", "--shard-size", "0"], "--shard-size: "),
        (["--source", "typefaces", "--seed", "-1"], "--seed: "),
        (["--source", "folder", "--path", "/tmp", "--split", "test"], "--split is no option of --source folder"),
        (["--source", "list", "--path", "/nowhere.csv"], "list /nowhere.csv cannot be read"),
        (["--source", "recordio", "--path", "/nowhere", "--max-pixels", "many"], "--max-pixels: "),
        (["--source", "recordio", "--path", "/nowhere"], "/nowhere does not exist; give the folder with train.rec"),
        (["--source", "folder", "--path", "/tmp", "--namespace", "a:b"], "--namespace: "),
    ],
)
def test_the_job_tells_a_mistake_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([*options, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {message}")
    assert told.err.count("\n") == 1
    assert told.out == ""
