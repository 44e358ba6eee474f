"""The generation artefact: one trained model and all that the next generation needs of it.

A folder:

    generation.json                      the record; its digest is the generation's identity
    backbone.safetensors                 weights and buffers by name
    classifier-START-STOP.safetensors    rows [START, STOP) of the prototypes, one file a rank that wrote
    identities.parquet                   the key of each row
    selftest.safetensors                 a few images as the backbone saw them, and the features it gave
    maps.safetensors                     weights of the maps to and from the parents' spaces, where there are any

Of an imported one (`pipeline/importing.py`) only embeddings are left: it has no backbone and no self-test, and keeps
held-out embeddings with their keys in place of them (`pipeline/evaluation/stored.py`).

Nothing in it is unpickled. The record is written last and the folder renamed into place: an artefact is there
whole or not at all.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import GenerationError
from pipeline.files import file_sha256, write_json
from pipeline.generation_record import GenerationRecord as GenerationRecord
from pipeline.identities import IdentityTable
from pipeline.model.backbones import build_backbone
from pipeline.model.maps import Direction, LearnedMap, SpaceMap
from pipeline.schema import digest_json

RECORD, BACKBONE, IDENTITIES, SELFTEST, MAPS = (
    "generation.json",
    "backbone.safetensors",
    "identities.parquet",
    "selftest.safetensors",
    "maps.safetensors",
)
CLASSIFIER_PART = re.compile(r"classifier-(\d{12})-(\d{12})\.safetensors")
SELFTEST_COSINE = 0.999  # other kernels and thread counts move features by far less


class Generation:
    """A generation on disk.

    Raises:
        GenerationError: there is none at `path`, or its record cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = (path / RECORD).read_bytes()
        except FileNotFoundError:
            raise GenerationError(f"no generation at {path}: {RECORD} is missing; train it first") from None
        except OSError as error:
            raise GenerationError(f"{path / RECORD} cannot be read: {error.strerror}") from None
        try:
            self.record = GenerationRecord.model_validate_json(text)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            told = f"{where!r}: {first['msg']}" if where else first["msg"]
            raise GenerationError(f"{path / RECORD} is not a generation's record: {told}") from None
        if self.record.format != 1:
            raise GenerationError(f"{path / RECORD} has format {self.record.format}; this version reads format 1")

    @cached_property
    def digest(self) -> str:
        """Sha256 of the record, which holds those of all files: equal digests are equal generations."""
        return digest_json(self.record.told())

    def verify(self) -> None:
        """Check every file against the record.

        Raises:
            GenerationError: names the first file that is missing or has changed.
        """
        for name in self.record.files:
            self.verify_file(name)

    def verify_file(self, name: str) -> None:
        """Check one file against the record.

        Raises:
            GenerationError: it is missing or has changed.
        """
        path = self.path / name
        if not path.is_file():
            raise GenerationError(f"generation {self.record.name!r}: {path} is missing; restore it or train again")
        if file_sha256(path) != self.record.files.get(name):
            raise GenerationError(
                f"generation {self.record.name!r}: {path} has changed since it was written; restore it or train again"
            )

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file beside the record, on the CPU.

        Raises:
            GenerationError: it is missing, or no safetensors.
        """
        with self._errors(name):
            return load_file(self.path / name)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn into one line what a file raises whose content is not what the record says."""
        try:
            yield
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise GenerationError(
                f"generation {self.record.name!r}: {self.path / name} cannot be loaded "
                f"({' '.join(str(error).split())[:200]}); restore it or train again"
            ) from None

    def identities(self) -> IdentityTable:
        """The key of each row of the classifier."""
        return IdentityTable.load(self.path / IDENTITIES)

    def load_backbone(self) -> nn.Module:
        """The backbone with its weights, in evaluation mode, on the CPU.

        Raises:
            GenerationError: only embeddings are left of it, or its file is missing or broken.
        """
        if self.record.backbone is None:
            raise GenerationError(
                f"generation {self.record.name!r} at {self.path} holds embeddings only, no backbone: as a parent take "
                "compat.method 'bct', whose prototypes are the class means of those embeddings"
            )
        backbone = build_backbone(self.record.backbone)
        with self._errors(BACKBONE):
            backbone.load_state_dict(self.load_tensors(BACKBONE))
        return backbone.eval()

    def load_map(self, parent: str, direction: Direction) -> SpaceMap:
        """The learned map to a parent's space, or from it, in evaluation mode, on the CPU.

        Raises:
            GenerationError: there is none, or its file is missing or has changed.
        """
        found = [one for one in self.record.maps if (one.parent, one.direction) == (parent, direction)]
        if not found:
            told = ", ".join(f"{one.direction} {one.parent}" for one in self.record.maps) or "no map at all"
            raise GenerationError(f"generation {self.record.name!r} has no {direction} map of {parent!r}, but {told}")
        self.verify_file(MAPS)
        start = found[0].prefix
        weights = {name: value for name, value in self.load_tensors(MAPS).items() if name.startswith(start)}
        loaded = SpaceMap(found[0])
        with self._errors(MAPS):
            loaded.load_state_dict({name.removeprefix(start): value for name, value in weights.items()})
        return loaded.eval()

    def read_classifier_rows(self, rows_K: npt.NDArray[np.int64]) -> Tensor:
        """(K, D) float32 prototypes of the given rows, reading only the files and spans that hold them.

        Raises:
            GenerationError: a file is missing or broken.
        """
        out = torch.empty(len(rows_K), self.record.embedding_dim)
        found = np.zeros(len(rows_K), bool)
        for name in self.record.files:
            if not (match := CLASSIFIER_PART.fullmatch(name)):
                continue
            start, stop = int(match[1]), int(match[2])
            inside = np.flatnonzero((rows_K >= start) & (rows_K < stop))
            if not len(inside):
                continue
            first, last = int(rows_K[inside].min()) - start, int(rows_K[inside].max()) - start + 1
            with self._errors(name), safe_open(self.path / name, framework="pt") as part:
                span = part.get_slice("weight")[first:last]
                out[torch.from_numpy(inside)] = span[torch.from_numpy(rows_K[inside] - start - first)]
            found[inside] = True
        assert found.all(), "rows outside the classifier"
        return out

    def reproduce_selftest(self) -> float:
        """Embed the stored images again and return the smallest cosine to the stored features.

        Without a backbone there is nothing to reproduce: 1.

        Raises:
            GenerationError: the backbone does not give what it gave when it was saved.
        """
        if self.record.backbone is None:
            return 1.0
        stored, backbone = self.load_tensors(SELFTEST), self.load_backbone()
        with self._errors(SELFTEST), torch.no_grad():
            cosine = float(F.cosine_similarity(backbone(stored["images"]), stored["features"]).min())
        if not cosine >= SELFTEST_COSINE:
            raise GenerationError(
                f"generation {self.record.name!r} at {self.path} does not reproduce its self-test "
                f"(cosine {cosine:.4f} to the stored features): the artefact or the code has changed"
            )
        return cosine


