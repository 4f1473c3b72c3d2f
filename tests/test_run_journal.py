"""The run journal: executed and up-to-date tasks, and its limits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from project import Project

from gamebear_tasks.records import run_journal
from gamebear_tasks.records.run_reader import Run, last_runs
from gamebear_tasks.records.task_record import Record

DODO = """
from gamebear_tasks import artifact

def task_one():
    return artifact("say.py", outputs=["build/one"], args={"name": "one"})

def task_more():
    for name in "ab":
        yield {"name": name, **artifact("say.py", outputs=[f"build/{name}"], args={"name": name}, inputs=["in"])}
"""

SAY = """#| arg: name: str
print(f"this is {name}")
open(name, "w").write(name)
"""


def create_tasks(project: Project) -> None:
    project.write("dodo.py", DODO)
    project.write("say.py", SAY)
    project.write("in", "1")


def runs_of(project: Project, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    monkeypatch.chdir(project.folder)
    return last_runs()


def told(run: Run) -> dict[str, tuple[str, str]]:
    return {entry.record.task: (entry.record.state, entry.record.origin) for entry in run.entries}


@pytest.mark.system
@pytest.mark.parametrize("mode", [(), ("-n", "2", "-P", "thread"), ("-n", "2", "-P", "process")])
def test_a_run_lists_executed_and_up_to_date_tasks(
    project: Project, monkeypatch: pytest.MonkeyPatch, mode: tuple[str, ...]
) -> None:
    create_tasks(project)
    project.doit(*mode).ok()
    if not mode:
        project.doit().ok()  # nothing to do: no run
    (first,) = runs_of(project, monkeypatch)
    assert told(first) == dict.fromkeys(["one", "more:a", "more:b"], ("done", "built"))
    assert (first.up_to_date, first.asked, first.is_whole) == ((), (), True)
    assert {entry.log.splitlines()[-1] for entry in first.entries} == {f"this is {name}" for name in ("one", "a", "b")}
    project.write("in", "2")
    (project.folder / "build/b").unlink()
    project.doit("-r", "zero", *mode, "more", "one").ok()
    last, before = runs_of(project, monkeypatch)
    assert before == first
    assert told(last) == dict.fromkeys(["more:a", "more:b"], ("done", "built"))
    assert last.up_to_date == ("one",), "the others were so too, but for a file"
    assert set(last.asked) == {"more", "one"}
    assert last.begun > first.begun and last.seconds >= max(entry.record.seconds for entry in last.entries)


@pytest.mark.system
def test_a_failed_run_is_stored_with_the_end_of_its_log(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    create_tasks(project)
    project.write(
        "say.py",
        SAY.replace("open(", "for number in range(20_000): print(number)\n1 / 0\nopen("),
    )
    project.doit("one").failed()
    (run,) = runs_of(project, monkeypatch)
    (entry,) = run.entries
    assert (entry.record.state, entry.record.job) == ("failed", {})
    assert "ZeroDivisionError" in entry.record.failure
    assert entry.size > len(entry.log) == pytest.approx(run_journal.END_OF_FAILED, abs=99)
    assert entry.log.splitlines()[0].isdigit()
    assert "ZeroDivisionError" in entry.log


def record(task: str, state: str = "done") -> Record:
    return Record(task, "00" * 32, "local:", state, "built", 1e9, 1.0, 0, 0, ())


def test_old_and_excess_runs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_journal, "MAX_BYTES", 300_000)
    log = tmp_path / "log"
    log.write_text("x" * 79 + "\n" + "y" * 20_000)
    for number in range(30):
        monkeypatch.setattr(run_journal, "doit_process", lambda number=number: (1, number + 1))
        run_journal.keep(record("one"), log)
        (path,) = Path(run_journal.RUNS).glob(f"{number + 1}-*")
        os.utime(path, (number, number))
    sizes = [path.stat().st_size for path in Path(run_journal.RUNS).iterdir()]
    assert len(sizes) == len(last_runs()) < 20 and 280_000 < sum(sizes) <= 300_000 + max(sizes)
    monkeypatch.setattr(run_journal, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(run_journal, "ENOUGH", 50_000)
    monkeypatch.setattr(run_journal, "doit_process", lambda: (1, 99))
    for number in range(5):
        run_journal.keep(record(f"t{number}", "failed"), log)
    run = next(run for run in last_runs() if len(run.entries) > 1)
    assert [bool(entry.log) for entry in run.entries] == [True, True, True, False, False]
    Path(run_journal.RUNS, "somebody's").mkdir()
    for number in range(100, 130):
        monkeypatch.setattr(run_journal, "doit_process", lambda number=number: (1, number + 1))
        run_journal.keep(record("one"), None)
    assert len(last_runs()) == run_journal.MAX_RUNS


def test_damaged_parts_of_a_run_are_omitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert last_runs() == []
    lines = [
        {"version": 1, "begun": 1e9 - 3},
        {"record": record("one").document()},
        {"record": {"task": "two"}},
        [1],
        {"record": record("three").document(), "log": {"end": "x"}},
        {"up_to_date": ["one", "four"], "seconds": 2.0, "asked": ["four"]},
    ]
    folder = Path(run_journal.RUNS)
    folder.mkdir(parents=True)
    (folder / "1-1.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"record": {"tas')
    (folder / "2-2.jsonl").write_bytes(b"\xff\0")
    (run,) = last_runs()
    assert (run.begun, run.seconds, run.asked, run.up_to_date) == (1e9 - 3, 4.0, ("four",), ("four",))
    assert [entry.record.task for entry in run.entries] == ["one"]
    monkeypatch.setattr(run_journal, "doit_process", lambda: (1, 1))
    run_journal.keep(record("five"), None)
    (run,) = last_runs()
    assert [entry.record.task for entry in run.entries] == ["one", "five"], "a part of a line takes no other along"
