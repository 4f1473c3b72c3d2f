"""A project that uses gamebear-tasks, and its doit in a separate process, as a user runs it."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gamebear_tasks.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
"""Root of the checkout."""


OUR_FRAMES = re.compile(r'File ".*(gamebear_tasks|gamebear_runner|/doit/)')
"""Traceback line of our code or doit's, which users must never see."""


class Memory(io.BytesIO):
    """In-memory target for an output of a builder."""

    def skip(self, count: int, /) -> None:
        self.write(bytes(count))


@dataclass(frozen=True)
class Run:
    """Result of a doit run.

    Attributes:
        status: Exit status.
        out: Standard output.
        err: Standard error.
    """

    status: int
    out: str
    err: str

    @property
    def ran(self) -> list[str]:
        """Tasks that were executed, in order."""
        return [line[3:] for line in self.out.splitlines() if line.startswith(".  ")]

    @property
    def text(self) -> str:
        """All visible output."""
        return self.out + self.err

    def ok(self) -> Run:
        """Assert success and return the run."""
        assert self.status == 0, self.text
        assert not OUR_FRAMES.search(self.text), self.text
        return self

    def failed(self, *words: str) -> Run:
        """Assert failure without a traceback, and that the output contains the words. Return the run."""
        assert self.status != 0, self.text
        assert not OUR_FRAMES.search(self.text), self.text
        output = " ".join(self.text.replace("\n→ ", "\n").split())
        for word in words:
            assert word in output, self.text
        return self


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a condition is true."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def processes(store: Path, kind: str = "") -> list[int]:
    """Return the living processes of a store's runner: supervisors (`supervise`), builds and their helpers.

    Args:
        store: Folder of the store.
        kind: Word that the command line must contain.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(str(store).encode() in word for word in words) and (not kind or kind.encode() in words):
            found.append(int(process.name))
    return found


def assert_nothing_is_left(project: Project, store: Path | None = None) -> None:
    """Assert that neither side has leftover processes, markers, work folders, tickets or partial files.

    Args:
        project: The client's project.
        store: Store of the builder. Default: the project's own one, for `local:`.
    """
    store = store or project.store
    wait_for(lambda: not processes(store))
    assert list((store / "live").iterdir()) == [], "a job that was not cleaned up after"
    patterns = ("jobs/*/work", "tmp/*.part", "tmp/*.wanted", "tmp/buildah*", f"tmp/{'[0-9a-f]' * 16}", "slots/wait-*")
    left = [path for pattern in patterns for path in store.glob(pattern)]
    left += (project.folder / "build").glob(".*.part")
    assert not left, f"left behind: {left}"


MEASURE = """
import os, sys
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
os.write(int(os.environ["MEASURED"]), b"%d %d" % (os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024))
"""
"""Run a command from a small process: a child starts with its parent's memory, which counts towards its peak."""


def measured(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], out: IO[bytes], err: IO[bytes]
) -> tuple[int, int]:
    """Run a command. Return its exit status and its peak resident memory in bytes."""
    reader, writer = os.pipe()
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", MEASURE, *command],
            cwd=folder,
            env={**environment, "MEASURED": str(writer)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            pass_fds=[writer],
            check=True,
        )
        status, most = os.read(reader, 100).split()
    finally:
        os.close(reader)
        os.close(writer)
    return int(status), int(most)


class Project:
    """A folder with a dodo.py.

    Args:
        folder: The folder; created if missing.
        home: Home folder of the user, which contains the caches.
        environment: Additional environment variables.
    """

    def __init__(self, folder: Path, home: Path, **environment: str) -> None:
        self.folder = folder
        self.home = home
        folder.mkdir(parents=True, exist_ok=True)
        home.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("GAMEBEAR_", "XDG_"))},
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            **environment,
        }

    @property
    def store(self) -> Path:
        """Store of `local:`."""
        return self.home / ".cache" / "gamebear" / "v1"

    def write(self, name: str, text: str) -> Path:
        """Write a file of the project."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def take(self, *names: str) -> None:
        """Copy files or folders of our own project."""
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, self.folder / name)

    python = sys.executable
    """The Python in which doit and our package are installed."""

    def command(self, *arguments: str) -> list[str]:
        """Return the command line: `gamebear` for its own commands and its reporter, else `doit`."""
        is_ours = (arguments[:1] and arguments[0] in COMMANDS) or "live" in arguments
        return self.gamebear_command(*arguments) if is_ours else [self.python, "-m", "doit", *arguments]

    def gamebear_command(self, *arguments: str) -> list[str]:
        """Return the command line for gamebear."""
        return [self.python, "-m", "gamebear_tasks", *arguments]

    def doit(self, *arguments: str, timeout: float = 900, **environment: str) -> Run:
        """Run doit."""
        return self._run(self.command(*arguments), timeout, environment)

    def gamebear(self, *arguments: str, timeout: float = 900, **environment: str) -> Run:
        """Run gamebear."""
        return self._run(self.gamebear_command(*arguments), timeout, environment)

    def _run(self, command: Sequence[str], timeout: float, environment: Mapping[str, str]) -> Run:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        return Run(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))

    def measured(self, *command: str) -> tuple[Run, int]:
        """Run a command. Return the run and its peak resident memory in bytes."""
        out, err = self.folder / "measured.out", self.folder / "measured.err"
        with out.open("wb") as first, err.open("wb") as second:
            status, most = measured(command, self.folder, self.environment, first, second)
        return Run(status, out.read_text(errors="replace"), err.read_text(errors="replace")), most

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start doit without waiting. Its output is written to `doit.out` in the folder."""
        with (self.folder / "doit.out").open("wb") as out:
            return subprocess.Popen(
                self.command(*arguments),
                cwd=self.folder,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
