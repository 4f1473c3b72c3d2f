"""Forced rebuilds: `fresh=yes`, `gamebear jobs forget` and `gamebear rebuild`."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import signal
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import Cluster, running
from project import Memory, Project, assert_nothing_is_left, wait_for
from remote import Remote

from gamebear_tasks.builders.base import Order, Status
from gamebear_tasks.builders.protocol.client import RunnerBuilder
from gamebear_tasks.builders.transports.local import open_builder
from gamebear_tasks.cli.rebuild import _Build
from gamebear_tasks.client import order as order_module
from gamebear_tasks.client.compare_outputs import MOST, differences
from gamebear_tasks.config import own_architecture
from gamebear_tasks.errors import BuilderError
from gamebear_tasks.jobspec.plan import Plan
from gamebear_tasks.jobspec.spec import Job
from gamebear_tasks.runner.store.store import Store
from gamebear_tasks.runner.util.atomic_files import sha256_of

DODO = """
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", outputs=["build/x"])
"""

COUNTING = """
with open({count!r}, "a") as file:
    file.write("built\\n")
number = len(open({count!r}).read())
{body}
"""


WAITING = """
import os, time
while not os.path.exists({go!r}):
    time.sleep(0.02)
open("x", "w")
"""


class Counted(Project):
    """A project whose job counts its builds."""

    def script(self, body: str = "open('x', 'w').write('made')") -> None:
        self.write("dodo.py", DODO)
        self.write("x.py", COUNTING.format(count=str(self.folder / "count"), body=body))

    @property
    def builds(self) -> int:
        path = self.folder / "count"
        return len(path.read_text().splitlines()) if path.exists() else 0

    @property
    def target(self) -> Path:
        return self.folder / "build" / "x"

    @property
    def jobs(self) -> list[Path]:
        return [*(self.store / "jobs").iterdir()]


@pytest.fixture
def counted(project: Project) -> Counted:
    made = Counted(project.folder, project.home)
    made.script("open('x', 'w').write(str(number))")
    return made


def record(project: Project) -> dict[str, object]:
    found: dict[str, object] = json.loads((project.folder / "build" / "logs" / "x.json").read_bytes())
    return found


# fresh=yes


@pytest.mark.system
def test_fresh_rebuilds_although_the_task_is_up_to_date_and_its_result_exists(counted: Counted) -> None:
    counted.doit().ok()
    assert counted.doit().ok().ran == []
    assert counted.doit("fresh=yes").ok().ran == ["x"]
    assert counted.builds == 2 and counted.target.read_text() == str(2 * len("built\n"))
    assert record(counted)["why"] == ["fresh=yes"]
    assert counted.doit().ok().ran == []
    counted.doit("clean").ok()
    counted.doit().ok()
    assert counted.builds == 2 and counted.target.read_text() == str(2 * len("built\n"))
    assert counted.doit(GAMEBEAR_FRESH="yes").ok().ran == ["x"]
    assert counted.builds == 3
    assert_nothing_is_left(counted)


@pytest.mark.system
def test_always_executes_the_task_and_the_builder_returns_its_result(counted: Counted) -> None:
    counted.doit().ok()
    assert counted.doit("-a").ok().ran == ["x"]
    assert counted.builds == 1


@pytest.mark.system
def test_equal_jobs_of_one_run_are_rebuilt_once(counted: Counted) -> None:
    counted.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\n\ndef task_all():\n    for name in 'ab':\n"
        "        yield {'name': name, **artifact('x.py', outputs=[f'build/{name}/x'])}\n",
    )
    counted.doit().ok()
    counted.doit("fresh=yes").ok()
    assert counted.builds == 2
    counted.doit("-n", "2", "fresh=yes").ok()
    assert counted.builds == 3


@pytest.fixture
def builder(system: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunnerBuilder]:
    """The builder of this machine, with an own store."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "home").mkdir()
    made = open_builder("local:")
    yield made
    made.close()


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Order]:
    """Create the order of a script that counts its builds."""

    def made(body: str = "open('x', 'w').write(str(number))") -> Order:
        script = tmp_path / "x.py"
        script.write_text(COUNTING.format(count=str(tmp_path / "count"), body=body))
        sha256 = hashlib.sha256(script.read_bytes()).hexdigest()
        return Order(Job(own_architecture(), script.name, sha256, ("x",)), {sha256: script}, dict)

    return made


