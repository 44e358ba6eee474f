"""Sources in the formats that others write: lists, RecordIO and WebDataset tars; whole, odd and broken."""

import io
import pickle
import struct
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipeline.data.sources import (
    KEY_PATTERN,
    ListSource,
    ListSourceConfig,
    RecordSource,
    RecordSourceConfig,
    Reject,
    Sample,
    Source,
    WebDatasetConfig,
    WebDatasetSource,
)
from pipeline.errors import DataError
from tests.pictures import encode, noise

IMAGES = [encode(noise(number, 8)) for number in range(6)]


def read(source: Source) -> list[Sample | Reject]:
    """All samples, read as a worker does: by a source that came by pickle."""
    there = pickle.loads(pickle.dumps(source))
    return [sample for part in source.parts() for sample in there.read(part)]


def good(source: Source) -> dict[str, tuple[str, bytes]]:
    """Key -> (identity, image) of the samples, which must be all there is."""
    samples = [sample for sample in read(source) if isinstance(sample, Sample)]
    assert len(samples) == len(read(source))
    assert all(KEY_PATTERN.fullmatch(sample.key) for sample in samples)
    assert len({sample.key for sample in samples}) == len(samples)
    return {sample.key: (sample.identity, sample.image) for sample in samples}


def fails(make: Any, *words: str) -> None:
    with pytest.raises(DataError) as error:
        make()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# Lists


def write_images(folder: Path) -> list[str]:
    names = [f"pictures/{'ä b' if number == 1 else number}.png" for number in range(len(IMAGES))]
    (folder / "pictures").mkdir()
    for name, image in zip(names, IMAGES, strict=True):
        (folder / name).write_bytes(image)
    return names


def listing(path: Path, **options: Any) -> ListSource:
    return ListSource(ListSourceConfig(path=path, **options))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_a_list_of_paths_gives_each_row_once_with_its_identity(tmp_path: Path, kind: str, rows: int) -> None:
    names = write_images(tmp_path)
    names[2] = str(tmp_path / names[2])  # absolute paths are taken as they are
    people = ["007", "7", "Zoë, the 2nd", "7", "a", "b"]
    path = tmp_path / f"faces.{kind}"
    if kind == "csv":
        lines = [f'"{person}",{name},{number}' for number, (person, name) in enumerate(zip(people, names, strict=True))]
        path.write_text("\n".join(["who,file,shot", *lines]) + "\n")
    else:
        pq.write_table(pa.table({"who": people, "file": names, "shot": range(6)}), path, row_group_size=rows)
    source = listing(path, image_column="file", identity_column="who", rows=rows)
    assert sorted(good(source).values()) == sorted(zip(people, IMAGES, strict=True))
    assert len(source.parts()) == -(-6 // rows)
    third = read(source)[2]
    assert isinstance(third, Sample)
    assert third.attributes == {"file": names[2], "shot": "2"}
    assert third.identity == "Zoë, the 2nd"
    assert source.name == "faces"


def test_a_list_may_hold_the_images(tmp_path: Path) -> None:
    path = tmp_path / "faces.parquet"
    table = pa.table({"image": pa.array(IMAGES, pa.binary()), "identity": [3, 3, 1, 2, 1, 1], "role": ["q"] * 6})
    pq.write_table(table, path, row_group_size=4)
    found = good(listing(path, image_column="image"))
    assert list(found.values()) == list(zip(["3", "3", "1", "2", "1", "1"], IMAGES, strict=True))
    assert list(found) == [f"row-{number:09d}" for number in range(6)]


def test_files_that_are_missing_are_an_error_or_rejects_as_the_user_says(tmp_path: Path) -> None:
    names = write_images(tmp_path)
    (tmp_path / names[3]).unlink()
    (tmp_path / names[5]).unlink()
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["path,identity", *(f"{name},x" for name in names)]))
    told = "2 of 6 files are missing, the first in row 4: pictures/3.png; mend the list, or pass them over"
    fails(listing(path, rows=2).fingerprint, told)
    source = listing(path, rows=2, skip_missing=True)
    source.fingerprint()
    found = read(source)
    assert [type(one) for one in found] == [Sample, Sample, Sample, Reject, Sample, Reject]
    assert isinstance(found[3], Reject)
    assert found[3].reason == "file is missing"


