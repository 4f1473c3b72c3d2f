"""Fault injection for connections: a TCP proxy on the loopback address that cuts, stalls, delays and counts."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field

UP = "up"
"""From the client to the server."""

DOWN = "down"
"""From the server to the client."""

CHUNK = 32 << 10
UNDER_WAY = 64 << 20
"""Maximum bytes in flight per direction."""

SETTLE = 0.25
"""Seconds between the last byte before a cut and the cut, so that the receiver can read it."""


@dataclass(frozen=True)
class Cut:
    """Point at which a connection is cut.

    Attributes:
        direction: Direction whose bytes are counted.
        at: Number of bytes that are still forwarded, counted from the start of the connection.
        how: `rst`; `fin`, an orderly shutdown; or `stall`: the connection stays open, but nothing is forwarded.
    """

    direction: str
    at: int
    how: str = "rst"


@dataclass
class _Link:
    """One connection: its two sockets and its byte counts."""

    client: socket.socket
    server: socket.socket
    cut: Cut | None
    passed: dict[str, int] = field(default_factory=lambda: {UP: 0, DOWN: 0})
    over: threading.Event = field(default_factory=threading.Event)
    stalled: bool = False
    heard: bool = False
    closing: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False

    def close(self, how: str) -> None:
        with self.closing:
            if self.closed:
                return
            self.closed = True
        self.over.set()
        for sock in (self.client, self.server):
            with contextlib.suppress(OSError):
                if how == "rst":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class Proxy:
    """Proxy between a client and a server of this machine.

    Args:
        target: Port of the server.

    Attributes:
        port: Port for the client.
        connections: Number of accepted connections.
        passed: Bytes forwarded in each direction over all connections.
        delay: Seconds that each chunk blocks the following ones, to simulate low bandwidth.
        latency: Seconds that each byte is in flight, without limiting the bandwidth, to simulate distance.
        turns: How often the client sent after it had received: an upper bound of its round trips.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.connections = 0
        self.passed = {UP: 0, DOWN: 0}
        self.delay = 0.0
        self.latency = 0.0
        self.turns = 0
        self._cuts: list[Cut] = []
        self._links: list[_Link] = []
        self._lock = threading.Lock()
        self._stall_new = False
        self._listener: socket.socket | None = None
        self.port = 0
        self.accept()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self.cut()

    # Commands

    def cut_next(self, *cuts: Cut) -> None:
        """Cut the next connections, one at each of the specified points."""
        with self._lock:
            self._cuts = list(cuts)

    def cut(self, how: str = "rst") -> None:
        """Cut all connections now."""
        for link in self._living():
            link.close(how)

    def stall(self, new: bool = True) -> None:
        """Stop forwarding on all connections but keep them open. With `new`, this includes new connections."""
        self._stall_new = new
        for link in self._living():
            link.stalled = True

    def go_on(self) -> None:
        """Resume forwarding on all connections."""
        self._stall_new = False
        for link in self._living():
            link.stalled = False

    def refuse(self) -> None:
        """Refuse new connections."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def accept(self) -> None:
        """Accept connections again, on the same port."""
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self.port = self._listener.getsockname()[1]
            threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    # Forwarding

    def _living(self) -> list[_Link]:
        with self._lock:
            self._links = [link for link in self._links if not link.closed]
            return list(self._links)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.connections += 1
                link = _Link(client, server, self._cuts.pop(0) if self._cuts else None)
                link.stalled = self._stall_new
                self._links.append(link)
            for direction, source, sink in ((UP, client, server), (DOWN, server, client)):
                threading.Thread(target=self._pump, args=(link, direction, source, sink), daemon=True).start()

    def _pump(self, link: _Link, direction: str, source: socket.socket, sink: socket.socket) -> None:
        cut = link.cut if link.cut is not None and link.cut.direction == direction else None
        line: deque[tuple[float, bytes]] = deque()  # chunks in flight with their times of arrival
        under_way = 0
        ended = False
        try:
            while not link.over.is_set():
                if link.stalled:
                    time.sleep(0.02)
                    continue
                wait = min(0.05, max(0.0, line[0][0] - time.monotonic())) if line else 0.05
                if line and not wait:
                    data = line.popleft()[1]
                    under_way -= len(data)
                    if direction == UP and link.heard:
                        link.heard = False
                        self.turns += 1
                    if self.delay:
                        time.sleep(self.delay)
                    link.heard |= direction == DOWN
                    sink.sendall(data)
                    link.passed[direction] += len(data)
                    with self._lock:
                        self.passed[direction] += len(data)
                    if cut is not None and link.passed[direction] >= cut.at:
                        if cut.how == "stall":
                            link.stalled = True
                            cut = None
                            continue
                        time.sleep(SETTLE)
                        link.close(cut.how)
                    continue
                if ended and not line:
                    sink.shutdown(socket.SHUT_WR)
                    return
                room = CHUNK if cut is None else min(CHUNK, cut.at - link.passed[direction] - under_way)
                if ended or not room or under_way > UNDER_WAY:
                    time.sleep(wait)
                    continue
                if not select.select([source], [], [], wait)[0]:
                    continue
                data = source.recv(room)
                ended = not data
                if data:
                    line.append((time.monotonic() + self.latency, data))
                    under_way += len(data)
        except (OSError, ValueError):
            link.close("fin")
