"""A TCP proxy on loopback that can be told to misbehave. Knows PostgreSQL's COMMIT, and nothing else inside.

One listener per client process and server, so that a fault can hit one process alone.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

COMMIT = b"COMMIT\x00"
CHUNK = 65_536


class Mode(StrEnum):
    """How bytes are treated."""

    OK = "ok"
    REFUSE = "refuse"  # new connections are reset at once
    BLACKHOLE_UP = "blackhole_up"  # what the client sends vanishes
    BLACKHOLE_DOWN = "blackhole_down"  # what the server sends vanishes
    BLACKHOLE = "blackhole"  # both


@dataclass(eq=False)
class _Pair:
    client: socket.socket
    server: socket.socket
    transaction: bytearray = field(default_factory=bytearray)  # what the client said since its last COMMIT
    committing: bool = False  # the reply to the COMMIT just sent must not arrive


class Proxy:
    """Forwards one port to another until told otherwise. All methods may be called from any thread."""

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self.mode = Mode.OK
        self.latency_s = 0.0
        self._pairs: set[_Pair] = set()
        self._lock = threading.Lock()
        self._cut_commit_of: bytes | None = None
        self._swallow: bytes | None = None
        self.fired = threading.Event()  # the one-shot fault that was armed has happened
        threading.Thread(target=self._accept, daemon=True).start()

    def heal(self) -> None:
        """Behave; connections that lost bytes are reset, as they would be when a real line comes back."""
        was, self.mode = self.mode, Mode.OK
        self.latency_s, self._cut_commit_of, self._swallow = 0.0, None, None
        if was is not Mode.OK:
            self.reset()

    def heal_silently(self) -> None:
        """Let bytes pass again and leave old connections as they are: half-open ones stay half-open."""
        self.mode = Mode.OK

    def break_off(self, mode: Mode) -> None:
        """Misbehave; refusing resets what is open too."""
        self.mode = mode
        if mode is Mode.REFUSE:
            self.reset()

    def reset(self) -> int:
        """Reset every open connection, at both ends; returns how many."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._reset(pair)
        return len(pairs)

    def cut_after_commit(self, statement: bytes) -> None:
        """Once: let the COMMIT of a transaction that holds `statement` through and cut before its reply.

        Open connections are reset first: a prepared statement's text is not sent again.
        """
        self.fired.clear()
        self._cut_commit_of = statement
        self.reset()

    def swallow_reply(self, holding: bytes) -> None:
        """Once: drop the server's bytes that hold these, and keep the connection."""
        self.fired.clear()
        self._swallow = holding

    def disarm(self) -> None:
        """Forget a one-shot fault that has not happened."""
        self._cut_commit_of = self._swallow = None

    def close(self) -> None:
        """End for good."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode is Mode.REFUSE:
                _close_hard(client)
                continue
            threading.Thread(target=self._open, args=(client,), daemon=True).start()

    def _open(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target, timeout=5)
        except OSError:
            _close_hard(client)
            return
        for end in (client, server):
            end.settimeout(None)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair = _Pair(client, server)
        with self._lock:
            self._pairs.add(pair)
        for name, way in (("up", self._pass_up), ("down", self._pass_down)):
            threading.Thread(target=self._pump, args=(pair, name, way), daemon=True).start()

    def _pump(self, pair: _Pair, name: str, way: object) -> None:
        source = pair.client if name == "up" else pair.server
        with suppress(OSError):
            while data := source.recv(CHUNK):
                if self.latency_s:
                    time.sleep(self.latency_s)
                way(pair, data)  # type: ignore[operator]
        if self.mode in (Mode.BLACKHOLE, Mode.BLACKHOLE_DOWN if name == "down" else Mode.BLACKHOLE_UP):
            return  # the end of a connection is not seen through a dead line either
        self._reset(pair)

    def _pass_up(self, pair: _Pair, data: bytes) -> None:
        if self.mode in (Mode.BLACKHOLE, Mode.BLACKHOLE_UP):
            return
        if self._cut_commit_of is not None:
            pair.transaction += data
            if COMMIT in pair.transaction:
                if self._cut_commit_of in pair.transaction:
                    pair.committing, self._cut_commit_of = True, None
                pair.transaction.clear()
        pair.server.sendall(data)

    def _pass_down(self, pair: _Pair, data: bytes) -> None:
        if self.mode in (Mode.BLACKHOLE, Mode.BLACKHOLE_DOWN):
            return
        if pair.committing:  # the server has answered, so the transaction is committed
            self.fired.set()
            self._reset(pair)
            return
        if self._swallow is not None and self._swallow in data:
            self._swallow = None
            self.fired.set()
            return
        pair.client.sendall(data)

    def _reset(self, pair: _Pair) -> None:
        with self._lock:
            if pair not in self._pairs:
                return
            self._pairs.discard(pair)
        _close_hard(pair.client)
        _close_hard(pair.server)


def _close_hard(end: socket.socket) -> None:
    """Close with RST: what was on its way is gone."""
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with suppress(OSError):
        end.shutdown(socket.SHUT_RD)  # wakes the thread that reads, and says nothing to the other end
    with suppress(OSError):
        end.close()
