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
    """Programs that tasks need for one thing.

    Attributes:
        name: of the finding about them.
        packages: Debian's package for each program.
        tasks: the names of the tasks.
        is_asked_for: whether one of them is to run.
    """

    name: str
    packages: Mapping[str, str]
    tasks: tuple[str, ...]
    is_asked_for: bool


def needs(tasks: Mapping[str, Any], asked: Collection[str]) -> list[Need]:
    """Return what tasks need.

    Args:
        tasks: all of a project's, by name.
        asked: the names of those that are to run.
    """
    packages: dict[str, dict[str, str]] = {}
    needing: dict[str, dict[str, None]] = {}
    for name, task in tasks.items():
        for thing, programs in _needs_of(task.actions):
            packages.setdefault(thing, {}).update(programs)
            needing.setdefault(thing, {})[name] = None
    return [
        Need(thing, packages[thing], tuple(names), not names.keys().isdisjoint(asked))
        for thing, names in needing.items()
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
