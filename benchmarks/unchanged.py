"""`doit` when nothing has changed, compared with plain doit on the same files. Needs no builder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

from project import ROOT, Project

from .measure import Goal, Result, Row, alternate, checked, processor_seconds, seconds
from .place import Place

COUNT = 15
MANY = 2000
MANY_COUNT = 7

BUILDER = '''\
"""A builder that has built everything already: each output is empty."""

from gamebear_tasks.builders.base import Output, Status

NOTHING = Output(0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", False)


class Instant:
    url = "instant:"
    patience = 0.0

    def __init__(self):
        self.status = {}

    def submit(self, order, again=False):
        self.status[order.job.digest] = Status("done", "1", outputs=dict.fromkeys(order.job.outputs, NOTHING))
        return self.status[order.job.digest]

    def follow(self, digest, attempt, offset):
        return self.status[digest], b""

    def fetch(self, digest, attempt, name, offset, target, limit):
        pass

    def close(self):
        pass


def open_builder(url):
    return Instant()
'''

MANY_OURS = f"""\
from gamebear_tasks import artifact

def task_many():
    for number in range({MANY}):
        yield {{"name": str(number), **artifact("x.py", inputs=[f"in/{{number}}"], outputs=[f"build/{{number}}"])}}
"""

MANY_PLAIN = f"""\
def task_many():
    for number in range({MANY}):
        yield {{
            "name": str(number),
            "actions": [f"touch build/{{number}}"],
            "file_dep": ["x.py", f"in/{{number}}"],
            "targets": [f"build/{{number}}"],
        }}
"""

PLAIN = """\
DEPS = {deps!r}

def task_artifact():
    for name, (files, targets) in DEPS.items():
        yield {{
            "name": name,
            "actions": ["touch " + " ".join(targets)],
            "file_dep": files,
            "targets": targets,
        }}
"""

FILES = """\
import dodo, json
tasks = {name[5:]: task() for name, task in vars(dodo).items() if name[5:] in ("umtprd", "usbgx", "gt")}
print(json.dumps({name: (task["file_dep"], task["targets"]) for name, task in tasks.items()}))
"""


def unchanged(place: Place) -> Result:
    """Measure the three tasks of the project's own dodo.py."""
    ours = instant(place.bare.project("unchanged"))
    ours.take("dodo.py", "buildscripts", "gamebear.lock")
    ours.doit().ok()
    plain = place.bare.project("plain")
    plain.take("buildscripts")
    files = checked([ours.command()[0], "-c", FILES], cwd=ours.folder, env=ours.environment)
    plain.write("dodo.py", PLAIN.format(deps=json.loads(files)))
    (plain.folder / "build").mkdir()
    plain.doit().ok()
    ours.environment["GAMEBEAR_BUILDER"] = place.bare.server.url
    before = place.bare.server.connections
    what = "three artifacts, nothing changed"
    rows = _compared(what, "plain doit, the same files", (ours, plain), COUNT, Goal("ratio", 1.3))
    heavy = sorted(imported(ours) - imported(plain))
    return Result(
        [
            *rows,
            Row("… its connections", "", [place.bare.server.connections - before], goal=Goal("most", 0), unit=""),
            Row(
                "… packages imported, without gamebear_tasks",
                "plain doit",
                [len([name for name in heavy if name != "gamebear_tasks"])],
                goal=Goal("most", 0),
                unit="",
                note=f"imported from outside the standard library, and not by plain doit: {', '.join(heavy)}",
            ),
        ]
    )


def many(place: Place) -> Result:
    """Measure two thousand tasks."""
    projects = []
    for name, dodo in (("many", MANY_OURS), ("many-plain", MANY_PLAIN)):
        project = instant(place.bare.project(name))
        project.write("dodo.py", dodo)
        project.write("x.py", "open('0', 'w').close()\n")
        (project.folder / "build").mkdir()
        for number in range(MANY):
            project.write(f"in/{number}", f"{number}\n")
        project.doit("-v", "0").ok()
        projects.append(project)
    against = f"plain doit, {MANY} tasks"
    rows = _compared(f"{MANY} artifacts, nothing changed", against, projects, MANY_COUNT, Goal("ratio", 1.3))
    for project in projects:
        shutil.rmtree(project.folder)
    return Result(rows)


def instant(project: Project) -> Project:
    """Configure a project to use a plug-in builder that builds instantly."""
    site = project.folder.parent / "instant-site"
    about = site / "instant-1.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (site / "instant.py").write_text(BUILDER)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: instant\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[gamebear_tasks.builders]\ninstant = instant:open_builder\n")
    project.environment["PYTHONPATH"] = f"{site}:{ROOT}"
    project.environment["GAMEBEAR_BUILDER"] = "instant:"
    return project


def imported(project: Project) -> set[str]:
    """Return the packages outside the standard library that an up-to-date doit imports."""
    command = project.command()
    done = subprocess.run(
        [command[0], "-X", "importtime", *command[1:]],
        cwd=project.folder,
        env=project.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    names = set(re.findall(r"^import time:.*\|\s*(\w+)", done.stderr, re.MULTILINE))
    return {name for name in names - sys.stdlib_module_names if not name.startswith(("_", "dodo"))}


def _compared(what: str, against: str, projects: Sequence[Project], count: int, goal: Goal) -> list[Row]:
    """Return rows that compare an up-to-date doit, ours and the plain one: wall-clock and processor time."""
    for project in projects:
        assert project.doit().ok().ran == []
    ours, plain = alternate(count, *(partial(seconds, project.doit) for project in projects))
    busy, plain_busy = alternate(count, *(partial(processor_seconds, project.doit) for project in projects))
    return [Row(what, against, ours, plain), Row("… processor time", against, busy, plain_busy, goal)]
