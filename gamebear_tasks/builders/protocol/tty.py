"""Local terminal for a program on a builder: forwards keys, output and changes of the window size."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from ...errors import INVALID_REPLY, BuilderError, BuilderLost
from ...runner.protocol.pty import (
    END,
    ERRORS,
    INPUT,
    OUTPUT,
    SIZES,
    STATUS,
    STATUSES,
    WINDOW,
    FrameError,
    Frames,
    frame,
)
from ...runner.protocol.requests import Enter, Run
from ...runner.util.atomic_files import write_all
from .session import Session, refusal

if TYPE_CHECKING:
    from ...runner.protocol.requests import Terminal

PIECE = 64 << 10
"""Maximum bytes of input in one frame."""

JOINING = 2.0
"""Seconds to wait for output that arrived before the connection broke."""

# Resets terminal modes that a killed program could not reset itself: alternate screen, hidden cursor, mouse reports,
# bracketed paste, colours (xterm's control sequences, which today's terminals share).
_SOBER = b"\x1b[?1049l\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[0m\r\n"


def local_terminal() -> Terminal | None:
    """Return the terminal of this process; None if it has none."""
    if not (os.isatty(0) and os.isatty(1)):
        return None
    rows, columns = _size()
    return {"term": os.environ.get("TERM", "dumb"), "rows": rows, "columns": columns}


def attend(session: Session, request: Run | Enter, place: str) -> int:
    """Start a program that takes over the session; forward the local terminal to it, and return its exit status.

    The program's output is not sanitized: a shell on a builder is trusted as with `ssh`.

    Args:
        session: not usable afterwards.
        request: starts the program, in `local_terminal()`.
        place: the builder's name in error messages.

    Raises:
        BuilderError: the program cannot be started, or the builder violates the protocol.
        BuilderLost: the connection broke.
    """
    has_terminal = request.terminal is not None
    refused = refusal(session.request(request, None, None, 0), place)
    if refused is not None:
        raise refused
    sys.stdout.flush()
    sys.stderr.flush()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    listener = _Listener(session, wake, place)
    try:
        with _signals(wake), _raw() if has_terminal else contextlib.nullcontext():
            listener.start()
            try:
                _send_keys(session, listener, woken, has_terminal)
            except BuilderLost as error:  # the program may have ended just now
                listener.join(JOINING)
                if listener.status is None and listener.error is None:
                    listener.error = error
            if has_terminal and listener.status is None:
                with contextlib.suppress(OSError):
                    write_all(1, _SOBER)
    finally:
        session.close()
        listener.join(JOINING)
        if not listener.is_alive():
            os.close(wake)
        os.close(woken)
    if listener.status is not None:
        return listener.status
    raise listener.error or BuilderLost(f"The connection to {place} broke.")


def _send_keys(session: Session, listener: _Listener, woken: int, has_terminal: bool) -> None:
    """Forward input, and the window size when it changes, until the program has ended."""
    sources = [woken, 0]
    while not listener.is_over:
        ready, _, _ = select.select(sources, [], [])
        if woken in ready:
            os.read(woken, 1 << 10)
            if has_terminal and not listener.is_over:
                session.push(frame(WINDOW, SIZES.pack(*_size())))
        if 0 in ready and not listener.is_over:
            try:
                data = os.read(0, PIECE)
            except OSError:  # the terminal is gone
                data = b""
            session.push(frame(INPUT, data) if data else frame(END))
            if not data:
                if has_terminal:
                    return
                sources.remove(0)


class _Listener(threading.Thread):
    """Thread that prints the program's output.

    Args:
        session: session of the program.
        wake: file descriptor to which one byte is written at the end of the output.
        place: the builder's name in error messages.

    Attributes:
        status: exit status of the program; None until it is known.
        error: the reason why the output ended before the program did.
    """

    def __init__(self, session: Session, wake: int, place: str) -> None:
        super().__init__(daemon=True)
        self.status: int | None = None
        self.error: Exception | None = None
        self.is_over = False
        self._session = session
        self._wake = wake
        self._place = place

    def run(self) -> None:
        """Print until the program has ended or the connection has broken."""
        frames = Frames()
        try:
            while self.status is None and (data := self._session.pull()):
                for kind, piece in frames.feed(data):
                    if kind == STATUS:
                        (self.status,) = STATUSES.unpack(piece)
                    elif kind in (OUTPUT, ERRORS):
                        write_all(1 if kind == OUTPUT else 2, piece)
        except (BuilderError, OSError) as error:
            self.error = error
        except (FrameError, struct.error) as error:
            self.error = BuilderError(f"{self._place} sends an invalid reply: {error}.", INVALID_REPLY)
        finally:
            self.is_over = True
            with contextlib.suppress(OSError):
                os.write(self._wake, b"x")


def _size() -> tuple[int, int]:
    """Return rows and columns of the local terminal."""
    try:
        about = os.get_terminal_size(1)
        return about.lines, about.columns
    except OSError:
        return 24, 80


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Set the terminal to raw mode for the block, so that every key is read at once, Ctrl-C too; then restore it."""
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSADRAIN)
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal window was closed
            termios.tcsetattr(0, termios.TCSANOW, before)


@contextlib.contextmanager
def _signals(wake: int) -> Iterator[None]:
    """Wake the main loop when the window is resized; raise SystemExit on SIGTERM and SIGHUP to unwind the block."""

    def resized(_: int, __: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(wake, b"w")

    def ended(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {signal.SIGWINCH: signal.signal(signal.SIGWINCH, resized)}
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, ended)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
