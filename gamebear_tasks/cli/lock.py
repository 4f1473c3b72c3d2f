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
    """Pins what the project's sources leave open."""

    doc_purpose = f"pin branches, tags and Debian packages in {LOCK_FILE}"
    doc_usage = "[-u] [--prune]"
    doc_description = f"""Asks upstream what each branch, tag and Debian package that a
source of this dodo.py names is now, and writes that to {LOCK_FILE}.
Commit the file: every build then takes exactly these sources.
Entries that are there already stay as they are without -u."""
    cmd_options: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "name": "update",
            "short": "u",
            "long": "update",
            "type": bool,
            "default": False,
            "help": "look again for what is pinned already",
        },
        {
            "name": "prune",
            "long": "prune",
            "type": bool,
            "default": False,
            "help": "drop the pins that no task of this dodo.py declares",
        },
    )
    needs_tasks = True
    execute_tasks = True  # doit then leaves @create_after tasks to us, which may fail without an end of all

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Write the lock file."""
        from ..sources.cache import sources_folder
        from ..sources.resolver import resolve

        self.refuse(args)
        unknown = list(create_delayed(self.tasks))
        prune = options["prune"] and not unknown
        self.print_lines(resolve(list(declared), LOCK, sources_folder(), update=options["update"], prune=prune))
        self.print_lines(unknown)
        if options["prune"] and unknown:
            self.print_lines(["no pin was dropped, as not all sources are known"])
        return 0
