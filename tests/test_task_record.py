"""Task records: reason, result and outputs."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from project import Project, wait_for

from gamebear_tasks.records.task_record import Made, Phase, Record

DODO = """
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", outputs=["build/x", "build/y"], inputs=["in put.txt"], args={"level": LEVEL})
"""

SCRIPT = """#| arg: level: int = 1
import common
for name in "xy":
    open(name, "w").write(name * level)
"""


def create_tasks(project: Project) -> None:
    project.write("dodo.py", DODO.replace("LEVEL", "1"))
    project.write("x.py", SCRIPT)
    project.write("common.py", "")
    project.write("in put.txt", "1")


def record_of(project: Project, task: str = "x") -> Record:
    record = Record.read(project.folder / f"build/logs/{task}.json")
    assert record
    return record


def assert_outputs_are_recorded(record: Record) -> None:
    both = hashlib.sha256(b"x").hexdigest(), hashlib.sha256(b"y").hexdigest()
    assert record.outputs == (Made("x", "build/x", 1, both[0]), Made("y", "build/y", 1, both[1]))
    assert record.attempt and not record.failure
    assert record.job["args"] == {"level": 1}
    assert record.job["inputs"] == {"in put.txt": {"sha256": hashlib.sha256(b"1").hexdigest()}}
    text = json.dumps(record.job, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == record.digest


@pytest.mark.system
def test_a_record_has_the_reason_of_the_run(project: Project) -> None:
    create_tasks(project)

    def why(*arguments: str) -> list[str]:
        project.doit(*arguments).ok()
        return list(record_of(project).why)

    assert why() == ["not built here before"]
    assert_outputs_are_recorded(record_of(project))
    assert why("-a") == ["forced (doit -a, doit forget or its own uptodate); the job is unchanged"]
    (project.folder / "build/y").unlink()
    assert why() == ["build/y was missing"]
    assert record_of(project).origin == "fetched"
    project.write("common.py", "# edited")
    project.write("in put.txt", "2")
    assert why() == ["the module common.py changed", "the input in put.txt changed"]
    project.write("x.py", SCRIPT.replace("import common\n", "\n"))
    project.write("dodo.py", DODO.replace("LEVEL", "2").replace("build/y", "build/z").replace('"in put.txt"', ""))
    project.doit().failed("z")
    assert list(record_of(project).why) == [
        "build/z was missing",
        "x.py changed",
        "the module common.py was removed",
        "the input in put.txt was removed",
        "the argument level changed",
        "the names of its outputs changed",
    ]
    assert record_of(project).state == "failed"
    assert "z" in record_of(project).failure
    project.write("x.py", SCRIPT.replace("xy", "xz"))
    assert why() == ["build/z was missing", "its last build failed", "x.py changed", "the module common.py was added"]


@pytest.mark.system
@pytest.mark.parametrize("mode", [(), ("-n", "2", "-P", "thread"), ("-n", "2", "-P", "process")])
def test_ctrl_c_leaves_a_record(project: Project, mode: tuple[str, ...]) -> None:
    create_tasks(project)
    project.write("x.py", "#| arg: level: int\nimport time\nprint('begun', flush=True)\ntime.sleep(60)")
    log = project.folder / "build/logs/x.log"
    client = subprocess.Popen(
        project.command(*mode), cwd=project.folder, env=project.environment, stderr=subprocess.PIPE
    )
    wait_for(lambda: log.exists() and b"begun" in log.read_bytes())
    client.send_signal(signal.SIGINT)
    client.communicate(timeout=60)
    record = record_of(project)
    assert (record.state, record.outputs, record.why) == ("interrupted", (), ("not built here before",))
    project.write("x.py", SCRIPT)
    project.doit().ok()
    assert record_of(project).why[:2] == ("build/x was missing", "build/y was missing")
    assert "its last build was interrupted" in record_of(project).why


@pytest.mark.system
def test_an_error_before_the_submission_is_in_the_record(project: Project) -> None:
    create_tasks(project)
    project.doit("builder=ssh://127.0.0.1:1", "patience=0").failed()
    record = record_of(project)
    assert (record.state, record.builder) == ("error", "ssh://127.0.0.1:1")
    assert "127.0.0.1" in record.failure
    project.doit().ok()
    assert "its last build ended with an error" in record_of(project).why


def test_a_record_is_read_back_unchanged_and_a_damaged_one_is_absent(tmp_path: Path) -> None:
    made = (Made("x", "build/x", 3, "00" * 32),)
    spans = (Phase("build", 0.5, 2.25),)
    record = Record("é/x", "d", "local:", "done", "built", 1580472000.125, 3.5, 1, 2, spans, "a", ("b",), "c", made)
    record = replace(record, valid={"since": 5.0, "seconds": 7.0}, job={"arch": "armhf"})
    path = tmp_path / "x.json"
    record.write(path)
    assert Record.read(path) == record
    old = {key: value for key, value in record.document().items() if key not in ("why", "outputs", "valid", "job")}
    assert Record.of_document(old) == replace(record, why=(), outputs=(), valid=None, job={})
    renamed = {**record.document(), "had": old["origin"]}
    del renamed["origin"]
    assert Record.of_document(renamed) == record
    damages: list[object] = [None, [], {}, {**old, "version": 9}, {**old, "begun": "x"}, {**old, "phases": [1]}]
    infinity = float("inf")
    damages += [{**old, "seconds": infinity}, {**old, "bytes": {"up": 10**400, "down": 0}}]
    damages += [{**old, "phases": [{"name": "build", "start": float("nan"), "seconds": 1}]}]
    damages += [{**old, "valid": {"since": 0, "seconds": infinity}}, {**old, "bytes": {"up": -1, "down": 0}}]
    for damaged in damages:
        assert Record.of_document(damaged) is None
    path.write_bytes(path.read_bytes()[:99])
    assert Record.read(path) is None
    path.write_text("[" * 200_000)
    assert Record.read(path) is None