def write_classifier_part(folder: Path, weight_CD: Tensor, start: int, stop: int) -> None:
    """Write rows [start, stop) of a classifier, one rank's part. An empty part writes nothing."""
    assert weight_CD.shape[0] == stop - start
    if stop > start:
        save_file(
            {"weight": weight_CD.detach().contiguous()}, folder / f"classifier-{start:012d}-{stop:012d}.safetensors"
        )


def seal(
    folder: Path,
    destination: Path,
    record: GenerationRecord,
    backbone_state: dict[str, Tensor],
    identities: IdentityTable,
    selftest_images: Tensor,
    maps: Sequence[LearnedMap] = (),
) -> Generation:
    """Complete `folder`, which holds every classifier part, and rename it into place.

    The self-test is made by a backbone loaded from what was just written, so that it also proves the file. Where the
    generation is there already, it is left as it is.
    """
    assert record.backbone is not None, "what is trained has a backbone"
    _save(backbone_state, folder / BACKBONE)
    if maps:
        assert len({one.config.prefix for one in maps}) == len(maps), "one map a parent and direction"
        _save({one.config.prefix + name: value for one in maps for name, value in one.state.items()}, folder / MAPS)
    identities.save(folder / IDENTITIES)
    backbone = build_backbone(record.backbone)
    backbone.load_state_dict(load_file(folder / BACKBONE))
    with torch.no_grad():
        features_ND = backbone.eval()(selftest_images)
    save_file({"images": selftest_images.contiguous(), "features": features_ND.contiguous()}, folder / SELFTEST)
    try:
        return complete(folder, destination, record.model_copy(update={"maps": tuple(one.config for one in maps)}))
    except OSError:
        if not (destination / RECORD).is_file():
            raise
        # A group of ranks that was believed lost has sealed it meanwhile: the same training, by its digest.
        shutil.rmtree(folder, ignore_errors=True)
        found = Generation(destination)
        assert found.record.config_digest == record.config_digest, "of another training"
        return found


def complete(folder: Path, destination: Path, record: GenerationRecord) -> Generation:
    """Write the record of all files in `folder`, and rename it into place."""
    digests = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != RECORD}
    write_json(folder / RECORD, record.model_copy(update={"files": digests}).told())
    folder.rename(destination)
    return Generation(destination)


def _save(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().contiguous().cpu() for name, value in state.items()}, path)
