"""`gamebear doctor`: whether each builder is ready, what it lacks and how that is mended; mended when told to."""

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
        "help": "mend what can be mended by commands, as root or with sudo; each is shown as it is run",
    },
    {
        "name": "json",
        "long": "json",
        "type": bool,
        "default": False,
        "help": "print what was found as JSON, and nothing else",
    },
)


class Doctor(ProjectCommand):
    """Looks at this machine and at each builder of the settings."""

    doc_purpose = "say of each builder whether it is ready, what it lacks and how to mend it"
    doc_usage = "[TASK ...] [builder=URL] [arch=ARCH]"
    doc_description = (
        "Looks at each builder that is set (builder=ssh://pi@buildpi, without a dodo.py too) and at this machine:"
        " reachable, host key, log-in, Python, buildah, user namespaces, storage, disk, architectures, base image,"
        " slots, jobs, sizes. Each trouble has its remedy.\n\n"
        "Of this machine, what the project's tasks need: what is missing is trouble where one of the TASKs needs it (by"
        " default those that doit alone runs), or one that these depend on, else a note.\n\n"
        "Nothing is changed without --fix, which installs what is missing as root, and shows each command as it is run;"
        " sudo asks for a password at the terminal where it has to.\n\n"
        "Exit status: 0 all are ready, 1 there is trouble, 2 a builder could not be asked."
    )

    cmd_options: ClassVar[tuple[dict[str, Any], ...]] = OPTIONS

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Look, mend if told to, and say."""
        from ...config import settings
        from .diagnose import visit
        from .output import Sheet, as_json, status_of

        needs = self._needs(args)
        sheet = Sheet(sys.stdout, is_mending=options["fix"])
        stream = Sheet(sys.stderr, is_mending=True) if options["json"] else sheet
        tell = notice if sys.stderr.isatty() else lambda _: None
        with _output_aside(options["json"]):
            places = visit(settings(), needs, stream.line if options["fix"] else None, tell)
        if options["json"]:
            print(as_json(places))
        else:
            sheet.show(places)
        return status_of(places)

    def _needs(self, args: Sequence[str]) -> list[Need]:
        """Return what the project's tasks need of this machine.

        Raises:
            SettingsError: there is no task of one of the names.
            InvalidDodoFile: dodo.py is broken; doit shows it.
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
                f"gamebear doctor knows no task {error.not_found or args[0]!r}.",
                "Name another builder with builder=URL, such as ssh://pi@buildpi.",
            ) from error
        return needs(self.tasks, with_dependencies(control.tasks, control.selected_tasks))


@contextlib.contextmanager
def _output_aside(needed: bool) -> Iterator[None]:
    """Keep what programs print out of our standard output for the length of the block: it is for JSON alone."""
    if not needed:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
