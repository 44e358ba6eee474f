"""A pickle in the place of each file that a user may have been sent runs nothing, and is refused in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.backfill.order import counts_of
from pipeline.config import load_config
from pipeline.data.catalogue import Catalogue
from pipeline.data.manifest import Manifest
from pipeline.data.protocols import SCHEMAS, load_protocol
from pipeline.data.shards import ShardIndex, index_path, read_attributes
from pipeline.data.sources import (
    ListSource,
    ListSourceConfig,
    RecordSource,
    RecordSourceConfig,
    WebDatasetConfig,
    WebDatasetSource,
)
from pipeline.data.sources_eval.insightface_bin import BinSource, BinSourceConfig
from pipeline.data.sources_eval.query_gallery import QueryGalleryConfig, QueryGallerySource
from pipeline.embedding.output import Header, Output
from pipeline.embedding_files import EmbeddingFile
from pipeline.errors import PipelineError
from pipeline.evaluation.stored import KEYS, TEST, stored_vectors
from pipeline.export.exported import read_exported_stamp
from pipeline.files import file_sha256
from pipeline.gallery.index import IndexConfig
from pipeline.gallery.store import DIGEST, GalleryFolder, GalleryRecord
from pipeline.generation import BACKBONE, IDENTITIES, MAPS, RECORD, SELFTEST, Generation
from pipeline.importing import Import, seal_embeddings
from pipeline.model.backbones import BackboneConfig
from pipeline.model.maps import MapConfig
from pipeline.planning.calibration import benchmark_rates
from pipeline.planning.config import PlanConfig
from pipeline.schema import digest_json
from pipeline.search import Gallery
from pipeline.stamp import STAMP
from pipeline.tracking.pyfunc import Embedder
from pipeline.vectors import read_vectors
from tests.data_set import make_data_set
from tests.unit.stamped import drawn, stamp
from tests.unit.test_registry import make_generation

PLAN = PlanConfig(identities=10, batch=4, backbone=BackboneConfig(), gpus=1, gpu_memory=8)
CLASSIFIER = "classifier-000000000000-000000000006.safetensors"


class Planted:
    """What a stranger pickles: whoever unpickles it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def plain(one: Planted) -> bytes:
    return pickle.dumps(one)


def of_torch(one: Planted) -> bytes:
    buffer = io.BytesIO()
    torch.save({"embeddings": one}, buffer)
    return buffer.getvalue()


def of_numpy(one: Planted) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([one], object), allow_pickle=True)
    return buffer.getvalue()


def of_numpy_archive(one: Planted) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.array([one], object))
    return buffer.getvalue()


KINDS: tuple[Callable[[Planted], bytes], ...] = (plain, of_torch, of_numpy, of_numpy_archive)


@dataclass(frozen=True)
class Artefacts:
    """One of each kind, whole; each test takes a copy."""

    folder: Path

    @property
    def generation(self) -> Path:
        return self.folder / "generation" / "v1.0"

    @property
    def imported(self) -> Path:
        return self.folder / "imported"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def gallery(self) -> Path:
        return self.folder / "gallery"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    one = Artefacts(tmp_path_factory.mktemp("made"))
    make_generation(one.folder / "generation", "v1")
    vectors = {"identity": ["a", "a", "b"], "key": ["x", "y", "z"], "vector": [[1.0, 0], [0, 1.0], [1.0, 1.0]]}
    pq.write_table(pa.table(vectors), one.folder / "old.parquet")
    old = EmbeddingFile(one.folder / "old.parquet")
    seal_embeddings(Import("v0", old, old), "glyphs", one.imported)
    make_data_set(one.data, shards=1)
    folder = GalleryFolder(one.gallery)
    built = Gallery.of([drawn("v1", 9, 4, seed=1)], IndexConfig())
    with folder.locked(new=True):
        part = folder.write(built.segments[0])
    folder.commit(GalleryRecord(index=IndexConfig(), parts=(part,)))
    return one


