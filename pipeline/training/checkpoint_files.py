"""The files of a checkpoint, as torch.distributed.checkpoint reads and writes them: each digested while it is written,
and compared while it is read. A file is read whole and once, so that its digest costs no second pass.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import queue
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter, _item_size
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pipeline.training.checkpoint_place import CheckpointRecord, DamagedError, FileEntry, Place

METADATA = ".metadata"  # torch's name for where each tensor lies
FILE_BYTES = 32 << 20  # of tensors in a file, unless one alone has more: what a reader holds at once
ALLOWED = {
    *((dcp.__name__, name) for name in (*dcp.__all__, "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}

Committing = Callable[[dict[str, FileEntry]], None]  # told of all ranks' files, on rank 0


class Writer(FileSystemWriter):
    """Writes this rank's part of a checkpoint; rank 0 commits it when all have written theirs.

    Args:
        place: of the checkpoints.
        path: of the folder of data.
        commit: makes the checkpoint exist.
    """

    def __init__(self, place: Place, path: str, commit: Committing) -> None:
        super().__init__(path, sync_files=place.local)
        self.files, self.path, self.commit = _Files(place.fs), cast(Any, path), commit
        self.fs = cast(Any, self.files)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write files of about FILE_BYTES; the last of the results is their digests."""
        files: queue.Queue[tuple[str, str, list[WriteItem]]] = queue.Queue()
        for number, items in enumerate(_in_files(plan.items)):
            name = f"{plan.storage_data.prefix}{number}.distcp"
            files.put((f"{self.path}/{name}", name, items))
        written = cast(list[Any], self._write_data(planner, files).value())
        done: Future[list[WriteResult]] = Future()
        done.set_result(cast(Any, [*written, self.files.written]))
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write where each tensor lies, then commit. On rank 0, after all ranks have written."""
        digests = cast(list[dict[str, FileEntry]], [of_rank[-1] for of_rank in results])
        super().finish(metadata, [of_rank[:-1] for of_rank in results])
        files = {name: entry for of_rank in digests for name, entry in of_rank.items()}
        self.commit({**files, METADATA: self.files.written[f"{METADATA}.tmp"]})


class Reader(FileSystemReader):
    """Reads a checkpoint, file by file, each of them proven to be what was written.

    Args:
        place: of the checkpoints.
        record: of the checkpoint.
        verify: compare the sha256; sizes are compared in any case.

    Raises:
        DamagedError: where the tensors lie is not told, or not by what was written.
    """

    def __init__(self, place: Place, record: CheckpointRecord, verify: bool) -> None:
        path = place.path(record.step, record.folder)
        super().__init__(path)
        files = _Files(place.fs, record.files, verify)
        self.fs, self.path = cast(Any, files), cast(Any, path)
        self._metadata = unpickle_metadata(files.read(f"{path}/{METADATA}"))

    def read_metadata(self) -> Metadata:  # torch would look for other ranks' files too
        """Where the tensors lie, as it was read when the reader was made."""
        return self._metadata


def unpickle_metadata(content: bytes) -> Metadata:
    """Torch keeps its metadata as a pickle: read one, but let it name nothing beyond what those are made of.

    Raises:
        DamagedError: it names more, or is none.
    """
    try:
        found = _Unpickler(io.BytesIO(content)).load()
    except DamagedError:
        raise
    except Exception as error:  # noqa: BLE001  a broken pickle raises whatever its bytes lead to
        raise DamagedError(f"{METADATA} is no metadata ({type(error).__name__})") from None
    if not isinstance(found, Metadata):
        raise DamagedError(f"{METADATA} is no metadata")
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in ALLOWED:
            raise DamagedError(f"{METADATA} names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _Files(FileSystemBase):
    """Files of an fsspec file system, with the digests of those that were written or are to be read."""

    def __init__(self, fs: Any, expected: dict[str, FileEntry] | None = None, verify: bool = True) -> None:
        self._fs, self._expected, self._verify = fs, expected or {}, verify
        self.written: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode == "rb":
            yield io.BytesIO(self.read(str(path)))
            return
        with self._fs.open(str(path), mode) as raw:
            stream = _Digesting(raw)
            yield cast(io.IOBase, stream)
        self.written[_name(path)] = FileEntry(size=stream.size, sha256=stream.sha256.hexdigest())

    def read(self, path: str) -> bytes:
        """A whole file.

        Raises:
            DamagedError: it is missing, or not what was written.
        """
        name = _name(path)
        if (entry := self._expected.get(name)) is None:
            raise DamagedError(f"{name} is not named in its JSON")
        try:
            content = bytes(self._fs.cat_file(path))
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        if len(content) != entry.size:
            raise DamagedError(f"{name} has {len(content):,} of {entry.size:,} bytes")
        if self._verify and hashlib.sha256(content).hexdigest() != entry.sha256:
            raise DamagedError(f"{name} has another sha256 than was written")
        return content

    def concat_path(self, path: str | PathLike[str], suffix: str) -> str:
        return f"{path}/{suffix}"

    def init_path(self, path: str | PathLike[str]) -> str:
        return str(path)

    def rename(self, path: str | PathLike[str], new_path: str | PathLike[str]) -> None:
        self._fs.mv(str(path), str(new_path))

    def mkdir(self, path: str | PathLike[str]) -> None:
        self._fs.makedirs(str(path), exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return bool(checkpoint_id)

    def exists(self, path: str | PathLike[str]) -> bool:
        return bool(self._fs.exists(str(path)))

    def rm_file(self, path: str | PathLike[str]) -> None:
        self._fs.rm_file(str(path))


class _Digesting:
    """A file that is written from start to end, and digested on the way."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self.size, self.sha256 = raw, 0, hashlib.sha256()
        self.flush, self.fileno, self.close = raw.flush, raw.fileno, raw.close

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._raw.write(data)

    def tell(self) -> int:
        return self.size


def _in_files(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Tensors in their order, so many to a file that it has about FILE_BYTES."""
    together: list[WriteItem] = []
    size = 0
    for item in items:
        more = _item_size(item)
        if together and size + more > FILE_BYTES:
            yield together
            together, size = [], 0
        together.append(item)
        size += more
    if together:
        yield together


def _name(path: str | PathLike[str]) -> str:
    return str(path).rpartition("/")[2]
