"""IJB-B and IJB-C as InsightFace distributes them: loose crops, and text files of templates and pairs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.data.protocols import GALLERY, QUERY, SCHEMAS, Protocol
from pipeline.data.sources import EXTENSIONS, Sample, folder_key
from pipeline.data.sources_eval.files import part_names, part_range, read_image, read_text_table, stamps
from pipeline.errors import DataError
from pipeline.files import file_sha256
from pipeline.schema import Config, digest_json

# The lists of 1:N search: name, file, role of its templates.
LISTS = {
    "ijbc": (("G1", "1N_gallery_G1", GALLERY), ("G2", "1N_gallery_G2", GALLERY), ("mixed", "1N_probe_mixed", QUERY)),
    "ijbb": (("S1", "1N_gallery_S1", GALLERY), ("S2", "1N_gallery_S2", GALLERY), ("mixed", "1N_probe_mixed", QUERY)),
}
LANDMARKS = tuple(f"{axis}{point}" for point in range(5) for axis in "xy")


class IjbSourceConfig(Config):
    """A folder of IJB-B or IJB-C."""

    path: Path = Field(description="The folder with `loose_crop` and `meta`, whose files begin with ijbb_ or ijbc_.")
    parts: int = Field(default=64, ge=1, le=65536, description="Into how many units of work the images are cut.")


class IjbSource:
    """Faces in templates, compared one to one and, where the 1N files are there, searched one to many.

    Crops are packed as they are. Their five landmarks, in pixels of the crop, are the sample's attribute `landmarks`
    ("x y" of both eyes, nose and both corners of the mouth), the detector's score is `score`. Most models want aligned
    faces: aligning by these landmarks is a step of the user before packing; nothing here does it yet.

    A sample's identity is its subject, which the 1N files tell; without them it is its template, and one person is
    several identities.

    Raises:
        DataError: files are missing, malformed or contradict each other; names the file and, where there is one, the
            row.
    """

    min_images = 1

    def __init__(self, config: IjbSourceConfig) -> None:
        self.config = config
        self.root = config.path.expanduser().resolve()
        self.crops, self.benchmark = self.root / "loose_crop", _benchmark(self.root)
        self._images = self._read_images()
        self._templates = self._read_templates()
        self._roles = self._read_roles()
        self._identities = self._identities_of_images()

    @property
    def name(self) -> str:
        """The name of the benchmark: ijbb or ijbc."""
        return self.benchmark

    def fingerprint(self) -> str:
        """Sha256 over the content of the text files, and each image's name, size and modification time."""
        meta = {path.name: file_sha256(path) for path in sorted((self.root / "meta").glob(f"{self.benchmark}_*"))}
        images = stamps(self.crops, self._images["file"].to_pylist())
        return digest_json({"source": "ijb", "meta": meta, "images": images})

    def parts(self) -> list[str]:
        """Runs of images, in the order of the list."""
        return part_names(len(self._images), self.config.parts)

    def read(self, part: str) -> Iterator[Sample]:
        """Yield the images of a part.

        Raises:
            DataError: an image cannot be read.
        """
        chosen = part_range(part, len(self._images))
        rows = self._images.slice(chosen.start, len(chosen)).to_pylist()
        identities = self._identities.slice(chosen.start, len(chosen)).to_pylist()
        for row, identity in zip(rows, identities, strict=True):
            file = row["file"]
            about = {
                "file": file,
                "landmarks": " ".join(repr(row[name]) for name in LANDMARKS),
                "score": repr(row["score"]),
            }
            extension = EXTENSIONS.get(Path(file).suffix.lower(), "jpg")
            yield Sample(folder_key(file), read_image(self.crops / file), extension, identity, about)

    def protocol(self) -> Protocol:
        """Return templates and their pairs, and the galleries and probes if the 1N files are there.

        Raises:
            DataError: the file of pairs is missing or malformed, or names a template that has no image.
        """
        keys = pa.array([folder_key(file) for file in self._templates["file"].to_pylist()], pa.string())
        templates = self._templates.drop_columns("file").append_column("key", keys)
        pairs = read_text_table(
            self._meta("template_pair_label.txt"), dict(zip(*_named("template_pairs"), strict=True)), delimiter=" "
        )
        return Protocol(templates=templates, template_pairs=pairs, template_roles=self._roles)

    def _meta(self, file: str) -> Path:
        return self.root / "meta" / f"{self.benchmark}_{file}"

    def _read_images(self) -> pa.Table:
        """Columns file, LANDMARKS and score, a row an image."""
        path = self._meta("name_5pts_score.txt")
        columns = {"file": pa.string(), **dict.fromkeys((*LANDMARKS, "score"), pa.float64())}
        images = read_text_table(path, columns, delimiter=" ")
        if not self.crops.is_dir():
            raise DataError(f"image folder {self.crops} does not exist; it should hold what {path} lists")
        there = pa.array([file.name for file in self.crops.iterdir()], pa.string())
        missing = np.flatnonzero(~pc.is_in(images["file"], value_set=there).to_numpy())
        if len(missing):
            row = int(missing[0])
            raise DataError(
                f"{path}: {len(missing)} of its {len(images)} images are not in {self.crops}, the first is "
                f"{images['file'][row].as_py()!r} in row {row + 1}; restore them"
            )
        return images

    def _read_templates(self) -> pa.Table:
        """Columns template, media and file, a row an image of a template."""
        path, listed = self._meta("face_tid_mid.txt"), self._images["file"]
        columns = {"file": pa.string(), "template": pa.int64(), "media": pa.int64()}
        templates = read_text_table(path, columns, delimiter=" ")
        unlisted = np.flatnonzero(~pc.is_in(templates["file"], value_set=listed).to_numpy())
        if len(unlisted):
            row = int(unlisted[0])
            raise DataError(
                f"{path}: row {row + 1} names {templates['file'][row].as_py()!r}, which "
                f"{self._meta('name_5pts_score.txt').name} does not list; the two files must be of one release"
            )
        lonely = np.flatnonzero(~pc.is_in(listed, value_set=templates["file"]).to_numpy())
        if len(lonely):
            row = int(lonely[0])
            raise DataError(
                f"{self._meta('name_5pts_score.txt')}: row {row + 1} lists {listed[row].as_py()!r}, which belongs to "
                f"no template of {path.name}; the two files must be of one release"
            )
        return templates.select(["template", "media", "file"])

    def _read_roles(self) -> pa.Table | None:
        """The galleries and probes, a row a template of a list; None if there is no 1N file at all."""
        lists = [(name, self._meta(f"{stem}.csv"), role) for name, stem, role in LISTS[self.benchmark]]
        missing = [path for _, path, _ in lists if not path.exists()]
        if len(missing) == len(lists):
            return None
        if missing:
            raise DataError(f"{missing[0]} is missing; restore it, or remove the other 1N files to leave search out")
        tables = []
        for name, path, role in lists:
            columns = {"TEMPLATE_ID": pa.int64(), "SUBJECT_ID": pa.string()}
            table = read_text_table(path, columns, header=True).rename_columns(["template", "subject"])
            table = table.group_by(["template", "subject"], use_threads=False).aggregate([])  # rows were images
            for column, value in (("role", role), ("list", name)):
                table = table.append_column(column, pa.array([value] * len(table), pa.string()))
            tables.append(table)
        return _of_one_subject(pa.concat_tables(tables).combine_chunks(), self.root / "meta")

    def _identities_of_images(self) -> pa.Array:
        """(N,) identity of each image: its subject or, where that is not known, its template."""
        templates, files = self._templates["template"], self._templates["file"]
        subjects = pa.nulls(len(templates), pa.string())
        if self._roles is not None:
            subjects = pc.take(self._roles["subject"], pc.index_in(templates, value_set=self._roles["template"]))
        first = pc.index_in(files, value_set=files)  # a file's first row; the others are of further templates
        other = pc.fill_null(pc.not_equal(subjects, pc.take(subjects, first)), False)
        if (row := pc.index(other, True).as_py()) >= 0:
            raise DataError(
                f"{self._meta('face_tid_mid.txt')}: row {row + 1} gives {files[row].as_py()!r} to subject "
                f"{subjects[row].as_py()!r}, an earlier row to another; an image has one subject"
            )
        identities = pc.coalesce(
            subjects, pc.binary_join_element_wise("template", pc.cast(templates, pa.string()), "-")
        )
        identities = pc.take(identities, pc.index_in(self._images["file"], value_set=files))
        return identities.combine_chunks()


