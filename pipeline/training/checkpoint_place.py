"""Where a run's checkpoints lie: a folder, on NFS too, or a URL that fsspec knows.

A checkpoint is `step-NNNNNNNN/checkpoint.json` and, beside it, the folder of data that it names. **Without its JSON it
does not exist**: the JSON is put last, at once whole, and goes first when the checkpoint is removed. Object stores know
no renaming, so that nothing here needs it.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import fsspec  # type: ignore[import-untyped]
import pydantic
from pydantic import Field, StringConstraints

from pipeline.errors import ConfigError
from pipeline.files import parse_json, write_atomically, write_json
from pipeline.redaction import in_short
from pipeline.schema import Config

RECORD = "checkpoint.json"
PREFIX = "step-"
DIGEST_DIGITS = 16  # of the config's digest, in the names of data folders

FileName = Annotated[str, StringConstraints(pattern=r"^\.?\w[\w.-]*$")]  # no way out of the folder


class DamagedError(Exception):
    """A checkpoint is not what was written; says which file, and what is wrong with it."""


class TakenOverError(Exception):
    """Another group of ranks has claimed the checkpoints since; says which."""


class FileEntry(Config):
    """One file of a checkpoint, as it was written."""

    size: int = Field(ge=0)
    sha256: str


class Origin(Config):
    """What a run was made of, for whoever looks at its checkpoints; the config's digest covers the first two."""

    parents: dict[str, str] = Field({})
    data_digest: str = ""
    code_version: str = ""


class CheckpointRecord(Config):
    """What `checkpoint.json` says.

    Attributes:
        step: updates done; the next batch is the data set's of this number, the learning rate that of this step.
        config_digest: of all that shapes the run.
        folder: of the data, beside the JSON.
        files: of that folder, by name.
        world_size: ranks that wrote it; any number can read it.
        origin: parents, data set and code.
        counters: of the run so far: steps with a loss that is no number, samples in quarantine on rank 0.
        random: what is random after a resume. No state is kept: every draw is a function of these.
    """

    step: int = Field(ge=0)
    config_digest: str
    folder: FileName
    files: dict[FileName, FileEntry]
    world_size: int = Field(ge=1)
    origin: Origin = Origin()
    counters: dict[str, int] = Field({})
    random: str = "reseeded from seed, step and the first sample of a micro-batch"


class Place:
    """The checkpoints of one run, as files.

    Args:
        where: an absolute folder, or a URL.

    Raises:
        ConfigError: fsspec does not know such URLs, or lacks the package for them.
    """

    def __init__(self, where: str | Path) -> None:
        self.where = str(where).rstrip("/")
        try:
            fs, root = fsspec.core.url_to_fs(self.where, skip_instance_cache=True, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"checkpoints at {self.where} cannot be reached: {in_short(error)}") from None
        self.fs: Any = fs
        self.root = str(root).rstrip("/")
        self.local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))

    def steps(self) -> list[int]:
        """Steps of which there is something, complete or not, newest first."""
        names = self._names(self.root)
        found = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
        return sorted((int(digits) for digits in found if digits.isdigit()), reverse=True)

    def record(self, step: int) -> CheckpointRecord | None:
        """What the JSON of a step says; None if there is none.

        Raises:
            DamagedError: it cannot be read.
        """
        path = f"{self._folder(step)}/{RECORD}"
        try:
            return CheckpointRecord.model_validate_json(self.fs.cat_file(path))
        except FileNotFoundError:
            return None
        except pydantic.ValidationError as error:
            wrong = error.errors()[0]
            raise DamagedError(f"step {step}: {RECORD} cannot be read: {wrong['msg']}") from None

    def found(self, config_digest: str) -> Iterator[CheckpointRecord | DamagedError]:
        """The checkpoints of a config, newest first, and JSONs that cannot be read, whosever they are."""
        for step in self.steps():
            try:
                record = self.record(step)
            except DamagedError as error:
                yield error
                continue
            if record is not None and record.config_digest == config_digest:
                yield record

    def commit(self, record: CheckpointRecord) -> None:
        """Make a checkpoint exist whose data are written, in place of another one of its step."""
        path = f"{self._folder(record.step)}/{RECORD}"
        if self.local:
            write_json(Path(path), record.model_dump())
        else:
            self.fs.pipe_file(path, record.model_dump_json(indent=2).encode())

    def claim(self, config_digest: str) -> str:
        """Take the checkpoints of a config over, and return the claim, a name of its own.

        Whoever held them may be alive: believed dead behind a network that is cut, or stopped. From now on its commits
        are refused.
        """
        claim = uuid.uuid4().hex[:8]
        content = json.dumps({"claim": claim, "host": socket.gethostname(), "pid": os.getpid()}).encode()
        if self.local:
            write_atomically(Path(self._holder(config_digest)), content)
        else:
            self.fs.pipe_file(self._holder(config_digest), content)
        return claim

    def check_claim(self, config_digest: str, claim: str) -> None:
        """Raise unless a claim is the last one.

        Raises:
            TakenOverError: another group has claimed the checkpoints.
        """
        told = parse_json(self.fs.cat_file(self._holder(config_digest)))
        if told["claim"] != claim:
            raise TakenOverError(f"process {told['pid']} on {told['host']}")

    def new_folder(self, config_digest: str) -> str:
        """A name for a folder of data, which tells whose it is."""
        return f"{config_digest[:DIGEST_DIGITS]}-{uuid.uuid4().hex[:8]}"

    def path(self, step: int, folder: str) -> str:
        """Of a folder of data, for the file system."""
        return f"{self._folder(step)}/{folder}"

    def remove(self, record: CheckpointRecord) -> None:
        """Remove a checkpoint, its JSON first."""
        self.fs.rm_file(f"{self._folder(record.step)}/{RECORD}")
        self.reap(record.step, record.config_digest)

    def reap(self, step: int, config_digest: str) -> None:
        """Remove what no JSON names of a step: data of saves that were cut off. Other configs' are left alone."""
        folder, own = self._folder(step), f"{config_digest[:DIGEST_DIGITS]}-"
        record, there = self.record(step), self._names(folder)
        if record is None and all(name.startswith((own, f".{RECORD}.")) for name in there):
            self.fs.rm(folder, recursive=True)
            return
        for name in there:
            if name.startswith(own) and (record is None or name != record.folder):
                self.fs.rm(f"{folder}/{name}", recursive=True)

    def clear(self) -> None:
        """Remove everything."""
        if self.fs.exists(self.root):
            self.fs.rm(self.root, recursive=True)

    def _holder(self, config_digest: str) -> str:
        return f"{self.root}/holder-{config_digest[:DIGEST_DIGITS]}.json"

    def _folder(self, step: int) -> str:
        return f"{self.root}/{PREFIX}{step:08d}"

    def _names(self, folder: str) -> list[str]:
        try:
            return [str(path).rstrip("/").rpartition("/")[2] for path in self.fs.ls(folder, detail=False)]
        except FileNotFoundError:
            return []
