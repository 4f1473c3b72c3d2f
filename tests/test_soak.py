"""Ten minutes of builds with random kills: targets are correct or absent, and nothing is left on either side.

pytest -m slow tests/test_soak.py -s          SOAK_SECONDS=600 and SOAK_SEED=… set how long, and which kills
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from project import OUR_FRAMES, Project, assert_nothing_is_left, processes, wait_for
from sshd import Account, Sshd

pytestmark = pytest.mark.system

NAMES = ("a", "b", "c", "d")

DODO = """
from pathlib import Path
from gamebear_tasks import artifact

TEXT = Path("function").read_text()

def reverse():
    import time
    time.sleep(0.2)
    Path("d").write_text(TEXT[::-1])

def task_a():
    return artifact("make.py", args={"name": "a"}, inputs={"in": "in-a"}, outputs=["build/a"])

def task_b():
    return artifact("make.py", args={"name": "b"}, inputs={"in": "in-b"}, outputs=["build/b", "build/b2"])

def task_c():
    return artifact("make.py", args={"name": "c"}, inputs={"in": "build/a"}, outputs=["build/c"])

def task_d():
    return artifact(reverse, outputs=["build/d"])
"""

SCRIPT = """
#| arg: name
import os, subprocess, time
print("begin", name, flush=True)
helper = subprocess.Popen(["sleep", "30"])
for part in range(8):
    print("part", part, flush=True)
    time.sleep(0.05)
data = open("in", "rb").read()
for output in ("b", "b2") if name == "b" else (name,):
    with open(output, "wb") as file:
        file.write(name.encode() + data[::-1])
print("end", name)
"""

COMMANDS = [
    (),
    ("-n", "3"),
    ("-n", "3", "-P", "thread"),
    ("-n", "3", "-r", "live"),
    ("-r", "live"),
    ("interrupt=detach",),
    ("-n", "2", "interrupt=detach"),
]


@dataclass
class Soak:
    """A project in which builds are killed.

    Attributes:
        versions: every content that each target may have had.
        counts: numbers of actions and of errors.
    """

    project: Project
    store: Path
    server: Sshd | None
    random: random.Random
    versions: dict[str, list[bytes]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def edit(self) -> None:
        """Change some inputs of the artifacts, sometimes with the same size and mtime."""
        for name in ("in-a", "in-b", "function"):
            path = self.project.folder / name
            if path.exists() and self.random.random() < 0.5:
                continue
            before = path.stat() if path.exists() else None
            size = before.st_size if before and self.random.random() < 0.5 else self.random.choice([10, 1000, 300_000])
            path.write_bytes(bytes(self.random.choices(b"0123456789abcdef", k=size)))
            if before and self.random.random() < 0.5:
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        a = b"a" + self._read("in-a")[::-1]
        b = b"b" + self._read("in-b")[::-1]
        self.expected = {"a": a, "b": b, "b2": b, "c": b"c" + a[::-1], "d": self._read("function")[::-1]}
        for name, content in self.expected.items():
            self.versions.setdefault(name, []).append(content)

    def _read(self, name: str) -> bytes:
        return (self.project.folder / name).read_bytes()

    def round(self) -> None:
        """Start doit, inject a kill, check the state; then run doit to its end."""
        self.edit()
        if self.random.random() < 0.2:
            self.project.doit("clean").ok()
        command = self.random.choice(COMMANDS)
        doit = self.project.start(*command)
        time.sleep(self.random.uniform(0, 1.5))
        fault = self.random.choice(["client", "term", "hup", "int", "session", "supervisor", "build", "sshd"])
        self.counts[fault] += self._inject(fault, doit)
        what = f"{' '.join(command)} {fault}"
        try:
            doit.wait(timeout=90)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{what}: it does not end")
            doit.kill()
            doit.wait()
        output = (self.project.folder / "doit.out").read_text(errors="replace")
        if "gamebear_tasks" in output and OUR_FRAMES.search(
            output
        ):  # before that, Ctrl-C causes Python's own traceback
            self.wrong.append(f"{what}: {output}")
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self._clients(), 20)
        if left := self._clients():
            self.wrong.append(f"{what}: processes of doit are left: {left}")
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        for name, versions in self.versions.items():
            target = self.project.folder / "build" / name
            if target.exists() and target.read_bytes() not in versions:
                self.wrong.append(f"{what}: {name} is wrong after it")
        self._finish(what)
        self.counts["rounds"] += 1

    def _finish(self, what: str) -> None:
        run = self.project.doit(timeout=120)
        if run.status:
            run = self.project.doit(timeout=120)  # a job that failed while nobody followed it is reported once
            self.counts["told once"] += 1
        if run.status:
            self.wrong.append(f"{what}: doit fails after it: {run.text[-2000:]}")
        for name, content in self.expected.items():
            target = self.project.folder / "build" / name
            if not target.exists() or target.read_bytes() != content:
                self.wrong.append(f"{what}: {name} is not what was declared: {run.text[-2000:]}")
        try:
            assert_nothing_is_left(self.project, self.store)
        except AssertionError as error:
            self.wrong.append(f"{what}: left behind: {error}")

    def _inject(self, fault: str, doit: subprocess.Popen[bytes]) -> int:
        """Inject a fault. Return the number of affected processes."""
        signals = {"client": signal.SIGKILL, "term": signal.SIGTERM, "hup": signal.SIGHUP, "int": signal.SIGINT}
        if fault in signals:
            if doit.poll() is not None:
                return 0
            doit.send_signal(signals[fault])
            return 1
        if fault == "sshd":
            if self.server is None:
                return 0
            self.server.hang_up()
            time.sleep(self.random.uniform(0, 1))
            self.server.start()
            return 1
        words = {"supervisor": "supervise", "build": "build"}
        found = self._sessions() if fault == "session" else processes(self.store, words[fault])
        hit = self.random.sample(found, min(len(found), 1))
        for pid in hit:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(hit)

    def _sessions(self) -> list[int]:
        """Return the processes that serve a client."""
        home = f"HOME={self.store.parents[2]}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
                if b"base64.b64decode" in words and home in environment.split(b"\0"):
                    found.append(int(process.name))
        return found

    def _clients(self) -> list[int]:
        """Return the processes that work in the project's folder."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "cwd").readlink() == self.project.folder and int(process.name) != os.getpid():
                    found.append(int(process.name))
        return found


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "ssh"])
def test_random_kills_leave_targets_correct_and_nothing_behind(
    where: str, tmp_path: Path, server: Sshd, home: Path, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "tmp").mkdir()
    seed = int(os.environ.get("SOAK_SEED", time.time()))
    if where == "ssh":
        project = Project(tmp_path / "project", home=home, GAMEBEAR_BUILDER=server.url, GAMEBEAR_PATIENCE="60")
        store = account.home / ".cache/gamebear/v1"
    else:
        project = Project(tmp_path / "project", home=tmp_path / "home")
        store = project.store
    project.write("dodo.py", DODO)
    project.write("make.py", SCRIPT)
    soak = Soak(project, store, server if where == "ssh" else None, random.Random(seed))
    until = time.monotonic() + float(os.environ.get("SOAK_SECONDS", "600")) / 2
    while time.monotonic() < until:
        soak.round()
    left = sorted(path.name for path in (tmp_path / "tmp").iterdir())
    print(f"{where}, seed {seed}: {dict(soak.counts)}; wrong: {len(soak.wrong)}; left in TMPDIR: {left}")
    assert not soak.wrong, "\n\n".join(soak.wrong)
    assert left == []