def test_the_fingerprint_of_a_list_knows_the_files_that_it_names(tmp_path: Path) -> None:
    names, path = write_images(tmp_path), tmp_path / "list.csv"
    path.write_text("\n".join(["path,identity", *(f"{name},x" for name in names)]))
    first = listing(path).fingerprint()
    assert listing(path, rows=3).fingerprint() == first
    (tmp_path / names[0]).write_bytes(IMAGES[0] + b"more")
    second = listing(path).fingerprint()
    path.write_text(path.read_text().replace("0.png,x", "0.png,y"))
    assert len({first, second, listing(path).fingerprint()}) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("path,identity\n", "has no row"),
        ("file,identity\na,b\n", "has no column 'path' but file, identity; choose with --image-column"),
        ("path,identity\na.png,b,c\n", "cannot be read: CSV parse error"),
        ("path,path,identity\na,b,c\n", "two columns of one name"),
    ],
)
def test_a_csv_that_is_no_list_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    fails(lambda: listing(path), str(path), words)


def test_a_list_that_is_no_parquet_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    fails(lambda: listing(path), f"list {path} cannot be read")
    path.write_bytes(b"PAR1 no")
    fails(lambda: listing(path), f"list {path} cannot be read")
    pq.write_table(pa.table({"path": [1], "identity": ["x"]}), path)
    fails(lambda: listing(path), "column 'path' is int64, neither paths nor images")
    fails(lambda: listing(tmp_path / "list.xlsx"), "neither .csv nor .parquet")


def test_a_row_without_an_identity_or_image_is_named(tmp_path: Path) -> None:
    names, path = write_images(tmp_path), tmp_path / "list.csv"
    path.write_text(f"path,identity\n{names[0]},x\n{names[1]},\n")
    fails(lambda: read(listing(path)), f"list {path}: row 2 has no 'identity'")
    other = tmp_path / "list.parquet"
    pq.write_table(pa.table({"path": pa.array([names[0], None]), "identity": ["x", "y"]}), other)
    fails(lambda: read(listing(other)), f"list {other}: row 2 has no 'path'")


# RecordIO, written by its published format

MAGIC = struct.pack("<I", 0xCED7230A)


def header(label: float | Sequence[float], number: int = 0) -> bytes:
    if isinstance(label, float | int):
        return struct.pack("<IfQQ", 0, label, number, 0)
    return struct.pack(f"<IfQQ{len(label)}f", len(label), 0.0, number, 0, *label)


def record(content: bytes) -> bytes:
    """One record; where the content has the magic number at a multiple of 4, it is cut there, and that left out."""
    cuts = [place for place in range(0, len(content) - 3, 4) if content[place : place + 4] == MAGIC]
    starts = [0, *(place + 4 for place in cuts)]
    pieces = [content[start:stop] for start, stop in zip(starts, [*cuts, len(content)], strict=True)]
    flags = [0] if len(pieces) == 1 else [1, *[2] * (len(pieces) - 2), 3]
    return b"".join(
        MAGIC + struct.pack("<I", flag << 29 | len(piece)) + piece + bytes(-len(piece) % 4)
        for flag, piece in zip(flags, pieces, strict=True)
    )


