"""`doit provenance`: statements beside the artifacts that say where these come from."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GamebearError, JobError, SettingsError
from ..report import printable
from .command import FAILED, ProjectCommand


class Provenance(ProjectCommand):
    """Writes the statement of each artifact of some tasks."""

    doc_purpose = "write beside each artifact where it comes from (in-toto, SLSA)"
    doc_usage = "[TASK ...]"
    doc_description = """For each artifact of the tasks, of all that were built without
an argument, writes ARTIFACT.intoto.json: its digest, the program,
inputs and sources with theirs, the images and Debian packages that
it was built in, builder and times, as an in-toto statement with SLSA
provenance. The builder is asked what it has not told before.

The setting provenance=true has every build write them."""
    cmd_options = ()
    needs_tasks = True

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Write the statements; return the exit status."""
        from ..action import Build

        for name in args:
            if name not in self.tasks:
                raise SettingsError(f"There is no task {name!r}.", "`doit list --all` shows those there are.")
        status = 0
        for name in args or self.tasks:
            builds = [action for action in self.tasks[name].actions if isinstance(action, Build)]
            try:
                if args and not builds:
                    raise JobError(f"{name} is not made by artifact().", "Only what a builder builds has provenance.")
                for build in builds:
                    for path in _written(name, build.plan, bool(args)):
                        print(printable(str(path)))
            except GamebearError as error:  # the others may well have theirs
                print(f"ERROR: {printable(str(error))}", file=sys.stderr)
                status = FAILED
        return status


def _written(name: str, plan: Any, named: bool) -> list[Path]:
    """Write the statements of a task; none of one that nobody named and that was never built."""
    from .. import provenance, tasklog
    from ..building import builder_of_this_run
    from ..config import settings
    from ..timing import Record

    record = Record.read(tasklog.path_of(name).with_suffix(".json"))
    chosen = settings()
    if record is None and not named:
        return []
    if record is None or record.state != "done" or plan.order(chosen).job.digest != record.digest:
        raise JobError(f"{name} is not up to date: what would be said of it is not so.", f"Run doit {name} first.")
    provenance.check(record)
    url = record.builder if "…" not in record.builder else chosen.builder_for(plan.arch or chosen.arch)
    return provenance.write(name, plan, record, builder_of_this_run(url))
