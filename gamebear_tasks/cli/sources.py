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
    doc_description = """Fetches each source of dodo.py that is not in this machine's cache
yet, and prints the sizes. Of alternatives (either()), it fetches
the one that the setting sources selects."""
    cmd_options = ()
    needs_tasks = True
    execute_tasks = True  # doit then does not create @create_after tasks; `create_delayed` tolerates failures

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Fetch the sources."""
        self.refuse(args)
        skipped = list(create_delayed(self.tasks))
        self.print_lines(_fetched())
        self.print_lines(skipped)
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
