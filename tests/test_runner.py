"""Jobs on a builder: found by digest, run once, detached, cleaned up. On this machine, without a container."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest
from project import Project, assert_nothing_is_left, processes, wait_for

from gamebear_tasks.config import own_architecture
from gamebear_tasks.runner.executor import supervisor, workspace
from gamebear_tasks.runner.host import buildah
from gamebear_tasks.runner.maintenance.cleanup import remove_leftovers
from gamebear_tasks.runner.store import store
from gamebear_tasks.runner.store.store import Store
from gamebear_tasks.runner.util.atomic_files import sha256_of

pytestmark = pytest.mark.system

DODO = """
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", outputs=["build/x"])
"""

COUNTING = """
import os, time
with open({count!r}, "a") as file:
    file.write("built\\n")
print("begin", flush=True)
{body}
with open("x", "w") as file:
    file.write("the artifact")
print("end")
"""


@pytest.fixture
def counted(project: Project) -> Project:
    """A project with one job that counts its builds, then waits for the file `go`."""
    project.write("dodo.py", DODO)
    write_script(project, f"while not os.path.exists({str(project.folder / 'go')!r}): time.sleep(0.02)")
    return project


def write_script(project: Project, body: str) -> None:
    project.write("x.py", COUNTING.format(count=str(project.folder / "count"), body=body))


def go(project: Project) -> None:
    project.write("go", "")


def builds(project: Project) -> int:
    path = project.folder / "count"
    return len(path.read_text().splitlines()) if path.exists() else 0


def supervisors(project: Project) -> list[int]:
    return processes(project.store, "supervise")


def test_a_job_is_built_and_its_output_becomes_the_target(counted: Project) -> None:
    go(counted)
    run = counted.doit().ok()
    assert (counted.folder / "build" / "x").read_text() == "the artifact"
    assert "begin" in run.out and "end" in run.out
    assert (counted.folder / "build" / "logs" / "x.log").read_text() == "begin\nend\n"
    assert_nothing_is_left(counted)


def test_the_second_run_does_nothing(counted: Project) -> None:
    go(counted)
    counted.doit().ok()
    assert counted.doit().ok().out == "-- x\n"
    assert builds(counted) == 1


def test_after_clean_the_artifact_is_fetched_and_not_built(counted: Project) -> None:
    go(counted)
    counted.doit().ok()
    counted.doit("clean").ok()
    assert not (counted.folder / "build" / "x").exists()
    counted.doit().ok()
    assert (counted.folder / "build" / "x").read_text() == "the artifact"
    assert builds(counted) == 1


def test_a_changed_script_is_built_again_and_a_touched_one_is_not(counted: Project) -> None:
    go(counted)
    counted.doit().ok()
    os.utime(counted.folder / "x.py", (1, 1))
    assert counted.doit().ok().ran == []
    write_script(counted, "pass  # changed")
    assert counted.doit().ok().ran == ["x"]
    assert builds(counted) == 2


def test_another_address_of_the_builder_rebuilds_nothing(counted: Project) -> None:
    go(counted)
    counted.doit().ok()
    assert counted.doit("builder=ssh://nobody@nowhere.invalid").ok().ran == []


def test_verbosity_zero_silences_the_log(counted: Project) -> None:
    go(counted)
    assert "begin" not in counted.doit("run", "-v", "0").ok().text


def test_a_killed_client_finds_its_job_again(counted: Project) -> None:
    first = counted.start()
    wait_for(lambda: b"begin" in (counted.folder / "doit.out").read_bytes())
    first.kill()
    first.wait()
    go(counted)
    second = counted.doit().ok()
    assert (counted.folder / "build" / "x").read_text() == "the artifact"
    assert builds(counted) == 1
    assert "begin" not in second.out and "end" in second.out, "the log goes on from where it was"
    assert (counted.folder / "build" / "logs" / "x.log").read_text() == "begin\nend\n"
    assert_nothing_is_left(counted)


def test_two_clients_of_one_job_get_one_build(counted: Project, tmp_path: Path) -> None:
    other = Project(tmp_path / "other", home=counted.home)
    for name in ("dodo.py", "x.py"):
        other.write(name, (counted.folder / name).read_text())
    runs = [project.start() for project in (counted, other)]
    wait_for(lambda: all(b"begin" in (p.folder / "doit.out").read_bytes() for p in (counted, other)))
    go(counted)
    assert [run.wait(60) for run in runs] == [0, 0]
    assert (other.folder / "build" / "x").read_text() == "the artifact"
    assert builds(counted) == 1


def test_the_job_of_a_killed_supervisor_is_lost_and_built_again(counted: Project) -> None:
    client = counted.start()
    wait_for(lambda: builds(counted) == 1)
    (pid,) = supervisors(counted)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: builds(counted) == 2)
    go(counted)
    assert client.wait(60) == 0, (counted.folder / "doit.out").read_text()
    assert (counted.folder / "build" / "x").read_text() == "the artifact"
    assert builds(counted) == 2
    assert_nothing_is_left(counted)


def test_ctrl_c_stops_the_job_on_the_builder(counted: Project) -> None:
    client = counted.start()
    wait_for(lambda: builds(counted) == 1)
    client.send_signal(signal.SIGINT)
    assert client.wait(60) != 0
    assert not (counted.folder / "build" / "x").exists()
    assert "cancelling x on" in (counted.folder / "doit.out").read_text()
    assert_nothing_is_left(counted)


@pytest.mark.parametrize("mode", ["process", "thread"])
def test_ctrl_c_stops_the_jobs_of_a_parallel_run(counted: Project, mode: str) -> None:
    client = counted.start("-n", "2", "-P", mode)
    wait_for(lambda: builds(counted) == 1)
    client.send_signal(signal.SIGINT)
    assert client.wait(60) != 0
    assert_nothing_is_left(counted)


def test_ctrl_c_detaches_if_configured(counted: Project) -> None:
    client = counted.start("interrupt=detach")
    wait_for(lambda: builds(counted) == 1)
    client.send_signal(signal.SIGINT)
    client.wait(60)
    assert len(supervisors(counted)) == 1
    go(counted)
    counted.doit().ok()
    assert builds(counted) == 1


def test_a_failure_names_its_cause_and_the_log(counted: Project) -> None:
    write_script(counted, "raise ValueError('the thing is upside down')")
    for reporter in ("console", "error-only", "executed-only"):
        output = counted.doit("-r", reporter).failed().text
        error = (
            "x failed on local: x.py, line 6: ValueError: the thing is upside down.\n"
            "→ Fix the script at x.py, line 6; the log has the traceback.\n"
            "The log is build/logs/x.log.\n"
        )
        assert error in output and output.count("x.py, line 6: ValueError") == 1, output
    assert_nothing_is_left(counted)


def test_a_failed_job_is_built_again_on_request(counted: Project) -> None:
    write_script(counted, "raise ValueError")
    counted.doit().failed()
    counted.doit().failed()
    assert builds(counted) == 2


def test_an_unacknowledged_failure_is_reported_and_not_built_again(counted: Project) -> None:
    gate = counted.folder / "go"
    write_script(counted, f"while not os.path.exists({str(gate)!r}): time.sleep(0.02)\nraise ValueError")
    client = counted.start()
    wait_for(lambda: builds(counted) == 1)
    client.kill()
    client.wait()
    go(counted)
    wait_for(lambda: not supervisors(counted))
    counted.doit().failed("x failed on local: ")
    assert builds(counted) == 1


def test_a_missing_output_is_named(counted: Project) -> None:
    counted.write("x.py", "open('y', 'w').close()")
    counted.doit().failed("x", "y")


def test_buildah_works_in_the_jobs_scratch_folder_while_a_job_is_cleaned_up_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it is killed then, the next cleanup removes its leftovers."""
    seen = []

    def captured(command: list[str], env: dict[str, str]) -> tuple[int, str, str]:
        seen.append(env["TMPDIR"])
        return 0, "null", ""

    stored = Store(tmp_path).job("0" * 64)
    monkeypatch.setattr(buildah, "captured", captured)
    assert remove_leftovers(stored)
    assert seen == [str(stored.scratch)] and not stored.scratch.exists()


