"""Task log: saved to a file, shown live, and resumed after an interrupted run."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..errors import JobError
from ..runner.util.atomic_files import check_regular, read_json
from ..util.locations import LOGS
from ..util.messages import notice
from ..util.text import line_of, printable, size, without_escapes

LIMIT = 1 << 30
"""Maximum bytes of a log that are saved. The rest is only shown."""

LONG = 8 << 10
"""Number of characters from which on an incomplete line is shown."""

_LAST = 16384
"""Bytes at the log's end that are searched for its last lines."""


def path_of(task: str) -> Path:
    """Return the path of a task's log, unique to the task."""
    return _file_of(task, "", ".log")


def record_of(task: str) -> Path:
    """Return the path of the record of a task's last run (see `task_record`)."""
    return _file_of(task, "", ".json")


def materials_of(task: str) -> Path:
    """Return the path of the cached report on the images and packages of a task's last build (see `provenance`)."""
    return _file_of(task, ".", ".materials")


def _note_of(task: str) -> Path:
    return _file_of(task, ".", ".json")


def _file_of(task: str, prefix: str, suffix: str) -> Path:
    from ..util.file_names import file_name  # here, because an up-to-date run does not need it

    return LOGS / f"{prefix}{file_name(task)}{suffix}"


def noted(task: str) -> tuple[str, str]:
    """Return the digest and attempt of the job that a task's log belongs to; empty strings without a log."""
    note = read_json(_note_of(task))
    if not isinstance(note, dict) or note.get("task") != task:
        return "", ""  # in an older release, two tasks could share a file
    digest, attempt = note.get("digest"), note.get("attempt")
    return (digest, attempt) if isinstance(digest, str) and isinstance(attempt, str) else ("", "")


class Out(Protocol):
    """Output of a live log: a stream, or a view that shows lines."""

    def write(self, text: str, /) -> object:
        """Write text."""
        ...

    def flush(self) -> object:
        """Show the written text at once."""
        ...


class Harmless:
    """Live output of a log, sanitized of terminal escape sequences, because the builder is untrusted.

    Args:
        out: the stream to write to.
    """

    def __init__(self, out: Out) -> None:
        self.encoding = getattr(out, "encoding", None) or "utf-8"
        self._out = out
        self._rest = ""
        self._is_ended = True

    def write(self, text: str) -> object:
        """Write text. A line with an escape sequence is held back until it is complete or long."""
        text = self._rest + text
        end = text.rfind("\n") + 1
        whole = len(text) - ("\x1b" not in text[end:] and text.endswith("\r"))  # a line feed may follow
        if "\x1b" in text[end:]:
            whole = end if len(text) - end < LONG else len(text)
        self._rest = text[whole:]
        self._show(text[:whole])
        return None

    def flush(self) -> None:
        """Flush the stream; text that is held back stays."""
        self._out.flush()

    def close(self) -> None:
        """Write the rest, and end its line."""
        self._show(self._rest)
        self._rest = ""
        if not self._is_ended:
            self._show("\n")
        self.flush()

    def _show(self, text: str) -> None:
        text = printable(without_escapes(text).replace("\r\n", "\n").replace("\r", "\n"))
        if text:
            self._is_ended = text.endswith("\n")
            self._out.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))


class TaskLog:
    """A task's log: saved to a file and shown live.

    A note next to the file names the task and the job's digest and attempt. A later run of this task resumes the log at
    its end. If the note names another task, job or attempt, the log is overwritten.

    Args:
        task: the task's name.
        out: output for the live log; None to hide it.
        tell: called with each decoded piece of the log; None for no callback.

    Attributes:
        path: path of the log.
        offset: number of bytes of the attempt's log received so far.
    """

    def __init__(self, task: str, out: Out | None, tell: Callable[[str], None] | None = None) -> None:
        self.path = path_of(task)
        self._task = task
        self._tell = tell
        self._out = out
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._last = b""
        self._resumed = False
        self.offset = 0

    def __enter__(self) -> TaskLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            check_regular(os.stat(self.path), self.path)  # opening a FIFO would block
        self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def begin(self, digest: str, attempt: str) -> None:
        """Resume the log of an attempt, or start it."""
        self.offset = 0
        if noted(self._task) == (digest, attempt):
            self.offset = os.fstat(self._file.fileno()).st_size
            self._resumed = self.offset > 0
            return
        self._file.truncate(0)
        note = {"task": self._task, "digest": digest, "attempt": attempt}
        _note_of(self._task).write_text(json.dumps(note), "utf-8")

    @property
    def is_shown(self) -> bool:
        """Whether this run shows the whole log, not just the part after a resume."""
        return self._out is not None and not self._resumed

    def hide(self) -> None:
        """Stop showing the log, because it is the log of an earlier build."""
        self._out = self._tell = None

    def write(self, data: bytes) -> None:
        """Append data to the file, up to `LIMIT` bytes, and show it.

        Raises:
            JobError: the file cannot be written.
        """
        if not data:
            return
        room = max(0, LIMIT - self.offset)
        self._keep(memoryview(data)[:room])
        if room and len(data) > room:
            notice(f"{self.path} has the first {size(LIMIT)} of the log; the rest is only shown")
        self._last = (self._last + data)[-_LAST:]
        self.offset += len(data)
        if self._out is None and self._tell is None:
            return
        text = self._decoder.decode(data)
        if self._tell is not None:
            self._tell(text)
        if self._out is not None:
            try:
                self._out.write(text)
                self._out.flush()
            except OSError:  # for example a closed pipe; the build continues
                self._out = None

    def _keep(self, data: memoryview) -> None:
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise JobError(
                f"{self.path} cannot be written: {error.strerror}.",
                "Free disk space, then run doit again: the build continues, and doit reattaches.",
            ) from error

    def last_lines(self, count: int) -> list[str]:
        """Return the log's last lines, sanitized for display and cut to 400 characters each."""
        data = self._last
        if self.offset <= LIMIT:
            with self.path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST))
                data = file.read()
        lines = data.decode("utf-8", "replace").splitlines()[-count:]
        return [line_of(line)[:400] for line in lines]
