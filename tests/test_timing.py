"""Durations of phases in a task's record."""

from __future__ import annotations

import calendar
import itertools
import json
import re
import threading
import time
from typing import Any

import pytest
from project import Project, wait_for

from gamebear_tasks.progress import render
from gamebear_tasks.progress.model import Board
from gamebear_tasks.records import task_record
from gamebear_tasks.records.task_record import Phase, Record, Stopwatch
from gamebear_tasks.runner.store import phases
from gamebear_tasks.runner.store.phases import LIMIT, Phases
from gamebear_tasks.util.text import age, duration
from gamebear_tasks.util.text import clock as clock_of

DODO = "from gamebear_tasks import artifact\ndef task_x(): return artifact('x.py', outputs=['build/x'])\n"


class Clock:
    """A monotonic clock that a test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(phases, "time", made)
    monkeypatch.setattr(task_record, "time", made)
    return made


# spans


def test_a_phase_within_another_interrupts_it(clock: Clock) -> None:
    spent = Phases()
    with spent.phase("build"):
        clock.now += 1
        with spent.phase("container"):
            clock.now += 2
        clock.now += 4
    assert spent.spans == [("build", 0, 1), ("container", 1, 2), ("build", 3, 4)]


def test_a_failed_phase_is_recorded(clock: Clock) -> None:
    spent = Phases()
    with pytest.raises(ValueError), spent.phase("build"), spent.phase("commit"):
        clock.now += 3
        raise ValueError
    clock.now += 5
    assert spent.spans == [("commit", 0, 3)]


@pytest.mark.parametrize(
    ("seconds", "sentence", "column", "ago"),
    [
        (0.04, "0.0 s", "0.0 s", "0 s"),
        (9.94, "9.9 s", "9.9 s", "10 s"),
        (59.4, "59 s", "59 s", "59 s"),
        (90.0, "1 min 30 s", "1:30", "90 s"),
        (3599.6, "1 h 0 min", "1:00:00", "59 min"),
        (7384.0, "2 h 3 min", "2:03:04", "2 h"),
        (200_000.0, "55 h 33 min", "55:33:20", "2 d"),
    ],
)
def test_durations_have_a_long_form_and_a_short_form_for_columns(
    seconds: float, sentence: str, column: str, ago: str
) -> None:
    assert (duration(seconds), clock_of(seconds), age(seconds)) == (sentence, column, ago)
    board = Board(1)
    (line,) = render.summary_lines(board, board.begun + seconds, 80, render.ASCII, interrupted=False)
    assert line.plain.endswith(f" in {sentence}")
    assert f" {column} " in f"{render.status_line(board, board.begun + seconds, 80, render.ASCII).plain} "


def test_consecutive_intervals_merge_and_empty_ones_are_dropped(clock: Clock) -> None:
    spent = Phases()
    with spent.phase("build"):
        for _ in range(9):
            clock.now += 1
            with spent.phase("container"):
                pass
    assert spent.spans == [("build", 0, 9)]
    spent.add("build", float("nan"), 5)
    assert spent.spans == [("build", 0, 9)]


def test_spans_of_a_thousand_containers_are_merged_without_losing_time(clock: Clock) -> None:
    spent = Phases()
    for _ in range(1000):
        for name in ("container", "build"):
            with spent.phase(name):
                clock.now += 1
    assert len(spent.spans) == LIMIT
    assert sum(seconds for _, _, seconds in spent.spans) == 2000


def test_threads_are_timed_separately() -> None:
    spent = Phases()
    inside = threading.Event()

    def work() -> None:
        with spent.phase("container"):
            inside.wait(20)

    with spent.phase("build"):
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.01)
        inside.set()
        thread.join()
    assert {name for name, _, _ in spent.spans} == {"build", "container"}


# the record


def test_times_of_a_builder_are_mapped_to_the_clients_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_record, "_loaded", True)
    there = [Phase("queue", 0, 10), Phase("build", 10, 30)]
    watch = Stopwatch()
    clock.now += 45
    watch.builder_spent(there)
    assert [phase.start for phase in watch.record("x", "", "", "done", "built").phases] == [5, 15]
    watch = Stopwatch()
    clock.now += 25
    watch.builder_spent(there)  # another client had started it
    assert [phase.start for phase in watch.record("x", "", "", "done", "followed").phases] == [-15, -5]
    watch = Stopwatch()
    with watch.running(), task_record.phase("upload"):
        clock.now += 45
    watch.builder_spent(there)  # the reply to the upload reported the end
    assert watch.record("x", "", "", "done", "built").totals() == {"upload": 5, "queue": 10, "build": 30}


def test_a_task_without_a_stopwatch_records_no_time(clock: Clock) -> None:
    with task_record.phase("connect"):
        task_record.sent(1)
        task_record.received(1)


@pytest.mark.parametrize(
    ("seconds", "output"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (41.3, "41 s"), (61.0, "1 min 1 s"), (7260.0, "2 h 1 min")],
)
def test_a_timing_record_is_one_readable_line(seconds: float, output: str) -> None:
    spans = (
        Phase("load", -1, 1),
        Phase("queue", 0, 0.12),
        Phase("build", 1, 2),
        Phase("keep", 3, 0.01),
        Phase("build", 4, 1),
    )
    record = Record("umtprd", "", "ssh://pi@buildpi", "done", "built", 0, seconds, 0, 0, spans)
    assert record.line() == f"umtprd: built in {output} on ssh://pi@buildpi (queue 0.1, build 3.0)"
    assert record.totals() == {"load": 1, "queue": 0.12, "build": 3, "keep": 0.01}


def record_of(project: Project, task: str = "x") -> dict[str, Any]:
    record = json.loads((project.folder / f"build/logs/{task}.json").read_text())
    assert isinstance(record, dict)
    return record


def names(record: dict[str, Any]) -> set[str]:
    return {phase["name"] for phase in record["phases"]}


@pytest.mark.system
def test_a_built_task_reports_its_phases(project: Project) -> None:
    project.write("dodo.py", DODO + "    # a word\n")
    project.write("x.py", "import time; time.sleep(0.06); open('x', 'w').write('x' * 3000)")
    before = time.time()
    run = project.doit().ok()
    record = record_of(project)
    assert re.search(r"^gamebear: x: built in [\d.]+ (s|min .*s) on local: \(.*\bbuild \d+\.\d", run.err, re.M), run.err
    assert (record["version"], record["task"], record["builder"]) == (1, "x", "local:")
    assert (record["state"], record["origin"], len(record["digest"])) == ("done", "built", 64)
    begun = time.strptime(record["begun"][:19] + " UTC", "%Y-%m-%dT%H:%M:%S %Z")
    assert before - 1 < calendar.timegm(begun) < time.time() + 1
    assert record["bytes"]["up"] > 70_000  # the runner
    assert record["bytes"]["down"] > 3000
    assert {"load", "connect", "build"} <= names(record) <= {*task_record.CLIENT, *task_record.BUILDER}
    starts = [phase["start"] for phase in record["phases"]]
    assert starts == sorted(starts)
    ours = [phase for phase in record["phases"] if phase["name"] in task_record.CLIENT]
    assert [phase["start"] for phase in ours if phase["name"] == "load"] == [starts[0]] and starts[0] < 0
    assert all(phase["start"] + phase["seconds"] <= record["seconds"] + 0.01 for phase in record["phases"])
    saved = project.doit("dumpdb").ok().out
    assert record["digest"] in saved and "'phases':" not in saved, "doit reads all of that each time"


@pytest.mark.system
def test_an_existing_result_is_fetched_without_phases_of_a_builder(project: Project) -> None:
    project.write("dodo.py", DODO)
    project.write("x.py", "open('x', 'w').write('x')")
    project.doit().ok()
    project.doit("clean").ok()
    run = project.doit().ok()
    assert "was built on local: before; downloading" in run.err
    assert "built in" not in run.err
    record = record_of(project)
    assert record["origin"] == "fetched"
    assert not names(record) & set(task_record.BUILDER)


@pytest.mark.system
def test_phases_of_a_build_started_by_another_doit_may_begin_earlier(project: Project) -> None:
    go, runs = project.folder / "go", project.folder / "runs"
    project.write("dodo.py", DODO)
    project.write(
        "x.py",
        f"import os, time\nopen({str(runs)!r}, 'w').close()\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.02)\nopen('x', 'w').close()",
    )
    first = project.start()
    wait_for(runs.exists)
    other = Project(project.folder.parent / "other", home=project.home)
    for name in ("dodo.py", "x.py"):
        other.write(name, (project.folder / name).read_text())
    second = other.start()
    wait_for(lambda: "following" in (other.folder / "doit.out").read_text())
    go.touch()
    assert first.wait(60) == second.wait(60) == 0
    assert record_of(project)["origin"] == "built"
    record = record_of(other)
    assert record["origin"] == "followed"
    assert min(phase["start"] for phase in record["phases"] if phase["name"] in task_record.BUILDER) < 0
    assert "x: followed in" in (other.folder / "doit.out").read_text()


@pytest.mark.system
def test_a_task_that_failed_has_a_record_too(project: Project) -> None:
    project.write("dodo.py", DODO)
    project.write("x.py", "import time; time.sleep(0.01); raise SystemExit('no')")
    project.doit().failed("no")
    record = record_of(project)
    assert (record["state"], record["origin"]) == ("failed", "built")
    assert "build" in names(record)


@pytest.mark.system
def test_containers_and_commits_are_separate_phases(project: Project) -> None:
    project.write("tree.tar", "something")
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n"
        "def task_x(): return artifact('x.py', inputs=['tree.tar'], outputs=['build/x'])\n",
    )
    project.write(
        "x.py",
        """
with Container("scratch") as c:
    c.copy_in("tree.tar", "/tree.tar")
    image = c.commit()
open("x", "w").close()
""",
    )
    project.doit().ok()
    record = record_of(project)
    assert {"container", "commit", "build"} <= names(record)
    there = [phase for phase in record["phases"] if phase["name"] in task_record.BUILDER]
    for one, next_one in itertools.pairwise(there):
        assert one["start"] + one["seconds"] <= next_one["start"] + 0.005


@pytest.mark.system
def test_a_script_that_overwrites_its_result_cannot_set_phases(project: Project) -> None:
    project.write("dodo.py", DODO)
    project.write(
        "x.py",
        "import os, json\nopen('x', 'w').close()\n"
        "open('../result.json', 'w').write(json.dumps({'ok': True, 'began': 'x', 'phases': [[1], {}]}))\nos._exit(0)\n",
    )
    project.doit().ok()
    assert "build" in names(record_of(project))
