"""What is embedded, cut into parts that are read independently: a data set's shards, or blocks of a list of images."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv

from pipeline.data.checking import EMPTY
from pipeline.data.manifest import Manifest
from pipeline.data.reading import ShardReader
from pipeline.data.shards import index_path, read_attributes
from pipeline.data.sources import ListSource, Reject, Sample, Source
from pipeline.data.sources.base import printable
from pipeline.data.spool import NOT_UTF8
from pipeline.data.store import ShardStore, open_store
from pipeline.data.store_metadata import metadata_folder
from pipeline.data.store_remote import StoreConfig
from pipeline.data.verify import verify
from pipeline.embedding_files import repeated
from pipeline.errors import DataError
from pipeline.evaluation.metrics import Int64
from pipeline.parquet import read_parquet
from pipeline.redaction import redacted
from pipeline.schema import digest_json


@dataclass(frozen=True)
class Images:
    """Some images of a part, as they are encoded.

    Attributes:
        keys: (B,) of the samples.
        identities: (B,) keys of their identities.
        raws: (B,) bytes of the images.
        rejects: what the source itself refused among them; not counted in B.
    """

    keys: tuple[str, ...]
    identities: tuple[str, ...]
    raws: list[bytes]
    rejects: tuple[Reject, ...] = ()


class Parts(Protocol):
    """What is embedded; it travels to the actors by pickle."""

    @property
    def name(self) -> str:
        """Of the data, for messages and _embed.json."""
        ...

    @property
    def digest(self) -> str:
        """Sha256 (hex) of all that determines the images and their order."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parts, in order."""
        ...

    def check(self) -> None:
        """Find out what can be known before an image is decoded.

        Raises:
            DataError: a file is missing or changed, or two samples have one key.
        """
        ...

    def read(self, number: int, size: int) -> Generator[Images, None, None]:
        """Read a part's images, `size` at a time, always in the same order. Threads may read parts at once.

        Raises:
            DataError: they cannot be read.
        """
        ...