def sealed_again(folder: Path, name: str, **changes: Any) -> Generation:
    """The record tells the digest of the file as it is: who changes the one changes the other."""
    told = json.loads((folder / RECORD).read_bytes()) | changes
    told["files"][name] = file_sha256(folder / name)
    (folder / RECORD).write_text(json.dumps(told))
    generation = Generation(folder)
    generation.verify_file(name)
    return generation


def read_map(folder: Path) -> None:
    config = MapConfig(parent="v0", direction="query", kind="linear", inputs=8, outputs=8)
    sealed_again(folder, MAPS, maps=[config.model_dump(mode="json")]).load_map("v0", "query")


def read_stored(folder: Path, name: str) -> None:
    stored_vectors(sealed_again(folder, name), ["x"], folder)


def read_gallery(folder: Path, **digests: str) -> None:
    told = json.loads((folder / "gallery.json").read_bytes())
    told.pop(DIGEST)
    told["parts"][0] |= digests
    (folder / "gallery.json").write_text(json.dumps(told | {DIGEST: digest_json(told)}))
    store = GalleryFolder(folder)
    record = store.read()
    store.segment(record.parts[0], record.index)


def read_embedded(folder: Path) -> None:
    header = Header(stamp=stamp("v1", 4), dtype="float32", data="d", data_digest="d", parts_digest="p")
    Output(folder, header, ["one"]).compare()


GENERATION: dict[str, Callable[[Path], object]] = {
    RECORD: Generation,
    BACKBONE: lambda folder: sealed_again(folder, BACKBONE).load_backbone(),
    SELFTEST: lambda folder: sealed_again(folder, SELFTEST).reproduce_selftest(),
    CLASSIFIER: lambda folder: sealed_again(folder, CLASSIFIER).read_classifier_rows(np.arange(3)),
    IDENTITIES: lambda folder: sealed_again(folder, IDENTITIES).identities(),
    MAPS: read_map,
    f"{BACKBONE} through MLflow": lambda folder: Embedder(sealed_again(folder, BACKBONE)),
}
IMPORTED: dict[str, Callable[[Path], object]] = {
    TEST: lambda folder: read_stored(folder, TEST),
    KEYS: lambda folder: read_stored(folder, KEYS),
}
DATA: dict[str, Callable[[Path], object]] = {
    "manifest.json": Manifest.load,
    "catalogue.npy": lambda folder: Catalogue.load(folder, np.array([3])),
    "identities.parquet": lambda folder: Manifest.load(folder).identities(),
    "shard-000000.idx": lambda folder: ShardIndex.load(shard(folder), index_path(shard(folder))),
    "shard-000000.tar": lambda folder: read_attributes(shard(folder), index_path(shard(folder))),
    "shard-000000.tar, packed anew": lambda folder: list(
        WebDatasetSource(WebDatasetConfig(path=folder)).read("shard-000000.tar")
    ),
    "roles.parquet": load_protocol,
}
GALLERY: dict[str, Callable[[Path], object]] = {
    "gallery.json": lambda folder: GalleryFolder(folder).read(),
    "parts/00001.parquet": lambda folder: read_gallery(
        folder, keys_sha256=file_sha256(folder / "parts" / "00001.parquet")
    ),
    "parts/00001.faiss": lambda folder: read_gallery(
        folder, index_sha256=file_sha256(folder / "parts" / "00001.faiss")
    ),
}
ALONE: dict[str, Callable[[Path], object]] = {
    "vectors.parquet": lambda path: read_vectors([path]),
    "_embed.json": lambda path: read_embedded(path.parent),
    "model.onnx": read_exported_stamp,
    "model.pt2": read_exported_stamp,
    "model.safetensors": read_exported_stamp,
    "pairs.bin": lambda path: BinSource(BinSourceConfig(path=path)),
    "train.rec": lambda path: RecordSource(RecordSourceConfig(path=path)),
    "list.csv": lambda path: ListSource(ListSourceConfig(path=path)),
    "list.parquet": lambda path: ListSource(ListSourceConfig(path=path)),
    "roles.csv": lambda path: QueryGallerySource(QueryGalleryConfig(path=path)),
    "roles.parquet": lambda path: QueryGallerySource(QueryGalleryConfig(path=path)),
    "counts.csv": lambda path: counts_of(path, pa.array(["k"], pa.large_string())),
    "counts.parquet": lambda path: counts_of(path, pa.array(["k"], pa.large_string())),
    "run.yaml": load_config,
    "benchmark.json": lambda path: benchmark_rates(path, PLAN),
}
CASES = [
    *(("generation", name, read) for name, read in GENERATION.items()),
    *(("imported", name, read) for name, read in IMPORTED.items()),
    *(("data", name, read) for name, read in DATA.items()),
    *(("gallery", name, read) for name, read in GALLERY.items()),
    *(("alone", name, read) for name, read in ALONE.items()),
]


