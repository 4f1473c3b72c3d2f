"""Base class of the commands: a doit command in a project, with two-line errors."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from doit.cmd_base import Command
from doit.cmdparse import CmdOption

from ..client import cancellation
from ..client.cancellation import Terminated
from ..errors import GamebearError, SettingsError, remedy
from ..util.messages import complain, drop
from ..util.text import in_line

FAILED = 2
"""The exit status of a command that could not do what it was asked: doit's of a task that could not run."""

UNREAD = 141
"""The exit status of a command whose output nobody reads any more, as shells have it (SIGPIPE)."""

INTERRUPTED = 130
"""The exit status of a command that was ended with Ctrl-C, as shells have it."""


class ProjectCommand(Command):  # type: ignore[misc]  # doit has no types
    """A command of `gamebear`.

    It does not open doit's database, so it works while a build goes on.

    Args:
        task_loader: doit's, which finds `dodo.py`.
        kwargs: what else doit gives a command.

    Attributes:
        needs_tasks: whether it makes no sense without a `dodo.py`; `self.tasks` then has its tasks by name.
            Otherwise `load_tasks` has them where there is one.
    """

    needs_tasks: ClassVar[bool] = False

    def __init__(self, task_loader: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loader = task_loader
        self.tasks: dict[str, Any] = {}
        self._is_in_project = False

    def get_options(self) -> list[CmdOption]:
        """Return the options: those that find `dodo.py`, and the command's own."""
        return [CmdOption(option) for option in (*self.loader.cmd_options, *self.cmd_options)]

    def execute(self, opt_values: Mapping[str, Any], pos_args: Sequence[str]) -> int:
        """Enter the project and run; return the exit status."""
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # it is closed: there is nothing to read, or nobody who would
                setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the process ends
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            try:
                cancellation.begin_run()
                self._enter_project(opt_values)
                status = self.run(opt_values, pos_args)
                cancellation.end_run()
            except GamebearError as error:
                complain(error)
                status = FAILED
            sys.stdout.flush()
            return status
        except Terminated as error:
            return 128 + error.number
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:  # whoever read it has enough, as `head` has
            drop(sys.stdout)
            return UNREAD
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror or error}"
            hint = remedy(error) or "See that the disk has room, and that what is read and written is there and yours."
            complain(GamebearError(f"{what}.", hint))
            drop(sys.stdout)
            return FAILED

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Do what the command is for; return the exit status.

        Raises:
            GamebearError: it could not be done.
        """
        raise NotImplementedError

    def _enter_project(self, options: Mapping[str, Any]) -> None:
        """Go to the folder of `dodo.py`; where there is none and none is needed, stay here.

        Raises:
            InvalidDodoFile: there is none, or it is broken; doit shows it.
        """
        if not (self.needs_tasks or options["seek_file"] or os.path.exists(options["dodoFile"])):
            return
        self.loader.setup(options)
        self.loader.load_doit_config()
        self._is_in_project = True
        if self.needs_tasks:
            self.load_tasks()

    def refuse(self, args: Sequence[str]) -> None:
        """Raise SettingsError where a command that takes no argument got one."""
        if args:
            said = f"{self.bin_name} {self.name}"
            raise SettingsError(f"{said} takes no argument, and got {args[0]!r}.", f"Say {said}.")

    def print_lines(self, lines: Iterable[str]) -> None:
        """Print each line when it comes. Where nobody reads them (`| head`), the work behind them still completes."""
        for line in lines:
            with contextlib.suppress(OSError):
                print(in_line(line), flush=True)

    def load_tasks(self) -> None:
        """Have `self.tasks`, where there is a `dodo.py`; raises InvalidDodoFile."""
        if self._is_in_project and not self.tasks:
            self.tasks = {task.name: task for task in self.loader.load_tasks(cmd=self, pos_args=[])}
