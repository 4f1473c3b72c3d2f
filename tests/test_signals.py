"""Signals: SIGTERM and SIGHUP act like Ctrl-C, and a killed doit leaves no process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import OUR_FRAMES, Project, assert_nothing_is_left, processes, wait_for

pytestmark = pytest.mark.system

DODO = """
from gamebear_tasks import artifact

def task_x():
    for number in range(3):
        yield {"name": str(number), **artifact("x.py", outputs=[f"build/{number}/x"], args={"n": number})}
"""

SCRIPT = """
#| arg: n: int
import os, time
print("begin", flush=True)
with open(HERE + f"/begun-{n}", "a") as file:
    file.write("built\\n")
while not os.path.exists(HERE + "/go"): time.sleep(0.02)
open("x", "w").write("made")
"""

MODES = {"serial": (), "processes": ("-n", "3"), "threads": ("-n", "3", "-P", "thread")}

REPORTERS = ("console", "live", "zero", "executed-only")

PROCESSES = ("-n", "3")


@pytest.fixture
def three(project: Project) -> Iterator[Project]:
    """A project of three jobs that wait for `go`, and a builder that runs all at once."""
    project.environment["GAMEBEAR_SLOTS"] = "3"
    project.write("dodo.py", DODO)
    project.write("x.py", f"{SCRIPT.replace('HERE', repr(str(project.folder)))}")
    yield project
    project.write("go", "")
    wait_for(lambda: not processes(project.store))


def begun(project: Project) -> int:
    return len(list(project.folder.glob("begun-*")))


def started(project: Project, mode: tuple[str, ...], *arguments: str) -> subprocess.Popen[bytes]:
    """Start doit and wait until it runs all jobs."""
    client = project.start(*mode, *arguments)
    wait_for(lambda: begun(project) == (3 if mode else 1))
    return client


def clients(project: Project) -> list[int]:
    """Processes of a project's user except jobs: doit, its forks, sessions, git."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            is_alive = (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            continue
        if is_alive and f"HOME={project.home}".encode() in environment:
            found.append(int(process.name))
    jobs = {pid for kind in ("supervise", "build") for pid in processes(project.store, kind)}
    return [pid for pid in found if pid not in jobs]


def states(project: Project) -> list[str]:
    return [json.loads(path.read_bytes())["state"] for path in project.store.glob("jobs/*/state.json")]


def output(project: Project) -> str:
    return (project.folder / "doit.out").read_text()


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("reporter", REPORTERS)
def test_a_signal_cancels_all_jobs_and_sets_the_exit_status(
    three: Project, mode: tuple[str, ...], number: signal.Signals, reporter: str
) -> None:
    client = started(three, mode, "-r", reporter)
    client.send_signal(number)
    assert client.wait(60) == 128 + number
    wait_for(lambda: not clients(three))
    assert set(states(three)) == {"cancelled"}
    assert_nothing_is_left(three)
    assert "Traceback" not in output(three)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_signal_detaches_from_the_jobs_if_configured(three: Project, mode: tuple[str, ...]) -> None:
    client = started(three, mode, "interrupt=detach")
    client.send_signal(signal.SIGTERM)
    assert client.wait(60) == 128 + signal.SIGTERM
    wait_for(lambda: not clients(three))
    assert set(states(three)) == {"running"}
    three.write("go", "")
    three.doit().ok()
    assert all(path.read_text() == "built\n" for path in three.folder.glob("begun-*"))


def test_a_killed_doit_leaves_no_process_and_its_jobs_are_found_again(three: Project) -> None:
    client = started(three, PROCESSES)
    client.kill()
    client.wait()
    wait_for(lambda: not clients(three))
    assert states(three) == ["running"] * 3
    three.write("go", "")
    three.doit(*PROCESSES).ok()
    assert [path.read_text() for path in three.folder.glob("begun-*")] == ["built\n"] * 3
    assert_nothing_is_left(three)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("after", [0.3, 0.6, 0.8, 1.0, 1.3])
def test_a_signal_at_any_time_leaves_no_process(three: Project, number: signal.Signals, after: float) -> None:
    client = three.start(*PROCESSES)
    time.sleep(after)
    client.send_signal(number)
    client.wait(60)
    wait_for(lambda: not clients(three))
    if number == signal.SIGTERM and three.store.exists():
        wait_for(lambda: not processes(three.store))
        assert "running" not in states(three)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_process_that_has_nothing_to_build_ends_with_doit(three: Project, number: signal.Signals) -> None:
    needs = '"task_dep": ["x:0"] if number else [], '
    three.write("dodo.py", DODO.replace('"name"', f'{needs}"name"'))
    client = three.start(*PROCESSES)
    wait_for(lambda: begun(three) == 1)
    client.send_signal(number)
    client.wait(60)
    wait_for(lambda: not clients(three))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("pause", [0.0, 0.02, 0.15])
