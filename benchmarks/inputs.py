"""A thousand inputs of one kilobyte: all new, and with one changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from project import Project

from .machine import Builder
from .measure import Goal, Result, Row, alternate, checked, seconds
from .phases import phases_of
from .place import Place

FILES = 1000
SIZE = 1000
COUNT = 5

DODO = """\
from pathlib import Path
from gamebear_tasks import artifact

def task_small():
    return artifact("small.py", inputs=sorted(Path("in").iterdir()), outputs=["build/small"])
"""

SCRIPT = """\
import os
Path('small').write_text(str(len(os.listdir())))
"""

STEPS = """\
set -e
ssh() { command ssh -F "$CONFIG" "$@"; }
rsync --archive --rsh "ssh -F $CONFIG" in/ "builder:$FOLDER"
scp -q -F "$CONFIG" small.py "builder:$FOLDER"
ssh builder buildahscript-py "$FOLDER/small.py"
scp -q -F "$CONFIG" "builder:$FOLDER/small" .
"""
"""A job whose inputs stay on the builder between runs, as a baseline that uses rsync."""

WHOLE = "ours: a whole run of doit, with the job that takes the inputs and its artifact; theirs: the copying alone"

NET = (
    "each less what the same run takes with one input of the same size instead (medians):"
    " the start of programs, connecting, the job"
)


def inputs(place: Place) -> Result:
    """Compare with rsync, scp, and a job by rsync, ssh and scp."""
    builder = place.found
    folder = place.folder / "inputs"
    folder.mkdir()
    project, one = (builder.project(name) for name in ("inputs", "one-input"))
    for each in (project, one):
        each.write("dodo.py", DODO)
        each.write("small.py", SCRIPT)
    _fill(one.folder / "in", 1)
    _fill(project.folder / "in", 10)
    copier = Copier(builder, project, folder)

    def ours() -> float:
        return seconds(lambda: project.doit().ok())

    def ours_new() -> float:
        _fill(project.folder / "in", FILES)
        return ours()

    def ours_one_input() -> float:
        _fill(one.folder / "in", 1)
        return seconds(lambda: one.doit().ok())

    def ours_changed() -> float:
        _change(project.folder / "in")
        return ours()

    ours_new()
    new = alternate(COUNT, ours_new, copier.rsync_new, copier.scp, copier.job_new)
    changed = alternate(COUNT, ours_changed, copier.rsync_changed, copier.scp, copier.job_changed)
    fixed = alternate(COUNT, ours_one_input, copier.rsync_one)
    rows = []
    for what, values in ((f"{FILES} inputs of 1 kB, new", new), (f"{FILES} inputs, one changed", changed)):
        mine, rsync, scp, job = values
        rows += [
            Row(what, "rsync", mine, rsync, Goal("ratio", 1.0), note=WHOLE),
            Row(what, "scp -r", mine, scp, note=WHOLE),
            Row(what, "the same job: rsync, ssh, scp", mine, job, Goal("ratio", 1.0)),
        ]
    mine, rsync, _, _ = new  # not `changed`: rsync then needs no longer than for one file, so nothing would be left
    what = f"… less fixed costs, {FILES} inputs of 1 kB, new"
    rows.append(Row(what, "rsync", _net(mine, fixed[0]), _net(rsync, fixed[1]), note=NET))
    run = phases_of(project, f"{FILES} inputs of 1 kB, new", ours_new)
    shutil.rmtree(folder)
    return Result(rows, [run])


def _net(values: list[float], fixed: list[float]) -> list[float]:
    middle = sorted(fixed)[len(fixed) // 2]
    return [max(0.001, value - middle) for value in values]


def _fill(folder: Path, count: int) -> None:
    """Replace a folder's content with new files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number in range(count):
        (folder / f"input-{number}").write_bytes(os.urandom(SIZE))


def _change(folder: Path) -> None:
    (folder / "input-0").write_bytes(os.urandom(SIZE))


class Copier:
    """The baseline programs, run on the files of a project."""

    def __init__(self, builder: Builder, project: Project, folder: Path) -> None:
        self.builder = builder
        self.project = project
        self.folder = folder
        self.config = builder.ssh_config()
        self.there = builder.account.home / "copied"
        shutil.copy(project.folder / "small.py", folder)
        _fill(folder / "in", FILES)
        _fill(folder / "one", 1)

    def rsync_new(self) -> float:
        """Copy all files to a missing folder."""
        self._forget()
        _fill(self.folder / "in", FILES)
        return self._rsync("in")

    def rsync_one(self) -> float:
        """Copy one file."""
        self._forget()
        return self._rsync("one")

    def rsync_changed(self) -> float:
        """Copy all files after one of them changed."""
        self._rsync("in")
        _change(self.folder / "in")
        return self._rsync("in")

    def scp(self) -> float:
        """Copy all files."""
        self._forget()
        command = ["scp", "-q", "-r", "-F", str(self.config), str(self.folder / "in"), f"builder:{self.there}"]
        return seconds(lambda: checked(command))

    def job_new(self) -> float:
        """Run a job with all files, none of them on the builder."""
        self._forget()
        return self._job()

    def job_changed(self) -> float:
        """Run a job with all files after one of them changed."""
        self._rsync("in")
        _change(self.folder / "in")
        return self._job()

    def _forget(self) -> None:
        shutil.rmtree(self.there, ignore_errors=True)

    def _rsync(self, name: str) -> float:
        shell = f"ssh -F {self.config}"
        command = ["rsync", "--archive", "--rsh", shell, f"{self.folder / name}/", f"builder:{self.there}"]
        return seconds(lambda: checked(command))

    def _job(self) -> float:
        variables = {"PATH": "/usr/local/bin:/usr/bin:/bin", "CONFIG": str(self.config), "FOLDER": str(self.there)}
        return seconds(lambda: checked(["bash", "-c", STEPS], cwd=self.folder, env=variables))
