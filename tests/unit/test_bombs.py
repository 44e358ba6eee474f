"""Small files that claim to be huge: each is refused in one line, before room is made for what it claims."""

from __future__ import annotations

import io
import json
import math
import pickle
import resource
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import load_config
from pipeline.data import typeface_packages
from pipeline.data.catalogue import FILE_NAME, Catalogue
from pipeline.data.checking import PILLOW_LIMIT
from pipeline.data.finishing import write_data_set
from pipeline.data.headers import claimed_size
from pipeline.data.loader import iterate_images
from pipeline.data.manifest import Manifest
from pipeline.data.preprocess import PreprocessConfig
from pipeline.data.protocols import load_protocol
from pipeline.data.reading import pillow_refuses
from pipeline.data.shards import ShardIndex
from pipeline.data.sources import ListSource, ListSourceConfig, RecordSource, RecordSourceConfig, Sample
from pipeline.data.sources_eval.insightface_bin import BinSource, BinSourceConfig
from pipeline.embedding_files import EmbeddingFile
from pipeline.errors import DataError, GenerationError, PipelineError
from pipeline.export.exported import read_exported_stamp
from pipeline.files import file_sha256
from pipeline.gallery.index import IndexConfig, faiss
from pipeline.gallery.store import GalleryFolder, GalleryRecord
from pipeline.generation import BACKBONE, Generation
from pipeline.identities import IdentityTable
from pipeline.search import Gallery
from pipeline.stamp import STAMP
from pipeline.tracking.pyfunc import Embedder
from tests.pictures import encode, noise, odd_but_good, png, ramp
from tests.unit.stamped import drawn
from tests.unit.test_registry import make_generation

TERABYTES = 1 << 42


def peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def refused(read: Callable[[], object], words: str, kind: type[PipelineError] = DataError) -> None:
    before = peak()
    with pytest.raises(kind) as error:
        read()
    assert words in str(error.value), error.value
    assert "\n" not in str(error.value)
    assert peak() - before < 256 << 20


