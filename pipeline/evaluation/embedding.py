"""The held-out images as a generation embeds them, kept on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from pipeline.data.catalogue import Catalogue
from pipeline.data.loader import iterate_images
from pipeline.data.manifest import Manifest
from pipeline.data.shards import index_path, read_attributes
from pipeline.errors import DataError, GenerationError
from pipeline.evaluation.compatibility import Embeddings, Mapped
from pipeline.evaluation.stored import stored_vectors
from pipeline.files import write_atomically
from pipeline.generation import Generation
from pipeline.schema import digest_json

Float32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

BATCH = 512
ROLES = ("gallery", "query")


@dataclass(frozen=True)
class Labels:
    """What is known of the images, in the shards' order.

    Attributes:
        keys: (N,) of the samples.
        identity_N: (N,) int64 rows of the data set's identity table.
        group_N: (N,) int64 codes of the group attribute.
        is_gallery_N: (N,) bool, the image is enrolled.
    """

    keys: tuple[str, ...]
    identity_N: Ints
    group_N: Ints
    is_gallery_N: npt.NDArray[np.bool_]


def embed(generation: Generation, folder: Path, group: str, threads: int = 1, cache: Path | None = None) -> Embeddings:
    """Embed every image of a data set, through the generation's own preprocessing.

    Args:
        generation: the model.
        folder: of the shards; each sample's attributes say its `role`, "gallery" (enrolled) or "query".
        group: the attribute whose equal values are not compared (the camera, the typeface).
        threads: of the decoder.
        cache: folder of what was embedded before, and will be; None: nothing is kept.

    Raises:
        DataError: a sample lacks one of the attributes.
    """
    return embed_all({generation.record.name: generation}, folder, group, threads, cache)[generation.record.name]


def embed_all(
    generations: dict[str, Generation], folder: Path, group: str, threads: int = 1, cache: Path | None = None
) -> dict[str, Embeddings]:
    """Embed every image with every generation, and apply the maps between them; arguments and errors as of `embed`.

    Raises:
        GenerationError: a map's file has changed, or it leads to another generation of the same name; an imported
            generation brought no held-out embeddings.
        DataError: an imported generation brought none of a sample.
    """
    manifest = Manifest.load(folder)
    labels = read_labels(folder, manifest, group)
    vectors = {
        name: stored_vectors(one, labels.keys, folder)
        if one.record.backbone is None
        else _vectors(one, folder, manifest, threads, cache)
        for name, one in generations.items()
    }
    return {
        name: Embeddings(
            vectors[name],
            labels.identity_N,
            labels.group_N,
            labels.is_gallery_N,
            name,
            apply_maps(generations, name, vectors),
        )
        for name in generations
    }


def apply_maps(generations: dict[str, Generation], name: str, vectors: dict[str, Float32]) -> dict[str, Mapped]:
    """What a generation's maps give, by the name of the older one.

    Args:
        generations: all that are there; maps of others are left out.
        name: whose maps are applied.
        vectors: (N, D) embeddings by each generation.

    Raises:
        GenerationError: a map's file has changed, or it leads to another generation of the same name.
    """
    generation, mapped = generations[name], {}
    for config in generation.record.maps:
        if (parent := generations.get(config.parent)) is None:
            continue
        if parent.digest != generation.record.parents.get(config.parent):
            raise GenerationError(
                f"generation {name!r} has a map for another {config.parent!r} than the one at {parent.path}; "
                f"evaluate it with its own parent, or train {name!r} again"
            )
        learned = generation.load_map(config.parent, config.direction)
        from_ND = vectors[name if config.direction == "query" else config.parent]
        with torch.no_grad():
            blocks = [learned(block_BD).numpy() for block_BD in torch.from_numpy(from_ND).split(BATCH)]
        mapped[config.parent] = Mapped(config.direction, np.concatenate(blocks))
    return mapped


def _vectors(generation: Generation, folder: Path, manifest: Manifest, threads: int, cache: Path | None) -> Float32:
    """(N, D) embeddings, from the cache if they are there."""
    preprocess = generation.record.preprocess
    assert preprocess is not None, "what has a backbone has a preprocessing"
    shape = manifest.samples, generation.record.embedding_dim
    made_of = {
        "generation": generation.digest,
        "manifest": manifest.digest,
        "preprocess": preprocess.model_dump(mode="json"),
    }
    path = None if cache is None else cache / f"{generation.record.name}-{digest_json(made_of)[:16]}.safetensors"
    if path is not None and (kept_ND := _read(path)) is not None and kept_ND.shape == shape:
        return kept_ND
    backbone = generation.load_backbone()
    vectors_ND = np.empty(shape, np.float32)
    with torch.no_grad():
        for images, first in iterate_images(folder, manifest, preprocess, BATCH, threads):
            vectors_ND[first : first + len(images)] = backbone(images).numpy()
    if path is not None:
        write_atomically(path, save({"embeddings": vectors_ND}))
    return vectors_ND


def _read(path: Path) -> Float32 | None:
    """Embeddings kept earlier; None if there are none, or the file is broken: they are made again."""
    try:
        vectors_ND: Float32 = load_file(path)["embeddings"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
    return vectors_ND


def read_labels(folder: Path, manifest: Manifest, group: str) -> Labels:
    """Read keys, identities, groups and roles from the shards.

    Raises:
        DataError: a sample lacks one of the attributes.
    """
    keys, groups, roles = [], [], []
    for entry in manifest.shards:
        tar = folder / entry.name
        for key, attributes in read_attributes(tar, index_path(tar)):
            if group not in attributes or attributes.get("role") not in ROLES:
                raise DataError(
                    f"{tar}: sample {key!r} needs the attributes {group!r} and 'role' ({' or '.join(ROLES)}) to be "
                    f"evaluated; its .json has {sorted(attributes)}"
                )
            keys.append(key)
            groups.append(attributes[group])
            roles.append(attributes["role"])
    codes = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    samples = np.array([entry.samples for entry in manifest.shards])
    rows = Catalogue.load(folder, samples).records["row"].astype(np.int64)
    return Labels(tuple(keys), rows, codes, np.array(roles) == "gallery")
