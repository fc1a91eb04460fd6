"""A TCP proxy between a client and a server, for what networks do: refuse, fall silent, cut."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit, urlunsplit

RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: closing sends RST


class Proxy:
    """Passes bytes on until told otherwise. `port` is where it listens on loopback."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.refusing = False  # new connections are closed at once
        self.mute = threading.Event()  # replies of the server are dropped; requests still reach it
        self.mute_after: bytes | None = None  # replies are dropped on lines whose requests hold these bytes
        self.cut_at: bytes | None = None  # the reply to a request with these bytes is lost, and the line cut
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port: int = self._listener.getsockname()[1]
        self._muted: set[socket.socket] = set()
        self._lines: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset all connections there are."""
        with self._lock:
            lines, self._lines = self._lines, set()
        for line in lines:
            for end in line:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        """Stop."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.refusing:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    client.close()
                    continue
                try:
                    server = socket.create_connection(("127.0.0.1", self.target_port), timeout=5)
                except OSError:
                    client.close()
                    continue
                server.settimeout(None)
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                line = (client, server)
                with self._lock:
                    self._lines.add(line)
                threading.Thread(target=self._requests, args=line, daemon=True).start()
                threading.Thread(target=self._replies, args=line, daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if self.cut_at is not None and self.cut_at in data:
                    self.cut_at = None
                    self._lose_the_answer(client, server, data)
                    return
                if self.mute_after is not None and self.mute_after in data:
                    self._muted.add(server)
                server.sendall(data)
        self._end(client, server)

    def _lose_the_answer(self, client: socket.socket, server: socket.socket, data: bytes) -> None:
        own = socket.socket(fileno=socket.dup(server.fileno()))
        with self._lock:
            self._lines.discard((client, server))
        with own:
            self.lost = threading.Event()
            self._deaf = server
            own.sendall(data)
            self.lost.wait(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._end(client, server)

    def _replies(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if getattr(self, "_deaf", None) is server:
                    self.lost.set()
                    return
                if not self.mute.is_set() and server not in self._muted:
                    client.sendall(data)
        self._end(client, server)

    def _end(self, client: socket.socket, server: socket.socket) -> None:
        with self._lock:
            self._lines.discard((client, server))
        self._muted.discard(server)
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def proxy_to(url: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy before the server of this URL, and the URL that leads through it."""
    parts = urlsplit(url)
    assert parts.port is not None
    proxy = Proxy(parts.port)
    try:
        yield (
            proxy,
            urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{proxy.port}"))),
        )
    finally:
        proxy.close()
