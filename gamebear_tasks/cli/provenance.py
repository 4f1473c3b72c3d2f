"""`gamebear provenance`: write provenance statements next to the artifacts."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GamebearError, JobError, SettingsError
from ..util.messages import print_error
from ..util.text import in_line
from .command import FAILED, ProjectCommand


class Provenance(ProjectCommand):
    """Writes the provenance statement of each artifact of some tasks."""

    doc_purpose = "write a provenance statement next to each artifact (in-toto, SLSA)"
    doc_usage = "[TASK ...]"
    doc_description = """Writes ARTIFACT.intoto.json next to each artifact of the tasks;
without a TASK, of all tasks that were built. The file is an
in-toto statement with SLSA provenance: digests of the artifact,
its program, inputs and sources, the images and Debian packages
that the build used, the builder, and times. Missing details are
requested from the builder.

With the setting provenance=true, every build writes these files."""
    cmd_options = ()
    needs_tasks = True

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Write the statements; return the exit status."""
        for name in args:
            if name not in self.tasks:
                raise SettingsError(f"Task {name!r} does not exist.", "List the tasks: gamebear list --all")
        status = 0
        for name in args or self.tasks:
            try:
                written = list(_written(name, self.tasks[name].actions, bool(args)))
                if args and not written:
                    raise JobError(
                        f"Task {name} has no provenance: it uses neither artifact() nor sd_image().",
                        "Name a task that does: gamebear provenance TASK",
                    )
                for path in written:
                    print(in_line(str(path)))
            except GamebearError as error:  # continue with the other tasks
                print_error(error)
                status = FAILED
        return status


def _written(name: str, actions: Iterable[Any], named: bool) -> Iterator[Path]:
    """Write the statements of a task and yield their paths. A task that is not named and never ran has none."""
    from ..client import provenance
    from ..client.build import builder_of_this_run, typed_settings
    from ..client.order import order_of
    from ..config import settings
    from ..doit_plugin.action import Build
    from ..records import run_journal
    from ..sdcard.recipe import Recipe

    record = run_journal.last(name)
    if record is None and not named:
        return
    stale = JobError(
        f"Task {name} is not up to date, so its provenance is unknown.",
        f"Run {shlex.join(['doit', name, *typed_settings()])} first, or add the settings of its last build, such as"
        " sources=debian.",
    )
    for action in actions:
        recipe = next((each for each in getattr(action, "args", None) or () if isinstance(each, Recipe)), None)
        if isinstance(action, Build):
            chosen = settings()
            if record is None or record.state != "done" or order_of(action.plan, chosen).job.digest != record.digest:
                raise stale
            provenance.check(record)
            url = record.builder if "…" not in record.builder else chosen.builder_for(action.plan.arch or chosen.arch)
            yield from provenance.write(name, action.plan, record, builder_of_this_run(url))
        elif recipe is not None:
            from ..sdcard import provenance as statement

            if record is None or record.state != "done" or record.job != recipe.document():
                raise stale
            yield statement.write(recipe, record)
