"""A wire to a server that can be cut: connections break off, and new ones are refused until it is mended."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class Relay:
    """Hands bytes on between its own port of this machine and a server.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._server = parts.hostname, parts.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._begin()

    def cut(self) -> None:
        """Break off what is connected, and take nobody."""
        _end(self._listener)  # wakes who waits in accept, which close alone does not
        self._accepting.join()
        self._listener.close()
        for source, thread in self._wires:
            _end(source)
            thread.join()

    def mend(self) -> None:
        """Take connections again."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._begin()

    def _begin(self) -> None:
        self._wires: list[tuple[socket.socket, threading.Thread]] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._server)
                for source, sink in ((near, far), (far, near)):
                    thread = threading.Thread(target=_hand_on, args=(source, sink), daemon=True)
                    self._wires.append((source, thread))
                    thread.start()


def _hand_on(source: socket.socket, sink: socket.socket) -> None:
    """One direction, to its end; the other one's thread closes the sink."""
    with source:
        with suppress(OSError):
            while chunk := source.recv(1 << 16):
                sink.sendall(chunk)
        _end(source)
        _end(sink)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def relay(url: str) -> Iterator[Relay]:
    """One that is gone at the end."""
    wire = Relay(url)
    try:
        yield wire
    finally:
        wire.cut()
