"""Memory of the client for a large artifact and a large input."""

from __future__ import annotations

from project import Project

from .measure import Goal, Result, Row
from .place import Place
from .transfer import MIB, project_with, write_random

SIZE = 1024 * MIB
COUNT = 3

NOTE = "the most resident memory of the doit process, which is started from a small one"


def memory(place: Place) -> Result:
    """Measure 1 GiB in each direction."""
    project = project_with(place.found, SIZE)
    goal = Goal("most", 80.0)
    idle = [_doit(project, "list") for _ in range(COUNT)]
    down = []
    for _ in range(COUNT):
        project.doit("clean", "down").ok()
        down.append(_doit(project, "down"))
    write_random(project.folder / "big", SIZE)
    up = [_doit(project, "up")]
    for path in project.folder.rglob("big"):
        path.unlink()
    return Result(
        [
            Row("memory of the client, 1 GiB down", "", down, goal=goal, unit="MiB", note=NOTE),
            Row("memory of the client, 1 GiB up", "", up, goal=goal, unit="MiB", note=NOTE),
            Row("memory of `doit list`", "", idle, unit="MiB", note=NOTE),
        ]
    )


def _doit(project: Project, *arguments: str) -> float:
    run, most = project.measured(*project.command(*arguments))
    run.ok()
    return most / MIB
