"""`gamebear`: doit's own main program with our commands and reporter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doit.dependency import DbmDB, JSONCodec
from project import OUR_FRAMES, Project, wait_for

from gamebear_tasks.cli.dep_file import DatabaseError, guarded
from gamebear_tasks.cli.main import COMMANDS

TASK = "def task_x():\n    return {'actions': ['echo output']}\n"

DODO = "from gamebear_tasks import artifact\ndef task_x():\n    return artifact('x.py', outputs=['build/x'])\n"

REMOVE = "Remove it: rm -r .doit.db*; doit then fetches finished results from the builder."


def test_without_a_command_it_runs_tasks_with_the_live_reporter(project: Project) -> None:
    project.write("dodo.py", TASK)
    assert "1 done in " in project.gamebear().ok().out
    assert "1 done in " in project.gamebear("run", "x").ok().out
    assert "1 done in " not in project.doit().ok().out


@pytest.mark.parametrize(
    ("arguments", "config", "pyproject"),
    [
        (("-r", "zero"), "", ""),
        ((), "DOIT_CONFIG = {'reporter': 'zero'}\n", ""),
        ((), "", "[tool.doit]\nreporter = 'zero'\n"),
    ],
    ids=["command line", "DOIT_CONFIG", "pyproject.toml"],
)
def test_the_command_line_and_the_project_choose_another_reporter(
    project: Project, arguments: tuple[str, ...], config: str, pyproject: str
) -> None:
    project.write("dodo.py", config + TASK)
    project.write("pyproject.toml", pyproject)
    assert project.gamebear(*arguments).ok().out == ""


def test_doit_uses_the_live_reporter_of_its_project(project: Project) -> None:
    project.write("dodo.py", "from gamebear_tasks import live\nDOIT_CONFIG = {'reporter': live}\n" + TASK)
    assert "1 done in " in project.doit().ok().out
    assert project.doit("-r", "zero").ok().out == ""


def test_gamebear_has_the_commands_of_doit(project: Project) -> None:
    project.write("dodo.py", TASK)
    assert project.gamebear("list").ok().out == project.doit("list").ok().out
    assert project.gamebear("info", "x").status == project.doit("info", "x").status
    usage = project.gamebear("--help").ok().out
    for name in ("run", "clean", "forget", "tabcompletion", *COMMANDS):
        assert f"  gamebear {name} " in usage
    for name in COMMANDS:
        assert f"gamebear {name}" in project.gamebear("help", name).ok().out


@pytest.mark.parametrize("name", ["report", "lock"])
def test_a_task_named_like_a_command_is_rejected_by_gamebear_and_run_by_doit(project: Project, name: str) -> None:
    project.write("dodo.py", TASK.replace("task_x", f"task_{name}"))
    output = project.gamebear().failed(f"Task can't be called '{name}' because this is a command name")
    assert output.status == 3
    assert project.doit("run", name).ok().ran == [name]


@pytest.mark.parametrize("name", ["lock", "prune", "sources", "report"])
def test_a_command_without_arguments_rejects_an_argument(project: Project, name: str) -> None:
    project.write("dodo.py", TASK)
    run = project.gamebear(name, "x").failed(f"gamebear {name} takes no arguments, got 'x'.", f"gamebear help {name}")
    assert run.status == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_an_error_of_two_lines(project: Project, name: str) -> None:
    project.write("dodo.py", TASK)
    run = project.gamebear(name, "--bad")
    assert (
        run.err == f"ERROR: gamebear {name}: option --bad not recognized.\n→ List the options: gamebear help {name}\n"
    )
    assert run.status == 3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([""], "An argument is empty."),
        (["run", ""], "An argument is empty."),
        (["clean", ""], "An argument is empty."),
        (["jobs", ""], "gamebear jobs has invalid arguments: ''."),
        (["jobs", "follow", ""], "No job or task '' on local:."),
        (["shell", ""], "Task '' does not exist."),
    ],
)
def test_an_empty_argument_is_an_error_of_two_lines(project: Project, arguments: list[str], error: str) -> None:
    project.write("dodo.py", TASK)
    run = project.gamebear(*arguments)
    assert run.err.startswith(f"ERROR: {error}\n→ ") and run.err.rstrip().count("\n") == 1


@pytest.mark.parametrize("arguments", ["jobs --lines", "shell --container"])
@pytest.mark.parametrize("value", ["x", "1.5", "", "²", "9" * 5000])
def test_an_option_that_is_not_a_number_is_an_error_of_two_lines(project: Project, arguments: str, value: str) -> None:
    project.write("dodo.py", TASK)
    run = project.gamebear(*arguments.split(), value)
    run.failed(f"{arguments.split()[1]} must be a number, got {value[:9]!r}"[:-1])
    assert run.status == 3 and run.err.count("\n") == 2


def test_an_import_of_a_former_task_names_the_command(project: Project) -> None:
    project.write("dodo.py", "from gamebear_tasks import task_lock\n")
    project.doit().failed("dodo.py imports task_lock, which is now a command.", "run: gamebear lock")


# the database


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Opens the project's database."""
    monkeypatch.chdir(tmp_path)
    return lambda: guarded(DbmDB)(".doit.db", JSONCodec())


def failure(attempt: Callable[[], object]) -> str:
    with pytest.raises(DatabaseError) as caught:
        attempt()
    return str(caught.value).replace("\n→ ", " ")


def test_the_database_stores_the_values_of_doit(opened: Callable[[], Any]) -> None:
    first = opened()
    first.set("x", "result", 1)
    first.dump()
    second = opened()
    assert second.in_("x") and second.get("x", "result") == 1
    second.remove("x")
    assert not second.in_("x") and second.get("x", "result") is None


