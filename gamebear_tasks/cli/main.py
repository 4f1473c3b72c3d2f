"""`gamebear`: doit's command line, with additional commands and the live reporter. `doit` itself is unchanged.

It embeds doit as documented: a subclass of `DoitMain` with additional commands, and `extra_config`, whose sections are
those of `doit.cfg` (https://pydoit.org/extending.html).
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from doit.cmd_base import DoitCmdBase
from doit.cmd_dumpdb import DumpDB
from doit.cmd_run import Run
from doit.doit_cmd import DoitMain
from doit.version import VERSION

from ..client.cancellation import Terminated, end_interrupted
from ..config import settings
from ..errors import SettingsError
from ..util.messages import drop, print_error
from .command import BROKEN_PIPE, FAILED
from .dep_file import check_regular, errors_of, guarded

REPORTER = "live"
"""The default reporter. A project's DOIT_CONFIG, its pyproject.toml and `-r` override it."""

COMMANDS = {
    "doctor": "gamebear_tasks.cli.doctor.command:Doctor",
    "init": "gamebear_tasks.cli.init.command:Init",
    "jobs": "gamebear_tasks.cli.jobs:Jobs",
    "lock": "gamebear_tasks.cli.lock:Lock",
    "provenance": "gamebear_tasks.cli.provenance:Provenance",
    "prune": "gamebear_tasks.cli.prune:Prune",
    "rebuild": "gamebear_tasks.cli.rebuild:Rebuild",
    "report": "gamebear_tasks.cli.report:Report",
    "shell": "gamebear_tasks.cli.shell:Shell",
    "sources": "gamebear_tasks.cli.sources:Sources",
}
"""The additional commands. doit imports a command on first use."""


class GuardedCommand:
    """Mixin for doit's commands: no traceback for empty arguments, an unusable database, or a reader that exits."""

    def parse_execute(self, in_args: Sequence[str]) -> int:
        """Run the command; return the exit status. doit fails on an empty argument.

        Raises:
            SettingsError: An argument is empty.
        """
        if "" in in_args:
            raise SettingsError("An argument is empty.", "Remove it, or name a task: gamebear list --all")
        try:
            status: int = super().parse_execute(in_args)  # type: ignore[misc]
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            drop(sys.stdout)
            return BROKEN_PIPE
        return status

    def get_backends(self) -> Mapping[str, Any]:
        """Return doit's databases by name, guarded."""
        backends: Mapping[str, Any] = super().get_backends()  # type: ignore[misc]
        return {name: guarded(backend) for name, backend in backends.items()}


class GuardedRun(GuardedCommand, Run):  # type: ignore[misc]  # doit has no types
    """`run`, which also passes `--verbosity` to the live reporter."""

    name = "run"

    def execute(self, params: Any, args: Sequence[str]) -> int:
        """Run tasks; return the exit status.

        Raises:
            SettingsError: doit cannot start processes (`-n`), whose locks need /dev/shm (sem_overview(7)).
        """
        from ..doit_plugin.reporter import LiveReporter

        LiveReporter.shows_logs = params.get("verbosity") == 2
        try:
            status: int = super().execute(params, args)
        except OSError as error:
            try:
                multiprocessing.Lock()
            except OSError as cause:
                raise SettingsError(
                    f"gamebear -n cannot start processes: /dev/shm: {cause.strerror}.",
                    "Use threads: gamebear -n 4 -P thread, or mount /dev/shm.",
                ) from error
            raise
        return status


class GuardedDumpDB(GuardedCommand, DumpDB):  # type: ignore[misc]  # doit has no types
    """`dumpdb`, guarded: it opens the database by itself."""

    name = "dumpdb"

    def execute(self, opt_values: Mapping[str, Any], pos_args: Sequence[str]) -> None:
        """Print the database."""
        path = opt_values["dep_file"]
        check_regular(path)
        with errors_of(path, "read"):
            super().execute(opt_values, pos_args)


def _guarded_command(command: type) -> type:
    if command in (Run, DumpDB):
        return GuardedRun if command is Run else GuardedDumpDB
    if issubclass(command, DoitCmdBase):
        return type(command.__name__, (GuardedCommand, command), {"__doc__": command.__doc__})
    return command


_EMPTY = " "
"""Placeholder for an empty argument, compared by identity."""


class Main(DoitMain):  # type: ignore[misc]  # doit has no types
    """doit's main program under the name `gamebear`."""

    BIN_NAME = "gamebear"
    DOIT_CMDS = tuple(map(_guarded_command, DoitMain.DOIT_CMDS))

    def __init__(self) -> None:
        super().__init__(
            extra_config={
                "GLOBAL": {"reporter": REPORTER},
                "COMMAND": COMMANDS,
                "REPORTER": {REPORTER: "gamebear_tasks.doit_plugin.reporter:LiveReporter"},
            }
        )

    def process_args(self, cmd_args: Sequence[str]) -> list[str]:
        """Set doit's variables; return the other arguments. doit's method fails on an empty argument."""
        others: list[str] = super().process_args([arg or _EMPTY for arg in cmd_args])
        return ["" if arg is _EMPTY else arg for arg in others]

    @staticmethod
    def print_version() -> None:
        """Print the versions of gamebear-tasks and doit."""
        print(f"gamebear-tasks {version('gamebear-tasks')}")
        print(f"doit {'.'.join(map(str, VERSION))}")


def _program() -> Main:
    """Return doit's main program, which reads pyproject.toml.

    Raises:
        SettingsError: That file is invalid.
    """
    try:
        return Main()
    except (ValueError, AttributeError) as error:  # doit does not handle them
        settings()
        raise SettingsError(
            "pyproject.toml is invalid: tool or tool.doit is not a table.", "Correct pyproject.toml."
        ) from error


def main() -> None:
    """Run the command line of this process, and exit."""
    try:
        status = _program().run(sys.argv[1:])
    except SettingsError as error:
        print_error(error)
        status = FAILED
    except Terminated as error:
        status = end_interrupted(error.number)
    except KeyboardInterrupt:
        status = end_interrupted()
    sys.exit(status)
