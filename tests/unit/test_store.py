"""Shards from a real S3 server and real HTTP servers, with a proxy in between that spoils what it is told to."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import s3fs  # type: ignore[import-untyped]

from pipeline.data.balanced import order_of
from pipeline.data.manifest import Manifest
from pipeline.data.order import OrderConfig, batch_positions
from pipeline.data.reading import ShardReader
from pipeline.data.store import LocalStore, open_store
from pipeline.data.store_cached import RemoteStore
from pipeline.data.store_metadata import fetch_metadata
from pipeline.data.store_remote import RANGE, Remote, StoreConfig
from pipeline.data.verify import verify
from pipeline.errors import ConfigError, DataError
from tests.data_set import make_data_set
from tests.faulty import FOREVER, Fault, FaultyProxy

URL = "s3://bucket/set"
SHARDS = [f"shard-{number:06d}.tar" for number in range(4)]
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
# Reads the manifest itself: what reads it otherwise takes seconds to import.
CHILD = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from pipeline.data.store_cached import RemoteStore
from pipeline.data.store_remote import StoreConfig
folder, url, cache, name = sys.argv[1:]
shards = [SimpleNamespace(**entry) for entry in json.loads(Path(folder, "manifest.json").read_text())["shards"]]
store = RemoteStore(url, shards, StoreConfig(cache=Path(cache), timeout_s=30))
print(store.local(name), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("made") / "set")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Iterator[FaultyProxy]:
    """A real server of S3, filled, behind the proxy that AWS_ENDPOINT_URL names."""
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("w") as stream:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stderr=stream)
    with pytest.MonkeyPatch.context() as environment:
        try:
            eventually(lambda: "Running on" in log.read_text())
            port = int(log.read_text().split("Running on http://127.0.0.1:")[1].split()[0])
            with FaultyProxy(port) as proxy:
                for key, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.url}.items():
                    environment.setenv(key, value)
                public = {"ACL": "public-read"}  # so that plain HTTP can read it too
                client = s3fs.S3FileSystem(skip_instance_cache=True, s3_additional_kwargs=public)
                client.mkdir("bucket")
                client.put(str(manifest.folder), URL, recursive=True)
                yield proxy
        finally:
            server.terminate()
            server.wait()


@pytest.fixture
def proxy(s3: FaultyProxy) -> FaultyProxy:
    s3.reset()
    return s3


def eventually(happens: Callable[[], object]) -> None:
    """Wait for what another thread or process does."""
    for _ in range(600):
        if happens():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in 30 s")


def patience(tmp_path: Path, **changes: object) -> StoreConfig:
    """A config that loses no time."""
    settings = {"cache": tmp_path / "cache", "backoff_s": 0.001, "retries": 2, "timeout_s": 0.5, **changes}
    return StoreConfig.model_validate(settings)


def kept(tmp_path: Path) -> set[str]:
    """Shards in the cache, and whatever else is there but the lock."""
    return {path.name.split("-", 1)[-1] for path in (tmp_path / "cache").iterdir()} - {".lock"}


def told(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def http_folder(folder: Path) -> ThreadingHTTPServer:
    """A server of files that knows no ranges."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    return ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))


def test_a_local_store_gives_the_shards_where_they_are(manifest: Manifest) -> None:
    for location in (str(manifest.folder), f"file://{manifest.folder}"):
        with closing(open_store(location, manifest, StoreConfig())) as store:
            assert store.local(SHARDS[1]) == manifest.folder / SHARDS[1]
            assert store.sizes([SHARDS[0], "none.tar"]) == {SHARDS[0]: manifest.shards[0].bytes}
            assert "none.tar is missing; restore it" in told(lambda: store.local("none.tar"))
    assert "cannot be listed" in told(lambda: LocalStore(Path("/nowhere")).sizes(SHARDS))


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_shards_arrive_as_they_were_packed(proxy: FaultyProxy, manifest: Manifest, tmp_path: Path, kind: str) -> None:
    url = URL if kind == "s3" else f"{proxy.url}/bucket/set"
    with closing(open_store(url, manifest, patience(tmp_path))) as store:
        for name in SHARDS * 2:
            assert store.local(name).read_bytes() == (manifest.folder / name).read_bytes()
        expected = {entry.name: entry.bytes for entry in manifest.shards}
        assert store.sizes([*SHARDS, "none.tar"]) == expected
    assert [len(proxy.asked(name)) for name in SHARDS] == [1 if kind == "s3" else 2] * 4
    assert kept(tmp_path) == set(SHARDS)


