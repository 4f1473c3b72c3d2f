"""Progress events: sent by a task's build to the view, in the same process or over a socket from worker processes.

Without a listener, events are dropped. Sending never raises, and blocks for a bounded time unless the view requests
every log line. An event is a JSON object with `task` and any of these keys:

- `phase`: current phase of `task_record.CLIENT`, empty for none; `there`: current phase of `task_record.BUILDER`;
  `ahead`: number of jobs before it in the builder's queue;
- `builder`: the builder's URL; `expected`: seconds that the last build took, null if unknown;
- `up`, `down`: bytes sent and received so far; `goal`: bytes of the transfer that starts now;
- `line`: last line of the log; `lines`: complete log lines to show;
- `origin`, `seconds`, `line_at_end`: origin, duration and summary of a successful result (see `task_record`).

An event with `asking` has no task. It reports whether the user is being prompted at the terminal, and the view
acknowledges it with a byte.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..records.task_log import LONG, Harmless
from ..util.messages import notice
from ..util.text import in_line, line_of

if TYPE_CHECKING:  # callers that build have loaded these
    from ..records.task_log import Out
    from ..records.task_record import Record

VARIABLE = "GAMEBEAR_PROGRESS"
"""Environment variable for the worker processes of `doit -n`: the pid of their parent, the requested log lines (see
`EventListener`) and the path of its socket, separated by spaces."""

OFTEN = 0.1
"""Minimum seconds between two events about transferred bytes, and between two retries of a delayed final event."""

UNSENT = 64 << 10
"""Bytes of unsent events from which on further events are dropped, except log lines and final events."""

STOPPED = 5.0
"""Seconds for which a view may accept no log lines before lines are dropped, so that the build continues."""

ANSWER = 10.0
"""Timeout in seconds for the view to acknowledge a prompt, and to accept the unsent events of a process that exits."""

Event = Mapping[str, Any]


def left_out(count: int) -> str:
    """Return the line that replaces dropped log lines."""
    return f"({count:,} lines omitted: the terminal accepted no data; the log in build/logs is complete)"


class Audience(Protocol):
    """Listener for events: a view, or the connection to one."""

    whole: bool
    """Whether it requests all log lines, not just the last ones."""

    def handle(self, event: Event) -> None:
        """Handle an event; never raises."""
        ...

    def leave_terminal(self, leave: bool) -> None:
        """Release the terminal to a prompt, or reclaim it; never raises."""
        ...


_audience: tuple[int, Audience | None] = (0, None)
"""The listener, and the pid of the process that it belongs to: a forked process needs another one."""


def audience() -> Audience | None:
    """Return the listener of this process; None without one."""
    global _audience
    if _audience[0] != os.getpid():
        _audience = os.getpid(), _parent()
    return _audience[1]


def is_elsewhere() -> bool:
    """Return whether another process shows this one's progress: then this one's streams are not its terminal."""
    return isinstance(audience(), _Wire)


def listen(here: Audience | None) -> None:
    """Set the listener of this process; None to drop events from now on."""
    global _audience
    _audience = os.getpid(), here


def _parent() -> Audience | None:
    parent = multiprocessing.parent_process()
    pid, _, rest = os.environ.get(VARIABLE, "").partition(" ")
    if parent is None or pid != str(parent.pid):
        return None
    how, _, path = rest.partition(" ")
    with contextlib.suppress(OSError):
        return _Wire(path, how)
    return None


class _Wire:
    """Connection to the view in the parent process.

    Args:
        path: path of the view's socket.
        wants: the requested log lines (see `EventListener`).

    Raises:
        OSError: the socket cannot be connected.
    """

    def __init__(self, path: str, wants: str) -> None:
        import socket
        from multiprocessing import util

        self.whole = wants != "last"
        self._patience = None if wants == "every" else STOPPED
        self._lock = threading.Lock()
        self._unsent = b""
        self._sender: threading.Thread | None = None
        self._is_stuck = False
        self._left_out = 0
        self._unacknowledged = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER)
        self._socket.connect(path)
        util.Finalize(self, self._finish, exitpriority=0)

    def handle(self, event: Event) -> None:
        """Send an event; block according to its kind.

        Log lines block as long as the view accepts data, or without limit if it requests every line. The final event of
        a task is sent later if the view does not accept it now. Other events are sent at once or stay in the buffer,
        and are dropped if the buffer is full.
        """
        is_log = "lines" in event
        is_end = "origin" in event
        waits: float | None = 0.0
        if is_log or (is_end and self._patience is None):
            waits = self._patience
        elif is_end or "asking" in event:
            waits = 1.0
        with self._lock:
            if self._is_stuck:
                self._is_stuck = not self._send_on(0.0)
                if self._is_stuck and is_log:
                    self._left_out += len(event["lines"])
                    return
            if waits == 0.0 and len(self._unsent) > UNSENT:
                return
            if self._left_out and (is_log or is_end):
                event = {**event, "lines": [left_out(self._left_out), *event.get("lines", ())]}
                self._left_out = 0
            self._unsent += json.dumps(event).encode() + b"\n"
            self._is_stuck = not self._send_on(waits) and (self._is_stuck or is_log)
            if is_end and self._unsent and self._sender is None:
                self._sender = threading.Thread(target=self._send_later, name="events", daemon=True)
                self._sender.start()

    def _send_on(self, waits: float | None) -> bool:
        """Send the buffered events and return whether the buffer is empty.

        Args:
            waits: timeout in seconds for each write; None for no limit.
        """
        try:
            self._socket.settimeout(waits)
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except (BlockingIOError, TimeoutError):
            return False
        except OSError:  # the view has closed the connection
            self._unsent = b""
        return True

    def _send_later(self) -> None:
        """Retry in a thread until the buffer is sent, because there may be no further event that would send it."""
        while True:
            time.sleep(OFTEN)
            with self._lock:
                if self._send_on(0.0):
                    self._is_stuck, self._sender = False, None
                    return

    def _finish(self) -> None:
        """Send the buffered events before the process exits."""
        with contextlib.suppress(KeyboardInterrupt), self._lock:
            self._send_on(ANSWER)

    def leave_terminal(self, leave: bool) -> None:
        """Report a prompt, and wait for its acknowledgement.

        After a timeout the byte may arrive later. It is counted, so that it does not acknowledge the next prompt.
        """
        self.handle({"asking": leave})
        with self._lock, contextlib.suppress(OSError):
            self._unacknowledged += 1
            self._socket.settimeout(ANSWER)
            while self._unacknowledged and (data := self._socket.recv(self._unacknowledged)):
                self._unacknowledged -= len(data)


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Reserve the terminal for a prompt during the block."""
    there = audience()
    if there is None:
        yield
        return
    there.leave_terminal(True)
    try:
        yield
    finally:
        there.leave_terminal(False)


