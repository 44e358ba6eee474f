"""Secrets are planted wherever a user may put them; then nothing that is printed, saved or recorded holds them."""

from __future__ import annotations

import base64
import logging
import pickle
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from ray.train.v2._internal.state.schema import _to_json_serializable_value

from jobs import train_bct
from pipeline.config import RunConfig, load_config
from pipeline.data.store import open_store
from pipeline.data.store_metadata import fetch_metadata
from pipeline.data.store_remote import Remote, StoreConfig
from pipeline.errors import ConfigError, DataError, PipelineError, RegistryError
from pipeline.family import flat
from pipeline.generation import GenerationRecord
from pipeline.plan import Plan
from pipeline.redaction import redacted
from pipeline.registry import DatasetInput, MlflowTracker, Registry
from pipeline.tracking import tracker as tracker_module
from pipeline.tracking.store import connect, tracking_location, ui_command
from tests.data_set import make_data_set
from tests.unit.test_registry import make_generation

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

SECRET = "planted-0b5e"  # every planted secret begins so
CLOSED = f"http://me:{SECRET}-server@127.0.0.1:9"
TINY = Path("configs/tiny.yaml")
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": f"{SECRET}-id",
    "AWS_SECRET_ACCESS_KEY": f"{SECRET}-key",
    "AWS_SESSION_TOKEN": f"{SECRET}-session",
    "RAY_AUTH_TOKEN": f"{SECRET}-ray",
    "MLFLOW_TRACKING_PASSWORD": f"{SECRET}-password",
    "MLFLOW_TRACKING_TOKEN": f"{SECRET}-token",
    "MLFLOW_TRACKING_URI": CLOSED,
}


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def silent_of(*texts: object) -> None:
    for text in texts:
        assert SECRET not in str(text)


def silent_in(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert SECRET not in str(path)
        assert SECRET.encode() not in path.read_bytes(), path


@contextmanager
def answering(status: int, user: str | None = None) -> Iterator[str]:
    """A server that gives every request the same answer, but 401 to all but the user; yields its host and port."""
    allowed = user and f"Basic {base64.b64encode(user.encode()).decode()}"

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if allowed in (None, self.headers["Authorization"]) else 401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql+psycopg2://me:s/e@cret@host:5432/db", "postgresql+psycopg2://me:***@host:5432/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("https://me:1234@host", "https://me:***@host"),
        ("https://token@host/set", "https://***@host/set"),
        ("s3://key:secret@bucket/set", "s3://key:***@bucket/set"),
        ("https://host/set?X-Amz-Signature=abc&x=1", "https://host/set?X-Amz-Signature=***&x=1"),
        ("https://host/set?sv=1&sig=abc%2F", "https://host/set?sv=1&sig=***"),
        ("sqlite:////home/me/a:b@c.db?timeout=20", "sqlite:////home/me/a:b@c.db?timeout=20"),
        ("no answer of 'http://me:secret@host' (http://you:secret@host/x): why?", None),
    ],
)
def test_what_is_told_of_a_uri(uri: str, told: str | None) -> None:
    assert redacted(uri) == told or (told is None and "secret" not in redacted(uri))
    assert redacted(redacted(uri)) == redacted(uri)


@pytest.mark.parametrize("key", ["tracking.uri", "data.train"])
@pytest.mark.parametrize("uri", ["http://me:{}@host/x", "https://{}@host/x", "https://host/x?token={}"])
def test_a_config_takes_no_secret(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str, uri: str
) -> None:
    tree = yaml.safe_load(TINY.read_text())
    section, last = key.split(".")
    tree.setdefault(section, {})[last] = uri.format(SECRET)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=rf"{key}: a config is kept and shown: leave the secret out") as error:
        load_config(tmp_path / "run.yaml")
    silent_of(error.value)
    for argument in (f"{key}={uri.format(SECRET)}", f"{key}=[{uri.format(SECRET)}", f"{key}.x={uri.format(SECRET)}"):
        monkeypatch.setattr("sys.argv", ["train_bct.py", "--config", str(TINY), argument])
        assert train_bct.main() == 2
        silent_of(*capfd.readouterr())


