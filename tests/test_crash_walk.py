"""SIGKILL or a full disk at each point where the client, a session or a supervisor modifies files.

`crash_points.c` is preloaded: it counts the file operations of a process, and kills it before or during the N-th.
A first run counts the points. Then each point has a separate run with the fault, followed by one without faults, which
must recover: complete artifacts, no repeated build, no leftovers on either side. The suite tests an evenly spread
sample; `-m slow` tests all points, and with `-s` prints the results.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from project import OUR_FRAMES, Project, Run, wait_for
from test_store_faults import processes

from gamebear_tasks.runner.store.store import Store

pytestmark = pytest.mark.system

DODO = """
from gamebear_tasks import artifact

DOIT_CONFIG = {"default_tasks": ["xy"]}

def task_xy():
    return artifact("xy.py", inputs=["small", "big"], outputs=["build/x", "build/y"])

"""

SCRIPT = """
with open({count!r}, "a") as file:
    file.write("built\\n")
print("begin")
for name, source in (("x", "big"), ("y", "small")):
    with open(source, "rb") as content, open(name, "wb") as output:
        output.write(content.read()[::-1])
print("end")
"""

COMMANDS = {"client": " -m doit", "session": "base64.b64decode", "supervisor": " supervise "}
"""Patterns that identify the three kinds of processes by their command lines."""

PRUNE = ("prune", "--older", "1", "--keep", "0")

FULL = re.compile("disk is full|[Mm]ake room|No space left")
"""Messages of which one must be shown to the user."""


@dataclass
class Figures:
    """Results of a walk."""

    points: Counter[str] = field(default_factory=Counter)
    injected: int = 0
    wrong: list[str] = field(default_factory=list)
    built_twice: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        walked = ", ".join(f"{count} of the {name}" for name, count in self.points.items())
        return (
            f"points walked: {sum(self.points.values())} ({walked}); faults injected: {self.injected}; artifacts wrong:"
            f" {len(self.wrong)}; built needlessly: {len(self.built_twice)}; left behind: {len(self.left)}; runs that"
            f" failed afterwards: {len(self.failed)}"
        )

    def assert_no_errors(self) -> None:
        print(self)
        assert self.injected
        assert [*self.wrong, *self.built_twice, *self.left, *self.failed] == [], str(self)


class Walk:
    """Runs of doit, each with one fault.

    Args:
        folder: folder for the projects.
        library: the compiled `crash_points.c`.
        home: home folder that contains the store; None for a new store for each run.
        command: arguments of doit.
    """

    def __init__(self, folder: Path, library: Path, home: Path | None, command: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.library = library
        self.home = home
        self.command = command
        self.figures = Figures()
        self._count = 0

    def new_project(self) -> Project:
        """Return a project with a new job and new files; for a prune, a project that was built a week ago."""
        self._count += 1
        folder = self.folder / f"{self._count:04}"
        project = Project(folder, self.home or folder.with_suffix(".home"))
        project.write("dodo.py", DODO)
        project.write("xy.py", SCRIPT.format(count=str(project.folder / "count")))
        (project.folder / "small").write_bytes(os.urandom(1000))
        (project.folder / "big").write_bytes(os.urandom(300_000))
        if self.command:
            project.doit().ok()
            for name in ("x", "y"):
                (project.folder / "build" / name).unlink()
            week_ago = time.time() - 7 * 86400
            for path in [*store(project).blobs.iterdir(), *store(project).jobs.glob("*/*")]:
                os.utime(path, (week_ago, week_ago))
        return project

    def points(self, role: str) -> list[str]:
        """Return the fault points of a role in a run without faults: system call and path of each."""
        project = self.new_project()
        self._run(project, role, 0, "kill").ok()
        by_process: dict[str, list[str]] = {}
        for line in project.folder.with_suffix(".points").read_text("utf-8", "replace").splitlines():
            process, _, rest = line.partition(" ")
            by_process.setdefault(process, []).append(rest)
        return max(by_process.values(), key=len)

    def walk(self, role: str, numbers: Iterable[int], points: list[str], how: str) -> None:
        """Inject a fault at some points of a role, numbered from 1."""
        for at in numbers:
            project = self.new_project()
            self.figures.points[f"{role}'s ({how})"] += 1
            run = self._run(project, role, at, how)
            if project.folder.with_suffix(".fired").exists():  # otherwise this run had fewer points
                self.figures.injected += 1
                self._check(project, f"{role}, {how}, {at} ({points[at - 1]})", how, run)
            shutil.rmtree(project.folder)

    def _run(self, project: Project, role: str, at: int, how: str) -> Run:
        return project.doit(
            *self.command,
            timeout=100,
            LD_PRELOAD=str(self.library),
            CRASH_COMMAND=COMMANDS[role],
            CRASH_FOLDERS=f"{store(project).root}/:{project.folder}/" + ("build/" if how == "full" else ""),
            CRASH_LOG=str(project.folder.with_suffix(".points")),
            CRASH_AT=str(at),
            CRASH_HOW=how,
            CRASH_FIRED=str(project.folder.with_suffix(".fired")),
        )

    def _check(self, project: Project, name: str, how: str, faulty: Run) -> None:
        """Check that the next run recovers."""
        if how == "full" and (OUR_FRAMES.search(faulty.text) or (faulty.status and not FULL.search(faulty.text))):
            self.figures.failed.append(f"{name}: {faulty.text[-1500:]}")
        was_done, built = is_done(project), builds(project)
        if self.command:
            project.doit(*self.command).ok()
            was_done = is_done(project)
        run = project.doit(timeout=100)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not supervised(project))
        text = f"{name}: {faulty.text[-1500:]} --- {run.text[-1500:]}"
        if run.status:
            self.figures.failed.append(text)
            return
        for output, source in (("x", "big"), ("y", "small")):
            path = project.folder / "build" / output
            if not path.is_file() or path.read_bytes() != (project.folder / source).read_bytes()[::-1]:
                self.figures.wrong.append(text)
        if builds(project) - built > (0 if was_done else 1) or builds(project) > 2:
            self.figures.built_twice.append(f"{builds(project)} builds, {built} before: {text}")
        left = self._left(project)
        if left:
            self.figures.left.append(f"{name}: {left}")
            for each in left:  # otherwise each later point would have it too
                with contextlib.suppress(OSError):
                    Path(each).unlink()

    def _left(self, project: Project) -> list[str]:
        root = store(project).root
        build = project.folder / "build"
        left = [
            *(root / "live").iterdir(),
            *(root / "trash").iterdir(),
            *(root / "tmp").iterdir(),
            *(root / "slots").glob("*wait-*"),
            *root.glob(".*"),
            *root.glob("jobs/*/.*"),
            *root.glob("jobs/*/work"),
            *root.glob("jobs/*/result.json"),
            *(path for path in (root / "blobs").iterdir() if len(path.name) != 64),
            *(path for path in (root / "runner").iterdir() if len(path.name) != 64),
            *(path for job in (root / "jobs").iterdir() for path in sorted(job.glob("out-*"))[1:]),
            *(path for path in build.iterdir() if path.name not in ("x", "y", "logs")),
            *(
                path
                for path in (build / "logs").iterdir()
                if path.name not in ("xy.log", ".xy.json", "xy.json", ".hashes", ".imports", ".placed", "runs")
            ),
        ]
        return [*map(str, left), *(f"process {pid}" for pid in supervised(project))]


def store(project: Project) -> Store:
    """Return the store in which a project is built."""
    return Store(project.home / ".cache" / "gamebear" / "v1")


def is_done(project: Project) -> bool:
    """Return whether the store has the project's result."""
    script = hashlib.sha256((project.folder / "xy.py").read_bytes()).hexdigest()
    for path in store(project).jobs.glob("*/job.json"):
        if script in path.read_text():
            return bool(store(project).job(path.parent.name).written_state()["state"] == "done")
    return False


