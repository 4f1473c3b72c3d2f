"""Where the processes of `doit -n` tell what they do: a socket in a folder of our own."""

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
"""What the names of our folders begin with, in the folder for temporary files."""

PATH_LIMIT = 100
"""The most bytes that a socket's name may have: 104 on macOS, 108 on Linux."""

EVENT_LIMIT = 4 << 20
"""The most bytes of an event; whoever sends more is not listened to any longer. A piece of a log has up to 256 KiB, and
what is no text in it is six times as long in JSON."""


class Hearing:
    """A socket for events, announced in the environment.

    Args:
        wants: what of the logs: `last`, their last lines; `whole`, all lines, while they can be shown; `every` line.

    Raises:
        OSError: there can be none; then the processes show what they do as they would without us.
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
        self._heard: dict[socket.socket, bytes] = {}
        os.environ[VARIABLE] = f"{os.getpid()} {wants} {self._folder / 's'}"

    def join(self, selector: selectors.BaseSelector, take: Callable[[Event], None]) -> None:
        """Have a selector call us when there is something to hear; `take` gets each event."""

        def accept() -> None:
            with contextlib.suppress(OSError):
                other, _ = self._socket.accept()
                other.setblocking(False)
                self._heard[other] = b""
                selector.register(other, selectors.EVENT_READ, lambda: receive(other))

        def receive(other: socket.socket) -> None:
            try:
                data = other.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            *events, self._heard[other] = (self._heard[other] + data).split(b"\n")
            if not data or len(self._heard[other]) > EVENT_LIMIT:
                selector.unregister(other)
                del self._heard[other]
                other.close()
            for event in events:
                said = json.loads(event)
                take(said)
                if "asking" in said:
                    with contextlib.suppress(OSError):
                        other.send(b"\n")

        selector.register(self._socket, selectors.EVENT_READ, accept)

    def deafen(self) -> None:
        """Hear no more: whoever tells something finds that out."""
        for other in self._heard:
            other.close()
        self._heard.clear()
        self._socket.close()

    def close(self) -> None:
        """Hear no more, and leave nothing behind."""
        self.deafen()
        os.environ.pop(VARIABLE, None)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
