"""What a task's build tells whoever shows it: in the process that does, or through a socket from those of `doit -n`.

Nobody may be there, then nothing is told; and nothing that is told can fail, or hold up a build for long. An event is a
JSON object: `task`, and any of

- `phase`: which of `task_record.CLIENT` it is in, empty for none; `there`: which of `task_record.BUILDER`; `ahead`: how
  many jobs are before it there;
- `builder`: its URL; `expected`: how many seconds it took the last time;
- `up`, `down`: bytes sent and received so far; `goal`: how many are to come of both from now on;
- `line`: the log's last line; `lines`: whole lines of it, which are to be shown;
- `had`, `seconds`, `line_at_end`: how it ended, where that was well.

`asking` says instead whether a person is asked something at the terminal now; it is answered with a byte.
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

if TYPE_CHECKING:  # those who build have them
    from ..builders.base import Status
    from ..records.task_log import Out
    from ..records.task_record import Record

VARIABLE = "GAMEBEAR_PROGRESS"
"""The environment variable that tells the processes of `doit -n`: the pid of their parent, what it wants of the
logs (see `Hearing`), and its socket."""

OFTEN = 0.1
"""Seconds between two events that say how many bytes have moved."""

UNSENT = 64 << 10
"""Bytes of events that may wait for a view which does not listen; what comes then is not told."""

STOPPED = 5.0
"""Seconds for which a view may take nothing of a log before lines of it are left out, so that the build goes on."""

ANSWER = 10.0
"""Seconds that the view may take to leave the terminal to a question, or to take anything of what a process that ends
has not told yet."""

Event = Mapping[str, Any]


def left_out(count: int) -> str:
    """Return what is shown instead of lines."""
    return f"({count:,} lines are not shown, as the terminal took nothing for a while: build/logs has them)"


class Audience(Protocol):
    """Who shows what is told."""

    whole: bool
    """Wants all lines of the logs, and not just the last."""

    def hear(self, event: Event) -> None:
        """Take an event; never raises."""
        ...

    def leave_terminal(self, leave: bool) -> None:
        """Leave the terminal to somebody who asks a person, or take it back; never raises."""
        ...


_audience: tuple[int, Audience | None] = (0, None)
"""That of the process with this pid: a fork has to look for its own."""


def audience() -> Audience | None:
    """Return who listens to this process."""
    global _audience
    if _audience[0] != os.getpid():
        _audience = os.getpid(), _parent()
    return _audience[1]


def is_elsewhere() -> bool:
    """Whether it is another process that shows what this one does: then its streams say nothing of the terminal."""
    return isinstance(audience(), _Wire)


def listen(here: Audience | None) -> None:
    """Let this process tell what it does to somebody in it; or, from now on, to nobody."""
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
    """The way to the process that shows what this one does."""

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
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER)
        self._socket.connect(path)
        util.Finalize(self, self._finish, exitpriority=0)

    def hear(self, event: Event) -> None:
        """Send an event: lines as long as any are taken, the end of a task now or later, all else at once or not."""
        is_log = "lines" in event
        is_end = "had" in event
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
                self._sender = threading.Thread(target=self._send_later, name="telling", daemon=True)
                self._sender.start()

    def _send_on(self, waits: float | None) -> bool:
        """Send what is left to be sent; say whether all of it went, with pauses of `waits` seconds (None: any)."""
        try:
            self._socket.settimeout(waits)
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except (BlockingIOError, TimeoutError):
            return False
        except OSError:  # nobody listens any more
            self._unsent = b""
        return True

    def _send_later(self) -> None:
        """Send how a task has ended when the view takes it: nothing may be told for long after that."""
        while True:
            time.sleep(OFTEN)
            with self._lock:
                if self._send_on(0.0):
                    self._is_stuck, self._sender = False, None
                    return

    def _finish(self) -> None:
        """Send what is left before the process ends."""
        with contextlib.suppress(KeyboardInterrupt), self._lock:
            self._send_on(ANSWER)

    def leave_terminal(self, leave: bool) -> None:
        self.hear({"asking": leave})
        with self._lock, contextlib.suppress(OSError):
            self._socket.settimeout(ANSWER)
            self._socket.recv(1)


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Have the terminal for a question to a person, while the block runs."""
    there = audience()
    if there is None:
        yield
        return
    there.leave_terminal(True)
    try:
        yield
    finally:
        there.leave_terminal(False)