def builds(project: Project) -> int:
    """Return the number of builds of the project."""
    path = project.folder / "count"
    return len(path.read_text().splitlines()) if path.exists() else 0


def supervised(project: Project) -> list[int]:
    """Return the living supervisors and builds of a store."""
    root = str(store(project).root).encode()
    return [
        pid for pid, words in processes() if root in b" ".join(words) and (b"supervise" in words or b"build" in words)
    ]


@pytest.fixture(scope="module")
def library(system: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled `crash_points.c`."""
    path = tmp_path_factory.mktemp("library") / "crash_points.so"
    source = Path(__file__).with_name("crash_points.c")
    subprocess.run(["gcc", "-O1", "-Wall", "-shared", "-fPIC", "-o", path, source, "-ldl"], check=True)
    return path


@pytest.fixture
def walk(tmp_path: Path, library: Path) -> Walk:
    """Runs on one store with an uploaded runner and cached capabilities."""
    made = Walk(tmp_path / "projects", library, tmp_path / "home")
    made.new_project().doit().ok()
    return made


def spread(count: int, points: list[str]) -> list[int]:
    """Return the numbers of evenly spread points, including the first and the last."""
    return sorted({1 + round(number * (len(points) - 1) / (count - 1)) for number in range(count)})


SAMPLE = {"client": 3, "session": 4, "supervisor": 4}


def test_a_kill_at_sampled_points_loses_no_completed_work(walk: Walk) -> None:
    for role, count in SAMPLE.items():
        points = walk.points(role)
        walk.walk(role, spread(count, points), points, "kill")
    walk.figures.assert_no_errors()


def test_a_full_disk_at_sampled_points_is_survived(walk: Walk) -> None:
    points = walk.points("supervisor")
    walk.walk("supervisor", spread(3, points), points, "full")
    walk.figures.assert_no_errors()


def test_a_killed_prune_leaves_a_usable_store(walk: Walk) -> None:
    walk.command = PRUNE
    points = walk.points("session")
    walk.walk("session", spread(4, points)[1:-1], points, "kill")
    walk.figures.assert_no_errors()


def _may_be_torn(point: str) -> bool:
    """Return whether a torn write at a point is tested: doit's database (dbm.dumb here) does not survive one."""
    return point.startswith("write ") and "/.doit.db" not in point


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "torn", "full"])
@pytest.mark.parametrize("role", SAMPLE)
def test_a_fault_at_any_point_loses_no_completed_work(walk: Walk, role: str, how: str) -> None:
    points = walk.points(role)
    numbers = [number for number, point in enumerate(points, 1) if how != "torn" or _may_be_torn(point)]
    walk.walk(role, numbers, points, how)
    walk.figures.assert_no_errors()


@pytest.mark.slow
def test_a_kill_at_any_point_of_a_prune_leaves_a_usable_store(walk: Walk) -> None:
    walk.command = PRUNE
    points = walk.points("session")
    walk.walk("session", range(1, len(points) + 1), points, "kill")
    walk.figures.assert_no_errors()


@pytest.mark.slow
@pytest.mark.parametrize("role", ["session", "supervisor"])
def test_the_next_run_recovers_from_a_kill_at_any_point_of_the_first_run(
    tmp_path: Path, library: Path, role: str
) -> None:
    walk = Walk(tmp_path / "projects", library, None)
    points = walk.points(role)
    walk.walk(role, range(1, len(points) + 1), points, "kill")
    walk.figures.assert_no_errors()