def write_records(folder: Path, contents: Iterable[bytes], index: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    with (folder / "train.rec").open("wb") as stream:
        for number, content in enumerate(contents):
            lines.append(f"{number}\t{stream.tell()}\n")
            stream.write(record(content))
    if index:
        (folder / "train.idx").write_text("".join(lines))
    return folder


def face_set(images: Sequence[bytes], labels: Sequence[float | Sequence[float]], people: int) -> list[bytes]:
    """As InsightFace has it: a header, the images from 1 on, and an empty record for each identity."""
    end = len(images) + 1
    first = header([float(end), float(end + people)])
    identities = [header([1.0, 2.0], end + person) for person in range(people)]
    return [first, *(header(label) + image for label, image in zip(labels, images, strict=True)), *identities]


def records(folder: Path, **options: Any) -> RecordSource:
    return RecordSource(RecordSourceConfig(path=folder, **options))


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("size", [2, 100])
def test_a_face_set_gives_each_image_once_with_its_label(tmp_path: Path, index: bool, size: int) -> None:
    images = [image + b"\1" * number for number, image in enumerate(IMAGES)]  # every length over 4
    labels: list[float | Sequence[float]] = [0.0, [2.0, 7.0], 1.0, 1.0, [0.0], 16_777_215.0]
    folder = write_records(tmp_path / "ms1mv3", face_set(images, labels, 3), index)
    (folder / "train.lst").write_text("1\tnonsense\t99\n")
    source = records(folder, records=size)
    expected = list(zip(["0", "2", "1", "1", "0", "16777215"], images, strict=True))
    found = good(source)
    assert list(found.values()) == expected
    assert list(found) == [f"train-{number:09d}" for number in range(1, 7)]
    assert source.name == "ms1mv3"


@pytest.mark.parametrize("index", [True, False])
def test_a_set_without_a_header_is_read_from_record_0(tmp_path: Path, index: bool) -> None:
    folder = write_records(tmp_path / "set", [header(float(n)) + image for n, image in enumerate(IMAGES)], index)
    assert list(good(records(folder / "train.rec")).values()) == [(str(n), image) for n, image in enumerate(IMAGES)]


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("places", [[0], [8], [40, 44], [0, 100, 200], [6]])
def test_images_that_hold_the_magic_number_come_back_whole(tmp_path: Path, index: bool, places: list[int]) -> None:
    image = bytearray(IMAGES[0])
    for place in places:
        image[place : place + 4] = MAGIC
    images = [IMAGES[1], bytes(image), IMAGES[2], bytes(image) + MAGIC]
    folder = write_records(tmp_path / "set", face_set(images, [1.0] * 4, 1), index)
    assert [image for _, image in good(records(folder)).values()] == images
    assert len(MAGIC.join([b""] * 3)) == 8


def test_beyond_what_a_float_counts_content_makes_an_image(tmp_path: Path) -> None:
    contents = face_set(IMAGES[:4], [0.0] * 4, 2)
    contents[0] = header([4.0, 7.0])  # one too low, as a rounded count may be
    assert len(good(records(write_records(tmp_path / "set", contents)))) == 4


def test_an_index_may_choose_records(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "set", face_set(IMAGES, [float(n) for n in range(6)], 0))
    lines = (folder / "train.idx").read_text().splitlines(keepends=True)
    (folder / "train.idx").write_text("".join(reversed([lines[0], lines[2], lines[5]])))
    assert [identity for identity, _ in good(records(folder)).values()] == ["1", "4"]


def test_labels_that_are_no_identity_are_rejects(tmp_path: Path) -> None:
    labels = [0.5, float("nan"), -1.0, float("inf"), 3.0, 2.0]
    folder = write_records(tmp_path / "set", face_set(IMAGES, labels, 0))
    (folder / "property").write_text("3,112,112\n")
    found = read(records(folder))
    no_number, unknown = "label is no whole number of 0 or more", "label is beyond the number of identities"
    reasons = [one.reason if isinstance(one, Reject) else None for one in found]
    assert reasons[:4] == [no_number] * 4
    assert str(reasons[4]).startswith(unknown)
    assert reasons[5] is None


def test_a_broken_face_set_is_refused(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "set", face_set(IMAGES, [0.0] * 6, 0))
    rec, idx = folder / "train.rec", folder / "train.idx"
    whole, lines = rec.read_bytes(), idx.read_text().splitlines()
    rec.write_bytes(whole[:-20])
    fails(lambda: read(records(folder)), f"{rec} is cut off within record 6")
    idx.unlink()
    fails(lambda: records(folder), f"{rec} is cut off within record 6")
    rec.write_bytes(whole + bytes(8))
    fails(lambda: records(folder), f"no record begins at byte {len(whole)}")
    rec.write_bytes(whole)
    for text, words in (
        (lines[3].replace("\t", " "), "is malformed"),
        ("x\t5", "is malformed"),
        ("1\t-5", "negative"),
        (f"{lines[3]}\n{lines[3]}", "lists a record twice"),
        ("", "is malformed"),
    ):
        idx.write_text(text)
        fails(lambda: records(folder), f"index {idx}", words)
    idx.write_text("3\t20\n")
    fails(lambda: read(records(folder)), "no record begins at byte 20, where record 3 should")
    idx.write_text(f"3\t{len(whole)}\n")
    fails(lambda: read(records(folder)), "is cut off before record 3")
    idx.unlink()
    (folder / "property").write_text("many")
    fails(lambda: records(folder), "property begins with 'many'")
    fails(lambda: records(tmp_path / "nowhere"), "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    fails(lambda: records(tmp_path / "empty"), "train.rec does not exist")
    (tmp_path / "empty" / "train.rec").write_bytes(b"")
    fails(lambda: records(tmp_path / "empty"), "has no record")
    short = write_records(tmp_path / "short", [b"tiny"])
    fails(lambda: records(short), "record 0 is too short for its header")


# WebDataset tars


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> Path:
    with path.open("wb") as stream, webdataset.TarWriter(stream, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def add(
    archive: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, link
    archive.addfile(member, io.BytesIO(content))


def tars(folder: Path, **options: Any) -> WebDatasetSource:
    return WebDatasetSource(WebDatasetConfig(path=folder, **options))


def test_tars_are_read_by_class_or_by_json(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(
            tmp_path / f"{number}.tar",
            (
                {"__key__": f"deep/{place}", "jpg": image, "cls": b" 5\n", "json": b'{"who": %d, "age": 3.5}' % place}
                for place, image in enumerate(IMAGES)
            ),
        )
    assert list(good(tars(tmp_path)).values()) == [("5", image) for image in IMAGES] * 2
    assert list(good(tars(tmp_path, label_key="who")).values()) == [(str(n), i) for n, i in enumerate(IMAGES)] * 2
    first = read(tars(tmp_path))[0]
    assert isinstance(first, Sample)
    assert first.attributes == {"file": "0.tar/deep/0", "who": "0"}


def test_what_a_tar_should_not_hold_is_refused_and_the_rest_kept(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(IMAGES[0])
    members: list[tuple[str, bytes, bytes, str]] = [
        ("../out.png", IMAGES[1], tarfile.REGTYPE, ""),
        ("/etc/abs.png", IMAGES[1], tarfile.REGTYPE, ""),
        ("a/../b.png", IMAGES[1], tarfile.REGTYPE, ""),
        ("soft.png", b"", tarfile.SYMTYPE, str(secret)),
        ("hard.png", b"", tarfile.LNKTYPE, "good.png"),
        ("device.png", b"", tarfile.CHRTYPE, ""),
        ("fifo.png", b"", tarfile.FIFOTYPE, ""),
        ("with space.png", IMAGES[1], tarfile.REGTYPE, ""),
        ("folder.png", b"", tarfile.DIRTYPE, ""),
        ("README", b"text", tarfile.REGTYPE, ""),
        (".hidden.png", IMAGES[1], tarfile.REGTYPE, ""),
        (f"{'long' * 40}.png", IMAGES[3], tarfile.REGTYPE, ""),
        ("good.png", IMAGES[2], tarfile.REGTYPE, ""),
    ]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content, kind, link in members:
            add(archive, name, content, kind, link)
            if kind != tarfile.DIRTYPE and name not in ("README", ".hidden.png"):
                add(archive, name.replace(".png", ".cls"), b"1")
    found = read(tars(tmp_path))
    reasons = [one.reason for one in found if isinstance(one, Reject)]
    unsafe, not_plain = "name in the tar is absolute or has `..`", "link, device or sparse file in the tar"
    assert reasons == [unsafe] * 3 + [not_plain] * 4 + ["white space in a name in the tar"]
    assert [one.image for one in found if isinstance(one, Sample)] == [IMAGES[3], IMAGES[2]]


@pytest.mark.parametrize(
    ("members", "label_key", "reason"),
    [
        ({"jpg": b"x"}, None, "no label"),
        ({"jpg": b"x", "cls": b"  "}, None, "no label"),
        ({"jpg": b"x", "cls": b"\xff\xfe"}, None, "label is neither text nor a whole number"),
        ({"jpg": b"x", "cls": b"1\n2"}, None, "label is neither text nor a whole number"),
        ({"cls": b"1", "txt": b"x"}, None, "no image (jpg, png or webp) under the key"),
        ({"cls": b"1", "jpg": b"x", "png": b"x"}, None, "more than one image under the key"),
        ({"jpg": b"x"}, "who", "no label"),
        ({"jpg": b"x", "json": b"{"}, "who", "no label"),
        ({"jpg": b"x", "json": b'{"who": 1.5}'}, "who", "label is neither text nor a whole number"),
        ({"jpg": b"x", "json": b'{"who": true}'}, "who", "label is neither text nor a whole number"),
    ],
)
def test_samples_without_an_image_or_label_are_rejects(
    tmp_path: Path, members: dict[str, bytes], label_key: str | None, reason: str
) -> None:
    write_tar(tmp_path / "0.tar", [{"__key__": "a", **members}, {"__key__": "b", "jpg": b"x", "cls": b"1"}])
    found = read(tars(tmp_path, label_key=label_key))
    assert isinstance(found[0], Reject)
    assert found[0].reason == reason
    assert isinstance(found[1], Reject if label_key else Sample)


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    one = {"jpg": b"x", "cls": b"1"}
    write_tar(tmp_path / "0.tar", [{"__key__": "a", **one}, {"__key__": "b", **one}, {"__key__": "a", **one}])
    fails(lambda: read(tars(tmp_path)), "0.tar: key 'a' stands twice")
    write_tar(tmp_path / "0.tar", [{"__key__": "a", **one}, {"__key__": "a", **one}])
    fails(lambda: read(tars(tmp_path)), "0.tar: key 'a' stands twice")


@pytest.mark.parametrize("cut", [512, 700, 1024, 1500, 2560, 4000, 10_240])
def test_a_tar_that_is_cut_off_is_never_taken_for_a_whole_one(tmp_path: Path, cut: int) -> None:
    """2560 bytes are one whole sample."""
    path = write_tar(tmp_path / "0.tar", ({"__key__": f"{n}", "jpg": b"x" * 900, "cls": b"1"} for n in range(4)))
    path.write_bytes(path.read_bytes()[:cut])
    fails(lambda: read(tars(tmp_path)), str(path))


def test_a_tar_that_is_broken_inside_or_compressed_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", ({"__key__": f"{n}", "jpg": b"x" * 900, "cls": b"1"} for n in range(4)))
    whole = path.read_bytes()
    broken = bytearray(whole)
    place = whole.index(b"2.cls")
    broken[place : place + 20] = b"\xff" * 20
    path.write_bytes(broken)
    fails(lambda: read(tars(tmp_path)), f"tar {path} is cut off, broken or compressed: bad checksum")
    path.write_bytes(whole + whole)
    fails(lambda: read(tars(tmp_path)), f"tar {path} is broken at byte")
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "a.jpg", b"x")
    fails(lambda: read(tars(tmp_path)), f"tar {path} is cut off, broken or compressed")
    path.write_bytes(b"")
    fails(lambda: read(tars(tmp_path)), str(path))
    path.unlink()
    fails(lambda: tars(tmp_path), "holds no .tar")
    fails(lambda: tars(tmp_path / "nowhere"), "does not exist")
