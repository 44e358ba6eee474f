"""An exported model (`pipeline/export/exporting.py`): what it must give, and what it says of itself."""

from __future__ import annotations

import importlib
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.preprocess import PreprocessConfig
from pipeline.errors import ConfigError, DataError, GenerationError
from pipeline.generation import SELFTEST, Generation
from pipeline.stamp import STAMP, Stamp

LEAST_COSINE = 0.9999  # kernels that are fused otherwise move it by 1e-6
STAMP_BYTES = 1 << 16  # no stamp is longer
BATCHES = (1, 3, 8)  # at which an export is compared


@dataclass(frozen=True)
class Exported:
    """One file that was written, and how well it agrees with the generation's own backbone.

    Attributes:
        path: of the file.
        cosine: smallest to the backbone's embeddings, over all images and batch sizes.
        error: largest difference of a value of an embedding.
    """

    path: Path
    cosine: float
    error: float


@dataclass(frozen=True)
class Sample:
    """Images of a generation's self-test, and what its backbone gives for them.

    Attributes:
        images_NCHW: as the backbone takes them.
        pixels_NCSS: as an export takes them; of the margin around the centre square only zeros are left.
        embeddings_ND: normalised.
    """

    images_NCHW: Tensor
    pixels_NCSS: Tensor
    embeddings_ND: Tensor

    @classmethod
    def of(cls, generation: Generation, backbone: nn.Module, preprocess: PreprocessConfig) -> Sample:
        """At least as many images as the largest batch; a few are repeated until they are."""
        images_NCHW = generation.load_tensors(SELFTEST)["images"]
        images_NCHW = images_NCHW.repeat(-(-max(BATCHES) // len(images_NCHW)), 1, 1, 1)
        before = preprocess.margin
        margins = (before, preprocess.resize - preprocess.size - before) * 2
        with torch.no_grad():
            return cls(
                images_NCHW,
                F.pad(images_NCHW * preprocess.std + preprocess.mean, margins),
                F.normalize(backbone(images_NCHW)),
            )

    def compare(self, embed: Callable[[Tensor], Tensor], path: Path, preprocessed: bool = False) -> Exported:
        """Embed all images in batches of every size of `BATCHES`.

        Args:
            embed: pixels_BCSS to unit vectors_BD.
            path: of the export, to be told.
            preprocessed: `embed` takes images_BCHW instead.

        Raises:
            GenerationError: the vectors are not those of the generation.
        """
        inputs = self.images_NCHW if preprocessed else self.pixels_NCSS
        cosine, error = math.inf, 0.0
        for size in BATCHES:
            with torch.no_grad():
                vectors_ND = torch.cat([embed(part) for part in inputs.split(size)])
            difference_ND = (vectors_ND - self.embeddings_ND).double()
            # of unit vectors, and exact where they are close; the zero vector, which ReLU may leave, equals itself
            worst = float((1 - difference_ND.square().sum(1) / 2).min())
            error = max(error, float(difference_ND.abs().max()))
            if not worst >= LEAST_COSINE:  # NaN too
                raise GenerationError(
                    f"{path} was not written: in batches of {size} the exported model disagrees with the generation's "
                    f"own (cosine {worst:.5f}, at least {LEAST_COSINE}; largest error {error:.2g}): export another "
                    "format, or report it with generation.json"
                )
            cosine = min(cosine, worst)
        return Exported(path, cosine, error)


def read_exported_stamp(path: Path) -> Stamp:
    """The stamp of a NAME.onnx, NAME.pt2 or NAME.safetensors, read without building, or trusting, the model.

    Raises:
        DataError: the file is missing, broken, of no such format, or has no stamp.
        ConfigError: it is an ONNX file, and the package onnx is missing.
    """
    readers = {".onnx": _onnx, ".pt2": _torch, ".safetensors": _safetensors}
    if path.suffix not in readers:
        raise DataError(f"{path} is no exported model: its name ends in none of {', '.join(readers)}")
    if not path.is_file():
        raise DataError(f"{path} is missing: export the generation (jobs/export.py)")
    text = readers[path.suffix](path)
    if text is None:
        raise DataError(f"{path} has no stamp of the generation that it is made of: export it again (jobs/export.py)")
    return Stamp.parse(text, str(path))


def _onnx(path: Path) -> str | None:
    try:
        onnx: Any = importlib.import_module("onnx")
        decode_error: Any = importlib.import_module("google.protobuf.message").DecodeError
    except ImportError:
        raise ConfigError(f"reading {path} needs the package onnx: pip install bct-pipeline[export]") from None
    try:
        model = onnx.load_model(path, load_external_data=False)
    except decode_error as error:
        raise _broken(path, error) from None
    return next((str(one.value) for one in model.metadata_props if one.key == STAMP), None)


def _torch(path: Path) -> str | None:
    """From the archive's folder `extra`: torch.export.load would unpickle what is in the others."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = next((one for one in archive.infolist() if one.filename.endswith(f"/extra/{STAMP}")), None)
            if found is not None and found.file_size > STAMP_BYTES:  # more than that is never unpacked
                raise zipfile.BadZipFile(f"its stamp claims {found.file_size:,} bytes")
            return archive.read(found).decode() if found else None
    except (zipfile.BadZipFile, zlib.error, UnicodeDecodeError, NotImplementedError, RuntimeError, OSError) as error:
        raise _broken(path, error) from None


def _safetensors(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as weights:
            return (weights.metadata() or {}).get(STAMP)
    except SafetensorError as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read ({str(error).splitlines()[0]}): export it again (jobs/export.py)")
