"""A name that a file from elsewhere gives never leads out of the folder that it is looked for in.

Names in tars: `test_what_a_tar_should_not_hold_is_refused_and_the_rest_kept` (test_sources.py).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.manifest import Manifest
from pipeline.data.store_metadata import fetch_metadata
from pipeline.data.store_remote import StoreConfig
from pipeline.errors import DataError, GenerationError
from pipeline.gallery.index import IndexConfig
from pipeline.gallery.store import DIGEST, GalleryFolder, GalleryRecord
from pipeline.generation import RECORD, Generation
from pipeline.schema import digest_json
from pipeline.search import Gallery
from tests.data_set import make_data_set
from tests.unit.stamped import drawn
from tests.unit.test_registry import make_generation

OUTSIDE = ("../x", "..", "a/../../x", "/etc/x", "a/x", "..\\x", "C:\\x", "s3://bucket/x", "x\0", "x\n")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def changed(path: Path, *keys: str | int, value: Any) -> None:
    """Put a value into a JSON file, at the place that the keys lead to."""
    told = json.loads(path.read_bytes())
    node = told
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(told))


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name != ".."])  # with a suffix it is a name
def test_a_manifest_names_files_of_its_folder(tmp_path: Path, name: str) -> None:
    make_data_set(tmp_path / "set", shards=1)
    path = tmp_path / "set" / "manifest.json"
    whole = path.read_bytes()
    for keys, suffix in ((("shards", 0, "name"), ".tar"), (("identities_file",), ".parquet")):
        changed(path, *keys, value=name + suffix)
        with pytest.raises(DataError, match=r"manifest\.json is broken at '(shards.0.name|identities_file)'") as error:
            Manifest.load(tmp_path / "set")
        assert "\n" not in str(error.value)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["../../stolen.parquet", "{outside}/stolen.parquet"])
def test_a_manifest_from_a_server_writes_nothing_outside_the_cache(tmp_path: Path, name: str) -> None:
    make_data_set(tmp_path / "set", shards=1)
    (tmp_path / "set" / "identities.parquet").rename(tmp_path / "set" / "stolen.parquet")
    changed(tmp_path / "set" / "manifest.json", "identities_file", value=name.format(outside=tmp_path / "outside"))
    (tmp_path / "outside").mkdir()
    with served(tmp_path / "set") as url, pytest.raises(DataError, match="is broken at 'identities_file'"):
        fetch_metadata(url, StoreConfig(cache=tmp_path / "deep" / "cache", retries=0))
    written = {path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "set"}
    assert written == {"manifest.json", ".lock"}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_generation_names_files_of_its_folder_and_is_no_path_itself(tmp_path: Path, name: str) -> None:
    folder = make_generation(tmp_path, "v1").path
    whole = (folder / RECORD).read_bytes()
    files = json.loads(whole)["files"]
    for key, value in (("files", files | {name: "0" * 64}), ("name", name), ("family", name), ("parents", {name: "0"})):
        changed(folder / RECORD, key, value=value)
        with pytest.raises(GenerationError, match=rf"is not a generation's record: '{key}") as error:
            Generation(folder)
        assert "\n" not in str(error.value)
        (folder / RECORD).write_bytes(whole)


@pytest.mark.parametrize("name", [*OUTSIDE, "../00001"])
def test_a_gallery_names_parts_of_its_folder(tmp_path: Path, name: str) -> None:
    store = GalleryFolder(tmp_path)
    built = Gallery.of([drawn("v1", 9, 4, seed=1)], IndexConfig())
    with store.locked(new=True):
        store.commit(GalleryRecord(index=IndexConfig(), parts=(store.write(built.segments[0]),)))
    changed(store.record_file, "parts", 0, "name", value=name)
    told = json.loads(store.record_file.read_bytes())
    told.pop(DIGEST)
    changed(store.record_file, DIGEST, value=digest_json(told))
    with pytest.raises(DataError, match=r"gallery\.json cannot be read \(String should match pattern") as error:
        store.read()
    assert "\n" not in str(error.value)
