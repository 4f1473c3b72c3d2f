"""Event socket: receives the events of the worker processes of `doit -n`, on a Unix socket in a private folder."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..util.temporary_folders import make_folder, remove_abandoned
from .events import VARIABLE, Event

PREFIX = "gamebear-progress-"
"""Name prefix of the socket's folder, which is in the folder for temporary files."""

PATH_LIMIT = 100
"""Maximum bytes of a socket's path. The limit is 104 on macOS and 108 on Linux."""

EVENT_LIMIT = 4 << 20
"""Maximum bytes of an event; a connection that sends more is closed. A piece of a log has up to 256 KiB, and JSON makes
binary data in it six times as long."""


class EventListener:
    """Listening socket for events, whose address is published in the environment.

    Args:
        wants: requested log lines: `last`, only last lines; `whole`, all lines, unless the view accepts none for a
            while; `every`, all lines without exception.

    Raises:
        OSError: the socket cannot be created. Worker processes then show their progress themselves.
    """

    def __init__(self, wants: str) -> None:
        parent = Path(tempfile.gettempdir())
        if len(os.fsencode(parent)) > PATH_LIMIT - len(PREFIX) - 20:
            parent = Path("/tmp")
        remove_abandoned(parent, PREFIX)
        self._folder, self._held = make_folder(parent, PREFIX)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self._folder / "s"))
        self._socket.listen(64)
        self._socket.setblocking(False)
        self._buffers: dict[socket.socket, bytes] = {}
        os.environ[VARIABLE] = f"{os.getpid()} {wants} {self._folder / 's'}"

    def join(self, selector: selectors.BaseSelector, handle: Callable[[Event], None]) -> None:
        """Register the socket and its connections with a selector.

        Args:
            selector: its caller calls the `data` of each key that is ready.
            handle: called with each event. Events with `asking` are acknowledged with a byte.
        """

        def accept() -> None:
            with contextlib.suppress(OSError):
                other, _ = self._socket.accept()
                other.setblocking(False)
                self._buffers[other] = b""
                selector.register(other, selectors.EVENT_READ, lambda: receive(other))

        def receive(other: socket.socket) -> None:
            try:
                data = other.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            *events, self._buffers[other] = (self._buffers[other] + data).split(b"\n")
            if not data or len(self._buffers[other]) > EVENT_LIMIT:
                selector.unregister(other)
                del self._buffers[other]
                other.close()
            for event in events:
                decoded = json.loads(event)
                handle(decoded)
                if "asking" in decoded:
                    with contextlib.suppress(OSError):
                        other.send(b"\n")

        selector.register(self._socket, selectors.EVENT_READ, accept)

    def disconnect(self) -> None:
        """Close the socket and all connections; senders get an error."""
        for other in self._buffers:
            other.close()
        self._buffers.clear()
        self._socket.close()

    def close(self) -> None:
        """Close the socket, remove its folder, and remove its address from the environment."""
        self.disconnect()
        os.environ.pop(VARIABLE, None)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
