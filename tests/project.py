"""A project that uses gamebear-tasks, and its doit, run as a person runs it: in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""


OUR_FRAMES = re.compile(r'File ".*(gamebear_tasks|gamebear_runner|/doit/)')
"""A line of a traceback through our code or doit's: never for a person to see."""


@dataclass(frozen=True)
class Run:
    """What a run of doit did.

    Attributes:
        status: exit status.
        out: standard output.
        err: standard error.
    """

    status: int
    out: str
    err: str

    @property
    def ran(self) -> list[str]:
        """The tasks that were run, in order."""
        return [line[3:] for line in self.out.splitlines() if line.startswith(".  ")]

    @property
    def text(self) -> str:
        """All that a person saw."""
        return self.out + self.err

    def ok(self) -> Run:
        """Return the run, which must have ended well."""
        assert self.status == 0, self.text
        assert not OUR_FRAMES.search(self.text), self.text
        return self

    def failed(self, *words: str) -> Run:
        """Return the run, which must have failed, without a traceback, saying each of some things."""
        assert self.status != 0, self.text
        assert not OUR_FRAMES.search(self.text), self.text
        said = " ".join(self.text.split())
        for word in words:
            assert word in said, self.text
        return self


class Project:
    """A folder with a dodo.py.

    Args:
        folder: made if need be.
        home: the person's home folder, and below it the caches.
        environment: more variables.
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

    def write(self, name: str, text: str) -> Path:
        """Write one of the project's files."""
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

    def command(self, *arguments: str) -> list[str]:
        """Return the command line for doit."""
        return [sys.executable, "-m", "doit", *arguments]

    def doit(self, *arguments: str, timeout: float = 900, **environment: str) -> Run:
        """Run doit."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        return Run(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start doit without waiting, its output in `doit.out` of the folder."""
        with (self.folder / "doit.out").open("wb") as out:
            return subprocess.Popen(
                self.command(*arguments),
                cwd=self.folder,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