class Telling:
    """What the build of one task tells.

    Args:
        task: its name.

    Attributes:
        is_heard: somebody listens.
        wants_lines: they want the whole log, in lines.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self._audience = audience()
        self.is_heard = self._audience is not None
        self.wants_lines = self._audience is not None and self._audience.whole
        self._told = 0.0
        self._here = ""

    def tell(self, **what: Any) -> None:
        """Tell an event of the task."""
        if self._audience is not None:
            self._audience.hear({"task": self.task, **what})

    # what a stopwatch notices

    def phase(self, name: str) -> None:
        """Tell which phase on this machine has begun; empty: none."""
        self.tell(phase=name)

    def moved(self, up: int, down: int) -> None:
        """Tell how many bytes have gone to the builder and come from it, now and then."""
        now = time.monotonic()
        if now - self._told >= OFTEN:
            self._told = now
            self.tell(up=up, down=down)

    def expects(self, up: int, down: int, count: int) -> None:
        """Tell how many bytes are about to go or come."""
        self.tell(up=up, down=down, goal=count)

    # the rest

    def begins(self, builder: str, last: Record | None) -> None:
        """Tell where it is built, and how long that took the last time."""
        if self.is_heard:
            from . import estimates

            self.tell(builder=builder, expected=estimates.seconds(self.task, builder, last))

    def builds(self, status: Status) -> None:
        """Tell what the builder says of the job."""
        there = "" if status.is_final else status.phase or ("queue" if status.state == "queued" else "build")
        self.tell(there=there, ahead=status.ahead)

    def remark(self, text: str) -> None:
        """Tell what only is of interest as long as the task runs."""
        if self.is_heard and not self.wants_lines:
            self.tell(line=in_line(text))
        else:
            notice(text)

    @contextlib.contextmanager
    def shown(self, out: Out | None) -> Iterator[Out | None]:
        """Give where the log is to be shown.

        Args:
            out: where it is without a view; None for nowhere.
        """
        lines: _Lines | Harmless | None = None
        if out is not None and (self.wants_lines or not self.is_heard):
            lines = _Lines(self) if self.is_heard else Harmless(out)
        try:
            yield lines
        finally:
            if lines is not None:
                with contextlib.suppress(OSError):
                    lines.close()

    def last_line(self, text: str) -> None:
        """Tell the last line of what has come of a log."""
        if self._audience is None:
            return
        for line in reversed(text[-LONG:].splitlines()):
            if shown := line_of(line)[:400].strip():
                self.tell(line=shown)
                return

    def ended(self, record: Record) -> None:
        """Tell that it went well, and how."""
        self.tell(had=record.had, seconds=record.seconds, up=record.up, down=record.down, line_at_end=record.line())


class _Lines:
    """Takes a log's text and tells it in whole lines; for where a log is shown."""

    encoding = "utf-8"

    def __init__(self, telling: Telling) -> None:
        self._telling = telling
        self._rest = ""

    def write(self, text: str) -> object:
        """Tell the lines that are whole now, and what is too long to wait for its end."""
        *lines, self._rest = (self._rest + text).split("\n")
        if len(self._rest) > LONG:
            lines.append(self._rest)
            self._rest = ""
        if lines:
            self._telling.tell(lines=[line_of(line) for line in lines])
        return None

    def flush(self) -> None:
        """Do nothing: a line that has no end yet is shown when it has."""

    def close(self) -> None:
        """Tell the last line, where it has no end."""
        if self._rest:
            self.write("\n")