def test_a_job_is_stopped_at_its_time_limit(counted: Project) -> None:
    counted.doit("time_limit=1").failed("time limit of 1 s was exceeded", "Raise time_limit=")
    assert_nothing_is_left(counted)


HUGE = """
import os
with open("x", "wb") as file:
    file.truncate(200 << 30)
"""
"""Creates a sparse output of 200 GiB that takes minutes to hash."""


def test_the_time_limit_stops_a_job_whose_output_is_being_hashed(project: Project) -> None:
    project.write("dodo.py", DODO)
    project.write("x.py", HUGE)
    project.doit("time_limit=4").failed("time limit of 4 s was exceeded")
    assert_nothing_is_left(project)
    assert list((project.store / "jobs").glob("*/out-*/*")) == []
    project.write("x.py", "open('x', 'w').close()")
    project.doit().ok()  # the slot is free


@pytest.mark.parametrize("how", ["Ctrl-C", "gamebear jobs cancel"])
def test_a_job_whose_output_is_being_hashed_can_be_cancelled(project: Project, how: str) -> None:
    project.write("dodo.py", DODO)
    project.write("x.py", HUGE)
    client = project.start()
    wait_for(lambda: [path for path in project.store.glob("jobs/*/phase") if path.read_text() == "keep"])
    if how == "Ctrl-C":
        client.send_signal(signal.SIGINT)
    else:
        project.gamebear("jobs", "cancel", "x", "--force").ok()
    assert client.wait(60) != 0
    (state,) = project.store.glob("jobs/*/state.json")
    assert json.loads(state.read_bytes())["state"] == "cancelled"
    assert_nothing_is_left(project)


