"""`gamebear jobs`: list, follow and cancel jobs, also from another laptop."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from project import Project, Run, wait_for
from remote import Remote, known
from sshd import Account, Sshd
from test_network import sessions_of
from warm import Warm

from gamebear_tasks.builders.protocol.responses import entry as _entry
from gamebear_tasks.builders.transports.local import open_builder
from gamebear_tasks.errors import BuilderError
from gamebear_tasks.runner.server.job_list import listing
from gamebear_tasks.runner.store.store import Store


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    """A doit that starts at once."""
    made = Warm()
    yield made
    made.close()


class Laptop(Project):
    """A laptop whose `gamebear jobs` starts at once."""

    warm: Warm

    def jobs(self, *arguments: str) -> Run:
        return self.warm.doit(self.folder, self.environment, "jobs", *arguments)

    def listed(self, *options: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.jobs("--json", *options).ok().out)
        return found


@pytest.fixture
def other(tmp_path: Path, remote: Remote, home: Path, server: Sshd, warm: Warm) -> Laptop:
    """A laptop without a project, with access to the same builder."""
    own = known(home, tmp_path / "other-home", remote.proxy.port, server)
    laptop = Laptop(tmp_path / "elsewhere", home=own, **remote.settings)
    laptop.warm = warm
    return laptop


@pytest.fixture
def mine(project: Project, warm: Warm) -> Laptop:
    """A laptop with a project that uses local:."""
    laptop = Laptop(project.folder, project.home)
    laptop.warm = warm
    return laptop


def begun(remote: Remote, after: str = "print('end')") -> subprocess.Popen[bytes]:
    """Start a doit whose job runs until it is released."""
    remote.waits(before="print('begin \\x1b[31mred', flush=True)", after=after)
    client = remote.project.start()
    wait_for(lambda: "begin" in remote.output())
    return client


def output(laptop: Project) -> str:
    return (laptop.folder / "doit.out").read_text()


def test_a_job_is_listed_and_followed_to_its_end_from_another_laptop(remote: Remote, other: Laptop) -> None:
    client = begun(remote)
    first = other.listed()[0]
    assert (first["state"], first["program"], first["outputs"]) == ("running", "x.py", ["x"])
    assert "@" in first["by"] and first["waiting"] == [first["by"]]
    line = other.jobs().ok().out.splitlines()[2].split()
    assert line[:5] == [first["digest"][: first["digits"]], "running", "x.py", "->", "x,"]
    follower = other.start("jobs", "follow", line[0])
    wait_for(lambda: "begin red\n" in output(other))
    remote.go()
    assert (client.wait(), follower.wait()) == (0, 0)
    assert "\nend\n" in output(other) and "succeeded" in output(other)
    again = other.jobs("follow", line[0], "--lines", "1").ok()
    assert again.out == "end\n"
    entry = other.listed()[0]
    assert (entry["digest"], entry["state"], entry["size"]) == (first["digest"], "done", 4)


def test_force_cancels_a_job_from_another_laptop_while_a_user_waits(remote: Remote, other: Laptop) -> None:
    client = begun(remote)
    entry = other.listed()[0]
    name = entry["digest"][:12]
    other.jobs("cancel", name).failed(
        f"others wait for it: {entry['by']}.", f"gamebear jobs cancel --force {name[: entry['digits']]}"
    )
    assert "was cancelled" in other.jobs("cancel", name, "--force").ok().err
    assert client.wait() != 0
    assert "x was cancelled on" in remote.output()
    other.jobs("cancel", name).failed("cannot be cancelled: its state is cancelled")
    remote.assert_nothing_is_left()


def test_following_a_job_does_not_count_as_waiting(remote: Remote, other: Laptop, account: Account) -> None:
    before = sessions_of(account)
    client = begun(remote, after="raise SystemExit('the job failed')")
    served = set(sessions_of(account)).difference(before)
    digest = other.listed()[0]["digest"]
    for stop in (True, False):
        follower = other.start("jobs", "follow", digest)
        wait_for(lambda: "begin" in output(other))
        if stop:
            follower.send_signal(signal.SIGINT)
            assert follower.wait() == 130
            assert "continues; cancel it with: gamebear jobs cancel" in output(other)
    assert len(other.listed()[0]["waiting"]) == 1
    client.kill()
    client.wait()
    wait_for(lambda: not served.intersection(sessions_of(account)))  # the builder has detected it
    remote.go()
    assert follower.wait() == 1
    assert "the job failed" in output(other)
    remote.project.doit().failed("the job failed")  # no waiting client had acknowledged it
    assert remote.builds == 1
    remote.project.doit().failed("the job failed")
    assert remote.builds == 2


@pytest.mark.system
def test_a_task_or_unique_digits_identify_a_job(mine: Laptop) -> None:
    mine.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\n\ndef task_made():\n"
        "    return artifact('x.py', outputs=['build/x'])\n\n\ndef task_other():\n    return {'actions': None}\n",
    )
    mine.write("x.py", "print('says so')\nopen('x', 'w').close()\n")
    mine.doit("made").ok()
    mine.write("x.py", "print('edited meanwhile')\n")
    assert mine.jobs("follow", "made").ok().out == "says so\n"
    mine.jobs("follow", "other").failed("Task 'other' has no job on local:")
    mine.jobs("cancel", "nobody").failed("No job or task 'nobody' on local:")
    mine.jobs("follow").failed("invalid arguments: 'follow'", "gamebear jobs follow ID")
    (entry,) = mine.listed()
    alike = f"{entry['digest'][:10]}{'0' * 54}"
    (mine.store / "jobs" / alike).mkdir()
    (mine.store / "jobs" / alike / "state.json").write_text("damaged")
    mine.jobs("follow", entry["digest"][:10]).failed("is ambiguous: ", "Use more digits")
    assert mine.jobs("follow", entry["digest"][: mine.listed()[0]["digits"]]).ok()


@pytest.mark.system
def test_an_unreachable_builder_hides_no_jobs_of_others(mine: Laptop) -> None:
    mine.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\n\ndef task_made():\n    return artifact('x.py', outputs=['build/x'])\n",
    )
    mine.write("x.py", "print('says so')\nopen('x', 'w').close()\n")
    mine.doit().ok()
    (entry,) = mine.listed()
    both = "builder=riscv64=ssh://pi@127.0.0.1:1,amd64=local:,arm64=local:"
    for name in (entry["digest"][:8], "made"):
        run = mine.jobs("follow", name, both, "patience=0").ok()
        assert run.out == "says so\n" and "ERROR: The builder ssh://pi@127.0.0.1:1 " in run.err
    run = mine.jobs(both, "patience=0").failed("ERROR: The builder ssh://pi@127.0.0.1:1 ")
    assert run.status == 2 and entry["digest"][:8] in run.out


@pytest.mark.system
def test_a_job_that_ended_meanwhile_is_not_reported_as_cancelled(mine: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(mine.home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    mine.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\n\ndef task_made():\n    return artifact('x.py', outputs=['build/x'])\n",
    )
    mine.write("x.py", "open('x', 'w').close()\n")
    mine.doit().ok()
    (entry,) = mine.listed()
    builder = open_builder("local:")
    with pytest.raises(BuilderError, match="cannot cancel the job: it is done"):
        builder.end(entry["digest"], entry["attempt"], force=True)
    with pytest.raises(BuilderError, match="it is lost, or begun again"):
        builder.end(entry["digest"], "other", force=True)
    builder.close()


@pytest.mark.system
def test_a_thousand_jobs_are_listed_in_pages_including_damaged_ones(mine: Laptop) -> None:
    store = Store(mine.store)
    store.root.parent.mkdir(parents=True)
    store.prepare()
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(1000)]
    for number, digest in enumerate(digests):
        folder = store.jobs / digest
        folder.mkdir()
        state = {"state": "cancelled", "attempt": "a", "since": number}
        text = ("", "{", "[]", '{"state": 1}')[number % 4] if number < 40 else json.dumps(state)
        (folder / "state.json").write_text(text)
        (folder / "job.json").write_text('{"script": 5, "outputs": 7}' if number % 2 else "{")
        os.utime(folder / "state.json", (number + 1, number + 1))
    (store.jobs / "strange").touch()
    (store.live / digests[3]).touch()
    page = listing(store, 0, 20, "")
    assert [job["digest"] for job in page["jobs"]] == digests[:-21:-1] and page["total"] == 1000
    everything = mine.listed("--all")
    assert {entry["digest"] for entry in everything} == set(digests)
    assert sum(entry["state"] == "lost" for entry in everything) == 40
    assert len({entry["digest"][: entry["digits"]] for entry in everything}) == 1000
    assert "980 more (list all: gamebear jobs --all)" in mine.jobs().ok().out


def test_the_job_list_of_a_builder_is_bounded_and_sanitized() -> None:
    good = {"digest": "a" * 64, "state": "done", "attempt": "b"}
    assert _entry(good) is not None
    assert [_entry({**good, **bad}) for bad in ({"digest": "../x"}, {"state": "odd"}, {"attempt": "a/b"})] == [None] * 3
    entry = _entry(
        {**good, "by": "\x1b[2J" * 999, "age": float("nan"), "size": -1, "digits": 1 << 70, "outputs": ["\n"] * 999}
    )
    assert entry is not None
    assert len(entry.by) <= 200 and entry.by.isprintable()
    assert (entry.age, entry.size, entry.digits, len(entry.outputs)) == (0.0, 0, 8, 20)
