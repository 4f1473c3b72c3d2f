"""Faults of the store: reboots, full disks, damage, clock changes, endless logs. On this machine.

Most jobs are scripts without a container, to save time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import lzma
import os
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from project import Project, Run, measured, wait_for

from gamebear_tasks.runner.executor import supervisor as supervise
from gamebear_tasks.runner.executor.workspace import JobFailed, Workspace
from gamebear_tasks.runner.host import buildah, capabilities
from gamebear_tasks.runner.images import apt_sources
from gamebear_tasks.runner.protocol import wire
from gamebear_tasks.runner.protocol.requests import Cancel, Discard, Put
from gamebear_tasks.runner.server import cancellation, outputs
from gamebear_tasks.runner.server import session as serve
from gamebear_tasks.runner.store import slots
from gamebear_tasks.runner.store.store import Store, StoredJob, version
from gamebear_tasks.runner.util.atomic_files import sha256
from gamebear_tasks.runner.util.locks import Lock

DODO = """
from gamebear_tasks import artifact

DOIT_CONFIG = {{"default_tasks": ["x"]}}

def task_x():
    return artifact("x.py", inputs={inputs!r}, outputs=["build/x"])

"""

SCRIPT = """
import os, sys, time
HERE = {here!r}
with open(HERE + "/count", "a") as file:
    file.write("built\\n")
{body}
with open("x", "w") as file:
    file.write("the artifact")
"""

IMPATIENT = """
from gamebear_tasks.builders.transports import local
from gamebear_tasks.builders.protocol import client as remote, session

remote.FOLLOW, session.SILENCE = 0.5, 2.5
start = local.ProcessConnection.start

def counted(self, command):
    with open("sessions", "a") as file:
        file.write("one\\n")
    return start(self, command)

local.ProcessConnection.start = counted
"""
"""Reduces a client's timeout for silent builders to 2.5 seconds, and counts its sessions."""

WAIT = 'while not os.path.exists(HERE + "/go"): time.sleep(0.02)'
"""Waits for the file `go` in the project's folder."""

MIB = 1 << 20


