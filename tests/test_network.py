"""Network failures, and unreachable or overloaded builders: the artifact is correct or absent, and built once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project import OUR_FRAMES, Project, assert_nothing_is_left, processes, wait_for
from proxy import DOWN, UP, Cut
from remote import BIG, DODO, MAKES_BIG, MIB, Remote, big_input
from sshd import Account, Sshd, client_home, new_key, public

pytestmark = pytest.mark.system

LINES = 5000

PRINTS_LINES = f"""
lines = [f"line {{number:06}} of a build that takes its time" for number in range({LINES})]
os.write(1, "\\n".join(lines[:3000] + [""]).encode())
for number, line in enumerate(lines[3000:]):
    print(line, flush=True)
    if number % 40 == 0:
        time.sleep(0.02)
open("x", "w").close()
"""


# round trips


def test_an_existing_result_needs_six_round_trips_including_the_connection(remote: Remote) -> None:
    remote.write("open('x', 'w').write('made')")
    remote.project.doit().ok()
    remote.project.doit("clean").ok()
    remote.proxy.delay, remote.proxy.turns = 0.05, 0
    remote.project.doit().ok()
    assert remote.target.read_text() == "made"
    assert remote.proxy.turns <= 6, "introduction, key exchange, log-in, program and request, farewell"


# cut during upload


def test_an_upload_resumes_after_a_lost_connection(remote: Remote) -> None:
    expected = big_input(remote)
    remote.proxy.cut_next(Cut(UP, MIB), Cut(UP, MIB + 1, "fin"), Cut(UP, MIB - 1))
    run = remote.project.doit().ok()
    assert remote.target.read_text() == expected
    assert remote.proxy.connections == 4
    assert remote.proxy.passed[UP] < BIG + MIB, "it began anew each time"
    assert "again" in run.err
    assert remote.builds == 1
    remote.assert_nothing_is_left()


@pytest.mark.parametrize(
    "cuts",
    [[Cut(UP, 5)], [Cut(DOWN, 60, "fin")], [Cut(UP, 1800)], [Cut(DOWN, 2000, "fin"), Cut(UP, 12_000)]],
    ids=["greeting", "keys", "log-in", "runner"],
)
def test_a_lost_first_connection_is_retried(remote: Remote, cuts: list[Cut]) -> None:
    shutil.rmtree(remote.store / "runner", ignore_errors=True)
    remote.write("open('x', 'w').write('made')")
    remote.proxy.cut_next(*cuts)
    remote.project.doit().ok()
    assert remote.target.read_text() == "made"
    assert remote.proxy.connections == len(cuts) + 1
    assert remote.builds == 1
    assert len(list((remote.store / "runner").iterdir())) == 1, "half a runner was left"
    remote.assert_nothing_is_left()


def test_an_upload_resumes_while_the_builder_waits_on_a_dead_connection(remote: Remote) -> None:
    (remote.project.home / ".ssh" / "config").write_text("ServerAliveInterval 1\nServerAliveCountMax 1\n")
    expected = big_input(remote)
    remote.proxy.cut_next(Cut(UP, 2 * MIB, "stall"))
    remote.project.doit(timeout=60).ok()
    assert remote.target.read_text() == expected
    assert remote.proxy.connections == 2
    assert remote.proxy.passed[UP] < BIG + MIB
    assert remote.builds == 1
    remote.assert_nothing_is_left()


def test_concurrent_uploads_of_one_file_do_not_interfere(remote: Remote, tmp_path: Path) -> None:
    expected = big_input(remote)
    other = Project(tmp_path / "other", home=remote.project.home, **remote.settings)
    for name in ("dodo.py", "x.py", "big.bin"):
        shutil.copy(remote.project.folder / name, other.folder / name)
    remote.proxy.delay = 0.01
    clients = [project.start() for project in (remote.project, other)]
    assert [client.wait(60) for client in clients] == [0, 0], remote.output()
    assert remote.target.read_text() == (other.folder / "build" / "x").read_text() == expected
    assert remote.builds == 1
    for blob in (remote.store / "blobs").iterdir():
        assert sha256(blob) == blob.name
    remote.assert_nothing_is_left()


# cut during the build


def numbered() -> str:
    return "".join(f"line {number:06} of a build that takes its time\n" for number in range(LINES))


def test_reconnects_neither_lose_nor_repeat_log_lines(remote: Remote) -> None:
    remote.write(PRINTS_LINES)
    remote.proxy.cut_next(Cut(DOWN, 60_000), Cut(DOWN, 99_999, "fin"), Cut(DOWN, 12_345), Cut(DOWN, 20_001, "fin"))
    run = remote.project.doit().ok()
    assert remote.proxy.connections == 5
    assert remote.log.read_text() == numbered()
    assert numbered() in run.out
    assert remote.builds == 1
    remote.assert_nothing_is_left()


def test_a_build_is_reattached_when_the_builder_is_reachable_again(remote: Remote) -> None:
    remote.waits()
    client = remote.project.start()
    wait_for(lambda: "begin" in remote.output())
    remote.proxy.refuse()
    remote.proxy.cut()
    wait_for(lambda: "lost the connection to" in remote.output())
    remote.go()
    time.sleep(1.0)
    remote.proxy.accept()
    assert client.wait(60) == 0, remote.output()
    assert "trying again for 600 seconds" in remote.output()
    assert "connected to" in remote.output()
    assert remote.output().count("begin\n") == remote.output().count("end\n") == 1
    assert remote.log.read_text() == "begin\nend\n"
    assert remote.target.read_text() == "made"
    assert remote.builds == 1
    remote.assert_nothing_is_left()


def test_after_patience_expires_the_build_continues_and_the_next_doit_reattaches(remote: Remote) -> None:
    remote.waits()
    client = remote.project.start("patience=2")
    wait_for(lambda: "begin" in remote.output())
    remote.proxy.refuse()
    remote.proxy.cut()
    assert client.wait(60) != 0
    output = " ".join(remote.output().split())
    assert f"{remote.project.environment['GAMEBEAR_BUILDER']} cannot be reached" in output
    assert "cannot be reached for 2 seconds" in output
    assert "it reattaches to the job, which continues." in output
    assert not OUR_FRAMES.search(output)
    assert not remote.target.exists()
    assert len(processes(remote.store, "supervise")) == 1

    remote.proxy.accept()
    remote.go()
    run = remote.project.doit().ok()
    assert "begin" not in run.out and "end" in run.out
    assert remote.log.read_text() == "begin\nend\n"
    assert remote.target.read_text() == "made"
    assert remote.builds == 1
    remote.assert_nothing_is_left()


def test_a_lost_session_does_not_close_the_connection(remote: Remote, account: Account) -> None:
    remote.waits()
    client = remote.project.start()
    wait_for(lambda: "begin" in remote.output())
    sessions = sessions_of(account)
    assert len(sessions) == 1
    os.kill(sessions[0], signal.SIGKILL)
    wait_for(lambda: sessions_of(account) not in ([], sessions))
    remote.go()
    assert client.wait(60) == 0, remote.output()
    assert remote.proxy.connections == 1
    assert remote.log.read_text() == "begin\nend\n"
    assert remote.builds == 1
    remote.assert_nothing_is_left()


def sessions_of(account: Account) -> list[int]:
    """Return the runners that serve a client."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if process.stat().st_uid == account.uid and words[:4] == [b"python3", b"-I", b"-S", b"-c"]:
                found.append(int(process.name))
    return found