def shard(folder: Path) -> Path:
    return folder / "shard-000000.tar"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("where", "name", "read"), CASES, ids=[f"{where}-{name}" for where, name, _ in CASES])
def test_a_pickle_in_place_of_an_artefact_runs_nothing(
    made: Artefacts, tmp_path: Path, where: str, name: str, read: Callable[[Path], object], kind: Callable[..., bytes]
) -> None:
    trace, folder = tmp_path / "trace", tmp_path / "copy"
    source = {"generation": made.folder / "generation" / "v1.0"}.get(where, made.folder / where)
    if where == "alone":
        folder.mkdir()
    else:
        shutil.copytree(source, folder)
    path = folder / name.split(" ")[0].rstrip(",")
    path.write_bytes(kind(Planted(trace)))
    with pytest.raises(PipelineError) as error:
        read(path if where == "alone" else folder)
    assert not trace.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_planted_pickles_would_run_if_somebody_let_them(tmp_path: Path, kind: Callable[..., bytes]) -> None:
    content = kind(Planted(tmp_path / "trace"))
    if kind is of_torch:
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        loaded: Any = np.load(io.BytesIO(content), allow_pickle=True)
        if kind is of_numpy_archive:
            loaded["arr_0"]
    assert (tmp_path / "trace").exists()


def test_a_tag_of_a_yaml_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path / 'trace'}']")
    with pytest.raises(PipelineError, match="is no YAML"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(PipelineError, match="is no YAML"):
        load_config(Path("configs/tiny.yaml"), [f"name=!!python/object/apply:os.mkdir ['{tmp_path / 'trace'}']"])
    assert not (tmp_path / "trace").exists()


def test_a_pickled_type_in_a_parquet_is_not_unpickled(tmp_path: Path) -> None:
    told = {"ARROW:extension:name": "arrow.py_extension_type"}
    metadata = told | {"ARROW:extension:metadata": pickle.dumps(Planted(tmp_path / "trace"))}
    schema = pa.schema([pa.field("key", pa.string(), metadata=metadata), *list(SCHEMAS["roles"])[1:]])
    pq.write_table(pa.table([["a"], ["query"], ["x"], ["g"]], schema=schema), tmp_path / "roles.parquet")
    with pytest.raises(PipelineError):
        load_protocol(tmp_path)
    EmbeddingFile(tmp_path / "roles.parquet").strings("key")
    assert not (tmp_path / "trace").exists()


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torch_runs_what_a_program_of_a_stranger_holds(tmp_path: Path) -> None:
    """So we do not load one: its stamp is read from the archive."""
    program = torch.export.export(Scaled(), (torch.ones(2),))
    told = stamp("v1", 4)
    torch.export.save(program, tmp_path / "sound.pt2", extra_files={STAMP: told.model_dump_json()})
    with zipfile.ZipFile(tmp_path / "sound.pt2") as sound, zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        for name in sound.namelist():
            inputs = name.endswith("sample_inputs/model.pt")
            archive.writestr(name, of_torch(Planted(tmp_path / "trace")) if inputs else sound.read(name))
    assert read_exported_stamp(tmp_path / "model.pt2") == told
    assert not (tmp_path / "trace").exists()
    with contextlib.suppress(Exception):  # of what it then finds in the place of the inputs
        torch.export.load(tmp_path / "model.pt2")
    assert (tmp_path / "trace").exists()
