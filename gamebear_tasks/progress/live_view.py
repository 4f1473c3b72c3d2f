"""Live view: running tasks at the end of the terminal; finished tasks are printed above and stay.

One thread repaints, at most eight times a second. It also reads captured standard output and error, and the events of
the worker processes of `doit -n`. If it fails, the terminal is restored and the builds continue.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import selectors
import signal
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from ..client import cancellation
from ..util.messages import notice
from . import events
from .event_socket import EventListener
from .events import Event, listen
from .model import Board, Outcome
from .stdio_capture import Capture, still

if TYPE_CHECKING:  # the painting thread imports rich
    from rich.text import Text

    from .terminal_screen import Screen

PAUSE = 0.125
"""Seconds between two repaints."""

PENDING = 4 << 20
"""Characters of log lines that may be queued. Beyond that a sender blocks, as long as the terminal accepts data."""

GRACE = 5.0
"""Timeout in seconds for the last repaint."""

COLOURS = ("cyan", "magenta", "blue", "green", "yellow")
"""Colours of the task names that prefix log lines."""

Item = Outcome | tuple[str, str] | str
"""An entry to print above the block: a task's result, a log line (task, line), or captured text."""


class Live:
    """Live view on a terminal.

    Args:
        stream: the terminal.
        board: model of the tasks.
        names: names of the tasks.
        whole: whether whole logs are shown, not just their last lines.
        processes: whether tasks run in worker processes (`doit -n`).
    """

    def __init__(self, stream: TextIO, board: Board, names: Sequence[str], whole: bool, processes: bool) -> None:
        self.whole = whole
        self.board = board
        self._names = names
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._terminal = os.dup(stream.fileno())
        self._changed = threading.Condition()
        self._painting = threading.RLock()  # reentrant: a signal handler may run while the main thread holds it
        self._above: list[Item] = []
        self._pending = 0
        self._left_out = 0
        self._ending: list[tuple[str, str, str]] = []
        self._away = 0
        self._screen: Screen | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._broken = False
        self._interrupted = False
        self._capture = Capture()
        self._wake, self._waker = os.pipe()
        self._listener: EventListener | None = None
        if processes:
            with contextlib.suppress(OSError):
                self._listener = EventListener("whole" if whole else "last")
        listen(self)
        atexit.register(self._close_at_exit, os.getpid())
        self._signals = self._take_signals()

    # calls of doit's reporter

    def start(self, name: str, title: str, alone: bool) -> None:
        """Show that a task has started.

        Args:
            name: the task's name.
            title: its title; not used here.
            alone: whether the task gets the terminal for itself.
        """
        with self._changed:
            self.board.start(name)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
                self._thread.start()
        if alone:
            self.leave_terminal(True)

    def end(self, name: str, how: str, text: str, alone: bool) -> None:
        """Show that a task has ended.

        Args:
            name: the task's name.
            how: its result (see `Board.end`).
            text: description of a failure.
            alone: whether the task had the terminal for itself.
        """
        if alone:
            self.leave_terminal(False)
        with self._changed:
            self._ending.append((name, how, text))  # deferred, because its last events may not have arrived yet

    def skip(self, how: str, line: str) -> None:
        """Count a task that did not run, and print a line about it unless the line is empty."""
        with self._changed:
            self.board.skip(how)
            if line:
                self._above.append(line)

    def close(self, interrupted: bool) -> None:
        """Print the summary and restore the terminal; only the first call has an effect."""
        if self._closing:
            return
        self._interrupted = interrupted
        self._closing = True
        listen(None)
        try:
            with contextlib.suppress(OSError):
                os.write(self._waker, b"\n")
            if self._thread is not None:
                self._thread.join(GRACE)
        finally:
            self._give_back()
            self._pass_on(0.0)
            if self._listener is not None:
                self._listener.close()

    def _close_at_exit(self, pid: int) -> None:
        """Restore the terminal if doit exits without calling `close`."""
        if pid == os.getpid():
            self.close(False)

    # events of builds

    def handle(self, event: Event) -> None:
        """Handle an event of this process; log lines block while the queue is full."""
        with self._changed:
            if "lines" in event and not self._has_room():
                self._left_out += len(event["lines"])
            else:
                self._take(event)

    def _has_room(self) -> bool:
        """Wait until the queue has room; return False if the terminal accepts no data (Ctrl-S, background).

        The caller must hold `_changed`.
        """
        taken, until = self._taken, 0.0
        while self._pending > PENDING and not self._broken and not self._closing:
            if self._taken != taken or not (self._left_out or until):
                taken, until = self._taken, time.monotonic() + events.STOPPED
            if time.monotonic() >= until:
                return False
            self._changed.wait(0.2)
        return True

    @property
    def _taken(self) -> int:
        return self._screen.taken if self._screen is not None else 0

    def _take(self, event: Event) -> None:
        if "asking" in event:
            self._leave(bool(event["asking"]))
            return
        with self._changed:
            self.board.take(event)
            for line in event.get("lines", ()):
                self._above.append((event["task"], line))
                self._pending += len(line) + 40

    def leave_terminal(self, leave: bool) -> None:
        """Release the terminal to another program or a prompt, or reclaim it.

        Args:
            leave: whether to release it. Releases nest.
        """
        self._leave(leave)
        with self._painting:
            if leave and self._away == 1:
                self._capture.pause()
            elif not leave and not self._away and not self._broken:
                self._capture.begin()

    def _leave(self, leave: bool) -> None:
        with self._painting:
            self._away += 1 if leave else -1
            if leave and self._screen is not None:
                with contextlib.suppress(OSError):
                    self._screen.clear()

    # the painting thread

    def _run(self) -> None:
        try:
            from .terminal_screen import Screen

            with selectors.DefaultSelector() as selector:
                selector.register(self._capture.reader, selectors.EVENT_READ, self._read)
                selector.register(self._wake, selectors.EVENT_READ, lambda: None)
                if self._listener is not None:
                    self._listener.join(selector, self._take)
                self._screen = screen = Screen(self._terminal, self._encoding)
                frame = 0
                while not self._closing:
                    self._listen(selector, PAUSE)
                    frame += 1
                    if self._is_in_front():
                        self._paint(screen, frame)
                while self._listen(selector, 0.0):
                    pass
                if self._capture.rest:
                    self._above.append(self._capture.rest)
                self._away = 0
                self._paint(screen, frame, last=True)
        except Exception as error:  # noqa: BLE001 - builds continue without a view
            self._broken = True
            self._give_back()
            notice(f"the live view failed ({type(error).__name__}: {error}); builds continue, see build/logs")
            if self._listener is not None:
                self._listener.disconnect()
            while not self._closing:
                self._pass_on(PAUSE)
        finally:
            with self._changed:
                self._changed.notify_all()

    def _listen(self, selector: selectors.BaseSelector, seconds: float) -> bool:
        """Handle input for a number of seconds; return whether there was any."""
        received = False
        until = time.monotonic() + seconds
        while True:
            ready = selector.select(max(until - time.monotonic(), 0.0))
            calls: list[Callable[[], object]] = [key.data for key, _ in ready if key.fd != self._wake]
            for call in calls:
                call()
            received = received or bool(calls)
            if time.monotonic() >= until or self._closing:
                return received

    def _read(self) -> None:
        lines = self._capture.read()
        with self._changed:
            self._above += map(still, lines)

    def _pass_on(self, seconds: float) -> None:
        """Copy captured output to the terminal without a view, because worker processes may still write."""
        with contextlib.suppress(OSError, ValueError):
            while select.select([self._capture.reader], [], [], seconds)[0]:
                os.write(self._terminal, os.read(self._capture.reader, 1 << 16).replace(b"\n", b"\r\n"))

    def _is_in_front(self) -> bool:
        """Return whether this process is in the terminal's foreground process group."""
        try:
            return os.tcgetpgrp(self._terminal) == os.getpgrp()
        except OSError:
            return True  # not the controlling terminal

    def _paint(self, screen: Screen, frame: int, last: bool = False) -> None:
        with self._painting:
            if self._away:
                return
            with self._changed:
                above, block = self._picture(screen, frame, last)
                self._above, self._pending, self._left_out = [], 0, 0
                self._changed.notify_all()
            screen.paint(above, block)

    def _picture(self, screen: Screen, frame: int, last: bool) -> tuple[list[Text | str], list[Text]]:
        """Return the lines to print above, and the lines of the block."""
        from . import render

        now = time.monotonic()
        columns, rows = screen.size()
        signs = screen.signs
        names = render.width_of_names(self._names, columns)
        ended = [end for end in self._ending if last or not self._is_awaiting_events(*end)]
        self._ending = [end for end in self._ending if end not in ended]
        self._above += [self.board.end(*end) for end in ended]
        above: list[Text | str] = []
        prefixes: dict[str, str] = {}
        for item in self._above:
            if isinstance(item, str):
                above.append(item)
            elif isinstance(item, Outcome):
                above.append(render.outcome_line(item, columns, names, signs))
                above += render.failure_lines(item.text, columns)
            else:
                task, line = item
                if task not in prefixes:
                    colour = COLOURS[self._names.index(task) % len(COLOURS)] if task in self._names else ""
                    prefixes[task] = screen.drawn(render.log_prefix(task, names, colour, signs))
                above.append(prefixes[task] + line)
        if self._left_out:
            above.append(events.left_out(self._left_out))
        if last and not self.board.is_idle:
            above += render.summary_lines(self.board, now, columns, signs, self._interrupted)
        if last:
            return above, []
        running = list(self.board.running.values())
        running.sort(key=lambda task: not task.phase and task.there == "queue")
        room = rows - 1
        hidden = len(running) - room + 1 if len(running) > room else 0
        seen = running[: max(room - 1, 0)] if hidden else running
        block = render.running_lines(seen, now, columns, names, frame, signs)
        if hidden and room > 0:
            block.append(render.more_line(hidden, columns, signs))
        block.append(render.status_line(self.board, now, columns, signs))
        if self._capture.rest:
            block.insert(0, render.part_line(self._capture.rest, columns, signs))
        return above, block

    def _is_awaiting_events(self, name: str, how: str, _: str) -> bool:
        """Return whether the final event of a task in a worker process is still missing.

        The worker delays it while the terminal accepts no data.
        """
        task = self.board.running.get(name)
        return self._listener is not None and how == "done" and task is not None and task.has_events and not task.origin

    # the terminal

    def _give_back(self) -> None:
        """Restore the terminal: stop capturing, erase the block, restore the signal handlers."""
        mine = self._painting.acquire(timeout=GRACE)  # with a timeout: a stopped terminal (Ctrl-S) blocks a repaint
        with contextlib.suppress(OSError):
            self._capture.pause()
        if mine:
            with contextlib.suppress(OSError):
                if self._screen is not None:
                    self._screen.clear()
            self._painting.release()
        if threading.current_thread() is threading.main_thread():
            for number, before in self._signals.items():
                signal.signal(number, before)
            self._signals = {}

    def _take_signals(self) -> dict[int, Any]:
        """Install handlers that restore the terminal before a signal ends or suspends the process.

        Returns:
            The replaced handlers, by signal.
        """
        if threading.current_thread() is not threading.main_thread():
            return {}
        cancellation.begin_run()  # it raises an exception, on which doit closes the view
        own = os.getpid()

        def stop(number: int, frame: types.FrameType | None) -> None:
            if os.getpid() == own:
                self._leave(True)
            os.kill(os.getpid(), signal.SIGSTOP)
            if os.getpid() == own:
                self._leave(False)  # resumed by SIGCONT

        taken: dict[int, Any] = {}
        if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            taken[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, stop)
        return taken
