"""The manifest: what a packed data set holds, and how to tell that it still does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pipeline.data.verify import verify
from pipeline.errors import DataError
from pipeline.files import parse_json, write_json
from pipeline.identities import IdentityTable
from pipeline.schema import Config, digest_json

FILE_NAME = "manifest.json"
IDENTITIES = "identities.parquet"
FORMAT = 1
HEX = r"^[0-9a-f]{64}$"
IN_FOLDER = r"[^/\\\x00-\x1f]"  # a letter of a file name that stays in the folder, wherever that is
PACK = "run jobs/pack.py to pack a data set there"


class ShardEntry(Config):
    """One shard as it was when it was packed."""

    name: str = Field(
        pattern=rf"^{IN_FOLDER}+\.tar$", description="File name of the tar; its index has the suffix .idx."
    )
    samples: int = Field(ge=1, description="Number of samples.")
    bytes: int = Field(ge=1, description="Bytes of the tar.")
    tar_sha256: str = Field(pattern=HEX, description="Sha256 of the tar.")
    index_sha256: str = Field(pattern=HEX, description="Sha256 of the index.")


class Manifest(Config):
    """A packed data set.

    `digest` stands for the content: it does not know the folder, nor where the samples came from.
    """

    folder: Path = Field(exclude=True, description="Where the data set stands; not stored, so that it can be moved.")
    format: int = Field(default=FORMAT, ge=FORMAT, le=FORMAT, description="Version of this file's layout.")
    name: str = Field(description="Name of the data set.")
    source: str = Field(description="Fingerprint of the source that was packed.")
    pack: dict[str, Any] = Field(description="The config that it was packed with.")
    samples: int = Field(ge=1, description="Samples in all shards.")
    identities_file: str = Field(
        default=IDENTITIES, pattern=rf"^{IN_FOLDER}+\.parquet$", description="File name of the identity table."
    )
    identities_digest: str = Field(pattern=HEX, description="Digest of the identity table.")
    identities_count: int = Field(ge=1, description="Rows of the identity table.")
    catalogue_sha256: str = Field(pattern=HEX, description="Sha256 of the catalogue of samples.")
    rejects: dict[str, int] = Field(description="Images that were not packed, by reason.")
    shards: tuple[ShardEntry, ...] = Field(min_length=1, description="The shards, in order.")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a data set.

        Raises:
            DataError: there is none, or it is broken.
        """
        path = folder / FILE_NAME
        if not folder.is_dir():
            raise DataError(f"data set {folder} does not exist; {PACK}")
        try:
            content = parse_json(path.read_bytes())
        except FileNotFoundError:
            what = "has no manifest.json" if any(folder.iterdir()) else "is empty"
            raise DataError(f"data set {folder} {what}; {PACK}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}; delete the folder, then {PACK}") from None
        if not isinstance(content, dict) or "folder" in content:
            raise DataError(f"{path} is no manifest; delete the folder, then {PACK}")
        try:
            manifest = cls.model_validate({**content, "folder": folder})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"{path} is broken at {where!r}: {first['msg']}; delete the folder, then {PACK}") from None
        if manifest.samples != sum(entry.samples for entry in manifest.shards):
            raise DataError(f"{path} is broken: its shards do not add up to {manifest.samples} samples; pack again")
        return manifest

    def save(self) -> None:
        """Write the manifest into its folder; a reader sees the old one or the whole new one."""
        write_json(self.folder / FILE_NAME, self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """Sha256 of the canonical JSON, less the source's fingerprint: equal digests mean equal samples in order."""
        return digest_json(self.model_dump(mode="json", exclude={"source"}))

    def identities(self) -> IdentityTable:
        """Read the identity table.

        Raises:
            DataError: it is missing, or not the one that was packed.
        """
        path = self.folder / self.identities_file
        table = IdentityTable.load(path)
        if table.digest != self.identities_digest or len(table) != self.identities_count:
            raise DataError(f"identity table {path} changed after packing; restore it, or delete the folder and pack")
        return table

    def verify(self, digests: bool) -> None:
        """Check that the data set, in its folder, is the one that was packed: `pipeline.data.verify.verify`.

        Args:
            digests: read every byte of every tar.

        Raises:
            DataError: names the first file that is missing or changed.
        """
        verify(self, "all" if digests else "none")
