"""Helper programs: bounded, supervised, and killed with all descendants."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from pathlib import Path

import pytest
from project import wait_for

from gamebear_tasks.runner.host.subprocesses import captured, streamed
from gamebear_tasks.runner.util.processes import descendants
from gamebear_tasks.util import subprocesses
from gamebear_tasks.util.subprocesses import MissingProgramError, ProgramError, StalledError, run


def stubborn(folder: Path) -> str:
    """Return shell code that starts a program that ignores SIGTERM, and waits until it runs."""
    script = f"trap '' TERM; touch {folder}/runs; while :; do sleep 0.1; done"
    return f"sh -c {shlex.quote(script)} & until [ -e {folder}/runs ]; do sleep 0.1; done"


def running(folder: Path) -> list[str]:
    """Return the command lines of living processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [words for words in found if f"{folder}/" in words]


# The client's


def test_a_program_that_closes_its_output_and_keeps_running_counts_as_stalled() -> None:
    with pytest.raises(StalledError):
        run(["sh", "-c", "exec >&- 2>&-; exec sleep 1000"], silence=0.5)


def test_a_program_that_closes_its_output_is_waited_for() -> None:
    with pytest.raises(ProgramError) as caught:
        run(["sh", "-c", "exec >&- 2>&-; sleep 0.2; exit 3"])
    assert caught.value.status == 3


def test_descendants_that_ignore_sigterm_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in separate sessions, and from a parent with threads."""
    monkeypatch.setattr(subprocesses, "GRACE", 0.3)
    monkeypatch.setattr(subprocesses, "OUTPUT_LIMIT", 1 << 16)
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, threading\n"
        f"words = ['sh', '-c', {stubborn(tmp_path) + '; exec yes'!r}]\n"
        "thread = threading.Thread(target=lambda: subprocess.run(words, start_new_session=True))\n"
        "thread.start()\nthread.join()\n"
    )
    with pytest.raises(ProgramError, match="wrote more than"):
        run([sys.executable, script])
    wait_for(lambda: not running(tmp_path))


def test_all_descendants_receive_sigterm_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They can clean up, although their parent ignores it."""
    monkeypatch.setattr(subprocesses, "OUTPUT_LIMIT", 1 << 16)
    script = tmp_path / "parent.py"
    child = f"trap 'touch {tmp_path}/cleaned; exit' TERM; touch {tmp_path}/runs; while :; do sleep 0.1; done"
    script.write_text(
        "import os, signal, subprocess, time\n"
        f"subprocess.Popen(['sh', '-c', {child!r}])\n"
        f"while not os.path.exists('{tmp_path}/runs'): time.sleep(0.1)\n"
        f"signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "os.set_blocking(1, False)\n"
        f"while not os.path.exists('{tmp_path}/cleaned'):\n"
        "    try: os.write(1, bytes(1 << 16))\n"
        "    except BlockingIOError: time.sleep(0.1)\n"
    )
    with pytest.raises(ProgramError, match="wrote more than"):
        run([sys.executable, script])
    assert (tmp_path / "cleaned").exists()


def test_a_second_ctrl_c_ends_the_wait_for_a_stubborn_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocesses, "GRACE", 100.0)

    def interrupt() -> None:
        for name in ("runs", "terminated"):
            wait_for((tmp_path / name).exists)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    script = f"trap 'touch {tmp_path}/terminated' TERM; touch {tmp_path}/runs"
    with pytest.raises(KeyboardInterrupt):
        run(["sh", "-c", f"{script}; while :; do sleep 0.1; done"])
    thread.join()
    assert not running(tmp_path)


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "apt-get").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingProgramError) as caught:
        run(["dpkg-source", "--extract"])
    assert (caught.value.reason, caught.value.hint) == (
        "dpkg-source is not installed",
        "sudo apt install dpkg-dev",
    )


def test_input_output_and_errors_can_be_redirected(tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    with copied.open("wb") as out:
        assert run(["cat"], stdin=b"data", stdout=out) == b""
    assert copied.read_bytes() == b"data"
    assert run(["sh", "-c", "echo 1; echo 2 >&2; exit 4"], merged=True, allowed=(0, 4)) == b"1\n2\n"
    with pytest.raises(ProgramError) as caught:
        run(["sh", "-c", "echo 1; echo 2 >&2; exit 4"], merged=True)
    assert caught.value.output == "1\n2\n"


# The runner's

ENV = {"PATH": os.environ["PATH"]}


def test_a_timeout_is_distinguished_from_every_exit_status() -> None:
    assert captured(["sh", "-c", "echo no >&2; exit 124"], ENV) == (124, "", "no\n")
    assert captured(["sleep", "1000"], ENV, timeout=0.2) == (-9, "", "timeout after 0 seconds")


def test_a_timeout_kills_the_descendants_too(tmp_path: Path) -> None:
    assert captured(["sh", "-c", f"{stubborn(tmp_path)}; wait"], ENV, timeout=2.0)[0] == -9
    wait_for(lambda: not running(tmp_path))


def test_a_silent_program_is_killed_with_its_descendants(tmp_path: Path) -> None:
    status, message = streamed(["sh", "-c", f"{stubborn(tmp_path)}; wait"], ENV, silence=lambda _: 1.6)
    assert status == -9 and "no output for" in message
    wait_for(lambda: not running(tmp_path))


def test_a_daemon_of_an_ended_program_keeps_running(tmp_path: Path) -> None:
    daemon = f"until [ -e {tmp_path}/stop ]; do sleep 0.1; done"
    words = ["sh", "-c", f"sh -c {shlex.quote(daemon)} >&- 2>&- &"]
    assert (run(words), captured(words, ENV)) == (b"", (0, "", ""))
    assert len(running(tmp_path)) == 2
    (tmp_path / "stop").touch()
    wait_for(lambda: not running(tmp_path))


def test_descendants_are_listed_nearest_first() -> None:
    process = subprocesses.start(["sh", "-c", "sh -c 'sleep 1000 & echo; wait' & wait"])
    assert process.stdout and process.stdout.read(1)
    found = list(descendants(process.pid))
    inner = list(descendants(found[0]))
    subprocesses.end(process)
    assert len(found) == 2 and inner == found[1:]
