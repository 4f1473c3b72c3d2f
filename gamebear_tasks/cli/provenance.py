"""`gamebear provenance`: statements beside the artifacts that say where these come from."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GamebearError, JobError, SettingsError
from ..util.messages import complain
from ..util.text import in_line
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
        for name in args:
            if name not in self.tasks:
                raise SettingsError(f"There is no task {name!r}.", "`doit list --all` shows those there are.")
        status = 0
        for name in args or self.tasks:
            try:
                written = list(_written(name, self.tasks[name].actions, bool(args)))
                if args and not written:
                    raise JobError(
                        f"{name} is made by neither artifact() nor sd_image().",
                        "Nothing is known of where it comes from.",
                    )
                for path in written:
                    print(in_line(str(path)))
            except GamebearError as error:  # the others may well have theirs
                complain(error)
                status = FAILED
        return status


def _written(name: str, actions: Iterable[Any], named: bool) -> Iterator[Path]:
    """Write the statements of a task and give where they are; none of one that nobody named and that never ran."""
    from ..client import provenance
    from ..client.build import builder_of_this_run, typed_settings
    from ..config import settings
    from ..doit_plugin.action import Build
    from ..records import run_journal
    from ..sdcard.recipe import Recipe

    record = run_journal.last(name)
    if record is None and not named:
        return
    stale = JobError(
        f"{name} is not up to date: what would be said of it is not so.",
        f"Run {shlex.join(['doit', name, *typed_settings()])} first; settings of the command line that it was built"
        " with, such as sources=debian, have to be said here too.",
    )
    for action in actions:
        recipe = next((each for each in getattr(action, "args", None) or () if isinstance(each, Recipe)), None)
        if isinstance(action, Build):
            chosen = settings()
            if record is None or record.state != "done" or action.plan.order(chosen).job.digest != record.digest:
                raise stale
            provenance.check(record)
            url = record.builder if "…" not in record.builder else chosen.builder_for(action.plan.arch or chosen.arch)
            yield from provenance.write(name, action.plan, record, builder_of_this_run(url))
        elif recipe is not None:
            from ..sdcard import provenance as statement

            if record is None or record.state != "done" or record.job != recipe.document():
                raise stale
            yield statement.write(recipe, record)
