"""Time of a run by phase, from the records beside the tasks' logs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from project import Project

from .measure import Phases


def phases_of(project: Project, what: str, run: Callable[[], float]) -> Phases:
    """Perform one more run, which returns its seconds, and read the phases from its tasks' records.

    Phases of concurrent tasks are added up.
    """
    for record in records(project):
        record.unlink()
    wall = run()
    spent: dict[str, float] = {}
    for record in records(project):
        for phase in json.loads(record.read_text()).get("phases", []):
            spent[phase["name"]] = spent.get(phase["name"], 0.0) + phase["seconds"]
    return Phases(what, wall, spent)


def records(project: Project) -> list[Path]:
    """Return the records of a project's tasks."""
    return sorted((project.folder / "build" / "logs").glob("*.json"))