def ended(builder: RunnerBuilder, order: Order) -> Status:
    """Submit a job, and follow it to its end."""
    status = builder.submit(order)
    offset = 0
    while True:
        now, data = builder.follow(order.job.digest, status.attempt, offset)
        offset += len(data)
        if now.is_final and not data:
            return replace(now, joined=status.joined)


def test_a_forced_job_is_built_once_however_often_its_submission_is_repeated(
    builder: RunnerBuilder, job: Callable[..., Order], tmp_path: Path
) -> None:
    """A client repeats a submission if the connection is lost before the reply arrives."""
    order = job()
    first = ended(builder, order)
    forced = ended(builder, replace(order, fresh="a1"))
    again = ended(builder, replace(order, fresh="a1"))
    assert (first.joined, forced.joined, again.joined) == (False, False, True)
    assert first.attempt != forced.attempt == again.attempt
    assert ended(builder, order).attempt == forced.attempt  # everybody gets the new result
    other = ended(builder, replace(order, fresh="b2"))
    assert other.attempt != forced.attempt and not other.joined
    assert (tmp_path / "count").read_text() == "built\n" * 3


def test_a_failure_of_a_forced_job_is_its_answer_and_an_older_failure_is_not(
    builder: RunnerBuilder, job: Callable[..., Order], tmp_path: Path
) -> None:
    order = job("raise ValueError(number)")
    older = builder.submit(order)  # nobody sees its end
    stored = Store().job(order.job.digest)
    wait_for(lambda: stored.state()["state"] == "failed")
    (stored.folder / f"seen-{older.attempt}").unlink(missing_ok=True)
    forced = ended(builder, replace(order, fresh="a1"))
    assert forced.attempt != older.attempt and not forced.joined
    again = ended(builder, replace(order, fresh="a1"))
    assert (again.attempt, again.state, again.joined) == (forced.attempt, "failed", True)
    assert (tmp_path / "count").read_text() == "built\n" * 2


def test_a_running_job_is_joined_by_a_forced_build(
    builder: RunnerBuilder, job: Callable[..., Order], tmp_path: Path
) -> None:
    order = job(
        f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.02)\nopen('x', 'w')"
    )
    running = builder.submit(order)
    joined = builder.submit(replace(order, fresh="a1"))
    assert joined.joined and joined.attempt == running.attempt and not joined.is_final
    (tmp_path / "go").touch()
    assert ended(builder, order).state == "done"


def test_a_forced_job_whose_result_is_damaged_is_built_again(builder: RunnerBuilder, job: Callable[..., Order]) -> None:
    order = replace(job(), fresh="a1")
    first = ended(builder, order)
    (output,) = Store().job(order.job.digest).outputs(first.attempt).iterdir()
    output.write_text("damaged")
    builder.discard(order.job.digest, first.attempt)
    second = ended(builder, order)
    assert second.state == "done" and second.attempt != first.attempt and not second.joined


def test_over_a_network_that_breaks_a_forced_job_is_built_once(remote: Remote) -> None:
    remote.waits()
    remote.go()
    remote.project.doit().ok()
    (remote.scratch / "go").unlink()
    client = remote.project.start("fresh=yes")
    wait_for(lambda: remote.builds == 2)
    remote.proxy.cut()
    remote.go()
    assert client.wait(120) == 0, remote.output()
    assert remote.builds == 2
    remote.assert_nothing_is_left()


