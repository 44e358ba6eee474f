"""An HTTP proxy that does to answers what networks and object stores do, as often as it is told."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Self

Fault = Literal["503", "cut", "short", "stall", "reset", "flip", "slow"]
HOP = {"connection", "transfer-encoding", "content-length", "date", "server", "keep-alive"}
FOREVER = 1000  # requests
SLOW_S = 0.5


@dataclass(frozen=True)
class Request:
    """One request as it came: method, path without query, and the range asked for."""

    method: str
    path: str
    range: str | None


class FaultyProxy:
    """Stands before an HTTP server; answers to GETs are spoilt as planned."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._planned: deque[tuple[str, Fault]] = deque()
        self._guard = threading.Lock()
        self.requests: list[Request] = []
        self.stalled = threading.Event()  # a client is being kept waiting
        self._ended = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                proxy.answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _answer

            def log_message(self, *_: object) -> None:
                """Stay quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def plan(self, name: str, fault: Fault, times: int = 1) -> None:
        """Spoil the next GETs of paths that end so."""
        self._planned.extend([(name, fault)] * times)

    def reset(self) -> None:
        """Forget plans and requests."""
        self._planned.clear()
        self.requests.clear()
        self.stalled.clear()

    def asked(self, name: str) -> list[Request]:
        """Requests of paths that end so."""
        return [request for request in self.requests if request.path.endswith(name)]

    def answer(self, client: BaseHTTPRequestHandler) -> None:
        path = client.path.partition("?")[0]
        with self._guard:
            self.requests.append(Request(client.command, path, client.headers.get("Range")))
            fault = None
            if client.command == "GET" and self._planned and path.endswith(self._planned[0][0]):
                fault = self._planned.popleft()[1]
        with suppress(ConnectionError):  # a client that went away
            self._send(client, fault)

    def _send(self, client: BaseHTTPRequestHandler, fault: Fault | None) -> None:
        sent = client.rfile.read(int(client.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection("127.0.0.1", self._upstream)
        try:
            upstream.request(client.command, client.path, sent, dict(client.headers))
            answer = upstream.getresponse()
            body, status, headers = answer.read(), answer.status, answer.getheaders()
            length = int(answer.headers.get("Content-Length", len(body)))
        finally:
            upstream.close()
        if fault == "503":
            body, status, headers, length = b"<Error><Code>SlowDown</Code></Error>", 503, [], 36
        elif fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        elif fault == "short":
            body, length = body[: len(body) // 2], len(body) // 2
        elif fault == "slow":
            self._ended.wait(SLOW_S)
        client.send_response(status)
        for key, value in headers:
            if key.lower() not in HOP:
                client.send_header(key, value)
        client.send_header("Content-Length", str(length))
        client.end_headers()
        if fault in ("cut", "stall", "reset"):
            client.wfile.write(body[: len(body) // 2])
            client.close_connection = True
            if fault == "stall":
                self.stalled.set()
                self._ended.wait()
            elif fault == "reset":
                client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.connection.close()
            return
        client.wfile.write(body)
