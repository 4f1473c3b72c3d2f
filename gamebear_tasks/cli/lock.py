"""`gamebear lock`: pin branches, tags and Debian packages in the lock file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..doit_plugin.artifact import LOCK
from ..jobspec.plan import declared
from ..sources.declare import LOCK_FILE
from .all_sources import create_delayed
from .command import ProjectCommand


class Lock(ProjectCommand):
    """Pins the branches, tags and Debian packages of the project's sources."""

    doc_purpose = f"pin branches, tags and Debian packages in {LOCK_FILE}"
    doc_usage = "[-u] [--prune]"
    doc_description = f"""Looks up the current commit of each branch and tag, and the
current version of each Debian package, that the sources of
dodo.py name, and writes them to {LOCK_FILE}. Commit the file:
every build then uses exactly these sources. Existing pins change
only with -u."""
    cmd_options: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "name": "update",
            "short": "u",
            "long": "update",
            "type": bool,
            "default": False,
            "help": "update existing pins too",
        },
        {
            "name": "prune",
            "long": "prune",
            "type": bool,
            "default": False,
            "help": "remove pins of sources that dodo.py no longer declares",
        },
    )
    needs_tasks = True
    execute_tasks = True  # doit then does not create @create_after tasks; `create_delayed` tolerates failures

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Write the lock file."""
        from ..sources.cache import sources_folder
        from ..sources.resolver import resolve

        self.refuse(args)
        skipped = list(create_delayed(self.tasks))
        prune = options["prune"] and not skipped
        self.print_lines(resolve(list(declared), LOCK, sources_folder(), update=options["update"], prune=prune))
        self.print_lines(skipped)
        if options["prune"] and skipped:
            self.print_lines(["no pin was removed, because tasks were skipped"])
        return 0
