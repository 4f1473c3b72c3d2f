"""Jobs on a builder: found by name, run once, detached, cleaned up after. On this machine, without a container."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from project import Project, assert_nothing_is_left, processes, wait_for

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
    """A project whose one job counts how often it is built, and then waits for a file called `go`."""
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


def test_a_killed_supervisor_means_a_lost_job_which_is_built_again(counted: Project) -> None:
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


def test_ctrl_c_ends_the_job_on_the_builder(counted: Project) -> None:
    client = counted.start()
    wait_for(lambda: builds(counted) == 1)
    client.send_signal(signal.SIGINT)
    assert client.wait(60) != 0
    assert not (counted.folder / "build" / "x").exists()
    assert "ending x.py" in (counted.folder / "doit.out").read_text()
    assert_nothing_is_left(counted)


@pytest.mark.parametrize("mode", ["process", "thread"])
def test_ctrl_c_ends_the_jobs_of_a_parallel_run(counted: Project, mode: str) -> None:
    client = counted.start("-n", "2", "-P", mode)
    wait_for(lambda: builds(counted) == 1)
    client.send_signal(signal.SIGINT)
    assert client.wait(60) != 0
    assert_nothing_is_left(counted)


def test_ctrl_c_detaches_where_that_is_set(counted: Project) -> None:
    client = counted.start("interrupt=detach")
    wait_for(lambda: builds(counted) == 1)
    client.send_signal(signal.SIGINT)
    client.wait(60)
    assert len(supervisors(counted)) == 1
    go(counted)
    counted.doit().ok()
    assert builds(counted) == 1


def test_a_failure_says_what_failed_and_where_the_log_is(counted: Project) -> None:
    write_script(counted, "raise ValueError('the thing is upside down')")
    words = "x.py, built by local:, failed.", "the thing is upside down", "The whole log is build/logs/x.log"
    counted.doit().failed(*words)
    assert_nothing_is_left(counted)


def test_a_failed_job_is_built_again_when_asked_again(counted: Project) -> None:
    write_script(counted, "raise ValueError")
    counted.doit().failed()
    counted.doit().failed()
    assert builds(counted) == 2


def test_a_failure_that_nobody_saw_is_told_and_not_built_again(counted: Project) -> None:
    gate = counted.folder / "go"
    write_script(counted, f"while not os.path.exists({str(gate)!r}): time.sleep(0.02)\nraise ValueError")
    client = counted.start()
    wait_for(lambda: builds(counted) == 1)
    client.kill()
    client.wait()
    go(counted)
    wait_for(lambda: not supervisors(counted))
    counted.doit().failed("x.py, built by local:, failed.")
    assert builds(counted) == 1


def test_an_output_that_is_missing_is_named(counted: Project) -> None:
    counted.write("x.py", "open('y', 'w').close()")
    counted.doit().failed("x", "y")


def test_a_job_that_takes_too_long_is_ended(counted: Project) -> None:
    counted.doit("time_limit=1").failed("time limit of 1 seconds")
    assert_nothing_is_left(counted)


def test_a_script_that_changes_while_it_is_built_is_not_taken_for_built(counted: Project) -> None:
    client = counted.start()
    wait_for(lambda: builds(counted) == 1)
    write_script(counted, "pass")
    go(counted)
    assert client.wait(60) != 0
    assert not (counted.folder / "build" / "x").exists()
    assert "changed while it was built" in (counted.folder / "doit.out").read_text()
    counted.doit().ok()
    assert builds(counted) == 2
