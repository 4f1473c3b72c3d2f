"""Retained containers of failed jobs, and shells in them: as root on this machine, rootless over SSH."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from keyboard import Keyboard
from project import Project, Run, assert_nothing_is_left, processes, wait_for
from remote import Remote
from sshd import Account, Sshd

from gamebear_tasks.runner.maintenance.retained_containers import AGE, MOST, keep, trim
from gamebear_tasks.runner.store.store import Store

pytestmark = pytest.mark.system

DODO = """
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", outputs=["build/x"])

def task_other():
    for name in "abcd":
        yield {"name": name, **artifact("other.py", outputs=[f"build/{name}"], args={"name": name})}
"""

SCRIPT = """
import os
os.mkdir("shared")
with open("shared/note", "w") as file:
    print("in the job's folder", file=file)
with Container("scratch", mounts=[("shared", "/job")]) as first:
    first.copy_in(TREE, "/")
    first.run(["true"])
with Container("scratch") as c:
    c.copy_in(TREE, "/")
    c.workdir = "/tmp"
    c.environ["GREETING"] = "hi there"
    c.run(["sh", "-c", "echo 'half done' > half; chown 1000 half"])
    print("the last line", flush=True)
    c.run(["sh", "-c", "test -e mended"], env={"FOR": "this one"}, user="pi", volumes=[("shared", "/mnt", "ro")])
    open("x", "w").close()
"""

PROGRAMS = ("sh", "bash", "cat", "chown", "env", "id", "ls", "pwd", "sleep", "stty", "test", "true")


class Place:
    """A project, and the store of its builder."""

    def __init__(self, project: Project, store: Path, tree: Path) -> None:
        self.project = project
        self.store = store
        self.failed: set[str] = set()
        self._left = Path()
        project.write("dodo.py", DODO)
        self.script = SCRIPT.replace("TREE", repr(str(tree)))
        project.write("x.py", self.script)
        project.write("other.py", "#| arg: name: str\nc = Container('scratch')\nraise ValueError(name)\n")

    def fail(self, *words: str) -> Run:
        run = self.project.doit(*(words or ("x", "keep_failed=yes"))).failed("failed")
        self.failed.update(path.name for path in (self.store / "jobs").iterdir())
        return run

    def has_left(self) -> Path:
        """Let x fail, unless its containers are still retained. Return the job's folder."""
        self.project.write("x.py", self.script)
        if not self._left.is_file():
            self.fail()
            record = json.loads((self.project.folder / "build/logs/x.json").read_text())
            self._left = self.store / "kept" / record["digest"]
        return self.store / "jobs" / self._left.name

    def shell(self, *words: str, size: tuple[int, int] = (24, 80)) -> Keyboard:
        return Keyboard(self.project.command("shell", *words), self.project.folder, self.project.environment, size)

    @property
    def kept(self) -> list[Path]:
        return list((self.store / "kept").iterdir())

    @property
    def containers(self) -> int:
        """Number of containers of failed jobs in the builder's image store."""
        is_ours = self.store == self.project.store
        default = Path("/var/lib") if is_ours else self.store.parents[2] / ".local" / "share"
        tops = (self.store, default / "containers")
        listings = [top / "storage" / "overlay-containers" / "containers.json" for top in tops]
        text = "".join(path.read_text() for path in listings if path.exists())
        return sum(text.count(f'"{Store(self.store).job(digest).container_prefix}') for digest in self.failed)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the containers that the builder's account can read."""
    tree = tmp_path_factory.mktemp("tree") / "files"
    tiny.fill(tree, PROGRAMS)
    for folder in (tree, *tree.parents):
        folder.chmod(folder.stat().st_mode | 0o011)
    tree.chmod(0o755)
    return tree