def test_an_http_server_without_ranges_will_do(manifest: Manifest, tmp_path: Path) -> None:
    with http_folder(manifest.folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            folder = fetch_metadata(url, patience(tmp_path))
            with closing(open_store(url, Manifest.load(folder), patience(tmp_path))) as store:
                assert store.local(SHARDS[2]).read_bytes() == (manifest.folder / SHARDS[2]).read_bytes()
        finally:
            server.shutdown()
            thread.join()


def test_metadata_is_fetched_once_and_makes_a_data_set_that_verifies(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path
) -> None:
    folder = fetch_metadata(f"{URL}/", patience(tmp_path))
    assert Manifest.load(folder).digest == manifest.digest
    names = {path.name for path in folder.iterdir()} - {".lock"}
    assert names == {path.name for path in manifest.folder.iterdir() if path.suffix != ".tar"}
    proxy.reset()
    assert fetch_metadata(URL, patience(tmp_path)) == folder
    assert [request.path for request in proxy.requests] == ["/bucket/set/manifest.json"]
    proxy.reset()
    with closing(open_store(URL, manifest, patience(tmp_path))) as store:
        verify(Manifest.load(folder), "background", store).wait()
        assert len(proxy.requests) == 1, "one listing, not one request a shard"
        verify(Manifest.load(folder), "all", store)
    assert all(len(proxy.asked(name)) == 1 for name in SHARDS)


@pytest.mark.parametrize("name", ["manifest.json", "catalogue.npy", "identities.parquet", "shard-000002.idx"])
def test_metadata_survives_faults_and_tells_what_is_never_right(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path, name: str
) -> None:
    faults: list[Fault] = ["503"] if name == "manifest.json" else ["503", "flip"]
    for fault in faults:
        proxy.plan(name, fault)
    folder = fetch_metadata(URL, patience(tmp_path))
    assert (folder / name).read_bytes() == (manifest.folder / name).read_bytes()
    proxy.plan(name, faults[-1], FOREVER)
    message = told(lambda: fetch_metadata(URL, patience(tmp_path, cache=tmp_path / "again")))
    assert f"{name} at {URL} " in message
    assert not list((tmp_path / "again.metadata").glob("*/.*.part"))


@pytest.mark.parametrize("fault", ["503", "cut", "short", "stall", "reset", "flip"])
@pytest.mark.parametrize("kind", ["s3", "http"])
def test_a_fault_that_passes_costs_a_retry_alone(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path, kind: str, fault: Fault
) -> None:
    url = URL if kind == "s3" else f"{proxy.url}/bucket/set"
    times = 1 if fault == "stall" else 2
    proxy.plan(SHARDS[0], fault, times)
    with closing(open_store(url, manifest, patience(tmp_path))) as store:
        assert store.local(SHARDS[0]).read_bytes() == (manifest.folder / SHARDS[0]).read_bytes()
    assert len(proxy.asked(SHARDS[0])) == times + 1
    assert kept(tmp_path) == {SHARDS[0]}


@pytest.mark.parametrize(
    ("kind", "fault", "message"),
    [
        ("s3", "503", "cannot be read, tried 3 times: OSError: [Errno 16]"),
        ("s3", "flip", "cannot be read, tried 3 times: FlexibleChecksumError: "),  # S3's own, if it has one
        ("http", "503", "cannot be read, tried 3 times: ClientResponseError: 503"),
        ("http", "short", "cannot be read, tried 3 times: DamagedError: 15360 bytes arrived of 30720 from byte 0 on"),
        ("http", "flip", "was fetched 3 times, but its sha256 is never the manifest's; upload it again"),
    ],
)
def test_a_fault_that_stays_is_told_with_shard_and_url(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path, kind: str, fault: Fault, message: str
) -> None:
    url = URL if kind == "s3" else f"{proxy.url}/bucket/set"
    proxy.plan(SHARDS[1], fault, FOREVER)
    with closing(open_store(url, manifest, patience(tmp_path))) as store:
        line = told(lambda: store.local(SHARDS[1]))
    assert f"{SHARDS[1]} at {url} " in line
    assert message in line
    assert len(proxy.asked(SHARDS[1])) == 3
    assert kept(tmp_path) == set()


def test_a_server_that_is_not_there_is_told(manifest: Manifest, tmp_path: Path) -> None:
    with closing(open_store("http://127.0.0.1:9/set", manifest, patience(tmp_path))) as store:
        line = told(lambda: store.local(SHARDS[0]))
    assert "tried 3 times: ClientConnectorError: Cannot connect to host 127.0.0.1:9" in line


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_a_shard_that_is_not_there_is_told_at_once(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path, kind: str
) -> None:
    url = "s3://bucket/elsewhere" if kind == "s3" else f"{proxy.url}/bucket/elsewhere"
    with closing(open_store(url, manifest, patience(tmp_path))) as store:
        line = told(lambda: store.local(SHARDS[0]))
        assert line.startswith(f"{SHARDS[0]} at {url} cannot be read: there is no such file or bucket (404)")
        assert len(proxy.asked(SHARDS[0])) == 1
        if kind == "http":
            assert store.sizes(SHARDS) == {}


def test_a_bucket_without_permission_is_told_at_once(proxy: FaultyProxy, manifest: Manifest, tmp_path: Path) -> None:
    """The server itself refuses: it is told to ask for credentials that it knows, of which there are none."""

    def set_free_actions(count: bytes) -> None:
        connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"))
        connection.request("POST", "/moto-api/reset-auth", count)
        connection.getresponse().read()
        connection.close()

    set_free_actions(b"0")
    try:
        with closing(open_store(URL, manifest, patience(tmp_path))) as store:
            line = told(lambda: store.local(SHARDS[0]))
            assert line.startswith(f"{SHARDS[0]} at {URL} cannot be read: no permission (403)")
            assert len(proxy.asked(SHARDS[0])) == 1
            assert "no permission (403)" in told(lambda: store.sizes(SHARDS))
    finally:
        set_free_actions(b"inf")


def test_only_the_range_that_failed_is_asked_for_again(proxy: FaultyProxy, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 34
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file("bucket/large/x.tar", content)
    proxy.reset()
    ranges = [f"bytes={start}-{min(start + RANGE, len(content)) - 1}" for start in range(0, len(content), RANGE)]
    target = tmp_path / "x.tar"
    with Remote("s3://bucket/large", patience(tmp_path, timeout_s=20)) as remote, target.open("w+b") as stream:
        stream.write(content[:RANGE])  # as if the first range had come
        proxy.plan("x.tar", "cut")
        remote.download("x.tar", len(content), stream)
    assert target.read_bytes() == content
    assert [request.range for request in proxy.asked("x.tar")] == [ranges[1], *ranges[1:]]


def test_the_cache_keeps_to_its_bytes_and_evicts_the_least_recently_used(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path
) -> None:
    config = patience(tmp_path, cache_bytes=3 * manifest.shards[0].bytes)
    with closing(open_store(URL, manifest, config)) as store:
        for number in (0, 1, 2, 0):
            store.local(SHARDS[number])
            store.release(SHARDS[number])
        store.local(SHARDS[3])
        assert kept(tmp_path) == {SHARDS[0], SHARDS[2], SHARDS[3]}
    assert len(proxy.asked(SHARDS[0])) == 1


def test_a_shard_in_use_is_not_evicted_by_anyone(proxy: FaultyProxy, manifest: Manifest, tmp_path: Path) -> None:
    assert proxy.url
    config = patience(tmp_path, cache_bytes=2 * manifest.shards[0].bytes)
    stores = [open_store(URL, manifest, config) for _ in range(2)]
    with closing(stores[0]) as one, closing(stores[1]) as other:
        one.local(SHARDS[0])
        for name in SHARDS[1:]:
            other.local(name)
            other.release(name)
        assert kept(tmp_path) == {SHARDS[0], SHARDS[3]}
        other.local(SHARDS[3])
        line = told(lambda: other.local(SHARDS[2]))
        assert f"has no room for shard {SHARDS[2]}" in line
        assert "raise cache_bytes" in line
        one.close()
        other.local(SHARDS[2])
        assert kept(tmp_path) == {SHARDS[2], SHARDS[3]}


def test_prefetched_shards_come_in_order_and_wait_for_room(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path
) -> None:
    config = patience(tmp_path, cache_bytes=2 * manifest.shards[0].bytes, threads=1, timeout_s=20)
    with closing(open_store(URL, manifest, config)) as store:
        store.prefetch(SHARDS[::-1])
        eventually(lambda: kept(tmp_path) == {SHARDS[3], SHARDS[2]})
        assert store.local(SHARDS[3]).is_file()
        store.release(SHARDS[3])
        eventually(lambda: kept(tmp_path) == {SHARDS[2], SHARDS[1]})
        store.local(SHARDS[0])  # needed now: what was only asked for gives way
        assert SHARDS[0] in kept(tmp_path)
    order = [request.path.rpartition("/")[2] for request in proxy.requests]
    assert order[:3] == SHARDS[:0:-1]
    assert SHARDS[0] in order


def test_what_fails_in_the_background_is_told_when_it_is_needed(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path
) -> None:
    with closing(open_store("s3://bucket/elsewhere", manifest, patience(tmp_path))) as store:
        store.prefetch(SHARDS[:2])
        eventually(lambda: proxy.asked(SHARDS[1]))
        assert "(404)" in told(lambda: store.local(SHARDS[0]))


def test_closing_ends_what_waits(proxy: FaultyProxy, manifest: Manifest, tmp_path: Path) -> None:
    config = patience(tmp_path, cache_bytes=2 * manifest.shards[0].bytes)
    store = open_store(URL, manifest, config)
    store.prefetch(SHARDS)
    eventually(lambda: len(kept(tmp_path) & set(SHARDS)) == 2)
    store.close()
    assert proxy.requests
    assert not [thread for thread in threading.enumerate() if thread.name == "shard-prefetch"]
    assert len(kept(tmp_path)) == 2


def test_a_cached_shard_that_was_cut_is_fetched_again(proxy: FaultyProxy, manifest: Manifest, tmp_path: Path) -> None:
    with closing(open_store(URL, manifest, patience(tmp_path))) as store:
        path = store.local(SHARDS[0])
    path.write_bytes(b"cut")
    with closing(open_store(URL, manifest, patience(tmp_path))) as store:
        assert store.local(SHARDS[0]).read_bytes() == (manifest.folder / SHARDS[0]).read_bytes()
    assert len(proxy.asked(SHARDS[0])) == 2


def child(manifest: Manifest, tmp_path: Path, name: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(manifest.folder), URL, str(tmp_path / "cache"), name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=Path(__file__).parents[2], **pipes, **options)  # type: ignore[call-overload,no-any-return]


def test_two_processes_that_want_a_shard_fetch_it_once(proxy: FaultyProxy, manifest: Manifest, tmp_path: Path) -> None:
    proxy.plan(SHARDS[0], "slow", FOREVER)
    children = [child(manifest, tmp_path, SHARDS[0]) for _ in range(2)]
    answers = [one.communicate() for one in children]
    assert [one.returncode for one in children] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert len(proxy.asked(SHARDS[0])) == 1
    assert kept(tmp_path) == {SHARDS[0]}


def test_a_process_killed_while_it_fetches_leaves_nothing_that_stays(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path
) -> None:
    proxy.plan(SHARDS[0], "stall")
    killed = child(manifest, tmp_path, SHARDS[0])
    assert proxy.stalled.wait(30)
    assert kept(tmp_path) == {f"{SHARDS[0]}.part"}
    with closing(open_store(URL, manifest, patience(tmp_path))):
        assert kept(tmp_path) == {f"{SHARDS[0]}.part"}, "a part that someone is filling stays"
    killed.kill()
    killed.communicate()
    with closing(open_store(URL, manifest, patience(tmp_path))) as store:
        assert kept(tmp_path) == set()
        assert store.local(SHARDS[0]).read_bytes() == (manifest.folder / SHARDS[0]).read_bytes()


def test_a_shard_that_a_process_uses_stays_until_it_is_killed(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path
) -> None:
    assert proxy.url
    holder = child(manifest, tmp_path, SHARDS[0])
    assert holder.stdout
    assert Path(holder.stdout.readline().strip()).is_file()
    config = patience(tmp_path, cache_bytes=manifest.shards[0].bytes)
    with closing(open_store(URL, manifest, config)) as store:
        assert "has no room" in told(lambda: store.local(SHARDS[1]))
        holder.kill()
        holder.communicate()
        store.local(SHARDS[1])
    assert kept(tmp_path) == {SHARDS[1]}


def test_a_cache_that_cannot_be_written_is_told(proxy: FaultyProxy, manifest: Manifest, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    assert proxy.url
    limited = CHILD.replace(
        "import json, sys\n", "import json, resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (99, 99))\n", 1
    )
    command = [sys.executable, "-c", limited, str(manifest.folder), URL, str(tmp_path / "cache"), SHARDS[0]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert f"shard {SHARDS[0]} cannot be kept in cache {tmp_path / 'cache'}: File too large" in done.stderr
    assert kept(tmp_path) == set()


def test_a_place_that_cannot_be_reached_is_a_mistake_of_the_config(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data at nonsense://x cannot be reached: ValueError: Protocol not known"):
        open_store("nonsense://x", manifest, patience(tmp_path))
    with pytest.raises(ConfigError, match=r"cache_bytes is 10, less than the 30720 of shard shard-000000\.tar"):
        RemoteStore(URL, manifest.shards, patience(tmp_path, cache_bytes=10))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cache folder .*file/x cannot be used: Not a directory"):
        RemoteStore(URL, manifest.shards, patience(tmp_path, cache=tmp_path / "file" / "x"))


def test_a_flaky_bucket_gives_the_batches_that_the_folder_gives(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path
) -> None:
    folder = fetch_metadata(URL, patience(tmp_path))
    proxy.plan(SHARDS[1], "503", 2)
    proxy.plan(SHARDS[3], "cut")
    with closing(open_store(URL, manifest, patience(tmp_path))) as store:
        far = epoch(ShardReader(folder, manifest, np.arange(5), 2, store))
    assert far == epoch(ShardReader(manifest.folder, manifest, np.arange(5), 2))
    assert len(far) == 12


def epoch(reader: ShardReader) -> list[tuple[bytes, int]]:
    """Every sample of an epoch, in batches of three, with its label."""
    order = order_of(reader.selection, OrderConfig(block_shards=2), "digest", 0, 3)
    samples = []
    for step in range(4):
        positions = batch_positions(step, 3)
        reader.expect(order.shards_ahead(positions))
        work = reader.read(step, *order.samples_at(positions))
        samples += list(zip(work.raws, work.labels_B.tolist(), strict=True))
    reader.close()
    return samples
