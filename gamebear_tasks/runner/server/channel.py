"""The session's standard input and output, which are connected to the client."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from ..util.atomic_files import CHUNK, write_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Optional

    from ..protocol.replies import Reply

    Answer = tuple[Reply, Optional[Callable[[Reply], None]]]
    """A reply, and the function that sends it if it has a body."""

PIPE = 1 << 20
"""Bytes of pipe buffer between the runner and sshd, in each direction. Only root may set more (pipe(7))."""

F_SETPIPE_SZ = 1031
"""Operation of fcntl(2) that sets a pipe's capacity; Python 3.9 has no constant for it."""


def read_exactly(size: int) -> bytes:
    """Return the next bytes from the client; fewer if the stream ends."""
    parts = []
    while size:
        data = os.read(0, min(size, CHUNK))
        if not data:
            break
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def write(data: bytes) -> None:
    """Send bytes to the client."""
    write_all(1, data)


def widen(pipe: int) -> None:
    """Enlarge a pipe's buffer beyond the usual 64 KiB, so that its two ends wait for each other less."""
    with contextlib.suppress(OSError):  # not a pipe, or the user's limit of pipe memory is reached
        fcntl.fcntl(pipe, F_SETPIPE_SZ, PIPE)
