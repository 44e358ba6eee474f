"""A list of one's own: images, who they show, and which of them search or are searched."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.data.protocols import GALLERY, QUERY, SCHEMAS, Protocol
from pipeline.data.sources import EXTENSIONS, Sample, folder_key
from pipeline.data.sources_eval.files import part_names, part_range, read_image, read_text_table, stamps
from pipeline.errors import DataError
from pipeline.files import file_sha256
from pipeline.parquet import read_parquet
from pipeline.schema import Config, digest_json

REQUIRED = ("path", "identity", "role")


class QueryGalleryConfig(Config):
    """A CSV or Parquet file with the columns path, identity, role (query or gallery) and, if wanted, group."""

    path: Path = Field(description="The list (.csv with a header, or .parquet).")
    not_compared: Literal["group", "identity and group"] = Field(
        default="group",
        description="Pairs that are not compared: those of one group, or only those of one group and one identity.",
    )
    parts: int = Field(default=64, ge=1, le=65536, description="Into how many units of work the images are cut.")


class QueryGallerySource:
    """The images of a list, in its order; their paths are relative to the list's folder, or absolute.

    Further columns become attributes. A path may stand in both roles, and is then packed once in each; as an image
    without a group is a group of its own, it is not compared with itself.

    Raises:
        DataError: the list is missing or malformed, a row lacks something or stands twice, or images are missing;
            names list and row (a CSV's header is row 1).
    """

    min_images = 1

    def __init__(self, config: QueryGalleryConfig) -> None:
        self.config = config
        self.path = config.path.expanduser().resolve()
        parquet = self.path.suffix.lower() == ".parquet"
        self._first_row = 1 if parquet else 2
        self._rows = _read_parquet(self.path) if parquet else _read_csv(self.path)
        self._check()
        self._missing()

    @property
    def name(self) -> str:
        """The list's name without suffix."""
        return self.path.stem

    def fingerprint(self) -> str:
        """Sha256 over the list's content, the rule, and each image's path, size and modification time."""
        files = stamps(self.path.parent, self._rows["path"].to_pylist())
        about = {"list": file_sha256(self.path), "not_compared": self.config.not_compared}
        return digest_json({"source": "query-gallery", **about, "files": files})

    def parts(self) -> list[str]:
        """Runs of rows."""
        return part_names(len(self._rows), self.config.parts)

    def read(self, part: str) -> Iterator[Sample]:
        """Yield the images of a part.

        Raises:
            DataError: an image cannot be read.
        """
        chosen = part_range(part, len(self._rows))
        for row in self._rows.slice(chosen.start, len(chosen)).to_pylist():
            path, identity = row.pop("path"), row.pop("identity")
            about = {**row, "file": path, "group": self._group(path, identity, row.get("group"))}
            image = read_image(self.path.parent / path)
            extension = EXTENSIONS.get(Path(path).suffix.lower(), "jpg")
            yield Sample(_key(path, row["role"]), image, extension, identity, about)

    def protocol(self) -> Protocol:
        """Return the roles."""
        rows = self._rows.select([name for name in (*REQUIRED, "group") if name in self._rows.schema.names]).to_pylist()
        columns = [
            [_key(row["path"], row["role"]) for row in rows],
            [row["role"] for row in rows],
            [row["identity"] for row in rows],
            [self._group(row["path"], row["identity"], row.get("group")) for row in rows],
        ]
        return Protocol(roles=pa.table(columns, schema=SCHEMAS["roles"]))

    def _group(self, path: str, identity: str, group: str | None) -> str:
        """What is equal for images that are not compared."""
        if not group:
            return folder_key(path)
        return group if self.config.not_compared == "group" else json.dumps([identity, group], ensure_ascii=False)

    def _check(self) -> None:
        """Refuse empty cells, unknown roles and rows that stand twice."""
        for name in REQUIRED:
            self._refuse(pc.equal(self._rows[name], ""), f"has no {name}")
        known = pc.is_in(self._rows["role"], value_set=pa.array([QUERY, GALLERY]))
        self._refuse(pc.invert(known), f"has a role that is neither {QUERY!r} nor {GALLERY!r}")
        for role in (QUERY, GALLERY):
            if not pc.any(pc.equal(self._rows["role"], role)).as_py():
                raise DataError(f"{self.path} has no row of role {role!r}; without it nothing can be searched")
        keys = map(_key, self._rows["path"].to_pylist(), self._rows["role"].to_pylist())
        again = pa.chunked_array([_repeats(keys)], pa.bool_())
        self._refuse(again, "names a path that an earlier row has in the same role")

    def _missing(self) -> None:
        absent = [not (self.path.parent / path).is_file() for path in self._rows["path"].to_pylist()]
        what = f"names an image that is not there, as do {sum(absent) - 1} more"
        self._refuse(pa.chunked_array([absent], pa.bool_()), what)

    def _refuse(self, wrong: pa.ChunkedArray, what: str) -> None:
        place = pc.index(wrong, True).as_py()
        if place >= 0:
            path = self._rows["path"][place].as_py()
            raise DataError(f"{self.path}: row {place + self._first_row} ({path!r}) {what}; mend the list")


def _key(path: str, role: str) -> str:
    return folder_key(f"{role}/{path}")


def _repeats(keys: Iterable[str]) -> list[bool]:
    """Which of the keys stood before."""
    seen: set[str] = set()
    repeats = []
    for key in keys:
        repeats.append(key in seen)
        seen.add(key)
    return repeats


def _read_csv(path: Path) -> pa.Table:
    """All columns as text: a camera named 007 is not 7."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            names = next(csv.reader(stream), [])
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"list {path} cannot be read: {error}") from None
    _check_columns(path, names)
    return read_text_table(path, dict.fromkeys(names, pa.string()), header=True)


def _read_parquet(path: Path) -> pa.Table:
    try:
        table = read_parquet(path)
        _check_columns(path, table.schema.names)
        columns = [pc.fill_null(table[name].cast(pa.string()), "") for name in table.schema.names]
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"list {path} cannot be read: {' '.join(str(error).split())}") from None
    return pa.table(columns, names=table.schema.names)


def _check_columns(path: Path, names: list[str]) -> None:
    for name in REQUIRED:
        if name not in names:
            raise DataError(f"list {path} has no column {name!r}, but {', '.join(names) or 'none'}; name it so")
    if len(set(names)) != len(names):
        raise DataError(f"list {path} has two columns of one name among {', '.join(names)}; name each once")
