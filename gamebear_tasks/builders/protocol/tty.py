"""Our terminal for a program that runs on a builder: keys go there, what it prints comes here, also at a new size."""

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
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from ...errors import NONSENSE, BuilderError, BuilderLost
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
from ...runner.util.atomic_files import write_all
from .session import Session, words_of

PIECE = 64 << 10
"""The most bytes of input in one frame."""

JOINING = 2.0
"""Seconds for which what a broken connection has still brought is waited for."""

# Ends what a program has begun that could not end it itself: the other screen, a hidden cursor, reports of the mouse,
# marks around what is pasted, colours (xterm's control sequences, which today's terminals share).
_SOBER = b"\x1b[?1049l\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[0m\r\n"


def attend(session: Session, header: Mapping[str, Any], place: str) -> int:
    """Ask for a program that takes the session over, and be its terminal until it ends; return its exit status.

    What it prints reaches our terminal as it is: who opens a shell on a builder trusts it as with `ssh`.

    Args:
        session: of no use afterwards.
        header: what to ask.
        place: what to call the builder.

    Raises:
        BuilderError: it cannot be started, or the builder makes no sense.
        BuilderLost: the connection broke.
    """
    has_terminal = os.isatty(0) and os.isatty(1)
    terminal = None
    if has_terminal:
        rows, columns = _size()
        terminal = {"term": os.environ.get("TERM", "dumb"), "rows": rows, "columns": columns}
    reply = session.ask({**header, "terminal": terminal}, None, None, 0)
    if "error" in reply:
        raise BuilderError(f"On {place}: {words_of(reply['error'])}", words_of(reply.get("hint", "")))
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
            except BuilderLost as error:  # it may have ended at this moment
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
    """Send what we read, and the window's size when it changes, until the program has ended."""
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
    """Prints what the program prints.

    Args:
        session: what it comes through.
        wake: is written to when there is no more.
        place: what to call the builder.

    Attributes:
        status: how the program has ended, None as long as that is not known.
        error: why there is no more where the program has not ended.
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
            self.error = BuilderError(f"{self._place} answers something that makes no sense ({error}).", NONSENSE)
        finally:
            self.is_over = True
            with contextlib.suppress(OSError):
                os.write(self._wake, b"x")


def _size() -> tuple[int, int]:
    """Return the rows and columns of our terminal."""
    try:
        about = os.get_terminal_size(1)
        return about.lines, about.columns
    except OSError:
        return 24, 80


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Give every key as it is pressed for the length of the block, Ctrl-C too; then the terminal is as it was."""
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSADRAIN)
        yield
    finally:
        with contextlib.suppress(termios.error):  # its window was closed
            termios.tcsetattr(0, termios.TCSANOW, before)


@contextlib.contextmanager
def _signals(wake: int) -> Iterator[None]:
    """Have a resized window wake us, and a signal that would end us end the block first."""

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
