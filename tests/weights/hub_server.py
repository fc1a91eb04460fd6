"""A stand-in for a Hugging Face hub on loopback: the three routes a download takes, over files in memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/tiny"


@dataclass
class Hub:
    """What the hub holds, and what it was asked for."""

    files: dict[str, bytes]
    url: str = ""
    status: int | None = None  # answer everything with this
    corrupt: str | None = None  # a file whose bytes differ from its digest
    asked: list[str] = field(default_factory=list)

    def describe(self) -> bytes:
        siblings = []
        for name, data in self.files.items():
            digest = hashlib.sha256(data).hexdigest()
            sibling: dict[str, object] = {"rfilename": name, "size": len(data)}
            if name.endswith((".safetensors", ".bin")):
                sibling["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        about = {"id": REPOSITORY, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
        return json.dumps({**about, "siblings": siblings}).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.hub.asked.append(self.path)
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
        if self.hub.status is not None:
            self.reply(self.hub.status, b"{}", {}, body=body)
        elif path == f"/api/models/{REPOSITORY}/revision/{COMMIT}":
            self.reply(200, self.hub.describe(), {}, body=body)
        elif name in self.hub.files:
            data = self.hub.files[name]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            wrong = bytes([data[0] ^ 1]) + data[1:] if name == self.hub.corrupt else data
            self.reply(200, wrong, headers, body=body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        return


@contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