class EventSender:
    """Sender of the events of one task's build.

    Args:
        task: the task's name.

    Attributes:
        has_listener: there is a listener.
        wants_lines: the listener requests all log lines.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self._audience = audience()
        self.has_listener = self._audience is not None
        self.wants_lines = self._audience is not None and self._audience.whole
        self._moved_at = 0.0
        self._here = ""

    def send(self, **what: Any) -> None:
        """Send an event of the task."""
        if self._audience is not None:
            self._audience.handle({"task": self.task, **what})

    # the stopwatch's listener (`task_record.Listener`)

    def phase(self, name: str) -> None:
        """Send the current phase on this machine; empty for none."""
        self.send(phase=name)

    def moved(self, up: int, down: int) -> None:
        """Send the number of bytes sent and received, at most every `OFTEN` seconds."""
        now = time.monotonic()
        if now - self._moved_at >= OFTEN:
            self._moved_at = now
            self.send(up=up, down=down)

    def expects(self, up: int, down: int, count: int) -> None:
        """Send the size of the transfer that starts now, in bytes."""
        self.send(up=up, down=down, goal=count)

    # other events

    def begins(self, builder: str, last: Record | None) -> None:
        """Send the builder's URL, and the duration of the last build there."""
        if self.has_listener:
            from . import estimates

            self.send(builder=builder, expected=estimates.seconds(self.task, builder, last))

    def builds(self, phase: str, ahead: int | None) -> None:
        """Send the job's phase on the builder and its queue position; an empty phase for a final state."""
        self.send(there=phase, ahead=ahead)

    def remark(self, text: str) -> None:
        """Send a remark that is relevant only while the task runs; print it as a notice without a live view."""
        if self.has_listener and not self.wants_lines:
            self.send(line=in_line(text))
        else:
            notice(text)

    @contextlib.contextmanager
    def shown(self, out: Out | None) -> Iterator[Out | None]:
        """Yield the output for the live log; None to hide it.

        Args:
            out: the stream to use without a view; None to hide the log.
        """
        lines: _Lines | Harmless | None = None
        if out is not None and (self.wants_lines or not self.has_listener):
            lines = _Lines(self) if self.has_listener else Harmless(out)
        try:
            yield lines
        finally:
            if lines is not None:
                with contextlib.suppress(OSError):
                    lines.close()

    def last_line(self, text: str) -> None:
        """Send the last non-empty line of a piece of the log."""
        if self._audience is None:
            return
        for line in reversed(text[-LONG:].splitlines()):
            if shown := line_of(line)[:400].strip():
                self.send(line=shown)
                return

    def ended(self, record: Record) -> None:
        """Send the final event of a successful task."""
        self.send(
            origin=record.origin, seconds=record.seconds, up=record.up, down=record.down, line_at_end=record.line()
        )


class _Lines:
    """Output for a live log that sends its text to the listener as complete lines."""

    encoding = "utf-8"

    def __init__(self, events: EventSender) -> None:
        self._events = events
        self._rest = ""

    def write(self, text: str) -> object:
        """Send the lines that are complete now, and an incomplete line that is too long."""
        *lines, self._rest = (self._rest + text).split("\n")
        if len(self._rest) > LONG:
            lines.append(self._rest)
            self._rest = ""
        if lines:
            self._events.send(lines=[line_of(line) for line in lines])
        return None

    def flush(self) -> None:
        """Do nothing: an incomplete line is sent once it is complete."""

    def close(self) -> None:
        """Send the last line if it is incomplete."""
        if self._rest:
            self.write("\n")
