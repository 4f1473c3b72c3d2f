"""The reporter `live`: the default of `gamebear`, or `DOIT_CONFIG = {"reporter": live}` for `doit`.

It is imported with every `dodo.py` that names it, so what it needs to show something is imported when there is
something to show.
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
"""Seconds that each process of `doit -n` has to say what it leaves, when Ctrl-C was pressed twice."""


class Output:
    """A stream that is written to as long as that works: builds go on without, and it is said once.

    Args:
        stream: the stream; None where standard output was closed before we began.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write a text, if somebody takes it."""
        if self._stream is not None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(self._stream, error)

    def flush(self) -> None:
        """Have all that is written be out."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(self._stream, error)

    def _lose(self, stream: TextIO, error: Exception) -> None:
        self._stream = None
        drop(stream)
        if not isinstance(error, BrokenPipeError):  # whoever read it has enough
            why = error.strerror if isinstance(error, OSError) else error
            notice(f"nothing more can be shown here ({why}); builds go on, and their logs are in build/logs")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class LiveReporter(ConsoleReporter):  # type: ignore[misc]  # doit has no types
    """A live view on a terminal; plain lines, each with its task, in files, pipes, CI and on dumb terminals."""

    desc = "live view on a terminal, plain lines elsewhere"

    shows_logs: ClassVar[bool] = False
    """Show all of the logs on a terminal too, and not just their last lines. `gamebear -v 2` sets it: doit gives a
    reporter none of its options, so with plain `doit -v 2` it stays False."""

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
        """Note what there is to do."""
        cancellation.begin_run(whole=True)
        self._tasks, self._selected = tasks, selected_tasks

    def get_status(self, task: Any) -> None:
        """Open the event socket before doit forks: its processes find the socket in their environment.

        doit has made its queues by now (`doit -n`). Who else has imported them only has the socket opened in vain.
        """
        if not self._processes and "multiprocessing.queues" in sys.modules:
            self._processes = True
        if self._processes:
            self._seen()

    def execute_task(self, task: Any) -> None:
        """Show that a task runs."""
        if _is_shown(task):
            if task.io.capture is False and not multiprocessing.active_children():
                self._alone.add(task.name)  # doit gives it the terminal, and nothing else runs
            self._seen().start(task.name, _title(task), task.name in self._alone)

    def add_success(self, task: Any) -> None:
        """Show that a task has ended well."""
        if _is_shown(task):
            self._end(task, "done")

    def add_failure(self, task: Any, fail: BaseFail) -> None:
        """Show that a task has failed, and why; all of it, and once."""
        if not fail.report:
            return
        if isinstance(fail, UnmetDependency):
            self._end(task, "not run", f"It needs {fail.message}.")
        else:
            self._end(task, "failed", self._words_of(task, fail))

    def skip_uptodate(self, task: Any) -> None:
        """Count a task that is up to date; name it where that was asked for, or lines cost nothing."""
        if _is_shown(task):
            self._skip("up to date", "" if self._is_live and not self.shows_logs else f"-- {_title(task)}")

    def skip_ignore(self, task: Any) -> None:
        """Name a task that is ignored."""
        self._skip("ignored", f"!! {_title(task)}")

    def complete_run(self) -> None:
        """Show how it went."""
        kind = sys.exc_info()[0]
        is_interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        try:
            if is_interrupted and self._view is not None:
                self._wait_for_the_interrupted()
        finally:  # a second interruption leaves the wait
            view, self._view = self._view, None
            if view is not None:
                view.close(is_interrupted)
                if is_interrupted:
                    cancellation.told.set()
        if self._is_live and self._skipped and (view is None or view.board.is_idle):
            self.write(", ".join(f"{count:,} {how}" for how, count in self._skipped.items()) + "\n")
        if self.runtime_errors:
            self.write("Execution aborted.\n" + "\n".join(self.runtime_errors) + "\n")
        cancellation.end_run()

    def _seen(self) -> Live | Plain:
        """Return what shows the run, from now on."""
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
        """Return the names of the tasks that doit has to see to."""
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
        """Return what there is to say of a failure, with what the task has written, where that was not shown."""
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
        """Wait for what an interruption ends, while that can still be shown: doit waits for it later."""
        if self._processes:
            try:
                with cancellation.interruptible():
                    cancellation.end_processes()
            except KeyboardInterrupt:
                for process in multiprocessing.active_children():
                    process.join(LAST_WORDS)
                raise
        cancellation.end_what_is_left()


def _is_shown(task: Any) -> bool:
    """Whether there is anything to show of a task: not of groups, nor of hidden ones, as doit has it."""
    return bool(task.actions) and not task.name.startswith("_")


def _title(task: Any) -> str:
    return in_line(without_escapes(task.title()))


def _is_live(stream: Any) -> bool:
    """Whether a stream is a terminal on which lines can be painted, and a person looks at it."""
    from doit.action import PythonAction

    if os.environ.get("TERM", "dumb") == "dumb" or os.environ.get("CI", "") not in ("", "0", "false"):
        return False
    try:
        return os.isatty(stream.fileno()) and not PythonAction.pm_pdb
    except (AttributeError, OSError, ValueError):
        return False
