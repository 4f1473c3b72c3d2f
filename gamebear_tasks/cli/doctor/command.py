"""`gamebear doctor`: check the builders and this machine, and apply fixes with `--fix`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ...util.messages import notice
from ..command import ProjectCommand

if TYPE_CHECKING:
    from .requirements import Need

OPTIONS = (
    {
        "name": "fix",
        "long": "fix",
        "type": bool,
        "default": False,
        "help": "apply the fixes that are commands, as root or with sudo, and print each command",
    },
    {
        "name": "json",
        "long": "json",
        "type": bool,
        "default": False,
        "help": "print the findings as JSON only",
    },
)


class Doctor(ProjectCommand):
    """Checks this machine and each configured builder."""

    doc_purpose = "check the builders and this machine, and suggest or apply fixes"
    doc_usage = "[TASK ...] [builder=URL] [arch=ARCH]"
    doc_description = (
        "Checks each configured builder (builder=URL for another; no dodo.py is needed): connection, host key, login,"
        " Python, buildah, user namespaces, storage, disk space, architectures, base image, slots, jobs. Each failed"
        " check has a fix.\n\n"
        "Checks this machine for the programs that the TASKs and their dependencies need; without a TASK, doit's"
        " default tasks. Missing programs of other tasks are only warnings.\n\n"
        "Without --fix, nothing is changed. --fix installs missing packages and changes settings as root, prints each"
        " command, and lets sudo ask for a password on the terminal.\n\n"
        "Exit status: 0 if everything is ready, 1 if a check failed, 2 if a builder could not be reached."
    )

    cmd_options: ClassVar[tuple[dict[str, Any], ...]] = OPTIONS

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Check, apply fixes if requested, and print the findings; return the exit status."""
        from ...config import settings
        from .diagnose import diagnose
        from .output import TextOutput, as_json, status_of

        needs = self._needs(args)
        output = TextOutput(sys.stdout, has_fixed=options["fix"])
        fix_output = TextOutput(sys.stderr, has_fixed=True) if options["json"] else output
        progress = notice if sys.stderr.isatty() else lambda _: None
        with _stdout_redirected(options["json"]):
            places = diagnose(settings(), needs, fix_output.line if options["fix"] else None, progress)
        if options["json"]:
            print(as_json(places))
        else:
            output.show(places)
        return status_of(places)

    def _needs(self, args: Sequence[str]) -> list[Need]:
        """Return the programs of this machine that the project's tasks need.

        Raises:
            SettingsError: A named task does not exist.
            InvalidDodoFile: dodo.py is broken. doit displays it.
        """
        from doit.control import TaskControl
        from doit.exceptions import InvalidCommand

        from ...doit_plugin.task_graph import with_dependencies
        from ...errors import SettingsError
        from .requirements import needs

        self.load_tasks()
        config = {**self.config_vals, **(self.loader.load_doit_config() if self._is_in_project else {})}
        control = TaskControl([*self.tasks.values()])
        try:
            control.process(list(args) or config.get("default_tasks"))
        except InvalidCommand as error:
            raise SettingsError(
                f"Task {error.not_found or args[0]!r} does not exist.",
                "List the tasks: gamebear list --all. To check another builder, use builder=URL.",
            ) from error
        return needs(self.tasks, with_dependencies(control.tasks, control.selected_tasks))


@contextlib.contextmanager
def _stdout_redirected(needed: bool) -> Iterator[None]:
    """Redirect standard output to standard error in the block, programs included: standard output is only for JSON."""
    if not needed:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
