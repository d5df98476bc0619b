"""An HTTP proxy before the real S3 server, which breaks some of the requests that pass."""

import contextlib
import http.client
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Faults:
    """What to break: the first `count` requests for which `when(method, path)` holds."""

    upstream: str
    kind: str = ""
    count: int = 0
    when: Callable[[str, str], bool] = lambda method, path: True
    pause_seconds: float = 0.0
    done: int = 0
    seen: list[tuple[str, str, int]] = field(default_factory=list)
    """Method, path and body bytes of every request."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, method: str, path: str, num_bytes: int) -> str:
        with self.lock:
            self.seen.append((method, path, num_bytes))
            if self.done < self.count and self.when(method, path):
                self.done += 1
                return self.kind
        return ""

    def plan(self, kind: str, count: int, when: Callable[[str, str], bool] | None = None) -> None:
        self.kind, self.count, self.done, self.seen = kind, count, 0, []
        self.when = when or (lambda method, path: True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        fault = self.faults.next(self.command, self.path, len(body))
        time.sleep(self.faults.pause_seconds)
        if fault == "500":
            return self._answer(500, b"<Error><Code>InternalError</Code></Error>", "xml")
        if fault == "502":
            return self._answer(502, b"<html>bad gateway</html>", "html")
        if fault == "reset":
            return self._reset()
        if fault == "alter_request" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        status, headers, data = self._forward(body)
        if fault == "lose_answer":
            return self._reset()
        if fault == "alter_answer" and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        size = dict((n.lower(), v) for n, v in headers).get("content-length", len(data))
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault == "truncate":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self._reset()
        if fault == "trickle":
            with contextlib.suppress(OSError):
                for byte in data[:200]:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.05)
            return self._reset()
        if fault == "stall":
            self.wfile.write(data[:10])
            self.wfile.flush()
            time.sleep(5)
            return self._reset()
        self.wfile.write(data)
        return None

    do_GET = do_PATCH = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.faults.upstream, timeout=60)
        headers = {n: v for n, v in self.headers.items() if n.lower() != "connection"}
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"application/{kind}" if kind == "xml" else "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        linger = struct.pack("ii", 1, 0)  # close with RST
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.rfile.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients hang up in these tests."""


@contextlib.contextmanager
def faulty_proxy(endpoint: str, *, certificate: Path | None = None) -> Iterator[tuple[str, Faults]]:
    """Address of a proxy before `endpoint`, and its faults; over TLS with a certificate."""
    faults = Faults(endpoint.partition("://")[2])
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"faults": faults}))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    scheme = "http" if certificate is None else "https"
    try:
        yield f"{scheme}://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        server.server_close()