def huge_jpeg() -> bytes:
    """Of 65,500 x 65,500 pixels, by its frame header."""
    raw = bytearray(encode(ramp(), "JPEG"))
    place = raw.index(b"\xff\xc0")
    raw[place + 5 : place + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(raw)


def huge_webp() -> bytes:
    """Of 2^24 x 2^24 pixels, by its extended header."""
    raw = bytearray(encode(ramp().convert("RGBA"), "WEBP", exif=b"Exif\0\0II*\0"))
    assert raw[12:16] == b"VP8X"
    raw[24:30] = b"\xff" * 6
    return bytes(raw)


BOMBS = {
    "png": png(60_000, 60_000, 8, 2, bytes(1000)),
    "jpg": huge_jpeg(),
    "webp": huge_webp(),
    "bmp": encode(ramp(), "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + encode(ramp(), "BMP")[26:],
}


@pytest.mark.parametrize("what", [*odd_but_good(), "webp", "jpg", "png", "bmp", "tiff", "gif"])
def test_the_header_tells_what_pillow_tells(what: str) -> None:
    kinds = {"jpg": "JPEG"}
    raw = odd_but_good().get(what) or encode(noise(3, 37).resize((61, 37)), kinds.get(what, what.upper()))
    with Image.open(io.BytesIO(raw)) as opened:
        assert claimed_size(raw) == opened.size


def test_a_broken_header_claims_nothing_and_never_fails() -> None:
    random = np.random.default_rng(0)
    for raw in [*odd_but_good().values(), *BOMBS.values()]:
        for end in range(40):
            claimed_size(raw[:end])
        for _ in range(200):
            damaged = bytearray(raw[:600])
            damaged[int(random.integers(len(damaged)))] = int(random.integers(256))
            assert min(claimed_size(bytes(damaged))) >= 0


@pytest.mark.parametrize("what", BOMBS)
def test_no_decoder_makes_room_for_a_bomb(tmp_path: Path, what: str) -> None:
    assert math.prod(claimed_size(BOMBS[what])) > PILLOW_LIMIT
    assert "too large: it claims" in str(pillow_refuses(BOMBS[what]))
    raws = [encode(noise(1)), encode(noise(2)), BOMBS[what], encode(noise(3))]
    samples = [Sample(f"s{place}", raw, "png", "id", {}) for place, raw in enumerate(raws)]
    write_data_set(tmp_path, "bombs", IdentityTable(("id",)), [samples])
    manifest, preprocess = Manifest.load(tmp_path), PreprocessConfig(size=16, resize=16)
    refused(lambda: list(iterate_images(tmp_path, manifest, preprocess, 2)), "'s2.png' of shard")
    embedder = Embedder(make_generation(tmp_path, "v1"))
    refused(lambda: embedder.embed(raws), "image 2 of the request (counted from 0) does not decode: too large")


def test_a_bomb_that_would_decode_is_not_decoded(tmp_path: Path) -> None:
    width, height = 14_000, 13_000
    raw = png(width, height, 1, 0, bytes((width // 8 + 1) * height))  # one bit a pixel; decoded, eight times as much
    assert len(raw) < 30_000
    write_data_set(tmp_path, "bomb", IdentityTable(("id",)), [[Sample("s0", raw, "png", "id", {})]])
    manifest, preprocess = Manifest.load(tmp_path), PreprocessConfig(size=16, resize=16)
    refused(lambda: list(iterate_images(tmp_path, manifest, preprocess, 1)), "too large: it claims 182,000,000 pixels")


def test_an_array_that_claims_terabytes_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    np.save(path, np.zeros(3, np.int8))
    head = {"descr": "<i8", "fortran_order": False, "shape": (TERABYTES,)}
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, head)
    refused(lambda: Catalogue.load(tmp_path, np.array([TERABYTES])), "cannot be read")


@pytest.mark.parametrize("head", ["(" * 150 + ")" * 150, "-" * 9000 + "1", "'\n", "{" * 90, "{'descr': " + "[" * 99])
def test_an_array_whose_head_is_no_head_is_refused(tmp_path: Path, head: str) -> None:
    text = head.encode()
    (tmp_path / FILE_NAME).write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    refused(lambda: Catalogue.load(tmp_path, np.array([3])), "cannot be read")


def test_a_parquet_of_more_rows_than_a_file_of_its_size_holds_is_refused(tmp_path: Path) -> None:
    same = pa.DictionaryArray.from_arrays(np.zeros(3_000_000, np.int32), pa.array(["one"]))
    columns = dict.fromkeys(("identity", "key", "role", "path"), same)
    for name in ("identities", "roles", "list"):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    path, words = tmp_path / "identities.parquet", "claim to hold 3,000,000 rows"
    assert path.stat().st_size < 40_000
    refused(lambda: IdentityTable.load(path), words)
    refused(lambda: EmbeddingFile(path).strings("key"), words)
    refused(lambda: load_protocol(tmp_path), words)
    refused(lambda: ListSource(ListSourceConfig(path=tmp_path / "list.parquet")), words)


def test_a_parquet_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path: Path) -> None:
    text = pa.array(["x" * 20_000_000])
    pq.write_table(pa.table({"identity": text}), tmp_path / "i.parquet", compression="zstd", write_statistics=False)
    assert (tmp_path / "i.parquet").stat().st_size < 20_000
    refused(lambda: IdentityTable.load(tmp_path / "i.parquet"), "claim to hold 1 rows of 2")


def test_weights_that_claim_terabytes_are_refused(tmp_path: Path) -> None:
    generation = make_generation(tmp_path, "v1")
    head = {"head.weight": {"dtype": "F32", "shape": [TERABYTES // 4], "data_offsets": [0, TERABYTES]}}
    text = json.dumps(head).encode()
    for size in (len(text), TERABYTES):
        (generation.path / BACKBONE).write_bytes(struct.pack("<Q", size) + text)
        refused(Generation(generation.path).load_backbone, "cannot be loaded", GenerationError)


def test_an_export_whose_stamp_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"model/extra/{STAMP}", bytes(1 << 24))
    refused(lambda: read_exported_stamp(tmp_path / "model.pt2"), "its stamp claims 16,777,216 bytes")


def test_a_package_of_typefaces_that_unpacks_to_more_than_it_may_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(typeface_packages, "UNPACKED_BYTES", 1 << 20)
    for name, sizes in (("one", [2 << 20]), ("many", [1 << 19] * 4)):
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            for number, size in enumerate(sizes):
                member = tarfile.TarInfo(f"package/files/yomogi-{number}-400-normal.woff2")
                member.size = size
                archive.addfile(member, io.BytesIO(bytes(size)))
        refused(lambda path=tmp_path / name: typeface_packages.read_slices("yomogi", path), "unpacks to more than")  # type: ignore[misc]


def test_a_pickle_that_asks_for_a_memo_of_gigabytes_gets_none(tmp_path: Path) -> None:
    content = pickle.dumps(([encode(noise(1)), encode(noise(2))], [True]), 2)
    before = peak()
    for place in (b"r" + struct.pack("<I", (1 << 31) - 1), b"p2147483647\n"):
        (tmp_path / "pairs.bin").write_bytes(content[:-1] + place + b".")
        assert len(BinSource(BinSourceConfig(path=tmp_path / "pairs.bin")).protocol().keys()) == 2
    assert peak() - before < 256 << 20


DEEP = "[" * 200_000


def test_what_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(DEEP)
    refused(lambda: Manifest.load(tmp_path), "cannot be read: it is nested too deeply")
    (tmp_path / "generation.json").write_text(DEEP)
    refused(lambda: Generation(tmp_path), "is not a generation's record", GenerationError)
    (tmp_path / "run.yaml").write_text(DEEP[:500])
    refused(lambda: load_config(tmp_path / "run.yaml"), "is no YAML", PipelineError)


def test_numbers_of_thousands_of_digits_are_refused(tmp_path: Path) -> None:
    many = "9" * 5000
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    (tmp_path / "a.idx").write_text(f"v1.2 1\njpg {many} 1 a.jpg\n")
    refused(lambda: ShardIndex.load(tmp_path / "a.tar", tmp_path / "a.idx"), "is malformed at line 2")
    (tmp_path / "train.rec").write_bytes(bytes(64))
    (tmp_path / "property").write_text(f"{many},112,112")
    refused(lambda: RecordSource(RecordSourceConfig(path=tmp_path)), "not the number of identities")


def gallery_of(folder: Path, index: object, config: IndexConfig) -> Callable[[], object]:
    """A gallery of 200 vectors behind any FAISS index; returns how it is read."""
    store, built = GalleryFolder(folder), Gallery.of([drawn("v1", 200, 4, seed=1)], config)
    with store.locked(new=True):
        part = store.write(built.segments[0])
    path = store.parts / "00001.faiss"
    path.write_bytes(index) if isinstance(index, bytes) else faiss.write_index(index, str(path))
    changed = part.model_copy(update={"index_sha256": file_sha256(path)})
    store.commit(GalleryRecord(index=config, parts=(changed,)))
    return lambda: store.segment(store.read().parts[0], config)


def inverted() -> Any:
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(4), 4, 2, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(drawn("v1", 200, 4, seed=1).vectors_ND)
    return index


def test_an_index_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    flat = faiss.serialize_index(Gallery.of([drawn("v1", 200, 4, seed=1)]).segments[0].index).tobytes()
    assert flat[37:45] == struct.pack("<Q", 800)  # values
    huge = flat[:37] + struct.pack("<Q", TERABYTES) + flat[45:]
    refused(gallery_of(tmp_path / "flat", huge, IndexConfig()), "cannot be read")
    lists = faiss.serialize_index(inverted()).tobytes()
    place = lists.index(b"ilar") + 4
    huge = lists[:place] + struct.pack("<Q", 1 << 31) + lists[place + 8 :]
    refused(gallery_of(tmp_path / "lists", huge, IndexConfig(kind="ivf")), "cannot be read")


def test_an_index_opens_no_file_elsewhere(tmp_path: Path) -> None:
    index, elsewhere = inverted(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    lists = faiss.OnDiskInvertedLists(2, index.code_size, str(elsewhere / "lists"))
    index.replace_invlists(lists)  # which does not keep them
    index.add(drawn("v1", 200, 4, seed=1).vectors_ND)
    before = (elsewhere / "lists").read_bytes()
    read = gallery_of(tmp_path / "gallery", index, IndexConfig(kind="ivf"))
    assert faiss.read_index(str(tmp_path / "gallery" / "parts" / "00001.faiss")).ntotal == 200  # FAISS alone opens it
    refused(read, "could not open")
    assert (elsewhere / "lists").read_bytes() == before


def test_an_index_of_another_kind_or_size_is_refused(tmp_path: Path) -> None:
    refused(
        gallery_of(tmp_path / "kind", faiss.IndexLSH(4, 8), IndexConfig()), "is a IndexLSH, no index of kind 'flat'"
    )
    refused(gallery_of(tmp_path / "size", faiss.IndexFlatIP(4), IndexConfig()), "holds 0 vectors of 4 values")
    refused(gallery_of(tmp_path / "dim", faiss.IndexFlatIP(5), IndexConfig()), "holds 0 vectors of 5 values")
