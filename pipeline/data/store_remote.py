"""A folder behind fsspec, read with patience: what may pass is tried again, what will not is told at once.

Credentials and endpoints are fsspec's business: it reads the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
Those that stand in an http(s) URL are taken out of it, so that neither a log nor an error of fsspec's can show them.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self, TypeVar
from urllib.parse import unquote, urlsplit

import aiohttp
import fsspec  # type: ignore[import-untyped]
import platformdirs
from botocore.exceptions import (  # type: ignore[import-untyped]
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from pydantic import Field, field_validator

from pipeline.errors import ConfigError, DataError
from pipeline.redaction import redacted, with_kind
from pipeline.schema import Config

RANGE = 16 << 20  # bytes of one request: what is lost to a broken connection
LONGEST_PAUSE_S = 30.0
PASSING = (408, 429)  # HTTP's only client errors that pass
HOPELESS = (NoCredentialsError, PartialCredentialsError, ParamValidationError)
REASONS = {
    401: "no permission (401); check the credentials",
    403: "no permission (403), or the bucket does not tell that there is no such file; check credentials and name",
    404: "there is no such file or bucket (404)",
    416: "it is shorter than the manifest says (416)",
}

Result = TypeVar("Result")


class StoreConfig(Config):
    """How shards that are not on this machine get there."""

    cache: Path = Field(
        default_factory=lambda: platformdirs.user_cache_path("bct-pipeline") / "shards",
        description="folder on a local disk for fetched shards; a node's processes share it",
    )
    cache_bytes: int = Field(
        100 << 30, ge=1, description="shards kept there, in bytes: three blocks of the order or more"
    )
    retries: int = Field(5, ge=0, description="times that a read is tried again, without progress, before giving up")
    backoff_s: float = Field(0.5, gt=0, description="seconds before the first retry; doubled for each further one")
    timeout_s: float = Field(60, gt=0, description="seconds without a byte, or without room, before a read has failed")
    threads: int = Field(4, ge=1, le=64, description="fetches ahead of need at once")

    @field_validator("cache")
    @classmethod
    def _cache_is_absolute(cls, cache: Path) -> Path:
        return cache.expanduser().absolute()


class ClosedError(DataError):
    """The store was closed while something was fetched."""


class DamagedError(OSError):
    """What arrived is not what was asked for."""


class Remote:
    """A folder that fsspec reaches.

    Args:
        url: of the folder, such as s3://bucket/folder.
        config: patience.

    Raises:
        ConfigError: fsspec does not know such URLs, or lacks the package for them.
    """

    def __init__(self, url: str, config: StoreConfig) -> None:
        self.url, self._config = redacted(url.rstrip("/")), config  # to be told
        self._fs, self._root = _filesystem(url.rstrip("/"), config)
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Make every read that is under way, in whatever thread, end with ClosedError soon."""
        self._closed.set()

    def pause(self, seconds: float) -> None:
        """Wait, unless closed meanwhile.

        Raises:
            ClosedError: it was.
        """
        if self._closed.wait(seconds):
            raise ClosedError(f"{self.url} was closed while a file was fetched; start again")

    def read(self, name: str) -> bytes:
        """Read a small file.

        Raises:
            DataError: it is not there, may not be read, or cannot be read for long; names file, URL and cause.
        """
        return self.retry(name, lambda: bytes(self._fs.cat_file(f"{self._root}/{name}")))

    def size(self, name: str) -> int:
        """Bytes of a file, by one request.

        Raises:
            DataError: as `read`, or the server does not tell.
        """
        size = self.retry(name, lambda: self._fs.info(f"{self._root}/{name}"))["size"]
        if size is None:
            raise DataError(f"{self.url}/{name}: the server does not tell its size; serve it with Content-Length")
        return int(size)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of those of the files that are there, by name: one listing, but one request a file over HTTP.

        Raises:
            DataError: the folder cannot be listed.
        """
        if self.url.startswith("http"):
            with ThreadPoolExecutor(max_workers=32) as pool:
                found = zip(names, pool.map(self._size_if_there, names), strict=True)
                return {name: size for name, size in found if size is not None}
        wanted = set(names)
        entries = self.retry("(its list)", lambda: self._fs.ls(self._root, detail=True, refresh=True))
        listed = {PurePosixPath(entry["name"]).name: entry["size"] for entry in entries}
        return {name: int(size) for name, size in listed.items() if name in wanted}

    def _size_if_there(self, name: str) -> int | None:
        try:
            return self.size(name)
        except _MissingError:
            return None

    def download(self, name: str, size: int, stream: BinaryIO) -> None:
        """Write a file's `size` bytes to a stream, range by range; a broken connection costs one range.

        Raises:
            DataError: as `read`.
            OSError: the stream cannot be written.
        """
        while (start := stream.tell()) < size:
            stop = min(start + RANGE, size)
            stream.write(self.retry(name, lambda start=start, stop=stop: self._range(name, start, stop, size)))  # type: ignore[misc]

    def _range(self, name: str, start: int, stop: int, size: int) -> bytes:
        data = bytes(self._fs.cat_file(f"{self._root}/{name}", start=start, end=stop))
        whole = start == 0 and len(data) == size  # from a server that knows no ranges
        if len(data) != stop - start and not whole:
            raise DamagedError(f"{len(data)} bytes arrived of {stop - start} from byte {start} on")
        return data

    def retry(self, name: str, read: Callable[[], Result]) -> Result:
        """Call `read` until it succeeds, with longer and longer pauses.

        Raises:
            DataError: it fails in a way that does not pass, or too often; names file, URL and cause.
            ClosedError: the store was closed meanwhile.
        """
        where = f"{name} at {self.url}"
        for pause in self.pauses():
            self.pause(0)
            try:
                return read()
            except DataError:
                raise
            except Exception as error:  # each file system has its own classes
                status = _status(error)
                if status == 404:
                    raise _MissingError(f"{where} cannot be read: {REASONS[404]}; upload it or mend the URL") from error
                if isinstance(error, HOPELESS) or (status is not None and status < 500 and status not in PASSING):
                    reason = REASONS.get(status or 0) or with_kind(error)
                    raise DataError(f"{where} cannot be read: {reason}") from error
                if pause is None:
                    raise DataError(
                        f"{where} cannot be read, tried {self._config.retries + 1} times: {with_kind(error)}; "
                        "see to the connection and the file, then start again"
                    ) from error
            self.pause(pause)
        raise AssertionError("the last pause is None")

    def pauses(self) -> Iterator[float | None]:
        """Seconds after each attempt, none after the last; drawn, so that ranks do not come back at once."""
        for attempt in range(self._config.retries):
            longest = min(LONGEST_PAUSE_S, self._config.backoff_s * 2**attempt)
            yield random.uniform(longest / 2, longest)
        yield None


class _MissingError(DataError):
    """There is no such file."""


def _filesystem(url: str, config: StoreConfig) -> tuple[Any, str]:
    """fsspec's file system for a URL, which leaves time-outs and retries to us, and the path in it."""
    url, headers = _split_user(url)
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        options["max_concurrency"] = 1  # one request a file
        seconds = {"read_timeout": config.timeout_s, "connect_timeout": config.timeout_s}
        options["config_kwargs"] = {**seconds, "retries": {"mode": "standard", "total_max_attempts": 1}}
    elif protocol in ("http", "https"):
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.timeout_s, sock_read=config.timeout_s)
        options["client_kwargs"] = {"timeout": timeout, "headers": headers}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"data at {url} cannot be reached: {with_kind(error)}") from None
    filesystem.retries = 1
    return filesystem, str(path).rstrip("/")


def _split_user(url: str) -> tuple[str, dict[str, str]]:
    """An http(s) URL without its user and password, and the header that tells them.

    Raises:
        ConfigError: there is another secret in the URL.
    """
    parts, headers = urlsplit(url), {}
    if parts.scheme in ("http", "https") and "@" in parts.netloc:
        user, password = (unquote(one or "") for one in (parts.username, parts.password))
        headers["Authorization"] = aiohttp.encode_basic_auth(user, password)
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    if redacted(url) != url:
        raise ConfigError(f"data at {redacted(url)}: leave the secret out of the URL, and give it in the environment")
    return url, headers


def _status(error: BaseException) -> int | None:
    """HTTP's status behind an error, None if it was none; file systems wrap the error that knows it."""
    cause = error.__cause__
    if isinstance(cause, aiohttp.ClientError | ClientError | OSError):
        return _status(cause)
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status
    if isinstance(error, ClientError):
        return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
    return 404 if isinstance(error, FileNotFoundError) else 403 if isinstance(error, PermissionError) else None
