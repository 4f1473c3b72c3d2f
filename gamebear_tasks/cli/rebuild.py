"""`gamebear rebuild`: rebuild a task although a result exists, or check that two builds have identical outputs."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from doit import doit_cmd

from ..builders.base import Output
from ..client.build import Building
from ..client.compare_outputs import differences
from ..client.install_outputs import Fetch, place
from ..errors import BuilderError, SettingsError
from ..jobspec.plan import Plan
from ..records.task_record import Record
from ..util.locations import LOGS
from ..util.messages import notice
from ..util.temporary_folders import make_folder, remove_abandoned
from ..util.text import size
from .command import ProjectCommand

DIFFERENT = 1
"""Exit status if the outputs of two builds differ."""

FOLDER = ".rebuild-"
"""Prefix of the temporary folder of the downloaded outputs."""


class Rebuild(ProjectCommand):
    """Rebuilds a task, or builds it twice and compares the outputs."""

    name = "rebuild"
    doc_purpose = "rebuild a task, or check that its build is reproducible"
    doc_usage = "TASK [--check]"
    doc_description = """
Runs TASK like `gamebear TASK fresh=yes`: the task and the tasks
that it depends on are rebuilt, although results exist.

With `--check`, builds the task's job twice and compares all
outputs by SHA-256. The first build may be an existing result.
Nothing is installed. Prints for each output whether it is
identical or where it differs: sizes, first differing offset and,
for tar archives (plain, gzip, bzip2), the first differing
members. Exit status: 0 if all outputs are identical, 1 if not.
"""
    cmd_options: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "name": "check",
            "short": "",
            "long": "check",
            "type": bool,
            "default": False,
            "help": "build twice, compare the outputs, and install nothing",
        },
    )
    needs_tasks = True

    def __init__(self, task_loader: Any, **kwargs: Any) -> None:
        super().__init__(task_loader, **kwargs)
        self._doit_arguments = {"task_loader": task_loader, **kwargs}

    def parse_execute(self, in_args: Sequence[str]) -> int:
        """Accept `--check` after the task too; return the exit status."""
        return super().parse_execute(self.options_first(in_args))

    def execute(self, opt_values: Mapping[str, Any], pos_args: Sequence[str]) -> int:
        """Run the task with doit, or check it; return the exit status."""
        if opt_values["check"]:
            return super().execute(opt_values, pos_args)
        from .main import GuardedRun

        task = _one_task(pos_args)
        doit_cmd.set_var("fresh", "yes")
        run = GuardedRun(**self._doit_arguments)
        params, args = run.cmdparser.parse([task])
        params.update({name: opt_values[name] for name in (option["name"] for option in self.loader.cmd_options)})
        return run.execute(params, args)

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Build the task twice and compare; return the exit status."""
        task = _one_task(args)
        plan = self.plan_of(task)
        with _temporary_folder() as folder:
            first = _Build(plan, task, folder / "first")
            first.build()
            origin = {"fetched": "is an existing result", "followed": "was already running"}.get(
                first.origin, "is done"
            )
            notice(f"the first build of {task} {origin}; building it again")
            second = _Build(plan, task, folder / "second", first)
            second.build()
            lines = {name: _compared(name, first, second) for name in plan.targets}
        different = sum(len(found) > 0 for found in lines.values())
        for name, target in plan.targets.items():
            found = lines[name]
            output = first.outputs[name]
            print(f"{target}: {found[0]}" if found else f"{target}: identical ({size(output.size)}, {output.sha256})")
            self.print_lines(f"  {line}" for line in found[1:])
        if different:
            print(f"different: {different} of {len(lines)} outputs of {task}")
            return DIFFERENT
        print(f"identical: all outputs of {task}")
        return 0


def _one_task(args: Sequence[str]) -> str:
    if len(args) != 1:
        raise SettingsError(
            f"gamebear rebuild needs one task, got {shlex.join(args) or 'none'}.",
            "Run gamebear rebuild TASK, or gamebear rebuild TASK --check.",
        )
    return args[0]


class _Build(Building):
    """One of the two builds: its outputs are downloaded, not installed, and it leaves no record.

    Args:
        plan: The task's declaration.
        task: The task's name.
        folder: New folder for the outputs. Folder outputs stay packed.
        first: The first build, if this is the second one: force a rebuild, and download only outputs that differ.
    """

    def __init__(self, plan: Plan, task: str, folder: Path, first: _Build | None = None) -> None:
        super().__init__(plan, task, sys.stderr)
        self.chosen = replace(self.chosen, fresh=first is not None)
        self.folder = folder
        self.first = first
        self.outputs: Mapping[str, Output] = {}
        self.attempt = ""

    def build(self) -> None:
        """Build the job and download its outputs; raises GamebearError or OSError."""
        self.folder.mkdir()
        with self.watch.running():
            self._run()
        self.attempt = self._status.attempt if self._status else ""
        if self.first is not None and self.attempt == self.first.attempt:
            raise BuilderError(
                f"{self.task} was not built again: {self._url} returned the same result.",
                "Use a builder that supports fresh=yes: local:, ssh:// or dask://.",
            )

    def note(self, state: str, failure: str = "") -> Record:
        """Return a record without writing it."""
        return self.watch.record(self.task, "", self._url, state, self.origin)

    def _targets(self) -> dict[str, Path]:
        return {name: self.folder / name for name in self.plan.targets}

    def _install(self, outputs: Mapping[str, Output], fetch: Fetch) -> None:
        self.outputs = dict(outputs)
        known = self.first.outputs if self.first is not None else {}
        place(
            {
                name: path
                for name, path in self._targets().items()
                if name not in known or known[name].sha256 != outputs[name].sha256
            },
            outputs,
            fetch,
        )


def _compared(name: str, first: _Build, second: _Build) -> list[str]:
    """Return the differences of an output, a phrase each; empty if it is identical."""
    one, other = first.outputs[name], second.outputs[name]
    if one.sha256 != other.sha256:
        found = differences(first.folder / name, second.folder / name)
        return [f"differs: {found[0]}", *found[1:]]
    if one.executable != other.executable:
        return [f"differs: executable only in the {'first' if one.executable else 'second'} build"]
    return []


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Yield a new folder on the file system of the targets, and remove it at the end of the block."""
    parent = LOGS.parent
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent, FOLDER)
    folder, fd = make_folder(parent, FOLDER)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)
