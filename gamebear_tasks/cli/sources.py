"""`gamebear sources`: fetch all pinned sources, to build without a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..config import settings
from ..doit_plugin.artifact import LOCK
from ..jobspec.plan import declared, read_lock
from ..util.text import size
from .all_sources import create_delayed
from .command import ProjectCommand


class Sources(ProjectCommand):
    """Fetches the project's sources into this machine's cache."""

    doc_purpose = "fetch all pinned sources into the cache, to build without a network"
    doc_usage = ""
    doc_description = """Fetches each source of the tasks that is not in the cache yet
(~/.cache/gamebear), as the setting sources chooses among
alternatives, and prints the sizes."""
    cmd_options = ()
    needs_tasks = True
    execute_tasks = True  # doit then leaves @create_after tasks to us

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Fetch them."""
        self.refuse(args)
        unknown = list(create_delayed(self.tasks))
        self.print_lines(_fetched())
        self.print_lines(unknown)
        return 0


def _fetched() -> Iterator[str]:
    from ..sources.alternatives import check_preference, choose
    from ..sources.base import FetchedSource
    from ..sources.cache import sources_folder

    preference = settings().sources
    check_preference(preference, declared)
    lock = read_lock(LOCK)
    for source in [choose(source, preference) for source in declared]:
        if isinstance(source, FetchedSource):
            yield f"{source}: {size(source.fetch(sources_folder(), lock).stat().st_size)}"
