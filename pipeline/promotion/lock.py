"""One promotion of a family at a time, whoever starts it and wherever.

On a sqlite store it is a lock on a file beside the database, which the system frees when a process dies. Elsewhere it
is a registered model named FAMILY.promoting, which exists for as long as the promotion takes: of two that create it the
database's own primary key lets one through, on a tracking server as on PostgreSQL. A process that is killed there
leaves it behind, and says who it was: the user removes it (`--unlock`); nobody guesses that its holder is dead.

A sqlite file that some reach directly and others through a server has two locks, which do not know each other: reach
it in one way.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.console import say
from pipeline.errors import RegistryError
from pipeline.registry import Registry
from pipeline.tracking.store import registry_uri, sqlite_file

POLL_SECONDS = 0.5


class Lock(Protocol):
    """Something that one process at a time holds."""

    def take(self) -> bool:
        """Take it, if it is free; without waiting."""

    def release(self) -> None:
        """Let it go."""

    def remove(self) -> None:
        """Remove it, whoever holds it."""

    @property
    def holder(self) -> str:
        """Who holds it, in words."""


def lock_of(registry: Registry) -> Lock:
    """The family's lock, as its store allows."""
    file = sqlite_file(registry_uri(registry.uri))
    if file is None:
        return RowLock(registry.client, registry.family)
    return BesideLock(f"{file}.{registry.family}.promoting")


@contextmanager
def promoting(registry: Registry, wait_seconds: float, lock: Lock | None = None) -> Iterator[None]:
    """Hold the family's lock, and wait for it if need be.

    Args:
        registry: of the family.
        wait_seconds: at most.
        lock: another one than the store's own.

    Raises:
        RegistryError: another process still holds it then; or the store refuses.
    """
    lock = lock or lock_of(registry)
    with registry.errors("locking promotions"):
        _wait(lock, registry.family, time.monotonic() + wait_seconds)
    try:
        yield
    finally:
        with registry.errors("unlocking promotions"):
            lock.release()


def _wait(lock: Lock, family: str, until: float) -> None:
    told = False
    while not lock.take():
        if not told:
            say(f"waiting for another promotion of {family!r} to end ({lock.holder})")
            told = True
        if time.monotonic() >= until:
            raise RegistryError(
                f"another promotion of {family!r} goes on ({lock.holder}): run the same command again when it has "
                "ended; if its process is gone, remove what it left with --unlock"
            )
        time.sleep(POLL_SECONDS)


class BesideLock:
    """A locked file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = FileLock(path)

    def take(self) -> bool:
        """Take it, if it is free; without waiting."""
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """Let it go."""
        self._lock.release()

    def remove(self) -> None:
        """Nothing to do: the system frees it when its process ends."""

    @property
    def holder(self) -> str:
        """Who holds it, in words."""
        return f"it holds {self._path}"


class RowLock:
    """A registered model that exists while a promotion goes on."""

    def __init__(self, client: MlflowClient, family: str) -> None:
        self._client, self._name = client, f"{family}.promoting"
        self._token = uuid.uuid4().hex

    def take(self) -> bool:
        """Take it, if it is free; without waiting."""
        who = f"process {os.getpid()} of {socket.gethostname()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        tags = {"token": self._token, "holder": who}
        try:
            self._client.create_registered_model(self._name, tags, "Promotions wait while this exists.")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):  # the latter: just freed
                raise
            return self._tags().get("token") == self._token  # a request whose answer was lost was sent again
        return True

    def release(self) -> None:
        """Let it go."""
        if self._tags().get("token") == self._token:  # else somebody has removed it
            self.remove()

    def remove(self) -> None:
        """Remove it, whoever holds it."""
        try:
            self._client.delete_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    @property
    def holder(self) -> str:
        """Who holds it, in words."""
        return self._tags().get("holder", "nobody any more")

    def _tags(self) -> dict[str, str]:
        try:
            return dict(self._client.get_registered_model(self._name).tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}