@pytest.fixture
def pair(system: None, tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler and two workers of one architecture."""
    with running(tmp_path / "pair", "amd64=1", "amd64=1") as cluster:
        yield cluster


def test_a_cluster_replaces_a_result_where_it_is_and_forgets_it(pair: Cluster, tmp_path: Path) -> None:
    project = Counted(tmp_path / "project", home=tmp_path / "home", GAMEBEAR_BUILDER=pair.url, GAMEBEAR_ARCH="amd64")
    project.script("open('x', 'w').write(str(number))")
    project.doit().ok()
    for count in (2, 3):
        project.doit("fresh=yes").ok()
        assert project.builds == count and project.target.read_text() == str(6 * count)
        assert sorted(len(worker.digests) for worker in pair.workers) == [0, 1]
    project.doit("clean").ok()
    project.doit().ok()
    assert project.builds == 3 and project.target.read_text() == "18"
    removed = project.gamebear("jobs", "forget", "x").ok().err
    assert "was removed" in removed and "; 0 bytes freed" not in removed
    assert [worker.digests for worker in pair.workers] == [[], []]
    assert "there is no job x" in project.gamebear("jobs", "forget", "x").ok().err
    project.doit("clean").ok()
    project.doit().ok()
    assert project.builds == 4


def test_a_cluster_rebuilds_in_a_slot_of_the_worker_that_has_the_result(pair: Cluster, tmp_path: Path) -> None:
    settings = {"GAMEBEAR_BUILDER": pair.url, "GAMEBEAR_ARCH": "amd64"}
    project = Counted(tmp_path / "project", tmp_path / "home", **settings)
    project.script()
    project.doit().ok()
    (digest,) = (digest for worker in pair.workers for digest in worker.digests)
    running = []
    for name in ("a", "b"):
        other = Counted(tmp_path / name, tmp_path / "home", **settings)
        other.script(WAITING.format(go=str(other.folder / "go")))
        running.append((other, other.start()))
    wait_for(lambda: all(other.builds for other, _ in running))
    rebuild = project.start("fresh=yes")
    wait_for(lambda: "no free slot" in (project.folder / "doit.out").read_text())
    holder = next(worker for worker in pair.workers if digest in worker.digests)
    there = {json.loads(path.read_bytes())["script"]["sha256"] for path in holder.store.glob("jobs/*/job.json")}
    running.sort(key=lambda pair: sha256_of(pair[0].folder / "x.py") in there)  # the job of the other worker is first
    for other, client in running:
        (other.folder / "go").touch()
        assert client.wait(120) == 0
    assert rebuild.wait(120) == 0, (project.folder / "doit.out").read_text()
    assert project.builds == 2
    assert [digest in worker.digests for worker in pair.workers] == [worker is holder for worker in pair.workers]


@pytest.mark.system
def test_a_builder_that_ignores_fresh_is_reported_by_a_check(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(counted.folder)
    monkeypatch.setenv("HOME", str(counted.home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(order_module, "token_of_this_run", str)
    plan = Plan(Path("x.py"), {"x": "build/x"})
    first = _Build(plan, "x", counted.folder / "first")
    first.build()
    with pytest.raises(BuilderError, match="x was not built again: local: returned the same result"):
        _Build(plan, "x", counted.folder / "second", first).build()


# jobs forget


@pytest.mark.system
def test_a_forgotten_job_is_gone_with_its_outputs_and_its_inputs_stay(counted: Counted) -> None:
    counted.doit().ok()
    (job,) = counted.jobs
    blobs = sorted(path.name for path in (counted.store / "blobs").iterdir())
    assert blobs
    run = counted.gamebear("jobs", "forget", job.name[:8]).ok()
    assert f"{job.name[:8]} (x.py -> x" in run.err and "was removed" in run.err
    assert counted.jobs == [] and [*(counted.store / "trash").iterdir()] == []
    assert sorted(path.name for path in (counted.store / "blobs").iterdir()) == blobs
    assert counted.target.exists() and counted.doit().ok().ran == []
    assert f"there is no job {job.name[:8]} on local:" in counted.gamebear("jobs", "forget", job.name[:8]).ok().err
    counted.doit("clean").ok()
    counted.doit().ok()
    assert counted.builds == 2
    counted.gamebear("jobs", "forget", "nobody").failed("No job or task 'nobody' on local:")
    assert_nothing_is_left(counted)


def test_a_job_that_runs_or_whose_outputs_are_being_downloaded_is_not_forgotten(
    builder: RunnerBuilder, job: Callable[..., Order], tmp_path: Path
) -> None:
    order = job(
        f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.02)\nopen('x', 'w')"
    )
    digest = order.job.digest
    status = builder.submit(order)
    with pytest.raises(BuilderError, match="it is running") as refusal:
        builder.forget(digest)
    assert f"gamebear jobs cancel {digest[:12]}" in str(refusal.value)
    (tmp_path / "go").touch()
    assert ended(builder, order).state == "done"
    stored = Store().job(digest)
    with stored.held_outputs(status.attempt), pytest.raises(BuilderError, match="downloads its outputs"):
        builder.forget(digest)
    assert stored.folder.exists()
    freed = builder.forget(digest)
    assert freed and not stored.folder.exists()
    assert builder.forget(digest) is None
    follower = builder.follow(digest, status.attempt, 0)
    assert follower[0].state == "lost"
    with pytest.raises(BuilderError):
        builder.fetch(digest, status.attempt, "x", 0, Memory(), 1)


@pytest.mark.system
def test_the_command_names_the_running_job_and_how_to_cancel_it(counted: Counted) -> None:
    gate = counted.folder / "go"
    counted.script(WAITING.format(go=str(gate)))
    client = counted.start()
    wait_for(lambda: counted.builds == 1)
    counted.gamebear("jobs", "forget", "x").failed("cannot be removed: it is running", "gamebear jobs cancel")
    gate.touch()
    assert client.wait(60) == 0
    assert counted.target.exists()


# rebuild


@pytest.mark.system
def test_rebuild_runs_the_task_with_fresh(counted: Counted) -> None:
    counted.doit().ok()
    run = counted.gamebear("rebuild", "x").ok()
    assert counted.builds == 2 and counted.target.read_text() == "12", run.text
    assert record(counted)["why"] == ["fresh=yes"]
    counted.gamebear("rebuild").failed("gamebear rebuild needs one task")
    counted.gamebear("rebuild", "y").failed("y")
    counted.gamebear("rebuild", "y", "--check").failed("Task 'y' does not exist", "Use one of: x")
    assert counted.builds == 2


@pytest.mark.system
def test_a_check_of_a_reproducible_build_says_so_and_installs_nothing(counted: Counted) -> None:
    counted.script()
    run = counted.gamebear("rebuild", "--check", "x").ok()
    sha256 = hashlib.sha256(b"made").hexdigest()
    assert run.out == f"build/x: identical (4 bytes, {sha256})\nidentical: all outputs of x\n", run.text
    assert "the first build of x is done" in run.err
    assert counted.builds == 2 and not counted.target.exists()
    assert [path.name for path in (counted.folder / "build").iterdir()] == ["logs"]
    run = counted.gamebear("rebuild", "x", "--check").ok()
    assert "the first build of x is an existing result" in run.err and counted.builds == 3
    counted.doit().ok()
    assert counted.builds == 3 and counted.target.read_text() == "made"


@pytest.mark.system
def test_a_check_names_the_outputs_and_members_that_differ(counted: Counted) -> None:
    counted.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\n\ndef task_x():\n"
        "    names = ['x', 'same', 'mode', 'all.tar', 'dist/']\n"
        "    return artifact('x.py', outputs=[f'build/{name}' for name in names])\n",
    )
    counted.write(
        "x.py",
        COUNTING.format(
            count=str(counted.folder / "count"),
            body="""
import os, tarfile
open("x", "w").write("made " + str(number))
open("same", "w").write("same")
open("mode", "w").close()
os.chmod("mode", 0o755 if number > 6 else 0o644)
with tarfile.open("all.tar", "w") as tar:
    for name in ("same", "x"):
        info = tarfile.TarInfo("usr/" + name)
        info.size, info.mtime = os.path.getsize(name), number if name == "x" else 0
        tar.addfile(info, open(name, "rb"))
os.mkdir("dist")
open("dist/one", "w").write("one")
open("dist/two", "w").write("two" * number)
""",
        ),
    )
    run = counted.gamebear("rebuild", "x", "--check")
    assert run.status == 1, run.text
    lines = run.out.splitlines()
    assert "build/x: differs: 6 and 7 bytes, first difference at offset 5" in lines
    assert lines[1].startswith("build/same: identical (4 bytes, ")
    assert "build/mode: differs: executable only in the second build" in lines
    assert "  usr/x: mtime 6 and 12, size 6 and 7" in lines
    assert "  two: size 18 and 36" in lines
    assert lines[-1] == "different: 4 of 5 outputs of x"
    assert not any("usr/same" in line or "  one" in line for line in lines)
    assert [path.name for path in (counted.folder / "build").iterdir()] == ["logs"]


@pytest.mark.system
def test_a_check_whose_build_fails_reports_the_failure_and_leaves_nothing(counted: Counted) -> None:
    counted.script("assert number < 7\nopen('x', 'w')")
    counted.doit().ok()
    before = record(counted)
    counted.gamebear("rebuild", "x", "--check").failed("x failed on local: x.py", "AssertionError")
    assert record(counted) == before
    assert sorted(path.name for path in (counted.folder / "build").iterdir()) == ["logs", "x"]


@pytest.mark.system
def test_an_interrupted_check_cancels_its_job_and_leaves_nothing(counted: Counted) -> None:
    counted.script(WAITING.format(go=str(counted.folder / "go")))
    client = counted.start("rebuild", "x", "--check")
    wait_for(lambda: counted.builds == 1)
    client.send_signal(signal.SIGINT)
    assert client.wait(60) == 130
    (state,) = counted.store.glob("jobs/*/state.json")
    assert json.loads(state.read_bytes())["state"] == "cancelled"
    assert [path.name for path in (counted.folder / "build").iterdir()] == ["logs"]
    assert_nothing_is_left(counted)


@pytest.mark.system
def test_rebuild_finds_the_dodo_file_as_doit_does(counted: Counted) -> None:
    (counted.folder / "dodo.py").rename(counted.folder / "other.py")
    inner = Counted(counted.folder / "inner", counted.home)
    inner.gamebear("rebuild", "-f", "../other.py", "-d", "..", "x", "builder=local:").ok()
    assert counted.builds == 1 and counted.target.exists()
    counted.gamebear("-f", "other.py", "rebuild", "x").ok()
    assert counted.builds == 2


# comparison


def archive(path: Path, *members: tuple[str, bytes, dict[str, object]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data, values in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in values.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_equal_files_have_no_difference(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * (3 << 20))
    assert differences(tmp_path / "a", tmp_path / "b") == []


@pytest.mark.parametrize("offset", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) - 1])
def test_the_first_differing_offset_is_found(tmp_path: Path, offset: int) -> None:
    data = bytearray(3 << 20)
    (tmp_path / "a").write_bytes(data)
    data[offset] = 1
    data[-1] = 1
    (tmp_path / "b").write_bytes(data)
    assert differences(tmp_path / "a", tmp_path / "b") == [f"{3 << 20} bytes each, first difference at offset {offset}"]


def test_a_file_that_is_the_beginning_of_the_other_differs_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab")
    (tmp_path / "b").write_bytes(b"abc")
    assert differences(tmp_path / "a", tmp_path / "b") == ["2 and 3 bytes, first difference at offset 2"]


@pytest.mark.parametrize(
    ("values", "data", "expected"),
    [
        ({"mode": 0o755}, b"data", "b: mode 644 and 755"),
        ({"mtime": 5}, b"data", "b: mtime 0 and 5"),
        ({"uid": 7}, b"data", "b: owner 0:0 and 7:0"),
        ({"uname": "root"}, b"data", "b: owner : and root:"),
        ({}, b"dat", "b: size 4 and 3"),
        ({}, b"daTa", "b: content at offset 2"),
        ({"mode": 0, "mtime": 1}, b"Data", "b: mode 644 and 0, mtime 0 and 1, content at offset 0"),
        ({"type": tarfile.SYMTYPE, "linkname": "a", "size": 0}, b"", "b: type 0 and 2, size 4 and 0, link  and a"),
        ({"name": "c"}, b"data", "member 2 is b in the first build and c in the second"),
    ],
)
def test_differing_members_are_described(tmp_path: Path, values: dict[str, object], data: bytes, expected: str) -> None:
    end: tuple[str, bytes, dict[str, object]] = ("z", b"z", {})
    one = archive(tmp_path / "a.tar", ("a", b"same", {}), ("b", b"data", {}), end)
    other = archive(tmp_path / "b.tar", ("a", b"same", {}), ("b", data, values), end)
    assert differences(one, other)[1:] == [expected]
    packed = [path.with_suffix(".gz") for path in (one, other)]
    for path in packed:
        path.write_bytes(gzip.compress(path.with_suffix(".tar").read_bytes()))
    assert differences(*packed)[1:] == [expected]


def test_a_member_of_one_archive_only_is_named(tmp_path: Path) -> None:
    one = archive(tmp_path / "a.tar", ("a", b"same", {}))
    other = archive(tmp_path / "b.tar", ("a", b"same", {}), ("b", b"", {}))
    assert differences(one, other)[1:] == ["b is only in the second build"]
    assert differences(other, one)[1:] == ["b is only in the first build"]


def test_many_differing_members_are_cut_off(tmp_path: Path) -> None:
    one, other = (
        archive(tmp_path / f"{text}.tar", *((f"m{number}", text.encode(), {}) for number in range(50))) for text in "ab"
    )
    found = differences(one, other)[1:]
    assert found[:2] == ["m0: content at offset 0", "m1: content at offset 0"]
    assert len(found) == MOST + 1 and found[-1] == "and more members"


def test_archives_with_equal_members_differ_outside_of_them(tmp_path: Path) -> None:
    one = archive(tmp_path / "a.tar", ("a", b"same", {}))
    for number in (1, 2):
        (tmp_path / str(number)).write_bytes(gzip.compress(one.read_bytes(), mtime=number))
    assert "all members are equal" in differences(tmp_path / "1", tmp_path / "2")[1]


def test_a_damaged_archive_ends_the_comparison_of_members(tmp_path: Path) -> None:
    one = archive(tmp_path / "a.tar", ("a", b"1", {}), ("b", b"same", {}))
    other = archive(tmp_path / "b.tar", ("a", b"2", {}), ("b", b"same", {}))
    other.write_bytes(other.read_bytes()[: 3 * 512 + 100])  # in the second member's header
    assert differences(one, other)[1:] == ["a: content at offset 0"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path: Path, kind: bytes) -> None:
    length = 64 << 20
    for name in ("a", "b"):
        info = tarfile.TarInfo("long")
        info.type, info.size = kind, length
        (tmp_path / name).write_bytes(info.tobuf(tarfile.GNU_FORMAT) + name.encode())
        os.truncate(tmp_path / name, length + 2048)
    tracemalloc.start()
    try:
        assert len(differences(tmp_path / "a", tmp_path / "b")) == 1
        assert tracemalloc.get_traced_memory()[1] < length // 4
    finally:
        tracemalloc.stop()
