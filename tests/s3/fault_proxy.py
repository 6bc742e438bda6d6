"""A proxy on loopback that hands requests on, counts what is read, and does harm when it is told to."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter, deque
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"
NO_END = float("inf")


class Request(NamedTuple):
    method: str
    path: str  # without the query
    sent: int  # bytes of body that the client was sent


class FaultProxy:
    """`with FaultProxy(port) as proxy`: proxy.port leads there.

    faults: what becomes of the next requests, one each. "slow down", "500", "reset", "stall before": not handed on.
    "stall", "short": half of what a GET asks for; of others the answer alone is lost. "": none.
    always: what becomes of every request once those are used up. stop: ends stalls.
    writes_left: so many PUTs and DELETEs are handed on, and from the next one on no request is: the client was killed.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.requests: list[Request] = []
        self.faults: deque[str] = deque()
        self.always = ""
        self.only = ""  # methods that faults are for: all
        self.writes_left = NO_END
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()

    def clear(self) -> None:
        """No faults, nothing counted; stalls that go on end."""
        self.stop.set()
        with self.lock:
            self.stop = threading.Event()
            self.requests, self.faults, self.always, self.only = [], deque(), "", ""
            self.writes_left = NO_END

    def next_fault(self, method: str) -> str:
        with self.lock:
            if method in ("PUT", "DELETE"):
                self.writes_left -= 1
            if self.writes_left < 0:
                return "reset"
            if self.only and method not in self.only:
                return ""
            return self.faults.popleft() if self.faults else self.always

    def note(self, request: Request) -> None:
        with self.lock:
            self.requests.append(request)

    def bytes_read(self, ending: str = "") -> int:
        """Of objects whose names end so, since the start."""
        return sum(r.sent for r in self.requests if r.method == "GET" and r.path.endswith(ending))

    def count(self) -> Counter[str]:
        """Requests by method."""
        return Counter(request.method for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the client gave up
            self.close_connection = True

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.next_fault(self.command)
        if fault == "reset":
            self.proxy.note(Request(self.command, self.path.partition("?")[0], 0))
            self._reset()
        elif fault in ("slow down", "500"):
            self._send(503 if fault == "slow down" else 500, {}, SLOW_DOWN if fault == "slow down" else b"")
        elif fault == "stall before":
            self.proxy.stop.wait(30)
            self.close_connection = True
        else:
            status, headers, answer = self._handed_on(body)
            self._send(status, headers, answer, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _handed_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", self.proxy.target, timeout=30)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)  # Host too: it is signed
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding", "date")}
        connection.close()
        return answer.status, headers, data

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
        if fault and self.command != "GET":
            self._reset()  # what was done is done, but its answer is lost
            return
        half = body[: len(body) // 2]
        self.proxy.note(Request(self.command, self.path.partition("?")[0], len(half if fault else body)))
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault:
            self.wfile.write(half)
            self.wfile.flush()
            if fault == "stall":
                self.proxy.stop.wait(30)
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        """RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