def _named(table: str) -> tuple[list[str], list[pa.DataType]]:
    return SCHEMAS[table].names, SCHEMAS[table].types


def _benchmark(root: Path) -> str:
    """Which of the benchmarks a folder holds."""
    found = [name for name in LISTS if (root / "meta" / f"{name}_face_tid_mid.txt").is_file()]
    if len(found) != 1:
        raise DataError(
            f"{root / 'meta'} holds {'both' if found else 'neither'} ijbb_face_tid_mid.txt and ijbc_face_tid_mid.txt; "
            "give the folder of one benchmark, with `loose_crop` and `meta` in it"
        )
    return found[0]


def _of_one_subject(roles: pa.Table, meta: Path) -> pa.Table:
    """Return the table, if each template is of one subject in all lists."""
    pairs = roles.group_by(["template", "subject"]).aggregate([])
    counts = pc.value_counts(pairs["template"])
    place = pc.index(pc.greater(counts.field("counts"), 1), True).as_py()
    if place >= 0:
        template = counts.field("values")[place].as_py()
        subjects = pairs.filter(pc.equal(pairs["template"], template))["subject"].to_pylist()
        raise DataError(
            f"the 1N files in {meta} give template {template} to subjects {' and '.join(sorted(subjects))}; mend them"
        )
    return roles
