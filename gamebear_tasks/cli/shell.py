"""`gamebear shell`: open a shell in the retained container of a failed job, on its builder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..builders.base import Keeper, Kept, KeptContainer
from ..client.build import builder_of_this_run, typed_settings
from ..client.order import order_of
from ..config import settings
from ..errors import BuilderError, GamebearError, JobError, SettingsError
from ..jobspec.plan import Plan
from ..records import run_journal
from ..runner.maintenance.retained_containers import AGE, MOST
from ..util.messages import notice
from ..util.urls import shown
from .command import ProjectCommand, number

COMMAND_LIMIT = 2000
"""Maximum characters of a command that are displayed."""


class Shell(ProjectCommand):
    """Opens a shell, or runs one command, in a retained container."""

    name = "shell"
    doc_purpose = "open a shell in the container in which a task failed"
    doc_usage = "TASK [-- COMMAND ...]"
    doc_description = f"""
The task must have failed in a run with `keep_failed=yes`. The
shell runs on the builder, in the working directory, as the user,
and with the files, mounts and variables of the command that
failed. In bash, the up arrow recalls that command. `--` runs a
COMMAND instead of a shell, with the standard input and output of
`gamebear shell`, which then ends with the command's exit status.

A builder retains the containers of the last {MOST} failed jobs for
{AGE / 86400:g} days. It removes them earlier when the task is built again or
`gamebear prune` removes the job, but never while a shell is open.
"""
    cmd_options: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "name": "container",
            "short": "c",
            "long": "container",
            "type": number("--container"),
            "default": 0,
            "metavar": "NUMBER",
            "help": "number of the job's container, starting with 1 for the first that it created;"
            " default: the container that ran the last command",
        },
    )
    needs_tasks = True

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Open the shell; return its exit status."""
        task, words = _parse(args)
        plan = self.plan_of(task)
        chosen = settings()
        url = chosen.builder_for(plan.arch or chosen.arch)
        builder = builder_of_this_run(url)
        if not isinstance(builder, Keeper):
            raise BuilderError(
                f"Builder {shown(url)} cannot retain containers.", "Use a builder that can: local:, ssh:// or dask://."
            )
        digest, kept = self._find(builder, url, task, plan)
        number = options["container"] - 1 if options["container"] else kept.last
        if not 0 <= number < len(kept.containers):
            raise SettingsError(
                f"Task {task} has no container {options['container']}, only {len(kept.containers)}.",
                f"Use a number from 1 to {len(kept.containers)}: gamebear shell --container 1 {shlex.quote(task)}",
            )
        if not words and sys.stdin.isatty():
            _describe(task, url, kept, number)
        return builder.enter(digest, number, words)

    def _find(self, builder: Keeper, url: str, task: str, plan: Plan) -> tuple[str, Kept]:
        """Return the digest and containers of a task's last failed job, even if the task's files have changed since."""
        current = ""
        failure: GamebearError | None = None
        try:
            current = order_of(plan, settings()).job.digest
        except GamebearError as error:  # an input is missing, but the job of the last run may still be retained
            failure = error
        record = run_journal.last(task)
        last = record.digest if record is not None else ""
        for digest in dict.fromkeys(filter(None, (current, last))):
            kept = builder.kept(digest)
            if kept is not None:
                if digest != current:
                    notice(
                        f"inputs or settings of {task} (such as sources=debian) have changed since it failed;"
                        " this is the container of the failed job"
                    )
                return digest, kept
        if not current and not last and failure is not None:
            raise failure
        quoted = shlex.join([task, *typed_settings()])
        raise JobError(
            f"Task {task} has no retained container on {shown(url)}.",
            f"Run doit {quoted} keep_failed=yes; if the task fails, run gamebear shell {quoted}",
        )


def _parse(args: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the task, and the command's arguments."""
    before, words = list(args), []
    if "--" in before:
        place = before.index("--")
        before, words = before[:place], before[place + 1 :]
        if "--" in sys.argv:  # doit removes arguments with a =, as its variables
            words = sys.argv[sys.argv.index("--") + 1 :]
        if not words:
            raise SettingsError(
                "gamebear shell has no command after --.", "Run gamebear shell TASK -- COMMAND, or omit --."
            )
    if len(before) != 1:
        raise SettingsError(
            f"gamebear shell needs the name of one task, got {len(before) or 'none'}.",
            "Run gamebear shell [--container NUMBER] TASK, or gamebear shell TASK -- COMMAND.",
        )
    return before[0], words


def _describe(task: str, url: str, kept: Kept, number: int) -> None:
    """Print a description of the container, and the numbers of the others."""
    container = kept.containers[number]
    total = len(kept.containers)
    name = f"container {number + 1} of {total}" if total > 1 else "container"
    notice(f"{name} of {task} on {shown(url)}: {_about(container)}")
    if container.command:
        line = " ".join(map(_typed, container.command))[:COMMAND_LIMIT]
        notice(f"to repeat its last command, press the up arrow in bash, or run: {line}")
    for other, each in enumerate(kept.containers):
        if other != number:
            notice(f"other container, with --container {other + 1}: {_about(each)}")


def _typed(word: str) -> str:
    """Quote a word for a shell, on one line."""
    if "\n" not in word and "\t" not in word:
        return shlex.quote(word)
    escapes = {"\\": r"\\", "'": r"\'", "\n": r"\n", "\t": r"\t"}
    return f"$'{''.join(escapes.get(char, char) for char in word)}'"


def _about(container: KeptContainer) -> str:
    """Describe a container: its image, and the result of its last command."""
    image = " ".join(container.image.split())
    if not container.command:
        return f"from {image}, ran no command"
    line = " ".join(shlex.join(container.command)[:COMMAND_LIMIT].split())
    line = f"{line[:100]}…" if len(line) > 100 else line
    if container.status is None:
        result = "was terminated"
    else:
        result = "succeeded" if container.status == 0 else f"failed with status {container.status}"
    return f"from {image}, `{line}` {result}"
