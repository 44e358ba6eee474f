"""What an evaluation needs beyond images: which pairs, templates or roles are compared. Parquet beside the manifest.

One file a table, named after the field of `Protocol`; a data set has those that its benchmark defines.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.sources import Source
from pipeline.errors import DataError
from pipeline.files import write_atomically
from pipeline.parquet import read_parquet

GALLERY, QUERY = "gallery", "query"

SCHEMAS = {
    "pairs": pa.schema([("first", pa.string()), ("second", pa.string()), ("same", pa.bool_())]),
    "templates": pa.schema([("template", pa.int64()), ("media", pa.int64()), ("key", pa.string())]),
    "template_pairs": pa.schema([("first", pa.int64()), ("second", pa.int64()), ("same", pa.bool_())]),
    "template_roles": pa.schema(
        [("template", pa.int64()), ("subject", pa.string()), ("role", pa.string()), ("list", pa.string())]
    ),
    "roles": pa.schema(
        [("key", pa.string()), ("role", pa.string()), ("identity", pa.string()), ("group", pa.string())]
    ),
}
FILES = tuple(f"{name}.parquet" for name in SCHEMAS)
KEY_COLUMNS = {"pairs": ("first", "second"), "templates": ("key",), "roles": ("key",)}


@dataclass(frozen=True)
class Protocol:
    """The tables of a benchmark, with the columns of SCHEMAS and no nulls; None where it has no such table.

    Attributes:
        pairs: verification of images: keys of two samples, and whether they show one identity.
        templates: which samples form a template, and of which media (a still, or a video whose frames are averaged).
        template_pairs: verification of templates.
        template_roles: search of templates: each one's subject, role, and the list that it stands on (IJB-C has the
            galleries G1 and G2, and the probes `mixed`, which search each of them).
        roles: search of images: each sample's role and identity. Samples of one `group` are not compared with each
            other.

    Raises:
        DataError: a table is empty, has other columns, or contradicts itself or another; names table and row.
    """

    pairs: pa.Table | None = None
    templates: pa.Table | None = None
    template_pairs: pa.Table | None = None
    template_roles: pa.Table | None = None
    roles: pa.Table | None = None

    def __post_init__(self) -> None:
        tables = self.tables
        if not tables:
            raise DataError("protocol is empty: it needs pairs, templates or roles to be evaluated")
        for name, table in tables.items():
            _check_form(name, table)
        if self.pairs is not None:
            itself = pc.equal(self.pairs["first"], self.pairs["second"])
            _refuse_where("pairs", itself, "compares a sample with itself")
        if self.roles is not None:
            _check_roles("roles", self.roles)
            _refuse_repeated("roles", self.roles["key"], "sample")
        self._check_templates()

    def _check_templates(self) -> None:
        for name, columns in (("template_pairs", ("first", "second")), ("template_roles", ("template",))):
            table = self.tables.get(name)
            if table is None:
                continue
            if self.templates is None:
                raise DataError(f"protocol has {name} but no templates; add the table that says what a template holds")
            known = pc.unique(self.templates["template"])
            for column in columns:
                unknown = pc.invert(pc.is_in(table[column], value_set=known))
                _refuse_where(name, unknown, "names a template that has no image", table[column])
        if self.template_roles is not None:
            _check_roles("template_roles", self.template_roles)

    @property
    def tables(self) -> dict[str, pa.Table]:
        """The tables that there are, by name."""
        tables = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: table for name, table in tables.items() if table is not None}

    def keys(self) -> pa.Array:
        """Distinct keys of all samples that the protocol speaks of."""
        columns = [self.tables[name][column] for name in self.tables for column in KEY_COLUMNS.get(name, ())]
        return pc.unique(pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string()))

    def require(self, present: Iterable[str]) -> None:
        """Check that every sample which the protocol speaks of is there: a benchmark with gaps is another benchmark.

        Args:
            present: keys of the samples of a data set.

        Raises:
            DataError: names the first that is missing, and says how many are.
        """
        mine = self.keys()
        missing = mine.filter(pc.invert(pc.is_in(mine, value_set=pa.array(list(present), pa.string()))))
        if len(missing):
            raise DataError(
                f"{len(missing)} of the protocol's {len(mine)} samples are not in the data set, such as "
                f"{missing[0].as_py()!r}; see to the images that were rejected, and pack again"
            )


@runtime_checkable
class EvaluationSource(Source, typing.Protocol):
    """A source whose data set is evaluated by a protocol."""

    def protocol(self) -> Protocol:
        """Return the tables, of the same keys and identities as the samples."""
        ...


def save_protocol(folder: Path, protocol: Protocol) -> None:
    """Write the tables into a data set's folder; tables of an earlier protocol are removed first."""
    for file in FILES:
        (folder / file).unlink(missing_ok=True)
    for name, table in protocol.tables.items():
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        write_atomically(folder / f"{name}.parquet", sink.getvalue().to_pybytes())


def load_protocol(folder: Path) -> Protocol:
    """Read the tables that `save_protocol` wrote.

    Raises:
        DataError: there is none, or one is broken; names the file.
    """
    tables = {}
    for name, schema in SCHEMAS.items():
        path = folder / f"{name}.parquet"
        if not path.exists():
            continue
        try:
            table = read_parquet(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}; pack the data set again") from None
        if not table.schema.equals(schema):
            raise DataError(f"{path} has the columns {_columns(table.schema)}, not {_columns(schema)}; pack again")
        tables[name] = table
    if not tables:
        raise DataError(
            f"data set {folder} has no protocol ({', '.join(FILES)}); pack a source that has one to evaluate on it"
        )
    try:
        return Protocol(**tables)
    except DataError as error:
        raise DataError(f"data set {folder}: {error}") from None


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _check_form(name: str, table: pa.Table) -> None:
    if not table.schema.equals(SCHEMAS[name]):
        raise DataError(
            f"protocol table {name} has the columns {_columns(table.schema)}, not {_columns(SCHEMAS[name])}"
        )
    if not len(table):
        raise DataError(f"protocol table {name} is empty; leave it out or fill it")
    for column in table.schema.names:
        _refuse_where(name, pc.is_null(table[column]), f"has no {column!r}")


def _check_roles(name: str, table: pa.Table) -> None:
    known = pc.is_in(table["role"], value_set=pa.array([GALLERY, QUERY]))
    _refuse_where(name, pc.invert(known), f"has a role that is neither {GALLERY!r} nor {QUERY!r}", table["role"])
    for role in (GALLERY, QUERY):
        if not pc.any(pc.equal(table["role"], role)).as_py():
            raise DataError(f"protocol table {name} has no {role}; nothing could be searched")


def _refuse_where(name: str, wrong: pa.ChunkedArray, what: str, values: pa.ChunkedArray | None = None) -> None:
    """Raise a DataError for the first row where `wrong` is true; rows count from 1."""
    place = pc.index(wrong, True).as_py()
    if place >= 0:
        value = "" if values is None else f": {values[place].as_py()!r}"
        raise DataError(f"protocol table {name}: row {place + 1} {what}{value}; mend the source")


def _refuse_repeated(name: str, column: pa.ChunkedArray, what: str) -> None:
    counts = pc.value_counts(column)
    place = pc.index(pc.greater(counts.field("counts"), 1), True).as_py()
    if place >= 0:
        twice = counts.field("values")[place].as_py()
        raise DataError(f"protocol table {name}: {what} {twice!r} stands twice; each has one role")