class Job:
    """A project with one job that counts its builds.

    Args:
        folder: folder of the project.
        home: home folder that contains the store.
        body: code that the script runs before it creates its output.
        inputs: files by name.
        environment: additional environment variables.
    """

    def __init__(
        self, folder: Path, home: Path, body: str = "", inputs: dict[str, bytes] | None = None, **environment: str
    ) -> None:
        self.project = Project(folder, home, **environment)
        self.folder = folder
        caches = environment.get("XDG_CACHE_HOME")
        self.store = Store((Path(caches) if caches else home / ".cache") / "gamebear" / "v1")
        self.project.write("dodo.py", DODO.format(inputs=list(inputs or ())))
        self.project.write("x.py", SCRIPT.format(here=str(folder), body=body))
        for name, content in (inputs or {}).items():
            (folder / name).write_bytes(content)

    @property
    def builds(self) -> int:
        path = self.folder / "count"
        return len(path.read_text().splitlines()) if path.exists() else 0

    @property
    def output(self) -> str:
        """Output of a started doit so far."""
        return (self.folder / "doit.out").read_text()

    @property
    def stored(self) -> Path:
        """The job's folder in the store."""
        for path in self.store.jobs.iterdir():
            if '"x.py"' in (path / "job.json").read_text() and self._script in (path / "job.json").read_text():
                return path
        raise AssertionError("the store has no such job")

    @property
    def _script(self) -> str:
        return hashlib.sha256((self.folder / "x.py").read_bytes()).hexdigest()

    @property
    def state(self) -> dict[str, object]:
        state: dict[str, object] = json.loads((self.stored / "state.json").read_bytes())
        return state

    def go(self) -> None:
        self.project.write("go", "")

    def started(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start doit. Return it when the build has started."""
        before = self.builds
        client = self.project.start(*arguments)
        wait_for(lambda: self.builds > before or client.poll() is not None)
        assert client.poll() is None, self.output
        return client

    def supervisors(self) -> list[int]:
        """Return the living supervisors of the store."""
        return [
            pid
            for pid, words in processes()
            if b"supervise" in words and str(self.store.root).encode() in b" ".join(words)
        ]

    def abandon(self) -> None:
        """Simulate a power cut: kill the client, the supervisor and the build at once."""
        client = self.started()
        client.kill()
        client.wait()
        for pid in self.supervisors():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.supervisors() and not self.left_processes())

    def left_processes(self) -> list[str]:
        return [
            str(pid)
            for pid, words in processes()
            if str(self.store.root).encode() in b" ".join(words) and (b"build" in words or b"supervise" in words)
        ]

    def ok(self, *arguments: str) -> Run:
        """Run doit. Assert success, the correct artifact, and no leftovers."""
        run = self.project.doit(*arguments).ok()
        assert (self.folder / "build" / "x").read_text() == "the artifact"
        self.assert_nothing_is_left()
        return run

    def failed(self, *words: str, arguments: tuple[str, ...] = ()) -> Run:
        """Run doit. Assert failure with some texts, no target, and no leftovers."""
        run = self.project.doit(*arguments).failed(*words)
        assert not (self.folder / "build" / "x").exists()
        self.assert_nothing_is_left()
        return run

    def assert_nothing_is_left(self) -> None:
        wait_for(lambda: not self.supervisors())
        assert self.left_processes() == []
        root = self.store.root
        left = [
            *(root / "live").iterdir(),
            *(root / "trash").iterdir(),
            *(root / "slots").glob("*wait-*"),
            *root.glob("jobs/*/work"),
            *root.glob("jobs/*/.*"),
            *root.glob("jobs/*/result.json"),
            *root.glob("jobs/*/source.tar"),
            *root.glob("tmp/*.wanted"),
            *(self.folder / "build").glob(".*.part"),
        ]
        assert left == []
        for job in (root / "jobs").iterdir():
            assert len(list(job.glob("out-*"))) <= 1, f"outputs of more than one attempt are in {job}"


def probed_facts(store: Store) -> capabilities.Facts:
    """Return the builder's cached probe results; those for our own environment differ."""
    return capabilities.from_json(json.loads((store.root / "facts.json").read_bytes())["facts"])


def processes() -> Iterator[tuple[int, list[bytes]]]:
    """Yield every process with its command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(entry.name), (entry / "cmdline").read_bytes().split(b"\0")


@pytest.fixture(scope="module")
def home(system: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared home folder, so that the builder is probed once."""
    return tmp_path_factory.mktemp("home")


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Yield a file system of the specified size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def disk(system: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The builder's disk, 32 MiB."""
    with small_disk(tmp_path_factory.mktemp("disk") / "cache", 32 * MIB) as folder:
        yield folder


@pytest.fixture
def ballast(disk: Path) -> Iterator[Path]:
    """A file that fills the disk."""
    path = disk / "ballast"
    yield path
    path.unlink(missing_ok=True)


def fill(ballast: Path, but: int) -> None:
    """Grow a file until the specified number of bytes is free."""
    with ballast.open("ab", buffering=0) as file:
        free = shutil.disk_usage(ballast.parent).free
        while free > but:
            file.write(bytes(min(free - but, MIB)))
            free = shutil.disk_usage(ballast.parent).free


# 7: the builder reboots


def test_after_a_reboot_the_job_is_built_again_and_its_leftovers_are_removed(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home, WAIT + '\nwith Container("scratch") as c:\n    c.copy_in("x.py", "/x")')
    job.abandon()
    assert job.state["state"] == "running"
    known = probed_facts(job.store)
    container = f"{job.store.job(job.stored.name).container_prefix}1"
    buildah.outside(job.store.root, known, "from", "--name", container, "scratch")
    other_boot = job.store.root / "run" / "11111111-2222-3333-4444-555555555555"
    (other_boot / "containers").mkdir(parents=True)
    facts = json.loads((job.store.root / "facts.json").read_bytes())
    facts["key"]["boot"] = other_boot.name
    (job.store.root / "facts.json").write_text(json.dumps(facts))
    job.go()
    job.ok()
    assert job.builds == 2
    assert not other_boot.exists()
    assert container not in buildah.outside(job.store.root, known, "containers", "--all", "--json")


def test_leftovers_of_a_lost_job_are_removed_by_the_next_job(tmp_path: Path, home: Path) -> None:
    lost = Job(tmp_path / "lost", home, WAIT)
    lost.abandon()
    container = f"{lost.store.job(lost.stored.name).container_prefix}7"
    known = probed_facts(lost.store)
    buildah.outside(lost.store.root, known, "from", "--name", container, "scratch")
    (lost.store.live / "no digest").touch()  # as left by NFS
    (lost.store.live / ("0" * 64)).touch()  # of a job without a folder
    assert (lost.stored / "work").is_dir()
    job = Job(tmp_path / "next", home)
    job.project.doit().ok()
    (lost.store.live / "no digest").unlink()
    job.assert_nothing_is_left()
    assert lost.state["state"] == "lost"
    assert container not in buildah.outside(lost.store.root, known, "containers", "--all", "--json")


def test_jobs_in_different_stores_have_different_containers(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("one")
    one, link, other = (Store(tmp_path / name).job("a" * 64).container_prefix for name in ("one", "link", "other"))
    assert one == link != other


def test_child_processes_do_not_inherit_locks_of_the_supervisor(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home, 'import subprocess\nsleep = subprocess.Popen(["sleep", "1000"])\n' + WAIT)
    client = job.started()
    (supervisor,) = job.supervisors()
    holders = set()
    for pid, _ in processes():
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(fd) in (str(job.stored / "lock"), str(job.store.slots / "0")):
                        holders.add(pid)
    job.go()
    assert client.wait(60) == 0
    assert holders == {supervisor}
    job.assert_nothing_is_left()


# 8: the builder's disk is full


def test_a_full_disk_at_upload_is_reported_and_the_upload_resumes_later(
    tmp_path: Path, home: Path, disk: Path, ballast: Path
) -> None:
    job = Job(tmp_path, home, inputs={"big": os.urandom(5 * MIB)}, XDG_CACHE_HOME=str(disk))
    fill(ballast, but=2 * MIB)
    job.failed("On this machine: The builder's disk is full", "Free space there", "gamebear prune")
    assert job.builds == 0
    ballast.unlink()
    job.ok()
    assert job.builds == 1
    assert list((job.store.root / "tmp").glob("*.part")) == []


def test_a_full_disk_before_the_job_starts_is_reported(tmp_path: Path, home: Path, disk: Path, ballast: Path) -> None:
    Job(tmp_path / "another", home, XDG_CACHE_HOME=str(disk)).ok()
    job = Job(tmp_path / "this", home, XDG_CACHE_HOME=str(disk))
    fill(ballast, but=0)
    run = job.project.doit().failed("The builder's disk is full", "Free space there")
    assert job.builds == 0 and "lost" not in run.text
    ballast.unlink()
    job.ok()
    assert job.builds == 1


@pytest.mark.parametrize(
    "body",
    [
        pytest.param('with open("big", "wb") as big:\n        while True: big.write(bytes(1 << 20))', id="its files"),
        pytest.param("while True: print('x' * 100000)", id="its log"),
        pytest.param(
            "import subprocess\n    print('begin')\n"
            "    subprocess.run(['dd', 'if=/dev/zero', 'bs=1M', 'of=big'], check=True)",
            id="a program",
        ),
    ],
)
def test_a_build_that_fills_the_disk_fails_with_this_cause(
    tmp_path: Path, home: Path, disk: Path, ballast: Path, body: str
) -> None:
    (tmp_path / "fill").touch()
    job = Job(tmp_path, home, f'if os.path.exists(HERE + "/fill"):\n    {body}', XDG_CACHE_HOME=str(disk))
    fill(ballast, but=8 * MIB)
    job.failed("x failed on local: ", "The builder's disk is full", "Free space there")
    assert job.builds == 1
    (tmp_path / "fill").unlink()
    ballast.unlink()
    job.ok()
    assert job.builds == 2


def test_a_full_disk_at_storing_the_result_fails_the_build_only(
    tmp_path: Path, home: Path, disk: Path, ballast: Path
) -> None:
    body = f"""
if os.path.exists(HERE + "/fill"):
    with open("x", "w") as file:
        file.write("the artifact")
    with open({str(ballast)!r}, "ab", buffering=0) as file:
        try:
            while True: file.write(bytes(4096))
        except OSError:
            sys.exit(0)
"""
    (tmp_path / "fill").touch()
    job = Job(tmp_path, home, body, XDG_CACHE_HOME=str(disk))
    job.failed("The builder's disk is full", "Free space there")
    assert job.builds == 1
    (tmp_path / "fill").unlink()
    ballast.unlink()
    job.ok()
    assert job.builds == 2


def test_a_full_disk_does_not_prevent_stopping_a_job(tmp_path: Path, home: Path, disk: Path, ballast: Path) -> None:
    job = Job(tmp_path, home, WAIT, XDG_CACHE_HOME=str(disk))
    client = job.started()
    (job.store.root / "facts.json").unlink()  # the capabilities have changed, and cannot be stored
    fill(ballast, but=0)
    client.send_signal(signal.SIGINT)
    assert client.wait(60) != 0
    assert "may still run" not in job.output
    job.assert_nothing_is_left()
    assert job.state["state"] == "cancelled"


# 9: the client's disk is full


def test_a_client_without_room_for_the_artifact_fetches_it_later_and_builds_nothing(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home, 'with open("x", "wb") as file:\n    file.write(b"-" * (4 << 20))\nsys.exit()')
    with small_disk(tmp_path / "build", 2 * MIB):
        job.failed("build/x does not fit on the disk: it needs 4.0 MiB", "Free disk space", "does not build")
    job.project.doit().ok()
    assert (tmp_path / "build" / "x").read_bytes() == b"-" * (4 << 20)
    assert job.builds == 1
    job.assert_nothing_is_left()


def test_a_client_without_room_for_the_log_reports_it_and_reattaches_later(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home, "for number in range(400000): print(number)")
    with small_disk(tmp_path / "build", MIB):
        job.failed("build/logs/x.log cannot be written: No space left on device.", "doit reattaches")
    job.ok()
    assert job.builds == 1
    assert (tmp_path / "build" / "logs" / "x.log").read_text() == "".join(f"{number}\n" for number in range(400000))


# 10, 11: what is stored is damaged


def damage(path: Path, how: str) -> None:
    """Change a byte in the middle of a file, truncate it, or replace it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(
        bytes(content) if how == "changed" else bytes(content[: len(content) // 2]) if how == "cut" else how.encode()
    )


@pytest.mark.parametrize("how", ["changed", "cut"])
def test_a_damaged_blob_is_detected_and_sent_again(tmp_path: Path, home: Path, how: str) -> None:
    content = os.urandom(400_000)
    job = Job(
        tmp_path, home, 'assert open("big", "rb").read() == open(HERE + "/big", "rb").read()', inputs={"big": content}
    )
    job.project.doit("builder=local:", "x").ok()
    blob = job.store.blobs / hashlib.sha256(content).hexdigest()
    damage(blob, how)
    (tmp_path / "x.py").write_text((tmp_path / "x.py").read_text() + "# another job")
    job.ok()
    assert job.builds == 2
    assert blob.read_bytes() == content


def test_many_damaged_blobs_are_sent_again_in_one_run(tmp_path: Path, home: Path) -> None:
    """After a power cut, a builder may have lost the content of all recent uploads."""
    inputs = {f"in{number}": os.urandom(1000) for number in range(8)}
    job = Job(tmp_path, home, "", inputs=inputs)
    job.project.doit("builder=local:", "x").ok()
    for content in inputs.values():
        (job.store.blobs / hashlib.sha256(content).hexdigest()).write_bytes(b"")
    (tmp_path / "x.py").write_text((tmp_path / "x.py").read_text() + "# another job")
    job.ok()


def test_a_blob_removed_between_submission_and_start_is_sent_again(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home, inputs={"big": os.urandom(400_000)})
    job.store.prepare()
    with all_slots_taken(job.store):
        client = job.project.start()
        wait_for(lambda: list(job.store.slots.glob("wait-*")))
        (job.store.blobs / hashlib.sha256((tmp_path / "big").read_bytes()).hexdigest()).unlink()
    assert client.wait(60) == 0, job.output
    assert job.builds == 1
    job.ok()


@contextlib.contextmanager
def all_slots_taken(store: Store) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        for number in range(slots.slot_count()):
            held.enter_context(Lock(store.slots / str(number)))
        yield


@pytest.mark.parametrize("how", ["changed", "cut"])
def test_a_damaged_result_is_detected_and_built_again(tmp_path: Path, home: Path, how: str) -> None:
    job = Job(tmp_path, home)
    job.ok()
    (output,) = job.stored.glob("out-*/x")
    damage(output, how)
    job.project.doit("clean", "x").ok()
    job.ok()
    assert job.builds == 2


def test_a_result_is_found_even_if_other_files_of_its_job_are_damaged(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home)
    job.ok()
    stored = job.stored
    for name in ("job.json", "order.json"):
        (stored / name).write_bytes(b"\0" * 100)
    for name in ("log", "lock"):
        (stored / name).unlink()
    shutil.rmtree(stored / "clients")
    (stored / "clients").touch()
    job.project.doit("clean", "x").ok()
    job.ok()
    assert job.builds == 1


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("\0" * 100, id="zeros"),
        pytest.param('{"state": "done"}', id="half of it"),
        pytest.param('{"state": "done", "attempt": "a/../..", "outputs": {}}', id="another folder"),
    ],
)
def test_a_damaged_state_only_causes_another_build(tmp_path: Path, home: Path, content: str) -> None:
    job = Job(tmp_path, home)
    job.ok()
    (job.stored / "state.json").write_text(content)
    job.project.doit("clean", "x").ok()
    job.ok()
    assert job.builds == 2


@pytest.mark.parametrize(
    ("name", "content"), [("job.json", "{}"), ("order.json", "[]"), ("order.json", '{"trees": {}')]
)
def test_a_description_that_is_damaged_while_the_job_waits_is_sent_again(
    tmp_path: Path, home: Path, name: str, content: str
) -> None:
    job = Job(tmp_path, home)
    job.store.prepare()
    with all_slots_taken(job.store):
        client = job.project.start()
        wait_for(lambda: list(job.store.slots.glob("wait-*")))
        (job.stored / name).write_text(content)
    assert client.wait(60) == 0, job.output
    assert job.builds == 1
    assert "lost" not in job.output


# 12: many clients, one job, one moment


def test_eight_clients_at_once_get_one_build(tmp_path: Path, home: Path) -> None:
    content = os.urandom(3 * MIB)
    jobs = [Job(tmp_path / str(number), home, inputs={"big": content}) for number in range(8)]
    for job in jobs[1:]:
        shutil.copy(jobs[0].folder / "x.py", job.folder / "x.py")
    runs = [job.project.start() for job in jobs]
    for job, run in zip(jobs, runs, strict=True):
        assert run.wait(120) == 0, job.output
        assert (job.folder / "build" / "x").read_text() == "the artifact"
    assert jobs[0].builds == 1
    jobs[0].assert_nothing_is_left()
    assert list((jobs[0].store.root / "tmp").glob("*.part")) == []


def test_an_acknowledged_attempt_does_not_prevent_cancelling_the_next(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home, f"{WAIT}\nif 'fail' in open(HERE + '/go').read(): sys.exit('failed')")
    (tmp_path / "go").write_text("fail")
    job.project.doit().failed("failed")
    (tmp_path / "go").unlink()
    client = job.started()
    client.send_signal(signal.SIGINT)
    assert client.wait(60) != 0
    assert "another client waits" not in job.output
    job.assert_nothing_is_left()


# 20: clocks


def test_timestamps_in_the_future_have_no_effect(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home, inputs={"big": os.urandom(400_000)})
    job.ok()
    later = time.time() + 100_000
    for folder, folders, names in os.walk(job.store.root):
        for name in (*folders, *names):
            if "storage" not in folder:
                os.utime(Path(folder, name), (later, later), follow_symlinks=False)
    state = job.state
    (job.stored / "state.json").write_text(json.dumps({**state, "since": later}))
    job.project.doit("clean", "x").ok()
    job.ok()
    assert job.builds == 1
    (tmp_path / "x.py").write_text((tmp_path / "x.py").read_text() + "# another job")
    job.ok()
    assert job.builds == 2


def test_a_client_with_a_future_timestamp_does_not_prevent_cancelling(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home, WAIT)
    client = job.started()
    stranger = job.stored / "clients" / "stranger"
    stranger.touch()
    later = time.time() + 7200
    os.utime(stranger, (later, later))
    client.send_signal(signal.SIGINT)
    assert client.wait(60) != 0
    assert "another client waits" not in job.output
    job.assert_nothing_is_left()


def test_slots_are_granted_in_order_despite_dead_waiters_and_clock_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "v1")
    store.prepare()
    clock = itertools.count(2_000_000_000_000_000_000, -3_600_000_000_000)
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    monkeypatch.setattr(time, "time", lambda: next(clock) / 1e9)
    monkeypatch.setattr(slots, "slot_count", lambda: 1)
    dead = [store.slots / "wait-99999999999999999999-dead", store.slots / ".wait-dead"]
    for path in dead:
        path.touch()
    order: list[str] = []
    output: list[str] = []

    def work(name: str) -> None:
        with slots.wait_for_one(store, name, lambda: None, output.append):
            order.append(name)

    threads = []
    with Lock(store.slots / "0"):
        for name in ("c", "b", "a"):
            threads.append(threading.Thread(target=work, args=(name,)))
            threads[-1].start()
            wait_for(lambda: len(slots.line(store)) == len(threads))
    for thread in threads:
        thread.join(20)
    assert order == ["c", "b", "a"]
    assert output == ["waiting for a free slot on the builder"] * 3
    assert list(store.slots.glob("*wait-*")) == []


def test_concurrent_jobs_do_not_wait_while_slots_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "v1")
    store.prepare()
    monkeypatch.setattr(slots, "slot_count", lambda: 8)
    output: list[str] = []
    together = threading.Barrier(8)

    def take(name: str) -> Lock:
        together.wait()
        return slots.wait_for_one(store, name, lambda: None, output.append)

    for _ in range(20):
        with ThreadPoolExecutor(8) as threads:
            held = list(threads.map(take, "abcdefgh"))
        assert len({lock.path for lock in held}) == 8
        for lock in held:
            lock.release()
    assert output == []


# 15: a hanging or silent build


def test_a_build_that_ignores_signals_is_killed_with_its_descendants(tmp_path: Path, home: Path) -> None:
    mark = f"1{os.getpid():09}"  # which is in no other command line
    body = f"""
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for words in (["sleep", "{mark}"], ["setsid", "sh", "-c", "trap '' TERM HUP; sleep {mark}; sleep {mark}"]):
    subprocess.Popen(words)
time.sleep(1000)
"""
    job = Job(tmp_path, home, body)
    job.failed("time limit of 2 s was exceeded", arguments=("time_limit=2",))
    assert [pid for pid, words in processes() if mark.encode() in b" ".join(words)] == []


def test_a_silent_build_keeps_its_connection_alive(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home, "time.sleep(5)")
    job.project.write("dodo.py", IMPATIENT + (tmp_path / "dodo.py").read_text())
    job.ok()
    assert (tmp_path / "sessions").read_text() == "one\n"


# 24: logs


def test_a_log_of_100_mb_is_complete_and_does_not_fill_the_memory(tmp_path: Path, home: Path) -> None:
    body = """
for number in range(1000):
    sys.stdout.write(("%06d " % number + "x" * 92 + "\\n") * 1024)
"""
    job = Job(tmp_path, home, body)
    with (tmp_path / "doit.out").open("wb") as out:
        status, most = measured(job.project.command(), tmp_path, job.project.environment, out, out)
    assert status == 0, job.output[-3000:]
    expected = hashlib.sha256()
    for number in range(1000):
        expected.update(f"{number:06} {'x' * 92}\n".encode() * 1024)
    log = tmp_path / "build" / "logs" / "x.log"
    assert log.stat().st_size > 100_000_000
    with log.open("rb") as file:
        assert sha256(file) == expected.hexdigest()
    assert most < 120 << 20
    (job.stored / "log").unlink()
    log.unlink()


def test_binary_and_unterminated_logs_are_transferred_unchanged(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home, 'os.write(1, bytes(range(256)) * 10000 + b"\\r\\n\\xff")\nos.write(2, b"x" * 3_000_000)')
    job.ok()
    expected = bytes(range(256)) * 10000 + b"\r\n\xff" + b"x" * 3_000_000
    assert (tmp_path / "build" / "logs" / "x.log").read_bytes() == expected


def test_a_build_with_endless_output_is_stopped_at_its_time_limit(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home, 'while True:\n    print("y" * 10000)\n    time.sleep(0.001)')
    job.failed("time limit of 2 s was exceeded", arguments=("time_limit=2",))
    assert (tmp_path / "build" / "logs" / "x.log").read_bytes() == (job.stored / "log").read_bytes()


def test_a_build_that_exceeds_the_log_limit_is_stopped(tmp_path: Path, home: Path) -> None:
    job = Job(tmp_path, home, WAIT + "\nos.ftruncate(1, (1 << 30) + 1)\ntime.sleep(1000)")
    client = job.started()
    client.kill()  # it does not have to fetch it
    client.wait()
    job.go()
    wait_for(lambda: not job.supervisors())
    failure = job.state["failure"]
    assert isinstance(failure, dict) and failure["kind"] == "log"
    assert "log exceeded 1024 MiB" in failure["message"] and "Reduce the output" in failure["hint"]
    job.assert_nothing_is_left()


# races that a run of doit does not reach


@pytest.fixture
def queued(tmp_path: Path) -> StoredJob:
    """A job whose attempt a1 is about to start."""
    store = Store(tmp_path / "gamebear" / "v1")
    store.prepare()
    job = store.job("a" * 64)
    job.work.parent.mkdir()
    job.write_state({"state": "queued", "attempt": "a1"})
    return job


def test_a_result_that_is_pruned_while_it_is_discarded_is_not_an_error(
    queued: StoredJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = StoredJob.lock

    def pruned_first(stored: StoredJob) -> Lock:
        shutil.rmtree(stored.folder)
        return lock(stored)

    monkeypatch.setattr(StoredJob, "lock", pruned_first)
    assert outputs.discard(queued.store, Discard(digest=queued.digest, attempt="a1")) == {"discarded": False}
    assert not queued.folder.exists()


def of(digest: str, attempt: str) -> Cancel:
    return Cancel(digest=digest, attempt=attempt, client="me", force=False, who="")


def test_cancel_reports_a_job_that_has_not_ended(queued: StoredJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancellation, "CANCEL_SECONDS", 0.1)
    with queued.lock():
        assert cancellation.cancel(queued.store, of(queued.digest, "a1")) == {"state": "running", "others": []}
    assert cancellation.cancel(queued.store, of(queued.digest, "a0")) == {"state": "lost", "others": []}
    assert cancellation.cancel(queued.store, of("b" * 64, "a1")) == {"state": "absent", "others": []}


def test_an_ended_job_cannot_be_cancelled_although_others_waited(queued: StoredJob) -> None:
    queued.write_state({"state": "done", "attempt": "a1", "outputs": {}})
    queued.touch_client("somebody")
    assert cancellation.cancel(queued.store, of(queued.digest, "a1")) == {"state": "done", "others": []}


def test_cancel_without_an_attempt_stops_the_current_one(queued: StoredJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancellation, "CANCEL_SECONDS", 10.0)
    lock = queued.lock()
    lock.acquire()

    def obey() -> None:
        wait_for(lambda: queued.is_asked_to_stop("a1"))
        queued.write_state({"state": "queued", "attempt": "a2"})
        wait_for(lambda: queued.is_asked_to_stop("a2"))
        queued.write_state({"state": "cancelled", "attempt": "a2"})
        lock.release()

    supervisor = threading.Thread(target=obey)
    supervisor.start()
    assert cancellation.cancel(queued.store, of(queued.digest, "")) == {"state": "cancelled", "others": []}
    supervisor.join()
    assert queued.was_seen("a2")


def test_a_job_can_be_stopped_while_its_folder_is_filled(queued: StoredJob) -> None:
    content = b"an input"
    digest = hashlib.sha256(content).hexdigest()
    queued.store.blob(digest).write_bytes(content)
    file = {"name": "x.py", "sha256": digest}
    job = {"script": file, "modules": {}, "inputs": {"a": file, "b": file}, "sources": {}}
    supervisor = supervise.Supervisor(queued, "a1")
    copied: list[str] = []

    def check() -> None:
        copied[:] = [path.name for path in queued.work.iterdir()]
        if "a" in copied:
            queued.ask_to_stop("a1")
        supervisor._check_stop()

    with pytest.raises(supervise.Cancelled):
        Workspace(queued, job, {}, check).fill()
    assert "b" not in copied
    os.close(supervisor.log)


def test_a_job_stopped_during_the_probe_does_not_start(queued: StoredJob, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = supervise.Supervisor(queued, "a1")
    known = capabilities.Facts("1", True, (), "overlay", "oci", True, "amd64", ())

    def found(root: Path) -> capabilities.Facts:
        queued.ask_to_stop("a1")
        return known

    monkeypatch.setattr(supervise, "facts", found)
    monkeypatch.setattr(supervisor, "_document", lambda: {"arch": "amd64"})
    monkeypatch.setattr(supervisor, "_order", lambda: {"trees": {}})
    with pytest.raises(supervise.Cancelled):
        supervisor._build()
    os.close(supervisor.log)


def test_only_a_blob_that_was_just_verified_is_not_hashed_again(queued: StoredJob) -> None:
    digest = hashlib.sha256(b"an input").hexdigest()
    blob = queued.store.blob(digest)
    job = {"script": {"name": "x.py", "sha256": digest}, "modules": {}, "inputs": {}, "sources": {}}
    blob.write_bytes(b"an input")
    order = {"verified": {digest: version(blob.stat())}}
    Workspace(queued, job, order, lambda: None).fill()
    assert (queued.work / "x.py").read_bytes() == b"an input"
    shutil.rmtree(queued.work)
    blob.write_bytes(b"an INPUT")  # the same size
    with pytest.raises(JobFailed, match="damaged"):
        Workspace(queued, job, order, lambda: None).fill()
    assert not blob.exists()


def test_a_source_that_is_not_an_archive_fails_the_job(queued: StoredJob) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("file")
        member.size = 5000
        tar.addfile(member, io.BytesIO(bytes(5000)))
    for content in (b"no archive" * 100, buffer.getvalue()[:2000]):
        digest = hashlib.sha256(content).hexdigest()
        queued.store.blob(digest).write_bytes(content)
        job = {"script": {"name": "x.py", "sha256": digest}, "modules": {}, "inputs": {}, "sources": {"src": {}}}
        with pytest.raises(JobFailed, match="source src cannot be unpacked"):
            Workspace(queued, job, {"trees": {"src": digest}}, lambda: None).fill()
        shutil.rmtree(queued.work)


def test_a_disk_full_during_the_build_is_reported_although_it_has_room_again(
    queued: StoredJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def is_full(*folders: str) -> bool:
        asked.append(folders)
        return len(asked) == 1

    monkeypatch.setattr(supervise, "is_full", is_full)
    supervisor = supervise.Supervisor(queued, "a1")
    with subprocess.Popen(["sleep", "1"]) as process:
        supervisor._wait(process)
    with pytest.raises(JobFailed, match="disk is full"):
        supervisor._check_room("`make` failed with status 2.", {})
    assert set(asked) == {(str(queued.store.root),)}
    os.close(supervisor.log)


def test_a_failed_build_blames_no_disk_that_has_room(queued: StoredJob) -> None:
    supervisor = supervise.Supervisor(queued, "a1")
    os.write(supervisor.log, b"write error: No space left on device\n")
    supervisor._check_room("No space left on device", {})
    os.close(supervisor.log)


def test_an_upload_larger_than_the_free_space_is_rejected_immediately(tmp_path: Path) -> None:
    runner = Path(serve.__file__).parents[2]
    program = (
        f"import sys; sys.path.insert(0, {str(runner)!r}); from runner.server import session as serve; serve.main()"
    )
    size = 1 << 60
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as session:
        assert session.stdin is not None and session.stdout is not None
        assert session.stdout.readline() == wire.PREAMBLE + b" ready\n"
        header = Put(sha256="0" * 64, size=size, offset=0).header
        session.stdin.write(wire.encode(header, size) + bytes(1000))
        session.stdin.flush()
        if not select.select([session.stdout], [], [], 20.0)[0]:
            session.kill()
        answer = wire.decode(session.stdout.read)
        assert answer is not None and "The builder's disk is full" in str(answer[0]["error"])
        assert session.wait(10) == 0


def test_a_decompression_bomb_as_index_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt_sources, "UNPACKED_LIMIT", 3 * MIB)
    apt_sources._check_xz(lzma.compress(bytes(2 * MIB)) + lzma.compress(b"more"))
    apt_sources._check_xz(lzma.compress(b""))
    for content, reason in (
        (lzma.compress(bytes(5 * MIB)), "more than 3 MiB"),
        (lzma.compress(b"x")[:-4], "truncated"),
    ):
        with pytest.raises(lzma.LZMAError, match=reason):
            apt_sources._check_xz(content)
