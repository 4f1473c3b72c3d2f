"""Base class of the commands: a doit command in a project, with two-line errors."""

from __future__ import annotations

import contextlib
import getopt
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from doit.cmd_base import Command
from doit.cmdparse import CmdOption, CmdParseError

from ..client import cancellation
from ..client.cancellation import Terminated
from ..errors import GamebearError, SettingsError, remedy
from ..jobspec.plan import Plan
from ..util.messages import drop, print_error
from ..util.text import in_line

FAILED = 2
"""Exit status of a command that failed; doit's status for a task that could not run."""

BROKEN_PIPE = 141
"""Exit status of a command whose reader closed the pipe: 128 + SIGPIPE, as in shells."""

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended: 128 + SIGINT, as in shells."""


def number(option: str) -> Callable[[str], int]:
    """Return the type of an option that is a non-negative integer, for doit; it raises SettingsError for other text."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and len(text) < 10):
            raise SettingsError(f"{option} must be a number, got {text!r}.", f"Use a number, such as {option} 1.")
        return int(text)

    return parse


class ProjectCommand(Command):  # type: ignore[misc]  # doit has no types
    """A command of `gamebear`.

    It does not open doit's database, so it works while doit runs.

    Args:
        task_loader: doit's loader, which finds `dodo.py`.
        kwargs: doit's other arguments of a command.

    Attributes:
        needs_tasks: Whether the command requires a `dodo.py`; `self.tasks` then has its tasks by name. Other commands
            call `load_tasks`, which does nothing without a `dodo.py`.
    """

    needs_tasks: ClassVar[bool] = False

    def __init__(self, task_loader: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loader = task_loader
        self.tasks: dict[str, Any] = {}
        self._is_in_project = False

    def get_options(self) -> list[CmdOption]:
        """Return the options that find `dodo.py`, and the command's own options."""
        return [CmdOption(option) for option in (*self.loader.cmd_options, *self.cmd_options)]

    def parse_execute(self, in_args: Sequence[str]) -> int:
        """Parse the command line and execute the command; return the exit status.

        Raises:
            SettingsError: An option is unknown or incomplete.
        """
        try:
            status: int = super().parse_execute(in_args)
        except CmdParseError as error:
            if not isinstance(error.__context__, getopt.GetoptError):
                raise
            raise SettingsError(
                f"{self.bin_name} {self.name}: {error.__context__.msg}.",
                f"List the options: {self.bin_name} help {self.name}",
            ) from error
        return status

    def options_first(self, in_args: Sequence[str]) -> list[str]:
        """Return a command line with its options before its arguments, the order that doit requires."""
        try:
            options, words = getopt.gnu_getopt([*in_args], self.cmdparser.get_short(), self.cmdparser.get_long())
        except getopt.GetoptError:
            return [*in_args]  # doit reports the error
        return [*(word for option in options for word in option if word), "--", *words]

    def execute(self, opt_values: Mapping[str, Any], pos_args: Sequence[str]) -> int:
        """Enter the project and run; return the exit status."""
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # its descriptor is closed
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
                print_error(error)
                status = FAILED
            sys.stdout.flush()
            return status
        except Terminated as error:
            return 128 + error.number
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:  # the reader, such as `head`, has exited
            drop(sys.stdout)
            return BROKEN_PIPE
        except OSError as error:
            message = f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror or error}"
            hint = remedy(error) or "Check free disk space (df -h) and permissions (ls -ld)."
            print_error(GamebearError(f"{message}.", hint))
            drop(sys.stdout)
            return FAILED

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Run the command; return the exit status.

        Raises:
            GamebearError: The command failed.
        """
        raise NotImplementedError

    def _enter_project(self, options: Mapping[str, Any]) -> None:
        """Change to the folder of `dodo.py`, if there is one.

        Raises:
            InvalidDodoFile: `dodo.py` is required and missing, or is broken. doit displays it.
        """
        if not (self.needs_tasks or options["seek_file"] or os.path.exists(options["dodoFile"])):
            return
        self.loader.setup(options)
        self.loader.load_doit_config()
        self._is_in_project = True
        if self.needs_tasks:
            self.load_tasks()

    def refuse(self, args: Sequence[str]) -> None:
        """Raise SettingsError if a command that takes no arguments got one."""
        if args:
            command = f"{self.bin_name} {self.name}"
            raise SettingsError(
                f"{command} takes no arguments, got {args[0]!r}.", f"List its options: {self.bin_name} help {self.name}"
            )

    def plan_of(self, task: str) -> Plan:
        """Return the plan of a task that uses `artifact()`.

        Raises:
            SettingsError: There is no such task.
        """
        from ..doit_plugin.action import Build

        found = self.tasks.get(task)
        if found is not None:
            for action in found.actions:
                if isinstance(action, Build):
                    return action.plan
        problem = "does not use artifact()" if found is not None else "does not exist"
        suitable = [name for name, each in self.tasks.items() if any(isinstance(one, Build) for one in each.actions)]
        raise SettingsError(f"Task {task!r} {problem}.", f"Use one of: {', '.join(suitable) or 'no task is suitable'}.")

    def print_lines(self, lines: Iterable[str]) -> None:
        """Print each line when it is ready. If the reader exits (`| head`), the remaining work still completes."""
        for line in lines:
            with contextlib.suppress(OSError):
                print(in_line(line), flush=True)

    def load_tasks(self) -> None:
        """Load `self.tasks` if there is a `dodo.py`; raises InvalidDodoFile."""
        if self._is_in_project and not self.tasks:
            self.tasks = {task.name: task for task in self.loader.load_tasks(cmd=self, pos_args=[])}
