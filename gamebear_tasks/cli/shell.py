"""`gamebear shell`: a shell in the container in which a task's job failed, on the builder that has kept it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..builders.base import Keeper, Kept, KeptContainer
from ..client.build import builder_of_this_run, typed_settings
from ..config import settings
from ..doit_plugin.action import Build
from ..errors import BuilderError, GamebearError, JobError, SettingsError
from ..jobspec.plan import Plan
from ..records import run_journal
from ..runner.maintenance.retained_containers import AGE, MOST
from ..util.messages import notice
from ..util.urls import shown
from .command import ProjectCommand

LINE = 2000
"""The most of a command that is shown, in characters."""


class Shell(ProjectCommand):
    """Opens a shell, or runs one command, in a container that was kept."""

    name = "shell"
    doc_purpose = "open a shell in the container in which a task failed"
    doc_usage = "TASK [-- COMMAND ...]"
    doc_description = f"""
The container is there if the task was run with
`keep_failed=yes` and failed. The shell runs on the builder,
where and as whom the command ran that failed, with the same
files, mounts and variables; in bash, one press of the up arrow
has that command. Behind `--`, a COMMAND is run instead of a
shell, and its exit status is this command's; without a terminal
here, it reads and writes what this command does.

A builder keeps what the last {MOST} failed jobs left, for
{AGE / 86400:g} days. It goes when the task is built again, and when the job
goes (`gamebear prune`); never while a shell is open in it.
"""
    cmd_options: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "name": "container",
            "short": "c",
            "long": "container",
            "type": int,
            "default": 0,
            "help": "which of the job's containers, from 1 in the order of their making;"
            " by default the one in which a command ran last",
        },
    )
    needs_tasks = True

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Open the shell; return its exit status."""
        task, words = _asked(args)
        plan = self._plan(task)
        chosen = settings()
        url = chosen.builder_for(plan.arch or chosen.arch)
        builder = builder_of_this_run(url)
        if not isinstance(builder, Keeper):
            raise BuilderError(f"The builder {shown(url)} keeps no containers.", "local:, ssh:// and dask:// do.")
        digest, kept = self._find(builder, url, task, plan)
        number = options["container"] - 1 if options["container"] else kept.last
        if not 0 <= number < len(kept.containers):
            raise SettingsError(
                f"{task} has left {_count(len(kept.containers))}, and there is no container {options['container']}.",
                f"Say --container with a number from 1 to {len(kept.containers)}, before the task's name.",
            )
        if not words and sys.stdin.isatty():
            _say_where(task, url, kept, number)
        return builder.enter(digest, number, words)

    def _plan(self, task: str) -> Plan:
        found = self.tasks.get(task)
        if found is not None:
            for action in found.actions:
                if isinstance(action, Build):
                    return action.plan
        named = f"The task {task} builds nothing on a builder" if found is not None else f"There is no task {task}"
        having = [name for name, each in self.tasks.items() if any(isinstance(one, Build) for one in each.actions)]
        raise SettingsError(f"{named}.", f"Those that build on one: {', '.join(having) or 'none'}.")

    def _find(self, builder: Keeper, url: str, task: str, plan: Plan) -> tuple[str, Kept]:
        """Return the job of a task's last failure, and what is kept of it; also where its files are others by now."""
        now = ""
        why: GamebearError | None = None
        try:
            now = plan.order(settings()).job.digest
        except GamebearError as error:  # a file of it is gone: the last run's job may be there all the same
            why = error
        record = run_journal.last(task)
        last = record.digest if record is not None else ""
        for digest in dict.fromkeys(filter(None, (now, last))):
            kept = builder.kept(digest)
            if kept is not None:
                if digest != now:
                    notice(
                        f"what {task} is built from has changed since it failed, or was set otherwise on the command"
                        " line (such as sources=debian); this is its container of then"
                    )
                return digest, kept
        if not now and not last and why is not None:
            raise why
        quoted = shlex.join([task, *typed_settings()])
        raise JobError(
            f"No container of {task} is kept on {shown(url)}.",
            f"`doit {quoted} keep_failed=yes` has it kept if the task fails (what the last {MOST} failed jobs left, for"
            f" {AGE / 86400:g} days), then `gamebear shell {quoted}` opens a shell in it.",
        )


def _asked(args: Sequence[str]) -> tuple[str, list[str]]:
    """Return the task that is meant, and the words of the command."""
    before, words = list(args), []
    if "--" in before:
        place = before.index("--")
        before, words = before[:place], before[place + 1 :]
        if "--" in sys.argv:  # doit takes whatever has a = in it for a variable of its own
            words = sys.argv[sys.argv.index("--") + 1 :]
        if not words:
            raise SettingsError("There is no command behind --.", "Say gamebear shell TASK -- COMMAND, or no --.")
    if len(before) != 1:
        what = "takes one task's name" if before else "does not say which task's container"
        raise SettingsError(
            f"gamebear shell {what}.",
            "Say gamebear shell [--container N] TASK, or gamebear shell TASK -- COMMAND.",
        )
    return before[0], words


def _say_where(task: str, url: str, kept: Kept, number: int) -> None:
    """Say which container this is, what happened in it, and which others there are."""
    container = kept.containers[number]
    which = f"container {number + 1} of the {len(kept.containers)}" if len(kept.containers) > 1 else "the container"
    notice(f"this is {which} that {task} has left on {shown(url)}, {_about(container)}")
    if container.command:
        line = " ".join(map(_typed, container.command))[:LINE]
        notice(f"to run its last command again, press the up arrow in bash, or say: {line}")
    for other, each in enumerate(kept.containers):
        if other != number:
            notice(f"with --container {other + 1} it is one {_about(each)}")


def _typed(word: str) -> str:
    """Return a word as it is typed into a shell, on one line."""
    if "\n" not in word and "\t" not in word:
        return shlex.quote(word)
    escapes = {"\\": r"\\", "'": r"\'", "\n": r"\n", "\t": r"\t"}
    return f"$'{''.join(escapes.get(char, char) for char in word)}'"


def _about(container: KeptContainer) -> str:
    made = f"made from {' '.join(container.image.split())}"
    if not container.command:
        return f"{made}, in which nothing was run"
    line = shlex.join(container.command)
    shown_line = " ".join(line[:LINE].split())
    shown_line = f"{shown_line[:100]}…" if len(shown_line) > 100 else shown_line
    if container.status is None:
        return f"{made}, in which `{shown_line}` was ended"
    how = "went well" if container.status == 0 else f"failed with status {container.status}"
    return f"{made}, in which `{shown_line}` {how}"


def _count(number: int) -> str:
    return "one container" if number == 1 else f"{number} containers"
