"""`doit doctor`: whether each builder is ready, what it lacks and how that is mended; mended when told to."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from ..report import notice
from .command import ProjectCommand

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
    doc_usage = "[builder=URL] [arch=ARCH]"
    doc_description = (
        "Looks at each builder that is set (builder=ssh://pi@buildpi, without a dodo.py too) and at this machine:"
        " reachable, host key, log-in, Python, buildah, user namespaces, storage, disk, architectures, base image,"
        " slots, jobs, sizes. Each trouble has its remedy.\n\n"
        "Nothing is changed without --fix, which installs what is missing as root, and shows each command as it is run;"
        " sudo asks for a password at the terminal where it has to.\n\n"
        "Exit status: 0 all are ready, 1 there is trouble, 2 a builder could not be asked."
    )

    cmd_options: ClassVar[tuple[dict[str, Any], ...]] = OPTIONS

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Look, mend if told to, and say."""
        from ..config import settings
        from ..doctor.sheet import Sheet, as_json, status_of
        from ..doctor.visit import visit
        from ..errors import SettingsError

        if args:
            raise SettingsError(
                f"doit doctor takes no {args[0]!r}.", "Name another builder with builder=URL, such as ssh://pi@buildpi."
            )
        sheet = Sheet(sys.stdout, is_mending=options["fix"])
        stream = Sheet(sys.stderr, is_mending=True) if options["json"] else sheet
        tell = notice if sys.stderr.isatty() else lambda _: None
        with _output_aside(options["json"]):
            places = visit(settings(), self._uses(), stream.line if options["fix"] else None, tell)
        if options["json"]:
            print(as_json(places))
        else:
            sheet.show(places)
        return status_of(places)

    def _uses(self) -> set[str]:
        """Return the names of ours that `dodo.py` has imported."""
        import gamebear_tasks

        namespace: Mapping[str, Any] = getattr(self.loader, "namespace", None) or {}
        ours = {name for name in gamebear_tasks.__all__ if name in namespace}
        return {name for name in ours if getattr(gamebear_tasks, name) is namespace[name]}


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
