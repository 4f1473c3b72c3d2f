"""What an `artifact()` declares, and the job that comes of it from what its files hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import functions
from .builders import Order
from .config import Settings
from .errors import JobError
from .functions import Function
from .job import File, Job, Json
from .runner.files import sha256
from .sources import Declared, Either, Lock, Source, check_preference


@dataclass(frozen=True)
class Plan:
    """What an `artifact()` declares.

    Attributes:
        program: the buildscript, or the function.
        identity: what the function was when dodo.py was loaded, as `functions.identity` has it.
        targets: the outputs' places by the outputs' names.
        modules: local modules by their path below the program's folder.
        inputs: files by the names that the program finds them under.
        sources: upstream trees by name.
        args: values by name.
        arch: Debian's name of an architecture; empty for the setting's.
        time_limit: seconds; None for the setting's.
        lock: where the lock file is.
    """

    program: Path | Function
    targets: Mapping[str, Path]
    identity: str = ""
    modules: Mapping[str, Path] = field(default_factory=dict)
    inputs: Mapping[str, Path] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)
    args: Mapping[str, Json] = field(default_factory=dict)
    arch: str = ""
    time_limit: float | None = None
    lock: Path = Path("gamebear.lock")

    @property
    def name(self) -> str:
        """What the program is called."""
        return self.program.name if isinstance(self.program, Path) else functions.name_of(self.program)

    def order(self, chosen: Settings) -> Order:
        """Make the job from what the files hold now.

        Raises:
            SourceError: a source is not pinned.
            JobError: a file cannot be read.
        """
        files: dict[str, Path] = {}

        def hashed(path: Path) -> File:
            sha256, executable = _hashed(path)
            files[sha256] = path
            return File(sha256, executable)

        program = self.program
        lock = read_lock(self.lock)
        job = Job(
            arch=self.arch or chosen.arch,
            program=self.name,
            identity=hashed(program).sha256 if isinstance(program, Path) else self.identity,
            is_function=not isinstance(self.program, Path),
            outputs=tuple(self.targets),
            modules={name: File(hashed(path).sha256) for name, path in self.modules.items()},
            inputs={name: hashed(path) for name, path in self.inputs.items()},
            sources={name: source.identity(lock) for name, source in self.sources.items()},
            args=self.args,
        )

        return Order(
            job=job,
            files=files,
            fetch_trees=lambda: self._fetch_trees(lock),
            time_limit=chosen.time_limit if self.time_limit is None else self.time_limit,
            base=chosen.base,
            python=None if isinstance(self.program, Path) else functions.python_version(),
        )

    def _fetch_trees(self, lock: Lock) -> dict[str, Path]:
        from .cache import keep, sources_folder

        trees = {name: source.fetch(sources_folder(), lock) for name, source in self.sources.items()}
        if not isinstance(self.program, Path):
            trees["/function.pickle"] = keep(functions.pickled(self.program))
            trees["/cloudpickle.zip"] = keep(functions.cloudpickle_archive())
        return trees


declared: dict[str, Declared] = {}
"""Every source that an `artifact()` of this dodo.py declares, by a text that tells it from the others."""


def check_choice(preference: str) -> None:
    """Refuse a setting `sources` that names nothing there is to choose from, where there is something.

    Raises:
        SettingsError: it is misspelt.
    """
    if any(isinstance(source, Either) for source in declared.values()):
        check_preference(preference, declared.values())


def read_lock(path: Path) -> Lock:
    """Return the lock file's content, read once as long as it stays the same."""
    try:
        about = path.stat()
    except OSError:
        return Lock.read(path)
    key = (str(path.absolute()), about.st_mtime_ns, about.st_size)
    lock = _locks.get(key)
    if lock is None:
        lock = _locks[key] = Lock.read(path)
    return lock


_locks: dict[tuple[str, int, int], Lock] = {}


def _hashed(path: Path) -> tuple[str, bool]:
    """Return a file's SHA-256 and whether it is executable."""
    try:
        with path.open("rb", buffering=0) as file:
            return sha256(file), bool(os.fstat(file.fileno()).st_mode & 0o100)
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror}.", "A job needs all of its files.") from error
