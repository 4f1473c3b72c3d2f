"""Plain view: lines of text prefixed with their task, for files, pipes, CI and limited terminals."""

from __future__ import annotations

import contextlib
import selectors
import threading
import time
from collections.abc import Sequence
from typing import TextIO

from ..util.text import duration, in_line, printable, size
from .event_socket import EventListener
from .events import Event, listen
from .model import Board

PAUSE = 0.1
"""Seconds for which the end of a task is delayed, to receive its worker process's last events first."""


class Plain:
    """Plain view on a stream.

    Args:
        stream: the stream to write to.
        board: model of the tasks.
        processes: whether tasks run in worker processes (`doit -n`).
    """

    whole = True

    def __init__(self, stream: TextIO, board: Board, processes: bool) -> None:
        self.board = board
        self._stream = stream
        self._lock = threading.RLock()
        self._closing = False
        self._ending: list[tuple[str, str, str]] = []
        self._thread: threading.Thread | None = None
        self._listener: EventListener | None = None
        if processes:
            with contextlib.suppress(OSError):
                self._listener = EventListener("every")
        listen(self)

    def start(self, name: str, title: str, alone: bool) -> None:
        """Print that a task has started; `alone` has no effect."""
        with self._lock:
            self.board.start(name)
            self._write(f".  {title}")
            if self._listener is not None and self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(self._listener,), name="progress", daemon=True)
                self._thread.start()

    def end(self, name: str, how: str, text: str, alone: bool) -> None:
        """Print a task's result; `alone` has no effect."""
        with self._lock:
            self._ending.append((name, how, text))
            if self._thread is None:
                self._end_all()

    def skip(self, how: str, line: str) -> None:
        """Count a task that did not run, and print a line about it unless the line is empty."""
        with self._lock:
            self.board.skip(how)
            if line:
                self._write(line)

    def handle(self, event: Event) -> None:
        """Handle an event."""
        if "task" not in event:
            return
        with self._lock:
            self.board.take(event)
            for line in event.get("lines", ()):
                self._write(f"{event['task']} | {line}")

    def leave_terminal(self, leave: bool) -> None:
        """Do nothing: plain lines do not interfere with a prompt."""

    def close(self, interrupted: bool) -> None:
        """Print the summary and stop listening."""
        self._closing = True
        listen(None)
        if self._thread is not None:
            self._thread.join(5.0)
        if self._listener is not None:
            self._listener.close()
        with self._lock:
            self._end_all()
            if self.board.is_idle:
                return
            spent = duration(time.monotonic() - self.board.begun)
            self._write(f"interrupted after {spent}: {self.board.summary()}" if interrupted else self._summary(spent))

    def _summary(self, spent: str) -> str:
        if not self.board.up + self.board.down:
            return f"{self.board.summary()} in {spent}"
        return f"{self.board.summary()} in {spent}, {size(self.board.up)} sent, {size(self.board.down)} received"

    def _run(self, listener: EventListener) -> None:
        try:
            with contextlib.suppress(Exception), selectors.DefaultSelector() as selector:  # builds continue regardless
                listener.join(selector, self.handle)
                while True:
                    with self._lock:
                        ending, self._ending = self._ending, []
                    last = self._closing
                    while ready := selector.select(0.0 if last or ending else PAUSE):
                        for key, _ in ready:
                            key.data()
                    with self._lock:
                        self._show(ending)
                    if last:
                        return
        finally:
            listener.disconnect()  # otherwise senders of log lines would block

    def _end_all(self) -> None:
        ended, self._ending = self._ending, []
        self._show(ended)

    def _show(self, ended: Sequence[tuple[str, str, str]]) -> None:
        for name, how, text in ended:
            outcome = self.board.end(name, how, text)
            line = outcome.line or f"{name}: {outcome.how} in {duration(outcome.seconds)}"
            self._write(line)
            for part in printable(text.rstrip()).splitlines():
                self._write(f"  {part}" if part else "")

    def _write(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(f"{in_line(line)}\n".encode(encoding, "backslashreplace").decode(encoding))
        self._stream.flush()
