"""Transfer of large files on one connection, compared with scp's defaults on the same sshd and disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from project import Project

from .machine import Builder
from .measure import Goal, Result, Row, alternate, checked, seconds
from .phases import phases_of
from .place import Place

MIB = 1 << 20
COUNT = 5
LONG_COUNT = 3
SMALL = 1000

GOAL = Goal("ratio", 1 / 0.9)
"""At least nine tenths of scp's speed."""

DODO = """\
from gamebear_tasks import artifact

def task_up():
    return artifact("small.py", inputs=["big"], outputs=["build/small"])

def task_down():
    return artifact("big.py", args={{"size": {size}}}, outputs=["build/big"])
"""

UP = "Path('small').write_text(str(Path('big').stat().st_size))\n"

DOWN = """\
#| arg: size: int
import os
with open('big', 'wb') as file:
    while file.tell() < size:
        file.write(os.urandom(min(1 << 20, size - file.tell())))
"""

WHOLE_UP = "ours: a whole run of doit: hashing by doit and the client, upload, hashing there, a job that reads the file"
WHOLE_DOWN = "ours: a whole run of doit, which hashes the received file and syncs it to disk; scp alone does not"
NET = "each less what the same run takes with 1 kB instead (medians): the start of programs, connecting, the job"


def transfer(place: Place) -> Result:
    """Measure 256 MiB in each direction, and 2 GiB down."""
    rows, phases = [], []
    for size, count, up in ((256 * MIB, COUNT, True), (256 * MIB, COUNT, False), (2048 * MIB, LONG_COUNT, False)):
        what = f"{size // MIB} MiB {'up' if up else 'down'}"
        project = project_with(place.found, size)
        small = project_with(place.found, SMALL)
        copier = Copier(place.found, place.folder / "scp", size)
        ours = _up if up else _down
        sides: list[Callable[[], float]] = [
            partial(ours, project, size),
            copier.up if up else copier.down,
            copier.up_and_sync if up else copier.down_and_sync,
        ]
        mine, scp, synced = alternate(count, *sides)
        run = phases_of(project, what, sides[0])
        copier.clear()
        tiny = Copier(place.found, place.folder / "scp", SMALL)
        fixed, scp_fixed = alternate(COUNT, partial(ours, small, SMALL), tiny.up if up else tiny.down)
        tiny.clear()
        for path in project.folder.rglob("big"):
            path.unlink()
        rows += [
            Row(what, "scp", mine, scp, GOAL, note=WHOLE_UP if up else WHOLE_DOWN),
            Row(what, "scp, then sync", mine, synced),
            Row(f"… less fixed costs, {what}", "scp", _net(mine, fixed), _net(scp, scp_fixed), note=NET),
        ]
        phases.append(run)
    return Result(rows, phases)


def _net(values: list[float], fixed: list[float]) -> list[float]:
    middle = sorted(fixed)[len(fixed) // 2]
    return [max(0.001, value - middle) for value in values]


def project_with(builder: Builder, size: int) -> Project:
    """Return a project that can send, and has already built, a file of the specified bytes."""
    project = builder.project("transfer")
    project.write("dodo.py", DODO.format(size=size))
    project.write("small.py", UP)
    project.write("big.py", DOWN)
    project.doit("down").ok()
    return project


def _up(project: Project, size: int) -> float:
    """Send a new file to a job."""
    write_random(project.folder / "big", size)
    taken = seconds(lambda: project.doit("up").ok())
    assert (project.folder / "build" / "small").read_text() == str(size)
    return taken


def _down(project: Project, size: int) -> float:
    """Fetch the built file."""
    project.doit("clean", "down").ok()
    taken = seconds(lambda: project.doit("down").ok())
    assert (project.folder / "build" / "big").stat().st_size == size
    return taken


def write_random(path: Path, size: int) -> None:
    """Write a new, incompressible file and sync it to disk."""
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(os.urandom(min(MIB, size - file.tell())))
        os.fsync(file.fileno())


class Copier:
    """scp of one file in each direction."""

    def __init__(self, builder: Builder, folder: Path, size: int) -> None:
        folder.mkdir(exist_ok=True)
        self.config = str(builder.ssh_config())
        self.here = folder / "big"
        self.fetched = folder / "fetched"
        self.there = builder.account.home / "big"
        write_random(self.here, size)
        self._up()

    def up(self) -> float:
        """Send the file."""
        self.there.unlink(missing_ok=True)
        return seconds(self._up)

    def up_and_sync(self) -> float:
        """Send the file and sync it to the builder's disk."""
        self.there.unlink(missing_ok=True)
        return seconds(lambda: (self._up(), checked(["ssh", "-F", self.config, "builder", "sync", str(self.there)])))

    def down(self) -> float:
        """Fetch the file."""
        self.fetched.unlink(missing_ok=True)
        return seconds(self._down)

    def down_and_sync(self) -> float:
        """Fetch the file and sync it to the local disk."""
        self.fetched.unlink(missing_ok=True)
        return seconds(lambda: (self._down(), checked(["sync", str(self.fetched)])))

    def clear(self) -> None:
        """Remove the files."""
        for path in (self.here, self.fetched, self.there):
            path.unlink(missing_ok=True)

    def _up(self) -> str:
        return checked(["scp", "-q", "-F", self.config, str(self.here), f"builder:{self.there}"])

    def _down(self) -> str:
        return checked(["scp", "-q", "-F", self.config, f"builder:{self.there}", str(self.fetched)])