def test_fifteen_signals_end_doit_without_a_traceback(three: Project, mode: tuple[str, ...], pause: float) -> None:
    client = started(three, mode)
    for _ in range(15):
        for pid in [client.pid, *children(client.pid)] if pause != 0.02 else [client.pid]:  # like a terminal
            try:
                os.kill(pid, signal.SIGINT)
            except ProcessLookupError:
                continue
        time.sleep(pause)
    assert client.wait(60) in (-signal.SIGINT, 128 + signal.SIGINT)
    wait_for(lambda: not clients(three))
    assert "Traceback" not in output(three) and "Exception ignored" not in output(three), output(three)
    assert not OUR_FRAMES.search(output(three))


def children(pid: int) -> list[int]:
    """The processes of `doit -n`: forked by doit, in its process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            _, parent, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(parent) == pid and int(group) == os.getpgid(pid):
            found.append(int(entry.name))
    return found


def test_output_is_flushed_before_a_signal_ends_doit(three: Project) -> None:
    prints = "\ndef task_a(): return {'actions': [lambda: print('from task a')], 'verbosity': 2}\n"
    three.write("dodo.py", DODO.replace('args={"n": number})}', 'args={"n": number}), "verbosity": 0}') + prints)
    client = started(three, (), "a", "x")
    assert "from task a" not in output(three), "it is still in a buffer"
    client.send_signal(signal.SIGTERM)
    assert client.wait(60) == 128 + signal.SIGTERM
    assert "from task a" in output(three)
    assert "terminated by SIGTERM" in output(three)


def test_an_ignored_signal_stops_nothing(three: Project) -> None:
    with (three.folder / "doit.out").open("wb") as out:
        client = subprocess.Popen(
            ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *three.command("-n", "3")],
            cwd=three.folder,
            env=three.environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    wait_for(lambda: begun(three) == 3)
    client.send_signal(signal.SIGHUP)
    three.write("go", "")
    assert client.wait(60) == 0


OTHERS_HANDLER = """
import os, signal, sys
from doit.doit_cmd import DoitMain

HERE = os.getcwd()
heard = []
if sys.argv[1] == "foreign":
    signal.signal(signal.SIGTERM, lambda number, frame: (heard.append(number), open(HERE + "/go", "w")))
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
status = DoitMain().run(["x:0"])
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
assert status == 0, status
print("heard", heard)
"""


def test_signal_handlers_of_a_program_that_calls_doit_are_respected_and_restored(three: Project) -> None:
    three.write("main.py", OTHERS_HANDLER)
    three.write("go", "")
    run = [sys.executable, "main.py", "own"]
    subprocess.run(run, cwd=three.folder, env=three.environment, check=True, capture_output=True)
    three.doit("clean").ok()
    (three.folder / "go").unlink()
    (three.folder / "begun-0").unlink()
    three.write("x.py", (three.folder / "x.py").read_text() + "# another job\n")
    run[2] = "foreign"
    with subprocess.Popen(run, cwd=three.folder, env=three.environment, stdout=subprocess.PIPE) as client:
        wait_for(lambda: begun(three) == 1)
        client.send_signal(signal.SIGTERM)
        out, _ = client.communicate(timeout=60)
    assert client.returncode == 0 and b"heard [15]" in out


def test_the_socket_of_a_killed_live_view_is_removed_by_a_later_one(three: Project) -> None:
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # the maximum length of a socket's path
    three.environment["TMPDIR"] = str(temporary)

    def folders() -> list[Path]:
        return list(temporary.glob("gamebear-*"))

    client = started(three, PROCESSES, "-r", "live")
    (killed,) = folders()
    other = Project(three.folder / "other", home=three.home, GAMEBEAR_SLOTS="3", TMPDIR=str(temporary))
    for name in ("dodo.py", "x.py"):
        other.write(name, (three.folder / name).read_text())
    second = other.start(*PROCESSES, "-r", "live")
    wait_for(lambda: len(folders()) == 2)
    assert killed in folders(), "it is in use"
    client.kill()
    client.wait()
    second.terminate()
    second.wait()
    wait_for(lambda: not clients(three))
    assert folders() == [killed]
    three.write("go", "")
    three.doit(*PROCESSES, "-r", "live").ok()
    assert folders() == []
    temporary.rmdir()


RUNS = """
import sys
from gamebear_tasks.util.subprocesses import run

run(sys.argv[1:])
"""


def test_a_program_of_a_source_ends_with_the_process_that_waits_for_it(three: Project) -> None:
    program = [sys.executable, "-c", RUNS, "sh", "-c", "touch runs; exec sleep 1000"]
    client = subprocess.Popen(program, cwd=three.folder, env=three.environment)
    wait_for(lambda: (three.folder / "runs").exists())
    client.kill()
    client.wait()
    wait_for(lambda: not clients(three))