def test_a_damaged_database_entry_is_reported(opened: Callable[[], Any]) -> None:
    first = opened()
    first._dbm[b"x"] = b'{"result'
    first.dump()
    output = "doit's database .doit.db cannot be read: it is damaged, or was written by another Python."
    assert failure(lambda: opened().get("x", "result")) == f"{output} {REMOVE}"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), "No space left on device. Free disk space, then run doit again"),
        (OSError(11, "Resource temporarily unavailable"), "Wait until the other doit in this folder has ended."),
        (OSError("database is locked"), "Wait until the other doit in this folder has ended."),
        (ValueError("Expecting value"), REMOVE),
    ],
)
def test_an_error_of_the_database_names_its_cause_and_fix(
    opened: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(DbmDB, "dump", fails)
    output = failure(opened().dump)
    assert output.startswith("doit's database .doit.db cannot be written: ") and says in output


@pytest.mark.parametrize("backend", ["dbm", "json", "sqlite3"])
@pytest.mark.parametrize("command", ["run", "list --status", "clean", "forget -a", "ignore x", "info x", "reset-dep"])
def test_a_damaged_database_causes_no_traceback(project: Project, command: str, backend: str) -> None:
    project.write("dodo.py", TASK)
    project.write(".doit.db", "{ no database")
    run = project.gamebear(*command.split(), "--backend", backend)
    run.failed(f"cannot be opened: it is damaged, or was written by another Python. {REMOVE}")
    assert run.status == 3 and "Traceback" not in run.text


@pytest.mark.parametrize("suffix", ["", ".dat", ".db"])
@pytest.mark.parametrize("command", ["run", "run --backend json", "run --backend sqlite3", "dumpdb"])
def test_a_fifo_in_place_of_the_database_does_not_block(project: Project, command: str, suffix: str) -> None:
    project.write("dodo.py", TASK)
    os.mkfifo(project.folder / f".doit.db{suffix}")
    output = project.gamebear(*command.split(), timeout=60).failed(
        f".doit.db{suffix} cannot be opened: it is not a regular file."
    )
    assert output.status == 3


@pytest.mark.parametrize("suffix", ["", ".dat", ".db"])
def test_a_fifo_in_place_of_the_database_does_not_block_doit(project: Project, suffix: str) -> None:
    project.write("dodo.py", DODO)
    project.write("x.py", "")
    os.mkfifo(project.folder / f".doit.db{suffix}")
    output = project.doit(timeout=60).failed(f".doit.db{suffix} cannot be opened: it is not a regular file.")
    assert output.status == 3


def test_a_damaged_database_is_not_dumped(project: Project) -> None:
    project.write(".doit.db", "{ no database")
    assert "Traceback" not in project.gamebear("dumpdb").failed("cannot be read: it is damaged").text


# Ctrl-C


@pytest.mark.system
@pytest.mark.parametrize("program", ["doit", "gamebear"])
def test_ctrl_c_prints_one_line(project: Project, program: str) -> None:
    project.write("dodo.py", DODO)
    begun = project.folder / "begun"
    project.write("x.py", f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(1000)\n")
    command = project.gamebear_command() if program == "gamebear" else project.command()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=project.folder, env=project.environment, stdout=pipe, stderr=pipe) as client:
        wait_for(begun.exists)
        client.send_signal(signal.SIGINT)
        output = b"".join(client.communicate(timeout=60)).decode()
    assert client.returncode == -signal.SIGINT, "a shell's loop ends with it"
    assert not OUR_FRAMES.search(output) and "Traceback" not in output, output
    assert output.count("interrupted") == 1, output


def test_ctrl_c_while_dodo_is_loaded_prints_one_line(project: Project) -> None:
    project.write("dodo.py", "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = project.gamebear_command("list")
    done = subprocess.run(command, cwd=project.folder, env=project.environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stderr == "gamebear: interrupted\n"


# the process

STATE = """
import gc, json, logging, os, signal, sys, threading

def state():
    loggers = ("paramiko", "paramiko.transport", "distributed", "distributed.comm", "distributed.core")
    return {
        "gc": [gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()],
        "hooks": [repr(hook) for hook in (sys.excepthook, threading.excepthook, sys.unraisablehook)],
        "signals": [repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "missing": [name for name, module in sys.modules.items() if module is None],
        "logging": [[logging.getLogger(name).level, len(logging.getLogger(name).handlers)] for name in loggers],
        "umask": [line for line in open("/proc/self/status") if line.startswith("Umask")],
    }
"""

CHANGES = f"""
import distributed, paramiko
{STATE}
before = state()
masks = []
umask = os.umask
os.umask = lambda mask: (masks.append(sys._getframe(1).f_code.co_filename), umask(mask))[1]
from gamebear_tasks import artifact, live, sd_image
import gamebear_tasks.builders.dask.comm, gamebear_tasks.builders.transports.ssh.connection
import gamebear_tasks.builders.transports.ssh.transport, gamebear_tasks.cli.main, gamebear_tasks.client.build
from doit.doit_cmd import DoitMain

assert DoitMain().run(["-r", "zero"]) == 0
loop = gamebear_tasks.builders.dask.comm.Loop()
loop.close()
assert not [name for name in masks if "gamebear" in name], masks  # the database asks for it
print(json.dumps([before, state()]))
"""


@pytest.mark.system
def test_process_global_state_is_unchanged(project: Project) -> None:
    """Neither by an import of the package, nor by a run of doit that builds."""
    project.write(
        "dodo.py", "from gamebear_tasks import artifact\ndef task_x(): return artifact('x.py', outputs=['x'])"
    )
    project.write("x.py", "open('x', 'w').close()")
    command = [sys.executable, "-c", CHANGES]
    done = subprocess.run(command, cwd=project.folder, env=project.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert after == before
