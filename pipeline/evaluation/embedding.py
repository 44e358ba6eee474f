"""The held-out images as a generation embeds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.catalogue import Catalogue
from pipeline.data.loader import iterate_images
from pipeline.data.manifest import Manifest
from pipeline.data.shards import index_path, read_attributes
from pipeline.errors import DataError
from pipeline.evaluation.compatibility import Embeddings
from pipeline.generation import Generation

Ints = npt.NDArray[np.int64]

BATCH = 512
ROLES = ("gallery", "query")


def embed(generation: Generation, folder: Path, group: str, threads: int = 1) -> Embeddings:
    """Embed every image of a data set, through the generation's own preprocessing.

    Args:
        generation: the model.
        folder: of the shards; each sample's attributes say its `role`, "gallery" (enrolled) or "query".
        group: the attribute whose equal values are not compared (the camera, the typeface).
        threads: of the decoder.

    Raises:
        DataError: a sample lacks one of the attributes.
    """
    manifest = Manifest.load(folder)
    backbone = generation.load_backbone()
    vectors = np.empty((manifest.samples, generation.record.backbone.embedding_dim), np.float32)
    with torch.no_grad():
        for images, first in iterate_images(folder, manifest, generation.record.preprocess, BATCH, threads):
            vectors[first : first + len(images)] = backbone(images).numpy()
    identities, groups, enrolled = _labels(folder, manifest, group)
    return Embeddings(vectors, identities, groups, enrolled, generation.record.name)


def _labels(folder: Path, manifest: Manifest, group: str) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """Identity rows, codes of the groups, and which images are enrolled, in the shards' order."""
    groups, roles = [], []
    for entry in manifest.shards:
        tar = folder / entry.name
        for key, attributes in read_attributes(tar, index_path(tar)):
            if group not in attributes or attributes.get("role") not in ROLES:
                raise DataError(
                    f"{tar}: sample {key!r} needs the attributes {group!r} and 'role' ({' or '.join(ROLES)}) to be "
                    f"evaluated; its .json has {sorted(attributes)}"
                )
            groups.append(attributes[group])
            roles.append(attributes["role"])
    codes = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    samples = np.array([entry.samples for entry in manifest.shards])
    rows = Catalogue.load(folder, samples).records["row"].astype(np.int64)
    return rows, codes, np.array(roles) == "gallery"
