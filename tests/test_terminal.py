"""Interactive programs on a builder with the user's terminal: over SSH and on this machine."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from keyboard import Keyboard
from project import OUR_FRAMES, Project, wait_for
from remote import Remote
from sshd import Sshd

pytestmark = pytest.mark.system

RUN = """
import sys
from gamebear_tasks.builders.base import Terminal
from gamebear_tasks.builders.registry import open_builder
from gamebear_tasks.errors import GamebearError

builder = open_builder(sys.argv[1])
assert isinstance(builder, Terminal)
try:
    sys.exit(builder.run_program(sys.argv[2:]))
except GamebearError as error:
    sys.exit(f"ERROR: {error}")
finally:
    builder.close()
"""


def command(url: str, *words: str) -> list[str]:
    return [sys.executable, "-c", RUN, url, *words]


@pytest.fixture(params=["local:", "ssh:"])
def place(request: pytest.FixtureRequest, project: Project, server: Sshd, home: Path) -> tuple[str, Project]:
    """A builder's URL, and its user."""
    if request.param == "local:":
        return "local:", project
    return server.url, Project(project.folder, home=home)


def sit_down(place: tuple[str, Project], *words: str, size: tuple[int, int] = (24, 80)) -> Keyboard:
    url, project = place
    return Keyboard(command(url, *words), project.folder, project.environment, size)


def test_a_remote_shell_behaves_like_a_local_one(place: tuple[str, Project]) -> None:
    with sit_down(place, "sh", size=(31, 97)) as keyboard:
        keyboard.see(r"[$#] ")
        keyboard.type("echo $TERM; stty size; tty; test -t 0 && test -t 1 && test -t 2 && echo all three\r")
        keyboard.see("xterm-256color\r\n31 97\r\n/dev/pts/.*\r\nall three\r\n")
        keyboard.resize(50, 120)
        keyboard.type("until [ \"$(stty size)\" = '50 120' ]; do sleep 0.05; done; echo at last\r")
        keyboard.see("at last\r\n.*at last\r\n")
        keyboard.type("sh -c 'echo begun; exec sleep 1000'\r")
        keyboard.see("begun\r\n")
        keyboard.type("\x03")
        keyboard.type("exit 7\r")
        assert keyboard.end() == 7
        assert keyboard.is_as_before


def test_a_large_paste_arrives_whole_while_much_is_printed(place: tuple[str, Project]) -> None:
    script = "stty raw -echo; echo ready; head -c 300000 | tee /dev/stderr | sha256sum"
    with sit_down(place, "sh", "-c", script) as keyboard:
        keyboard.see("ready\n")
        pasted = bytes(range(256)) * 1200
        keyboard.type(pasted[:300000])
        keyboard.see(hashlib.sha256(pasted[:300000]).hexdigest())
        assert keyboard.end() == 0


def test_files_created_by_a_program_obey_the_users_umask(place: tuple[str, Project]) -> None:
    """Unlike the store. The first program uploads the runner, the second reuses it."""
    url, project = place
    for _ in range(2):
        done = subprocess.run(
            command(url, "sh", "-c", "umask"),
            cwd=project.folder,
            env=project.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "0022\n"
    with sit_down(place, "sh", "-c", "umask") as keyboard:
        keyboard.see("0022\r\n")


def test_without_a_terminal_a_pipe_is_used(place: tuple[str, Project]) -> None:
    url, project = place
    data = os.urandom(1 << 20)
    done = subprocess.run(
        command(url, "sh", "-c", "tty; cat; echo wrong >&2; exit 3"),
        cwd=project.folder,
        env=project.environment,
        input=data,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout == b"not a tty\n" + data
    assert done.stderr == b"wrong\n"


def test_a_signal_that_ends_the_program_is_in_the_status(place: tuple[str, Project]) -> None:
    with sit_down(place, "sh", "-c", "kill -SEGV $$") as keyboard:
        assert keyboard.end() == 128 + signal.SIGSEGV


def test_a_program_that_cannot_be_started_is_an_error(place: tuple[str, Project]) -> None:
    with sit_down(place, "/proc/nowhere/at-all") as keyboard:
        assert keyboard.end() == 1
        assert "/proc/nowhere/at-all cannot be started: No such file or directory." in keyboard.text
        assert keyboard.is_as_before


def lives(number: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_termination_signal_restores_the_terminal(place: tuple[str, Project]) -> None:
    with sit_down(place, "sh", "-c", "echo $$; exec sleep 1000") as keyboard:
        number = int(keyboard.see(r"\d+\r\n"))
        keyboard.process.send_signal(signal.SIGTERM)
        assert keyboard.end() == 128 + signal.SIGTERM
        assert keyboard.is_as_before
        wait_for(lambda: not lives(number))


def test_background_processes_do_not_hold_the_terminal(place: tuple[str, Project]) -> None:
    with sit_down(place, "sh", "-c", "trap '' HUP; (while echo more; do :; done) & echo begun; exit 4") as keyboard:
        assert keyboard.end() == 4


def test_a_lost_connection_is_reported_and_restores_the_terminal(remote: Remote) -> None:
    url = remote.project.environment["GAMEBEAR_BUILDER"]
    with sit_down((url, remote.project), "sh", "-c", "echo begun; exec sleep 1000") as keyboard:
        keyboard.see("begun\r\n")
        assert not keyboard.is_as_before
        remote.proxy.cut()
        assert keyboard.end() == 1
        assert "ERROR: " in keyboard.text and "is disconnected" in keyboard.text
        assert not OUR_FRAMES.search(keyboard.text)
        assert keyboard.is_as_before