def test_the_printed_config_holds_no_secret_of_the_environment(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train_bct.py", "--config", str(TINY), "--print-config"])
    assert train_bct.main() == 0
    told = capfd.readouterr()
    assert "tracking:" in told.out
    silent_of(*told)


def test_runs_models_and_generations_hold_no_secret(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(TINY, [f"home={tmp_path / 'home'}"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow's own; the registry is given its store
    path = f"s3://me:{SECRET}-key@bucket/set"
    dataset = DatasetInput("set", path, "d" * 64, samples=9, identities=3)
    tags = {"config_digest": "c" * 64, "code_version": "test"}
    run_id = registry.start_run("v1", flat(config.shaping("v1")), tags, dataset)
    generation = make_generation(tmp_path / "made", "v1")
    registry.register(run_id, generation, {"rank1": 0.5})
    registry.finish_run(run_id)
    silent_of(registry.description(), registry.ui_command())
    silent_in(tmp_path)


def test_what_ray_shows_of_a_training_holds_no_secret() -> None:
    config = load_config(TINY)
    uri, _ = tracking_location(config.tracking, config.home)
    assert SECRET in uri
    nowhere = Path("/nowhere")
    record = make_record(config)
    plan = Plan(config, record, "data", nowhere, str(nowhere), nowhere, nowhere, nowhere, (), uri, "r" * 32)
    shown = _to_json_serializable_value({"plans": [plan]})  # what Ray Train keeps of what a worker is given
    assert "run_id" in str(shown)
    silent_of(shown, plan)
    assert pickle.loads(pickle.dumps(plan)).tracking_uri == uri


def make_record(config: RunConfig) -> GenerationRecord:
    return GenerationRecord(
        family=config.name,
        name="v1",
        backbone=config.generations["v1"].backbone,
        preprocess=config.preprocess,
        margin=config.generations["v1"].margin,
        identities=3,
        config=config.shaping("v1"),
        config_digest="c",
        data_digest="d",
        code_version="test",
    )


def test_a_tracking_server_that_is_down_is_told_without_its_password(
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(RegistryError, match="does not answer") as error:
        Registry(CLOSED, "glyphs")
    monkeypatch.setattr(tracker_module, "TICK_SECONDS", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with MlflowTracker(CLOSED, "r" * 32, tmp_path / "figures.jsonl") as tracker:
        tracker.log(1, {"loss": 1.0})
    told = capfd.readouterr()
    assert "does not take the metrics" in told.err
    silent_of(error.value, *told, caplog.text, ui_command(CLOSED, "1"))


@pytest.mark.parametrize("status", [401, 500])
def test_a_tracking_server_that_refuses_is_told_without_its_password(
    status: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with answering(status) as host, pytest.raises(RegistryError, match="opening it failed") as error:
        Registry(f"http://me:{SECRET}@{host}", "glyphs")
    silent_of(error.value, caplog.text)


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_store_that_refuses_is_told_without_its_credentials(
    tmp_path: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    config = StoreConfig(cache=tmp_path / "cache", retries=1, backoff_s=0.01)
    manifest = make_data_set(tmp_path / "set", shards=1)
    with answering(status) as host:
        url = f"http://me:{SECRET}@{host}/set"
        told: list[PipelineError] = []
        for ask in (
            lambda: fetch_metadata(url, config),
            lambda: open_store(url, manifest, config).local("shard-000000.tar"),
            lambda: Remote(url, config).size("x"),
        ):
            with pytest.raises(DataError) as error:
                ask()
            told.append(error.value)
            silent_of("".join(traceback.format_exception(error.value)))  # as Ray writes it into a worker's log
    silent_of(*told, caplog.text)
    silent_in(tmp_path)


@pytest.mark.parametrize(
    "url", ["s3://me:{}@bucket/set", "sftp://me:{}@host/set", "nothing://me:{}@host/set", "https://host/set?token={}"]
)
def test_other_stores_take_no_secret_in_their_address(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="leave the secret out of the URL") as error:
        Remote(url.format(SECRET), StoreConfig(cache=tmp_path / "cache"))
    silent_of(error.value)


def test_a_password_reaches_the_server_that_it_is_for(tmp_path: Path) -> None:
    assert connect(CLOSED).tracking_uri == CLOSED
    with answering(200, f"me:{SECRET}@/") as host:
        config = StoreConfig(cache=tmp_path / "cache", retries=0)
        assert Remote(f"http://me:{quote(f'{SECRET}@/', '')}@{host}/set", config).read("x") == b""
        with pytest.raises(DataError, match=r"no permission \(401\)"):
            Remote(f"http://{host}/set", config).read("x")
