"""Cluster scaling from one to eight workers, and the overhead of a job on client, scheduler and network.

Jobs sleep instead of computing, and each worker has its own slot and store, so that a few processors can simulate many
builders. On a real cluster, a job's own programs run on the worker; here they all share this machine's processors.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster import Cluster
from project import Project

from . import ROOT
from .measure import Goal, Result, Row, seconds
from .place import Place

WORKERS = (1, 2, 4, 8)
WAIT = 20.0
"""Seconds that a job of the scaling benchmark sleeps."""

EACH = 2
"""Jobs per worker."""

SHORT = 0.05
"""Seconds that a short job sleeps."""

JOBS = int(os.environ.get("CLUSTER_JOBS", "1000"))

GOAL = Goal("ratio", 1 / 0.9)
"""N workers complete at least 0.9 N times as many jobs in the same time as one worker."""

DODO = """\
from gamebear_tasks import artifact

def task_wait():
    for number in range({jobs}):
        yield {{
            **artifact("wait.py", outputs=[f"build/{{number}}/x"], args={{"n": number, "wait": {wait}}}),
            "name": str(number),
        }}
"""

WAITS = """\
#| arg: n: int
#| arg: wait: float
import time
time.sleep(wait)
open("x", "w").write(str(n))
"""

ALONE = """\
import sys, time
from distributed import Client
with Client(sys.argv[1]) as client:
    client.gather(client.map(lambda n: time.sleep({wait}), range({jobs}), pure=False, resources={{"amd64": 1}}))
"""

MIXED = "as many jobs for each worker; a whole run of `doit -n 32 -P thread`, and all that jobs run is on this machine"
PER_JOB = "of one job, all {jobs} through 8 workers with one slot each: time by the clock, {jobs} jobs by their number"


def cluster(place: Place) -> Result:
    """Measure the scaling, then the overhead of short jobs."""
    rows: list[Row] = []
    times: dict[int, float] = {}
    for count in WORKERS:
        shelf = _shelf(place, f"shelf{count}", count)
        try:
            _run(place, shelf, f"warm{count}", count, 0.0)
            times[count] = _run(place, shelf, f"scale{count}", EACH * count, WAIT)
        finally:
            shelf.close()
        what = f"{EACH * count} jobs of {WAIT:g} s, {count} workers"
        goal = GOAL if count > 1 else None
        rows.append(Row(what, "1 worker", [times[count]], [times[1]], goal, note=MIXED))
    shelf = _shelf(place, "short", WORKERS[-1])
    try:
        _run(place, shelf, "warm", 8, 0.0)
        before = _processor_seconds(shelf.scheduler.pid)
        network = _Network(shelf.port)
        used = os.times()
        took = _run(place, shelf, "short", JOBS, SHORT)
        client = os.times().children_user + os.times().children_system - used.children_user - used.children_system
        sent, received = network.close()
        scheduler = _processor_seconds(shelf.scheduler.pid) - before
        script = place.folder / "alone.py"
        script.write_text(ALONE.format(wait=SHORT, jobs=JOBS))
        alone = seconds(lambda: subprocess.run([sys.executable, str(script), shelf.address], check=True))
    finally:
        shelf.close()
    plot(times, [ROOT / "benchmarks" / "results" / f"scaling.{kind}" for kind in ("svg", "png")])
    note = PER_JOB.format(jobs=JOBS)
    rows += [
        Row("a short job", "Dask alone", [took / JOBS], [alone / JOBS], note=note),
        Row("… the client's processor time", "", [client / JOBS], note=note),
        Row("… the scheduler's processor time", "", [scheduler / JOBS], note=note),
        Row("… KiB to the scheduler", "", [received / JOBS / 1024], unit="", note=note),
        Row("… KiB from the scheduler", "", [sent / JOBS / 1024], unit="", note=note),
    ]
    return Result(rows)


def plot(times: Mapping[int, float], targets: Iterable[Path]) -> None:
    """Plot the speedup by number of workers, with the goal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted(times)
    figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
    axes.plot(counts, counts, color="black", linewidth=1, linestyle="--", label="N")
    axes.plot(counts, [count / GOAL.value for count in counts], color="tab:grey", linewidth=1, label="0.9 N, the goal")
    speeds = [count * times[counts[0]] / times[count] for count in counts]
    axes.plot(counts, speeds, color="tab:green", marker="o", label="measured")
    for count, speed in zip(counts, speeds, strict=True):
        axes.annotate(f"  {speed:.2f}", (count, speed), va="top", fontsize=8)
    axes.set_xticks(counts)
    axes.set_xlabel("workers")
    axes.set_ylabel(f"jobs of {WAIT:g} s done in the same time, by those of one worker")
    axes.legend()
    for target in targets:
        figure.savefig(target, dpi=150, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)


def _shelf(place: Place, name: str, count: int) -> Cluster:
    shelf = Cluster(place.folder / name)
    for _ in range(count):
        shelf.start_worker("amd64=1")
    shelf.wait_for_workers()
    return shelf


def _run(place: Place, shelf: Cluster, name: str, jobs: int, wait: float) -> float:
    """Build the specified number of jobs in a new project and return the duration in seconds."""
    project = Project(place.folder / f"project-{name}", place.folder / "home", GAMEBEAR_BUILDER=shelf.url)
    project.write("dodo.py", DODO.format(jobs=jobs, wait=wait))
    project.write("wait.py", WAITS)
    return seconds(lambda: project.doit("-n", "32", "-P", "thread", timeout=36000, GAMEBEAR_ARCH="amd64").ok())


def _processor_seconds(number: int) -> float:
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Network:
    """Counter of the traffic through the scheduler's port, which polls its connections."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ended = threading.Event()
        self._seen: dict[str, tuple[int, int]] = {}
        self._look()
        self._before = self._total()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(2.0):
            self._look()

    def _look(self) -> None:
        output = subprocess.run(
            ["ss", "-tinH", f"sport = :{self._port}"], capture_output=True, text=True, check=True
        ).stdout
        for line, about in zip(output.splitlines()[::2], output.splitlines()[1::2], strict=False):
            counts = dict(re.findall(r"bytes_(sent|received):(\d+)", about))
            self._seen[line.split()[4]] = int(counts.get("sent", 0)), int(counts.get("received", 0))

    def _total(self) -> tuple[int, int]:
        values = list(self._seen.values())
        return sum(sent for sent, _ in values), sum(received for _, received in values)

    def close(self) -> tuple[int, int]:
        """Return the bytes sent and received since the counter was created."""
        self._ended.set()
        self._thread.join()
        self._look()
        sent, received = self._total()
        return sent - self._before[0], received - self._before[1]
