"""Requirements: the programs of this machine that a project's tasks need."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...doit_plugin.action import Build
from ...sdcard.recipe import Recipe
from ...sources.debian import Debian
from ...sources.git import Git
from ...util.subprocesses import PACKAGES


@dataclass(frozen=True)
class Need:
    """Programs that tasks need for one purpose.

    Attributes:
        name: Name of the finding about them.
        packages: Debian package of each program.
        tasks: Names of the tasks.
        is_required: Whether one of the tasks is selected to run.
    """

    name: str
    packages: Mapping[str, str]
    tasks: tuple[str, ...]
    is_required: bool


def needs(tasks: Mapping[str, Any], selected: Collection[str]) -> list[Need]:
    """Return the programs that tasks need.

    Args:
        tasks: All tasks of a project by name.
        selected: Names of the tasks to run.
    """
    packages: dict[str, dict[str, str]] = {}
    tasks_by_purpose: dict[str, dict[str, None]] = {}
    for name, task in tasks.items():
        for purpose, programs in _needs_of(task.actions):
            packages.setdefault(purpose, {}).update(programs)
            tasks_by_purpose.setdefault(purpose, {})[name] = None
    return [
        Need(purpose, packages[purpose], tuple(names), not names.keys().isdisjoint(selected))
        for purpose, names in tasks_by_purpose.items()
    ]


def _needs_of(actions: Collection[Any]) -> Iterator[tuple[str, dict[str, str]]]:
    for action in actions:
        for source in action.plan.sources.values() if isinstance(action, Build) else ():
            if isinstance(source, Git):
                yield "git", {"git": "git"}
            elif isinstance(source, Debian):
                yield "dpkg-source", {"dpkg-source": "dpkg-dev"}
        for recipe in getattr(action, "args", None) or ():
            if isinstance(recipe, Recipe):
                yield "image tools", {program: PACKAGES[program] for program in recipe.programs}
