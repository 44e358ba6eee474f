"""A generation as MLflow loads it: image bytes in, stamped embeddings out.

    model = mlflow.pyfunc.load_model("models:/FAMILY@serving")
    model.predict(pandas.DataFrame({"image": [bytes, ...]}))       columns `vector` and `stamp`

MLflow imports this module by name and hands it the folder of the logged model, which holds the generation's own files:
nothing is pickled. It embeds on the CPU, a request at a time; galleries are embedded by jobs/embed.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from pipeline.data.preprocess import AugmentConfig
from pipeline.errors import DataError, GenerationError
from pipeline.generation import BACKBONE, Generation
from pipeline.stamp import Stamp

if TYPE_CHECKING:
    from mlflow.models import Model

IMAGE, VECTOR, STAMP = "image", "vector", "stamp"  # columns
BATCH = 64

Float32 = npt.NDArray[np.float32]


def mlmodel(model_id: str, run_id: str, created_ms: int, stamp: Stamp) -> Model:
    """What the MLmodel file of a generation says: always the same, so that an upload that was cut off is seen.

    Args:
        model_id: of the logged model.
        run_id: of the run that trained it.
        created_ms: when the logged model was made, in ms since the epoch.
        stamp: of its vectors.
    """
    from datetime import UTC, datetime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of type hints of its own
        import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    made = Model(
        run_id=run_id,
        utc_time_created=datetime.fromtimestamp(created_ms / 1000, UTC).replace(tzinfo=None),
        model_uuid=model_id.removeprefix("m-"),
        model_id=model_id,
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.binary, IMAGE)]),
            outputs=Schema([ColSpec(Array(DataType.float), VECTOR), ColSpec(DataType.string, STAMP)]),
        ),
        metadata={"stamp": stamp.model_dump(mode="json")},
    )
    mlflow.pyfunc.add_to_model(made, loader_module=__name__)
    return made


def _load_pyfunc(path: str) -> Embedder:
    """What MLflow calls, with the folder of the logged model.

    Raises:
        GenerationError: the model's files are missing or have changed, or only embeddings are left of it.
    """
    return Embedder(Generation(Path(path)))


class Embedder:
    """Embeds images through a generation's own preprocessing.

    Raises:
        GenerationError: the backbone's file is missing or has changed, or only embeddings are left of it.
    """

    def __init__(self, generation: Generation) -> None:
        self.stamp = Stamp.of(generation)
        generation.verify_file(BACKBONE)
        self._backbone = generation.load_backbone()
        assert generation.record.preprocess is not None, "what has a stamp has a preprocessing"
        self._preprocess = generation.record.preprocess

    def predict(self, images: Any) -> Any:
        """MLflow's entry: a DataFrame with the column `image` of bytes to one with `vector` and `stamp` (JSON).

        Raises:
            DataError: an image does not decode; nothing is embedded.
        """
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]  # MLflow's own dependency

        vectors_ND = self.embed(list(images[IMAGE]))
        stamps = [self.stamp.model_dump_json()] * len(vectors_ND)
        return pd.DataFrame({VECTOR: list(vectors_ND), STAMP: stamps}, index=images.index)

    def embed(self, raws: Sequence[bytes]) -> Float32:
        """(N, D) float32 unit vectors of N encoded images.

        Raises:
            DataError: an image does not decode; nothing is embedded.
            GenerationError: the model gives a feature that has no direction.
        """
        out_ND = np.empty((len(raws), self.stamp.dim), np.float32)
        with torch.no_grad():
            for first, images_BCHW in self._decoded(raws):
                features_BD = F.normalize(self._backbone(images_BCHW))
                out_ND[first : first + len(features_BD)] = features_BD.numpy()
        if not (np.linalg.norm(out_ND, axis=1) > 0.5).all():
            raise GenerationError(
                f"generation {self.stamp.generation!r} gives an image of the request a feature that is zero or no "
                "number, which has no direction: look at the images, or train again"
            )
        return out_ND

    def _decoded(self, raws: Sequence[bytes]) -> Iterator[tuple[int, torch.Tensor]]:
        """Batches of (B, channels, size, size) images, each with the place of its first."""
        from pipeline.data.decoding import Decoder, NotDecodedError  # DALI, where it is first needed
        from pipeline.data.reading import Work

        none_B = np.empty(0, np.int64)
        firsts = range(0, len(raws), BATCH)
        works = (Work(first, none_B, none_B, none_B, list(raws[first : first + BATCH])) for first in firsts)
        size = min(BATCH, len(raws))
        decoder = Decoder(self._preprocess, AugmentConfig(), 0, size, 1, torch.device("cpu"))
        try:
            for work, images_BCHW in decoder.run(works):
                yield work.step, images_BCHW
        except NotDecodedError as error:
            raise DataError(_first_bad(error.work.raws, error.work.step) or str(error).splitlines()[0]) from None


def _first_bad(raws: Sequence[bytes], first: int) -> str | None:
    from pipeline.data.dali_graph import dali_refuses
    from pipeline.data.reading import pillow_refuses

    for place, raw in enumerate(raws, first):
        if (reason := pillow_refuses(raw) or dali_refuses(raw)) is not None:
            return f"image {place} of the request (counted from 0) does not decode: {reason}; leave it out, or mend it"
    return None
