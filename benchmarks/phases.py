"""Where the time of a run went, by the record that each task leaves beside its log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from project import Project

from .measure import Phases


def phases_of(project: Project, what: str, run: Callable[[], float]) -> Phases:
    """Do one run more, which returns its seconds, and read what its tasks say of their phases.

    Tasks that ran at the same time are added up.
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
