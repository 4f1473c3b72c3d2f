"""What an `artifact()` declares, and the job that comes of it from what its files hold."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import JobError
from .imports import SETTLED
from .sources import LOCK_FILE

if TYPE_CHECKING:  # loading a dodo.py, and an up-to-date run, do without these
    from .builders import Order
    from .config import Settings
    from .functions import PickledFunction
    from .job import File
    from .sources.choice import Declared, Source
    from .sources.lock import Lock


NONE: Mapping[str, Any] = {}


class Plan(NamedTuple):  # there may be thousands, and it takes a third of the time that a dataclass takes
    """What an `artifact()` declares.

    Attributes:
        program: the buildscript, or the function as it was when dodo.py was loaded.
        targets: the outputs' places by the outputs' names.
        modules: local modules by their path below the program's folder.
        inputs: files by the names that the program finds them under.
        sources: upstream trees by name.
        args: values by name, as canonical JSON.
        arch: Debian's name of an architecture; empty for the setting's.
        time_limit: seconds; None for the setting's.
        lock: where the lock file is.
    """

    program: Path | PickledFunction
    targets: Mapping[str, str]
    modules: Mapping[str, Path] = NONE
    inputs: Mapping[str, str] = NONE
    sources: Mapping[str, Source] = NONE
    args: bytes = b"{}"
    arch: str = ""
    time_limit: float | None = None
    lock: Path = Path(LOCK_FILE)

    @property
    def name(self) -> str:
        """What the program is called."""
        return self.program.name

    def order(self, chosen: Settings) -> Order:
        """Make the job from what the files hold now.

        Raises:
            SourceError: a source is not pinned.
            JobError: a file cannot be read.
        """
        from .builders import Order
        from .job import File, Job

        files: dict[str, Path] = {}

        def hashed(path: Path) -> File:
            sha256, executable = _hashed(path)
            files[sha256] = path
            return File(sha256, executable)

        program = self.program
        python = ""
        if isinstance(program, Path):
            identity = hashed(program).sha256
        else:
            from .cache import keep
            from .functions import python_version

            identity, python = program.sha256, python_version()
            files[identity] = keep(program.data)
        lock = read_lock(self.lock) if self.sources else None
        job = Job(
            arch=self.arch or chosen.arch,
            program=self.name,
            identity=identity,
            python=python,
            outputs=tuple(self.targets),
            modules={name: File(hashed(path).sha256) for name, path in self.modules.items()},
            inputs={name: hashed(Path(path)) for name, path in self.inputs.items()},
            sources={name: source.identity(lock) for name, source in self.sources.items() if lock},
            args=json.loads(self.args),
        )
        return Order(
            job=job,
            files=files,
            fetch_trees=lambda: self._fetch_trees(lock),
            time_limit=chosen.time_limit if self.time_limit is None else self.time_limit,
            base=chosen.base,
            keep_failed=chosen.keep_failed,
            python=python or None,
        )

    def _fetch_trees(self, lock: Lock | None) -> dict[str, Path]:
        from . import functions, timing
        from .cache import keep, sources_folder

        with timing.phase("sources"):
            trees = {name: source.fetch(sources_folder(), lock) for name, source in self.sources.items() if lock}
            if not isinstance(self.program, Path):
                trees["/function.lines"] = keep(self.program.lines)
                trees["/cloudpickle.zip"] = keep(functions.cloudpickle_archive())
        return trees


declared: dict[Declared, None] = {}
"""Every source that an `artifact()` of this dodo.py declares, once, in their order."""

_alternatives: set[str] = set()
"""The names in every `either()` of them."""


def declare(source: Declared) -> None:
    """Note a source that an `artifact()` declares."""
    if source not in declared:
        declared[source] = None
        _alternatives.update(name for name, _ in getattr(source, "options", ()))


def check_choice(preference: str) -> None:
    """Refuse a setting `sources` that names nothing there is to choose from, where there is something.

    Raises:
        SettingsError: it is misspelt.
    """
    if preference and _alternatives and preference not in _alternatives:
        from .sources.choice import check_preference

        check_preference(preference, declared)


def read_lock(path: Path) -> Lock:
    """Return the lock file's content, read once as long as it stays the same."""
    from .sources.lock import Lock

    try:
        about = os.stat(path)
    except OSError:
        return Lock.read(path)
    key = (about.st_dev, about.st_ino, about.st_mtime_ns, about.st_size)
    lock = _locks.get(key)
    if lock is None:
        lock = _locks[key] = Lock.read(path)
    return lock


_locks: dict[tuple[int, int, int, int], Lock] = {}


def _hashed(path: Path) -> tuple[str, bool]:
    """Return a file's SHA-256 and whether it is executable; what is as it was is not read again."""
    from .runner.files import sha256

    try:
        with path.open("rb", buffering=0) as file:  # on NFS, what is opened is as it is on the server
            about = os.fstat(file.fileno())
            version = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
            digest = _digests.get(version)
            if digest is None:
                is_settled = abs(time.time() - about.st_ctime) > SETTLED
                digest = sha256(file)
                if is_settled:
                    _digests[version] = digest
            return digest, bool(about.st_mode & 0o100)
    except OSError as error:
        raise JobError(
            f"{path} cannot be read: {error.strerror}.",
            "A job needs all of its files: mend its path or its permissions.",
        ) from error


_digests: dict[tuple[int, ...], str] = {}
"""The SHA-256 of files whose last change is long enough ago that another would show in their times."""
