"""IJB-B and IJB-C in the form in which InsightFace distributes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.sources_eval import IjbSource, IjbSourceConfig
from pipeline.errors import DataError
from tests.unit.eval_sets import encode, put, samples_of

# Image, template, media; image 3 is a frame of the same video as 4, and image 2 is in two templates.
TEMPLATES = [("1.jpg", 11, 100), ("2.jpg", 11, 101), ("2.jpg", 14, 101), ("3.jpg", 12, 102), ("4.jpg", 12, 102)]
TEMPLATES += [("5.jpg", 13, 103)]
SUBJECTS = {11: "7", 14: "7", 12: "8", 13: "9"}
PAIRS = [(11, 12, 0), (11, 14, 1), (12, 13, 0)]
HEADER = "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID,FACE_X,FACE_Y"


def landmarks(number: int) -> list[str]:
    return [f"{number + place / 1000:.3f}" for place in range(10)]


def lines(rows: list[tuple[object, ...]]) -> str:
    return "".join(" ".join(map(str, row)) + "\n" for row in rows)


def listed(templates: list[int]) -> str:
    """A 1N file: a row an image, with an empty cell and a quoted name as the originals have."""
    rows = [(template, file) for file, template, _ in TEMPLATES if template in templates]
    cells = [f'{template},{SUBJECTS[template]},"img/a, {file}",,1,2' for template, file in rows]
    return "\n".join([HEADER, *cells]) + "\n"


def build(root: Path, benchmark: str = "ijbc", search: bool = True) -> IjbSourceConfig:
    numbers = range(1, 6)
    for number in numbers:
        put(root / "loose_crop" / f"{number}.jpg", encode(number))
    meta = root / "meta"
    scores = lines([(f"{number}.jpg", *landmarks(number), f"0.99{number}") for number in numbers])
    put(meta / f"{benchmark}_name_5pts_score.txt", scores)
    put(meta / f"{benchmark}_face_tid_mid.txt", lines(list(TEMPLATES)))
    put(meta / f"{benchmark}_template_pair_label.txt", lines(list(PAIRS)))
    if search:
        first, second = ("G1", "G2") if benchmark == "ijbc" else ("S1", "S2")
        put(meta / f"{benchmark}_1N_gallery_{first}.csv", listed([11]))
        put(meta / f"{benchmark}_1N_gallery_{second}.csv", listed([12]))
        put(meta / f"{benchmark}_1N_probe_mixed.csv", listed([14, 13]))
    return IjbSourceConfig(path=root, parts=3)


@pytest.mark.parametrize(("benchmark", "lists"), [("ijbc", ["G1", "G2"]), ("ijbb", ["S1", "S2"])])
def test_images_templates_pairs_and_lists_are_read(tmp_path: Path, benchmark: str, lists: list[str]) -> None:
    source = IjbSource(build(tmp_path / "in", benchmark))
    assert source.name == benchmark
    samples = {sample.attributes["file"]: sample for sample in samples_of(source, tmp_path).values()}
    assert {file: sample.image for file, sample in samples.items()} == {f"{n}.jpg": encode(n) for n in range(1, 6)}
    assert {file: sample.identity for file, sample in samples.items()} == {
        "1.jpg": "7", "2.jpg": "7", "3.jpg": "8", "4.jpg": "8", "5.jpg": "9"
    }  # fmt: skip
    assert [float(x) for x in samples["4.jpg"].attributes["landmarks"].split()] == [float(x) for x in landmarks(4)]
    assert samples["4.jpg"].attributes["score"] == "0.994"
    protocol = source.protocol()
    assert protocol.templates is not None
    assert protocol.template_pairs is not None
    assert protocol.template_roles is not None
    rows = [(row["template"], row["media"], row["key"]) for row in protocol.templates.to_pylist()]
    assert rows == [(template, media, samples[file].key) for file, template, media in TEMPLATES]
    assert [tuple(row.values()) for row in protocol.template_pairs.to_pylist()] == [
        (first, second, same == 1) for first, second, same in PAIRS
    ]
    assert sorted(tuple(row.values()) for row in protocol.template_roles.to_pylist()) == [
        (11, "7", "gallery", lists[0]),
        (12, "8", "gallery", lists[1]),
        (13, "9", "query", "mixed"),
        (14, "7", "query", "mixed"),
    ]


def test_without_the_lists_of_search_an_identity_is_a_template(tmp_path: Path) -> None:
    source = IjbSource(build(tmp_path / "in", search=False))
    samples = {sample.attributes["file"]: sample.identity for sample in samples_of(source, tmp_path).values()}
    assert samples == {
        "1.jpg": "template-11", "2.jpg": "template-11", "3.jpg": "template-12", "4.jpg": "template-12",
        "5.jpg": "template-13",
    }  # fmt: skip
    assert source.protocol().template_roles is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("name_5pts_score.txt", "", "ijbc_name_5pts_score.txt is malformed: Empty CSV file"),
        (
            "name_5pts_score.txt",
            lines([("1.jpg", *landmarks(1), 1), ("2.jpg", *landmarks(1))]),
            "score.txt is malformed: .*row 2: Expected 12 columns, got 11",
        ),
        ("name_5pts_score.txt", lines([("1.jpg", *landmarks(1))]), "is malformed: .*Expected 12 columns, got 11"),
        (
            "name_5pts_score.txt",
            lines([("1.jpg", *landmarks(1), 1), ("2.jpg", *landmarks(1)[:9], "left", 1)]),
            "score.txt is malformed: .*row 2: .*invalid value 'left'",
        ),
        (
            "name_5pts_score.txt",
            lines([(f"{number}.jpg", *landmarks(1), 1) for number in (1, 2, 6, 7)]),
            r"score.txt: 2 of its 4 images are not in .*loose_crop, the first is '6\.jpg' in row 3",
        ),
        (
            "name_5pts_score.txt",
            lines([("1.jpg", *landmarks(1), 1)]),
            r"tid_mid.txt: row 2 names '2\.jpg', which ijbc_name_5pts_score.txt does not list",
        ),
        ("face_tid_mid.txt", lines([("1.jpg", 11, 1), ("2.jpg", 11)]), "tid_mid.txt is malformed: .*row 2: Expected 3"),
        ("face_tid_mid.txt", lines([("1.jpg", "a", 1)]), "tid_mid.txt is malformed: .*row 1: .*invalid value 'a'"),
        ("face_tid_mid.txt", lines([("1.jpg", "", 1)]), "tid_mid.txt is malformed: .*row 1: .*invalid value ''"),
        (
            "face_tid_mid.txt",
            lines([*TEMPLATES[:4]]),
            r"score.txt: row 4 lists '4\.jpg', which belongs to no template of ijbc_face_tid_mid.txt",
        ),
        (
            "face_tid_mid.txt",
            lines([*TEMPLATES, ("1.jpg", 13, 9)]),
            r"tid_mid.txt: row 7 gives '1\.jpg' to subject '9', an earlier row to another",
        ),
        ("template_pair_label.txt", lines([(11, 12, 0), (11, 12, 2)]), "label.txt is malformed: .*row 2: .*'2'"),
        ("template_pair_label.txt", lines([(11, 12, 0), (11, 12)]), "label.txt is malformed: .*row 2: Expected 3"),
        (
            "template_pair_label.txt",
            lines([(11, 12, 0), (11, 99, 1)]),
            "template_pairs: row 2 names a template that has no image: 99",
        ),
        ("1N_gallery_G1.csv", "TEMPLATE_ID,NAME\n11,7\n", "G1.csv is malformed: .*SUBJECT_ID"),
        ("1N_gallery_G1.csv", f"{HEADER}\n11,7,a,,1,2\nx,7,a,,1,2\n", "G1.csv is malformed: .*row 3: .*'x'"),
        ("1N_probe_mixed.csv", listed([13]) + "11,8,a,,1,2\n", "1N files .* give template 11 to subjects 7 and 8"),
        (
            "1N_probe_mixed.csv",
            listed([13]) + "77,8,a,,1,2\n",
            "template_roles: row 4 names a template that has no image: 77",
        ),
    ],
)
def test_malformed_files_are_told_with_their_row(tmp_path: Path, file: str, content: str, message: str) -> None:
    config = build(tmp_path)
    put(tmp_path / "meta" / f"ijbc_{file}", content)
    with pytest.raises(DataError, match=message) as caught:
        IjbSource(config).protocol()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("name_5pts_score.txt", "ijbc_name_5pts_score.txt cannot be read: .*No such file"),
        ("face_tid_mid.txt", "meta holds neither ijbb_face_tid_mid.txt and ijbc_face_tid_mid.txt"),
        ("template_pair_label.txt", "ijbc_template_pair_label.txt cannot be read: .*No such file"),
        ("1N_gallery_G2.csv", "ijbc_1N_gallery_G2.csv is missing; restore it, or remove the other 1N files"),
    ],
)
def test_missing_files_are_told(tmp_path: Path, file: str, message: str) -> None:
    config = build(tmp_path)
    (tmp_path / "meta" / f"ijbc_{file}").unlink()
    with pytest.raises(DataError, match=message):
        IjbSource(config).protocol()


def test_two_benchmarks_in_one_folder_are_refused(tmp_path: Path) -> None:
    build(tmp_path, "ijbb")
    with pytest.raises(DataError, match="holds both"):
        IjbSource(build(tmp_path, "ijbc"))


def test_a_crop_that_vanishes_is_told(tmp_path: Path) -> None:
    source = IjbSource(build(tmp_path))
    (tmp_path / "loose_crop" / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"image .*3\.jpg cannot be read: No such file"):
        source.fingerprint()
    with pytest.raises(DataError, match=r"image .*3\.jpg cannot be read: No such file"):
        [sample for part in source.parts() for sample in source.read(part)]


def test_rows_are_counted_past_what_is_parsed_at_once(tmp_path: Path) -> None:
    config = build(tmp_path)
    put(tmp_path / "meta" / "ijbc_template_pair_label.txt", "11 12 0\n" * 300_000 + "11 12\n")
    with pytest.raises(DataError, match=r"label\.txt is malformed: .*row 300001: Expected 3 columns, got 2"):
        IjbSource(config).protocol()