def test_a_slow_network_is_not_an_error(remote: Remote) -> None:
    remote.write("print('line')\nopen('x', 'w').write('made')")
    remote.proxy.delay = 0.05
    remote.project.doit().ok()
    assert remote.proxy.connections == 1
    assert remote.target.read_text() == "made"
    assert remote.builds == 1


# cut during download


def said_in_log(remote: Remote) -> str:
    return remote.log.read_text().strip()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_download_resumes_after_a_lost_connection(remote: Remote) -> None:
    remote.write(MAKES_BIG)
    remote.proxy.cut_next(Cut(DOWN, MIB), Cut(DOWN, MIB + 1, "fin"), Cut(DOWN, MIB // 2))
    remote.project.doit().ok()
    assert sha256(remote.target) == said_in_log(remote)
    assert remote.proxy.connections == 4
    assert remote.proxy.passed[DOWN] < BIG + MIB
    assert remote.builds == 1
    remote.assert_nothing_is_left()


@pytest.mark.parametrize("damaged", [False, True], ids=["sound", "damaged"])
def test_a_download_of_a_killed_client_resumes_if_its_part_is_intact(remote: Remote, damaged: bool) -> None:
    remote.write(MAKES_BIG)
    remote.proxy.cut_next(Cut(DOWN, 3 * MIB, "stall"))
    client = remote.project.start()
    build = remote.project.folder / "build"
    wait_for(lambda: any(part.stat().st_size > 2 * MIB for part in build.glob(".x.*.part")))
    client.kill()
    client.wait()
    assert not remote.target.exists()
    if damaged:
        (part,) = build.glob(".x.*.part")
        with part.open("r+b") as file:
            file.seek(MIB)
            file.write(b"something else")

    before = remote.proxy.passed[DOWN]
    run = remote.project.doit().ok()
    assert sha256(remote.target) == said_in_log(remote)
    fetched = remote.proxy.passed[DOWN] - before
    if damaged:
        assert "build/x: the partial download of an earlier run was damaged and is removed. Retrying." in run.err
        assert fetched > BIG
    else:
        assert fetched < BIG - MIB
    assert remote.builds == 1
    remote.proxy.cut()
    remote.assert_nothing_is_left()


# the builder's sshd


def test_a_build_survives_a_killed_and_refusing_sshd(remote: Remote, server: Sshd) -> None:
    remote.waits()
    remote.project.environment["GAMEBEAR_BUILDER"] = server.url
    client = remote.project.start()
    wait_for(lambda: "begin" in remote.output())
    server.hang_up()
    try:
        remote.go()
        time.sleep(10.0)
        assert client.poll() is None, remote.output()
    finally:
        server.start()
    assert client.wait(60) == 0, remote.output()
    assert remote.log.read_text() == "begin\nend\n"
    assert remote.target.read_text() == "made"
    assert remote.builds == 1
    remote.assert_nothing_is_left()


def test_a_failed_login_is_reported_once_and_nothing_is_installed(remote: Remote, server: Sshd, tmp_path: Path) -> None:
    remote.write("open('x', 'w').close()")
    ssh = remote.project.home / ".ssh"
    right = (ssh / "known_hosts").read_text()
    port = remote.proxy.port

    (ssh / "known_hosts").write_text("")
    remote.project.doit().failed(
        "is rejected: its host key SHA256:",
        "is unknown.",
        f"ssh-keyscan -p {port} 127.0.0.1 >> {ssh}/known_hosts",
    )
    (ssh / "known_hosts").write_text(f"[127.0.0.1]:{port} {public(new_key(tmp_path / 'former'))}\n")
    remote.project.doit().failed(
        "its host key has changed to SHA256:",
        "This may be an attack",
        f"ssh-keygen -R '[127.0.0.1]:{port}' -f {ssh}/known_hosts",
    )
    (ssh / "known_hosts").write_text(right)
    (ssh / "id_ed25519").unlink()
    new_key(ssh / "id_ed25519")
    rejected = f"rejects the log-in of {server.account.name}"
    remote.project.doit().failed(rejected, f"ssh-copy-id -i {ssh}/id_ed25519 -p {port}")
    assert remote.proxy.connections == 3, "a refusal was tried again"
    assert remote.builds == 0
    assert not remote.target.exists()


# a builder that is down

FOUR_AND_ONE = """
from gamebear_tasks import artifact

def task_x():
    for number in range(4):
        yield dict(artifact("x.py", outputs=[f"build/x{number}"]), name=str(number))

def task_here():
    return {"actions": ["touch here"]}
"""


@pytest.mark.parametrize("mode", [(), ("-n", "4", "-P", "thread")], ids=["serial", "threads"])
def test_a_silent_builder_costs_one_timeout_and_independent_tasks_continue(
    project: Project, mode: tuple[str, ...]
) -> None:
    (project.home / ".ssh").mkdir(mode=0o700)
    (project.home / ".ssh" / "config").write_text("ConnectTimeout 1\n")
    project.write("dodo.py", FOUR_AND_ONE)
    project.write("x.py", "")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ssh://pi@127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        run = project.doit("-c", *mode, f"builder={url}", timeout=60).failed(f"The builder {url} cannot be reached")
        took = time.monotonic() - start
    assert "timeout" in run.text
    assert run.text.count(f"The builder {url} cannot be reached") == 4
    assert (project.folder / "here").exists()
    assert took < 10, "three times what one time-out takes"


# a builder with tight limits

MANY = """
from gamebear_tasks import artifact

def task_x():
    for number in range({count}):
        yield dict(artifact("x.py", args={{"number": number}}, outputs=[f"build/x{{number}}"]), name=str(number))
"""

ONE_OF_MANY = """
#| arg: number: int
with open({count!r}, "a") as file:
    file.write("built\\n")
with open(f"x{{number}}", "w") as file:
    file.write(f"the artifact {{number}}")
"""


class Crowd:
    """A builder with tight limits, and a project with many jobs."""

    def __init__(self, folder: Path, server: Sshd, count: int) -> None:
        self.server = server
        self.count = count
        self.project = Project(folder / "project", home=client_home(folder, server), GAMEBEAR_BUILDER=server.url)
        self.project.write("dodo.py", MANY.format(count=count))
        self.counted = server.account.home / f"count-{time.monotonic_ns()}"
        self.project.write("x.py", ONE_OF_MANY.format(count=str(self.counted)))

    def take_slots(self, count: int) -> None:
        """Raise the builder's number of slots, to save time."""
        folder = self.server.account.home / ".config" / "gamebear"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "builder.json").write_text(f'{{"slots": {count}}}')
        subprocess.run(["chown", "-R", self.server.account.name, self.server.account.home / ".config"], check=True)

    def assert_built_once(self) -> None:
        for number in range(self.count):
            path = self.project.folder / "build" / f"x{number}"
            assert path.read_text() == f"the artifact {number}"
        assert len(self.counted.read_text().splitlines()) == self.count
        assert_nothing_is_left(self.project, self.server.account.home / ".cache" / "gamebear" / "v1")


@pytest.fixture
def crowd(tmp_path: Path, account: Account) -> Iterator[Callable[..., Crowd]]:
    with contextlib.ExitStack() as stack:

        def start(count: int, **options: object) -> Crowd:
            return Crowd(
                tmp_path, stack.enter_context(Sshd(tmp_path / "sshd", account, ("ed25519",), **options)), count
            )

        yield start
    (account.home / ".config" / "gamebear" / "builder.json").unlink(missing_ok=True)


def test_with_one_session_allowed_eight_tasks_at_once_share_it(crowd: Callable[..., Crowd]) -> None:
    eight = crowd(8, MaxSessions=1)
    eight.project.doit("-n", "8", "-P", "thread").ok()
    assert eight.server.connections == 1
    eight.assert_built_once()


def test_with_one_session_allowed_a_lost_session_is_replaced(crowd: Callable[..., Crowd], account: Account) -> None:
    one = crowd(1, MaxSessions=1)
    slow = ONE_OF_MANY.replace("with", "import time; print('begin', flush=True); time.sleep(2)\nwith", 1)
    one.project.write("x.py", slow.format(count=str(one.counted)))
    client = one.project.start()
    output = one.project.folder / "doit.out"
    wait_for(lambda: "begin" in output.read_text())
    (session,) = sessions_of(account)
    os.kill(session, signal.SIGKILL)
    assert client.wait(60) == 0, output.read_text()
    assert one.server.connections == 1
    one.assert_built_once()


def test_logins_refused_by_maxstartups_are_retried(crowd: Callable[..., Crowd]) -> None:
    four = crowd(4, MaxStartups="1:100:1")
    four.project.doit("-n", "4").ok()
    assert four.server.connections >= 4
    four.assert_built_once()


def test_a_builder_with_all_logins_in_use_is_waited_for(crowd: Callable[..., Crowd]) -> None:
    one = crowd(1, MaxStartups="1:100:1")
    with socket.create_connection(("127.0.0.1", one.server.port)) as in_the_way:
        in_the_way.recv(100)
        client = one.project.start()
        time.sleep(4.0)  # longer than an unreachable one is tried
        assert client.poll() is None, (one.project.folder / "doit.out").read_text()
    assert client.wait(60) == 0
    one.assert_built_once()


def test_32_tasks_at_once_use_one_connection(crowd: Callable[..., Crowd]) -> None:
    many = crowd(32)
    many.take_slots(4)
    many.project.doit("-n", "32", "-P", "thread").ok()
    assert many.server.connections == 1
    many.assert_built_once()


# much on one connection

THROUGH = """
import os, shutil
with open({count!r}, "a") as file:
    file.write("built\\n")
shutil.copyfile("big.bin", "x")
"""


def through_and_back(crowd: Crowd, size: int) -> int:
    """Send a file of `size` bytes to the builder and back. Return the growth of the client's memory in bytes."""
    block = os.urandom(MIB)
    with (crowd.project.folder / "big.bin").open("wb") as file:
        for number in range(size // MIB):
            file.write(number.to_bytes(8, "big") + block[8:])
    crowd.project.write("dodo.py", DODO.format(more=", inputs=['big.bin']"))
    crowd.project.write("x.py", THROUGH.format(count=str(crowd.counted)))
    _, baseline = crowd.project.measured(sys.executable, "-c", "import doit.doit_cmd, paramiko, gamebear_tasks")
    run, most = crowd.project.measured(*crowd.project.command())
    run.ok()
    subprocess.run(["cmp", crowd.project.folder / "big.bin", crowd.project.folder / "build" / "x"], check=True)
    assert crowd.server.connections == 1
    assert len(crowd.counted.read_text().splitlines()) == 1
    return most - baseline


def test_re_keying_during_a_transfer_corrupts_no_byte(crowd: Callable[..., Crowd]) -> None:
    one = crowd(1, RekeyLimit="16M", LogLevel="DEBUG1")
    grown = through_and_back(one, 48 * MIB)
    assert one.server.log.count("SSH2_MSG_NEWKEYS received") > 4
    assert grown < 80 * MIB, f"{grown / MIB:.0f} MiB"


@pytest.mark.slow
def test_more_than_a_gibibyte_each_way_through_doit(crowd: Callable[..., Crowd]) -> None:
    one = crowd(1, LogLevel="DEBUG1")
    grown = through_and_back(one, 1130 * MIB)
    assert one.server.log.count("SSH2_MSG_NEWKEYS received") > 1
    print(f"the client grew by {grown / MIB:.0f} MiB")
    assert grown < 80 * MIB, f"{grown / MIB:.0f} MiB"
