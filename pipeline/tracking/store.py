"""Where MLflow's store is and how it is reached.

MLflow takes seconds to import: here it is imported where it is first used, so that a config can be read without it.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import socket
import sqlite3
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from pipeline.errors import ConfigError, RegistryError
from pipeline.redaction import redacted, without_secret
from pipeline.schema import Config

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow reads these on each request. Its own 7 retries with a factor of 2 and 120 s for each answer stall a caller for
# minutes (up to a quarter of an hour if the server swallows packets). 3 retries at 0, 2 and 4 s ride out a restarted
# proxy; whatever takes longer is retried by the tracker, or by running the idempotent registration again. What the
# user has set wins. Telemetry would call out of clusters that have no way out; what is printed is the jobs' business.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

PROBE_SECONDS = 5.0
_REMOTE = ("http://", "https://")
_NAME = re.compile(r"\w[\w.-]*")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}  # where a URI names none


class TrackingConfig(Config):
    """Where runs and generations are recorded, and how often."""

    uri: str | None = Field(
        default=None,
        description="MLflow's tracking URI: http(s)://HOST, sqlite:////ABSOLUTE/PATH or another database. "
        "Left out: the environment's MLFLOW_TRACKING_URI, else a sqlite file under the home, HOME/mlflow/mlflow.db. "
        "No password: that of a server is MLFLOW_TRACKING_PASSWORD's, that of a database MLFLOW_TRACKING_URI's.",
    )

    @field_validator("uri")
    @classmethod
    def _uri_has_no_secret(cls, uri: str | None) -> str | None:
        return uri and without_secret(uri)


def tracking_location(config: TrackingConfig, home: Path) -> tuple[str, Path | None]:
    """The store's URI, and the folder of its artefacts (None where a server has its own).

    Args:
        config: what the run config says.
        home: absolute folder of all that the product keeps; jobs run in copies of the checkout, so that a path
            relative to the working directory would lead to a folder that is thrown away.

    Raises:
        ConfigError: the URI is a folder, of an unknown scheme, or a relative sqlite path.
    """
    assert home.is_absolute(), f"home {home} must be absolute"
    base = home / "mlflow"
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{base / 'mlflow.db'}"
    if uri.startswith(_REMOTE):
        return uri.rstrip("/"), None
    if uri.split(":", 1)[0].split("+", 1)[0] not in _DATABASES:
        raise ConfigError(
            f"tracking URI {redacted(uri)!r} is neither a server nor a database (MLflow 3 keeps no runs in folders): "
            f"use http(s)://HOST, or sqlite:///{base / 'mlflow.db'}"
        )
    if uri.startswith("sqlite:") and not uri.startswith("sqlite:////"):
        raise ConfigError(f"tracking URI {uri!r} is a relative path: write sqlite:////ABSOLUTE/PATH (four slashes)")
    return uri, base / "artifacts"


def metric_key(name: str) -> str:
    """The name with the characters that MLflow refuses (such as @) replaced by underscores."""
    return re.sub(r"[^\w./ :-]", "_", name)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened; MLflow's carry SQL and stack traces."""
    lines = str(error).strip().splitlines()
    return redacted(lines[0])[:300] if lines else type(error).__name__


def connect(uri: str) -> MlflowClient:
    """A client bound to `uri`, without any of MLflow's process-wide state.

    A new sqlite file is brought to the current schema first, which takes seconds. MLflow gives each session of
    sqlite a busy timeout of 20 s by itself (and overrides `?timeout=`), so that processes may write at once.

    Raises:
        mlflow.exceptions.MlflowException: the store cannot be opened.
    """
    # Progress of the migrations, retries of requests, and tracebacks of errors that are raised all the same.
    for name in ("mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri(uri))


def registry_uri(uri: str) -> str:
    """Where the registered models are: with the runs, unless MLFLOW_REGISTRY_URI says otherwise."""
    return os.environ.get("MLFLOW_REGISTRY_URI") or uri


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store; None: it is another one."""
    return Path(uri.removeprefix("sqlite:///").split("?", 1)[0]) if uri.startswith("sqlite:///") else None


def unless_there(create: Callable[[], object]) -> None:
    """Create, unless somebody was quicker."""
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextmanager
def artefact_errors(doing: str, again: str) -> Iterator[None]:
    """Turn what an artefact store raises, whatever its own client does, into one line."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        raise RegistryError(f"{doing} failed ({first_line(error)}): mend that and {again} again") from None


def check_name(what: str, name: str) -> None:
    """Names stand in MLflow's filters and paths."""
    if not _NAME.fullmatch(name):
        raise RegistryError(f"{what} {name!r} cannot be registered: use letters, digits, '.', '_' and '-' only")


def check_answers(uri: str) -> None:
    """Ask the store for a sign of life, within seconds: MLflow itself retries for a minute and more.

    Raises:
        RegistryError: nothing answers at `uri`, the sqlite file cannot be opened, or a database's driver is missing.
    """
    try:
        if uri.startswith(_REMOTE):
            _probe_server(uri)
        elif (path := sqlite_file(uri)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path, timeout=20)) as database:
                database.execute("PRAGMA schema_version").fetchone()
        else:
            _probe_database(uri)
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "reason", None) or error
        raise RegistryError(
            f"MLflow's store {redacted(uri)} does not answer ({first_line(reason)}): "
            "start it, or set tracking.uri or MLFLOW_TRACKING_URI to one that runs"
        ) from None


def _probe_server(uri: str) -> None:
    """Raise OSError unless anything at all answers; whether the answer is good is MLflow's to judge."""
    bare = urllib.parse.urlsplit(uri)
    bare = bare._replace(netloc=bare.netloc.rpartition("@")[2])  # urllib takes a user and password for a host
    try:
        urllib.request.urlopen(urllib.request.Request(bare.geturl(), method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # MLFLOW_TRACKING_INSECURE_TLS may allow what we do not
            raise


def _probe_database(uri: str) -> None:
    """Raise OSError unless somebody listens where the database should be: its driver would wait for two minutes."""
    from sqlalchemy.engine import make_url

    address = make_url(uri)
    dialect = address.get_dialect()
    try:
        dialect.import_dbapi()
    except ImportError as error:
        raise RegistryError(
            f"MLflow's store {redacted(uri)} needs the Python package {error.name!r}, on every node: install it "
            "(for postgresql://: pip install 'psycopg[binary]')"
        ) from None
    port = address.port or _PORTS.get(address.get_backend_name())
    if address.host and port:  # without a host it is a socket in the file system
        socket.create_connection((address.host, port), timeout=PROBE_SECONDS).close()


def ui_command(uri: str, experiment_id: str) -> str:
    """The shell command that opens the UI on a database, or the address of the server's UI."""
    if uri.startswith("http"):
        return f"{redacted(uri)}/#/experiments/{experiment_id}"
    if redacted(uri) != uri:  # a password is not to be printed
        return 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI" --port 5000'
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)} --port 5000"