class ShardParts:
    """The shards of a packed data set.

    Args:
        location: the data set's folder, or a URL: s3://, gs://, http(s)://.
        store: of a URL's cache.
        where: (attribute, value) of the samples that are wanted, as their .json say; None: all.
        digest: of the manifest; None: whichever is found.

    Raises:
        ConfigError: no such kind of URL is known.
        DataError: there is no data set, or one of another digest.
    """

    def __init__(
        self, location: str, store: StoreConfig, where: tuple[str, str] | None = None, digest: str | None = None
    ) -> None:
        self._location, self._config, self._where = location, store, where
        self._folder = metadata_folder(location, store)
        self._manifest = Manifest.load(self._folder)
        if digest is not None and digest != self._manifest.digest:
            raise DataError(
                f"data set {redacted(location)} is another one here, or changed since the start; embed it again"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Open it again where it is unpickled: manifest, catalogue and cache are there as well."""
        return ShardParts, (self._location, self._config, self._where, self._manifest.digest)

    @property
    def name(self) -> str:
        """The data set's, and which of its samples."""
        return self._manifest.name + (f", {'='.join(self._where)}" if self._where else "")

    @property
    def digest(self) -> str:
        """The manifest's, with the condition if there is one."""
        return digest_json([self._manifest.digest, self._where]) if self._where else self._manifest.digest

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The shards'."""
        return tuple(entry.name for entry in self._manifest.shards)

    @cached_property
    def _identities(self) -> pa.Array:
        return self._manifest.identities().column

    @cached_property
    def _store(self) -> ShardStore:
        return open_store(self._location, self._manifest, self._config)

    def check(self) -> None:
        """Check the files beside the tars, the tars' sizes, and the keys. The packer has done so with its own keys."""
        verify(self._manifest, "none", self._store)
        if "shard_size" in self._manifest.pack:
            return
        keys = pa.chunked_array([pa.array(self._keys(number)) for number in range(len(self.names))], pa.string())
        if (twice := repeated(keys)) is not None:
            raise DataError(
                f"data set {redacted(self._location)}: two samples have the key {twice!r}, but a vector is found by "
                "its key; pack the tars anew (jobs/pack.py without --adopt), which makes keys unique"
            )

    def read(self, number: int, size: int) -> Generator[Images, None, None]:
        """Read a shard in its order; see `Parts.read`."""
        labels = np.arange(self._manifest.identities_count)
        reader = ShardReader(self._folder, self._manifest, labels, limit=1, store=self._store)
        places, keys = self._places(number), self._keys(number)
        with closing(reader):
            for start in range(0, len(places), size):
                places_B = places[start : start + size]
                work = reader.read(0, np.full(len(places_B), number), places_B)
                identities = self._identities.take(pa.array(work.labels_B)).to_pylist()
                yield Images(tuple(keys[place] for place in places_B), tuple(identities), work.raws)

    def _places(self, number: int) -> Int64:
        """Of the wanted samples in a shard."""
        entry = self._manifest.shards[number]
        if self._where is None:
            return np.arange(entry.samples)
        attribute, value = self._where
        try:
            samples = read_attributes(self._store.local(entry.name), index_path(self._folder / entry.name))
        finally:
            self._store.release(entry.name)
        for key, found in samples:
            if attribute not in found:
                raise DataError(
                    f"shard {entry.name}: sample {key!r} has no attribute {attribute!r} for --where; "
                    f"its .json has {', '.join(sorted(found))}"
                )
        return np.flatnonzero([found[attribute] == value for _, found in samples])

    def _keys(self, number: int) -> list[str]:
        """Of a shard's samples, in its order, which is also the catalogue's."""
        entry = self._manifest.shards[number]
        index = index_path(self._folder / entry.name)
        keys = _read_keys(index)
        if len(keys) != entry.samples:
            raise DataError(f"index {index} lists {len(keys)} samples, the manifest {entry.samples}; pack again")
        return keys


class SourceParts:
    """Images that a source lists, which nobody has packed.

    Args:
        source: whose parts they are.
    """

    def __init__(self, source: Source) -> None:
        self._source, self.name, self.names = source, source.name, tuple(source.parts())

    @cached_property
    def digest(self) -> str:
        """The source's fingerprint: it asks every file for its size and time of change."""
        return self._source.fingerprint()

    def check(self) -> None:
        """Check that no path stands twice in a list; keys of other sources are unique by how they are made."""
        if not isinstance(self._source, ListSource) or (paths := _paths(self._source)) is None:
            return
        if (twice := repeated(paths)) is not None:
            raise DataError(f"list {self._source.path} names {twice!r} twice; remove one of the rows")

    def read(self, number: int, size: int) -> Generator[Images, None, None]:
        """Read a part of the source in its order; see `Parts.read`."""
        samples = iter(self._source.read(self.names[number]))
        while block := list(islice(samples, size)):
            checked = [_named(one) if isinstance(one, Sample) else one for one in block]
            good = [one for one in checked if isinstance(one, Sample)]
            yield Images(
                tuple(one.key for one in good),
                tuple(one.identity for one in good),
                [one.image for one in good],
                tuple(one for one in checked if isinstance(one, Reject)),
            )


def _named(sample: Sample) -> Sample | Reject:
    """A sample whose names can be written, or a reject as packing makes of it; no image at all is one, too."""
    try:
        sample.identity.encode()
    except UnicodeEncodeError:
        return Reject(sample.key, printable(sample.identity), NOT_UTF8)
    return sample if sample.image else Reject(sample.key, sample.identity, EMPTY)


def _read_keys(index: Path) -> list[str]:
    """Keys of the samples that an index lists; its sha256 was compared, so that each line is whole."""
    try:
        lines = index.read_text().splitlines()[1:]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"index {index} cannot be read: {error}; restore it or pack again") from None
    return [name.removesuffix(f".{suffix}") for suffix, _, _, name, *_ in (line.split(" ", 4) for line in lines)]


def _paths(source: ListSource) -> pa.ChunkedArray | None:
    """The paths that a list names; None if it holds the images themselves, whose keys are the rows' numbers."""
    column = source.config.image_column
    if source.path.suffix.lower() == ".parquet":
        paths = read_parquet(source.path, [column]).column(0)
        return paths if pa.types.is_string(paths.type) or pa.types.is_large_string(paths.type) else None
    convert = pa.csv.ConvertOptions(column_types={column: pa.string()}, include_columns=[column])
    return pa.csv.read_csv(
        source.path, parse_options=pa.csv.ParseOptions(newlines_in_values=True), convert_options=convert
    ).column(0)
