"""The reporter `live`: the default of `gamebear`, or `DOIT_CONFIG = {"reporter": live}` for `doit`.

It is imported with every `dodo.py` that names it, so the views are imported only when there is something to show.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from doit.exceptions import UnmetDependency
from doit.reporter import ConsoleReporter

from ..client import cancellation
from ..util.messages import drop, notice
from ..util.text import in_line, without_escapes

if TYPE_CHECKING:
    from doit.exceptions import BaseFail

    from ..progress.live_view import Live
    from ..progress.plain_view import Plain

LAST_WORDS = 1.0
"""Seconds to wait for each worker process of `doit -n` to report its remaining jobs, after a second Ctrl-C."""


class Output:
    """A stream that is dropped with one notice when it fails, so that builds continue.

    Args:
        stream: the stream; None if standard output was closed at the start.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write a text and flush it."""
        if self._stream is not None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(self._stream, error)

    def flush(self) -> None:
        """Flush the stream."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(self._stream, error)

    def _lose(self, stream: TextIO, error: Exception) -> None:
        self._stream = None
        drop(stream)
        if not isinstance(error, BrokenPipeError):  # the reader has exited
            why = error.strerror if isinstance(error, OSError) else error
            notice(f"output stops here ({why}); builds continue, and their logs are in build/logs")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class LiveReporter(ConsoleReporter):  # type: ignore[misc]  # doit has no types
    """A live view on a terminal; plain lines with the task's name in files, pipes, CI and on dumb terminals."""

    desc = "live view on a terminal, plain lines elsewhere"

    shows_logs: ClassVar[bool] = False
    """Show whole logs on a terminal too, not just their last lines. `gamebear -v 2` sets it. doit does not pass its
    verbosity to reporters, so it stays False with plain `doit -v 2`."""

    def __init__(self, outstream: TextIO | None, options: Mapping[str, Any]) -> None:
        is_live = outstream is not None and _is_live(outstream)
        super().__init__(outstream if is_live else Output(outstream), options)
        self._tasks: Mapping[str, Any] = {}
        self._selected: Sequence[str] = ()
        self._processes = False
        self._alone: set[str] = set()
        self._is_live = is_live
        self._skipped: dict[str, int] = {}
        self._view: Live | Plain | None = None
        self._lock = threading.Lock()

    def initialize(self, tasks: Mapping[str, Any], selected_tasks: Sequence[str]) -> None:
        """Begin the run."""
        cancellation.begin_run(whole=True)
        self._tasks, self._selected = tasks, selected_tasks

    def get_status(self, task: Any) -> None:
        """Open the event socket before doit forks: its processes find the socket in their environment.

        doit has created its queues by now (`doit -n`). If another program imported them, the socket is unused.
        """
        if not self._processes and "multiprocessing.queues" in sys.modules:
            self._processes = True
        if self._processes:
            self._seen()

    def execute_task(self, task: Any) -> None:
        """Show that a task runs."""
        if _is_shown(task):
            if task.io.capture is False and not multiprocessing.active_children():
                self._alone.add(task.name)  # doit gives it the terminal, and it runs alone
            self._seen().start(task.name, _title(task), task.name in self._alone)

    def add_success(self, task: Any) -> None:
        """Show that a task succeeded."""
        if _is_shown(task):
            self._end(task, "done")

    def add_failure(self, task: Any, fail: BaseFail) -> None:
        """Show that a task failed, and the error, once."""
        if not fail.report:
            return
        if isinstance(fail, UnmetDependency):
            self._end(task, "not run", f"It needs {fail.message}.")
        else:
            self._end(task, "failed", self._words_of(task, fail))

    def skip_uptodate(self, task: Any) -> None:
        """Count a task that is up to date. Name it in plain output, and on a terminal if whole logs are shown."""
        if _is_shown(task):
            self._skip("up to date", "" if self._is_live and not self.shows_logs else f"-- {_title(task)}")

    def skip_ignore(self, task: Any) -> None:
        """Name a task that is ignored."""
        self._skip("ignored", f"!! {_title(task)}")

    def complete_run(self) -> None:
        """Show the summary."""
        kind = sys.exc_info()[0]
        is_interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        try:
            if is_interrupted and self._view is not None:
                self._wait_for_the_interrupted()
        finally:  # a second interruption ends the wait
            view, self._view = self._view, None
            if view is not None:
                view.close(is_interrupted)
                if is_interrupted:
                    cancellation.announced.set()
        if self._is_live and self._skipped and (view is None or view.board.is_idle):
            self.write(", ".join(f"{count:,} {how}" for how, count in self._skipped.items()) + "\n")
        if self.runtime_errors:
            self.write("Execution aborted.\n" + "\n".join(self.runtime_errors) + "\n")
        cancellation.end_run()

    def _seen(self) -> Live | Plain:
        """Return the view; create it on the first call."""
        with self._lock:
            if self._view is None:
                self._view = self._begun()
            return self._view

    def _begun(self) -> Live | Plain:
        from ..progress.model import Board

        names = self._wanted()
        board = Board(len(names))
        for how, count in self._skipped.items():
            board.counts[how] += count
        if not self._is_live:
            from ..progress.plain_view import Plain

            return Plain(self.outstream, board, self._processes)
        from ..progress.live_view import Live

        return Live(self.outstream, board, names, self.shows_logs, self._processes)

    def _wanted(self) -> list[str]:
        """Return the names of the tasks in the run."""
        from .task_graph import with_dependencies

        return [name for name in with_dependencies(self._tasks, self._selected) if _is_shown(self._tasks[name])]

    def _end(self, task: Any, how: str, text: str = "") -> None:
        self._seen().end(task.name, how, text, task.name in self._alone)
        self._alone.discard(task.name)

    def _skip(self, how: str, line: str) -> None:
        self._skipped[how] = self._skipped.get(how, 0) + 1
        if self._view is not None:
            self._view.skip(how, line)
        elif line:
            self.write(f"{line}\n")

    def _words_of(self, task: Any, fail: BaseFail) -> str:
        """Return the text of a failure, with the output of the task unless it was shown."""
        words: list[str] = [fail.get_msg().rstrip()]
        if not task.executed:
            return words[0]
        show_err = task.verbosity < 1 or self.failure_verbosity > 0
        show_out = task.verbosity < 2 or self.failure_verbosity == 2
        for name, wanted in (("err", show_err), ("out", show_out)):
            text = "".join(getattr(action, name) for action in task.actions if getattr(action, name))
            if wanted and text.strip():
                words += [f"  | {line}" for line in text.rstrip().splitlines()]
        return "\n".join(words)

    def _wait_for_the_interrupted(self) -> None:
        """Wait until interrupted jobs have ended, while the view can still show it: doit waits only later."""
        if self._processes:
            try:
                with cancellation.interruptible():
                    cancellation.end_processes()
            except KeyboardInterrupt:
                for process in multiprocessing.active_children():
                    process.join(LAST_WORDS)
                raise
        cancellation.cancel_waiting()


def _is_shown(task: Any) -> bool:
    """Return whether a task is shown: it has actions, and its name does not begin with `_` (as in doit)."""
    return bool(task.actions) and not task.name.startswith("_")


def _title(task: Any) -> str:
    return in_line(without_escapes(task.title()))


def _is_live(stream: Any) -> bool:
    """Return whether a stream is an interactive terminal that supports cursor movement."""
    from doit.action import PythonAction

    if os.environ.get("TERM", "dumb") == "dumb" or os.environ.get("CI", "") not in ("", "0", "false"):
        return False
    try:
        return os.isatty(stream.fileno()) and not PythonAction.pm_pdb
    except (AttributeError, OSError, ValueError):
        return False