@pytest.fixture(scope="module")
def here(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A builder on this machine, as root."""
    folder = tmp_path_factory.mktemp("here")
    project = Project(folder / "project", home=folder / "home")
    place = Place(project, project.store, tree)
    yield place
    for mark in place.kept:  # other tests share the store of root's containers
        os.utime(mark, (1, 1))
    trim(Store(place.store))
    assert place.containers == 0


@pytest.fixture(scope="module")
def there(tree: Path, server: Sshd, home: Path, account: Account, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A builder behind sshd, as an ordinary user."""
    project = Project(tmp_path_factory.mktemp("there"), home=home, GAMEBEAR_BUILDER=server.url)
    return Place(project, account.home / ".cache" / "gamebear" / "v1", tree)


@pytest.fixture(params=["here", "there"])
def place(request: pytest.FixtureRequest) -> Place:
    """Each of both builders."""
    place: Place = request.getfixturevalue(request.param)
    return place


def test_a_shell_opens_where_the_command_failed(place: Place) -> None:
    output = place.fail().text
    assert "x failed on " in output and ": `sh -c 'test -e mended'` exited with 1.\n" in output
    assert "the last line" in output and "The log is build/logs/x.log" in output
    assert "The container is kept. Open a shell in it: gamebear shell x" in output
    with place.shell("x", size=(31, 97)) as keyboard:
        keyboard.see("container 2 of 2 of x on .* failed with status 1")
        keyboard.see(r"[$#] ")
        keyboard.type("pwd; id -u; stty size; echo $TERM, $GREETING, $FOR; cat half /mnt/note\r")
        keyboard.see("/tmp\r\n1000\r\n31 97\r\nxterm-256color, hi there, this one\r\nhalf done\r\nin the job's folder")
        keyboard.resize(50, 120)
        keyboard.type("until [ \"$(stty size)\" = '50 120' ]; do sleep 0.05; done; echo at last\r")
        keyboard.see("at last\r\n.*at last\r\n")
        keyboard.type("sh -c 'echo begun; exec sleep 1000'\r")
        keyboard.see("begun\r\n")
        keyboard.type("\x03")
        keyboard.see(r"[$#] ")
        keyboard.type("\x1b[A\x1b[A\x1b[A\x1b[A")
        keyboard.see("sh -c 'test -e mended'")
        keyboard.type("\r")
        keyboard.type("echo output $?; exit 7\r")
        keyboard.see("output 1")
        assert keyboard.end() == 7
        assert keyboard.is_as_before
        assert "exit status" not in keyboard.text and "exited with" not in keyboard.text


def test_a_given_command_is_run_and_its_status_returned(there: Place) -> None:
    there.has_left()
    run = there.project.gamebear("shell", "x", "--", "sh", "-c", 'echo "$1"; id -u; exit 5', "sh", "CFLAGS=-O2")
    assert (run.status, run.out) == (5, "CFLAGS=-O2\n1000\n")
    data = os.urandom(1 << 20)
    done = subprocess.run(
        there.project.command("shell", "x", "--", "cat"),
        cwd=there.project.folder,
        env=there.project.environment,
        input=data,
        capture_output=True,
        check=True,
    )
    assert done.stdout == data
    assert done.stderr == b""
    assert there.project.gamebear("shell", "-c", "1", "x", "--", "cat", "/job/note").ok().out == "in the job's folder\n"


def test_a_shell_that_cannot_be_opened_is_an_error(here: Place) -> None:
    here.has_left()
    shell = ("shell",)
    here.project.doit(*shell, "-c", "3", "x").failed("Task x has no container 3, only 2.", "from 1 to 2")
    here.project.doit(*shell, "y").failed("Task 'y' does not exist.", "Use one of: x, other:a, other:b")
    here.project.doit(*shell).failed("gamebear shell needs the name of one task, got none.")
    here.project.doit(*shell, "x", "--").failed("gamebear shell has no command after --.")
    here.project.doit(*shell, "other:a").failed(
        "Task other:a has no retained container on", "Run doit other:a keep_failed=yes"
    )


def test_an_open_shell_retains_its_container(there: Place) -> None:
    job = there.has_left()
    with there.shell("x") as keyboard:
        keyboard.see(r"[$#] ")
        there.project.doit("x").failed("a shell is open in a container", "Exit that shell")
        for name in ("state.json", "clients", "job.json"):
            os.utime(job / name, (1, 1))
        output = there.project.gamebear("prune", "--older", "0.5").ok().out
        assert "was kept: a shell is open in its container" in output
        assert there.project.gamebear("shell", "x", "--", "sh", "-c", "echo beside").ok().out == "beside\n"
        keyboard.type("echo still here; exit 6\r")
        keyboard.see("still here\r\n")
        assert keyboard.end() == 6
        assert "panic" not in keyboard.text
    for name in ("state.json", "clients", "job.json"):
        os.utime(job / name, (1, 1))
    assert "1 job" in there.project.gamebear("prune", "--older", "0.5").ok().out
    assert there.kept == [] and there.containers == 0
    there.project.gamebear("shell", "x").failed("Task x has no retained container")


def test_the_next_build_of_a_job_removes_its_retained_containers(there: Place) -> None:
    there.fail()
    assert len(there.kept) == 1 and there.containers == 2
    output = there.fail("x", "base=auto").text
    again = "doit x base=auto keep_failed=yes; gamebear shell x base=auto"
    assert f"To keep its container for a shell: {again}" in output
    assert there.kept == [] and there.containers == 0
    assert_nothing_is_left(there.project, there.store)


def test_the_number_of_retained_containers_is_bounded(here: Place) -> None:
    here.fail("-c", "other", "keep_failed=yes")
    assert len(here.kept) == MOST == here.containers
    assert here.project.gamebear("jobs").ok().out.count("failed, kept") == MOST
    for path in here.kept:
        old = time.time() - AGE - 60
        os.utime(path, (old, old))
    here.fail("x")
    assert here.kept == [] and here.containers == 0
    assert_nothing_is_left(here.project, here.store)


def test_a_shell_opened_while_its_container_is_replaced_holds_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    job = store.job("ab" * 32)
    job.folder.mkdir()

    def fail() -> None:
        assert job.release_kept()
        job.mark.touch()
        keep(job)

    lock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        monkeypatch.undo()
        fail()
        lock(fd, operation)

    fail()
    monkeypatch.setattr(fcntl, "flock", late)
    with job.held_kept() as held:
        assert held and not job.release_kept() and job.kept.exists()
    assert job.release_kept() and not job.kept.exists()
    with job.held_kept() as held:
        assert not held


def test_a_killed_build_retains_its_container(here: Place) -> None:
    here.project.write("x.py", here.script.replace("test -e mended", "echo begun; exec sleep 1000"))
    with here.project.start("x", "keep_failed=yes") as doit:
        wait_for(lambda: "\nbegun\n" in (here.project.folder / "doit.out").read_text(), 60)
        for number in processes(here.store, "build"):
            with contextlib.suppress(ProcessLookupError):  # the end of one may have ended the others
                os.kill(number, signal.SIGKILL)
        assert doit.wait() == 1
    here.failed.update(path.name for path in (here.store / "jobs").iterdir())
    run = here.project.gamebear("shell", "x", "--", "sh", "-c", "pwd; cat half").ok()
    assert run.out == "/tmp\nhalf done\n"
    here.project.write("x.py", f"{here.script}# mended\n")
    run = here.project.gamebear("shell", "x", "--", "true").ok()
    assert "inputs or settings of x (such as sources=debian) have changed since it failed" in run.err
    here.project.write("x.py", here.script)


def test_a_missing_output_retains_the_last_containers(here: Place) -> None:
    here.project.write("x.py", "with Container('scratch') as c:\n    c.copy_in('x.py', '/left')\n")
    assert "gamebear shell x" in here.fail().text
    with here.shell("x") as keyboard:
        keyboard.see("from scratch, ran no command")
        assert keyboard.end() != 0  # it contains no program, not even a shell
    here.project.write("x.py", here.script)


def test_a_lost_connection_is_reported_and_the_container_retained(remote: Remote, tree: Path) -> None:
    place = Place(remote.project, remote.store, tree)
    place.project.write("x.py", f"{place.script}# by way of a proxy\n")
    seconds = 1000 + os.getpid()  # a duration that no other process uses
    place.fail()
    with place.shell("x") as keyboard:
        keyboard.see(r"[$#] ")
        keyboard.type(f"sh -c 'echo begun; exec sleep {seconds}'\r")
        keyboard.see("begun\r\n")
        wait_for(lambda: is_running("sleep", str(seconds)))
        remote.proxy.cut()
        assert keyboard.end() == 2
        assert "ERROR: " in keyboard.text and "is disconnected" in keyboard.text
        assert keyboard.is_as_before
    wait_for(lambda: not is_running("sleep", str(seconds)))
    assert place.project.gamebear("shell", "x", "--", "cat", "half").ok().out == "half done\n"
    place.fail("x")


def is_running(*words: str) -> bool:
    """Return whether any user has a process with this command line."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes() == "".join(f"{word}\0" for word in words).encode():
                return True
    return False