def test_a_sparse_output_is_sparse_on_both_sides_and_its_holes_are_not_sent(project: Project) -> None:
    project.write("dodo.py", DODO)
    parts = {0: b"begin", (1 << 30) + 5: b"middle" * 50_000, 2 << 30: b"z" * 100_000}
    ends = 3 << 30
    project.write(
        "x.py",
        f"""
with open("x", "wb") as file:
    for offset, data in {parts!r}.items():
        file.seek(offset)
        file.write(data)
    file.truncate({ends})
""",
    )
    run = project.doit("-r", "live").ok()
    target = project.folder / "build" / "x"
    (stored,) = project.store.glob("jobs/*/out-*/x")
    for path in (target, stored):
        about = path.stat()
        assert about.st_size == ends
        assert about.st_blocks * 512 < 4 << 20
    with target.open("rb") as file:
        for offset, data in parts.items():
            file.seek(offset)
            assert file.read(len(data) + 1).rstrip(b"\0") == data
    record = json.loads((project.folder / "build" / "logs" / "x.json").read_bytes())
    assert record["bytes"]["down"] < 4 << 20, run.text
    project.doit("clean").ok()
    project.doit().ok()
    assert sha256_of(target) == sha256_of(stored)


@pytest.mark.parametrize("phase", ["another job's leftovers", "the builder is looked at", "the folder is filled"])
def test_a_phase_that_does_not_poll_is_stopped_too(
    project: Project, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    stored = Store(project.store).job("0" * 64)
    stored.store.prepare()
    stored.folder.mkdir()
    monkeypatch.setattr(store, "cache_home", lambda: project.home / ".cache")
    attempt = stored.begin_attempt({"trees": {}, "time_limit": 0})
    begun: list[str] = []

    def waits(*_: object, **__: object) -> NoReturn:
        begun.append(phase)
        stored.ask_to_stop(attempt)
        subprocess.run(["sleep", "100"], check=True)
        raise AssertionError("it was not ended")

    place = {
        "another job's leftovers": (supervisor, "clean_up_after_lost_jobs"),
        "the builder is looked at": (supervisor, "facts"),
        "the folder is filled": (workspace.Workspace, "fill"),
    }[phase]
    monkeypatch.setattr(*place, waits)
    monkeypatch.setattr(supervisor.Supervisor, "_document", lambda self: {"arch": own_architecture()})
    supervisor.Supervisor(stored, attempt).run()
    assert begun == [phase]
    assert stored.written_state()["state"] == "cancelled"


def test_a_script_changed_during_its_build_counts_as_not_built(counted: Project) -> None:
    client = counted.start()
    wait_for(lambda: builds(counted) == 1)
    write_script(counted, "pass")
    go(counted)
    assert client.wait(60) != 0
    assert not (counted.folder / "build" / "x").exists()
    assert "files changed during the build" in (counted.folder / "doit.out").read_text()
    counted.doit().ok()
    assert builds(counted) == 2
