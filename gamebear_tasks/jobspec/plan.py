"""Plan: the declaration of an `artifact()`, and the job that it yields with the current content of its files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import JobError
from ..sources.declare import LOCK_FILE
from ..util.file_hashes import opened_content_of, version
from .canonical_json import FORMAT, Json
from .module_finder import local_modules

if TYPE_CHECKING:  # not needed to load dodo.py, nor in an up-to-date run
    from ..sources.alternatives import Declared, Source
    from ..sources.lockfile import Lock
    from .function_digest import PickledFunction


NONE: Mapping[str, Any] = {}

SAVED = "gamebear"
"""Key of the built state (see `Plan.state`) among the values that doit saves for a task."""


class Contents(NamedTuple):
    """Contents of a job: the digests of its files and the pins of its sources.

    Attributes:
        arch: Debian's name of the architecture.
        program: SHA-256 of the script, or of the function's pickle.
        modules: SHA-256 of each module, by path relative to the script's folder.
        inputs: SHA-256 of each input and whether it is executable, by name.
        sources: pin of each source, by name.
        metadata: metadata of each source for the program, by name.
        paths: local path of each module, by path relative to the script's folder.
        lock: the lock file that contains the pins; None without sources.
    """

    arch: str
    program: str
    modules: Mapping[str, str]
    inputs: Mapping[str, tuple[str, bool]]
    sources: Mapping[str, Mapping[str, Json]]
    metadata: Mapping[str, Mapping[str, str]]
    paths: Mapping[str, Path]
    lock: Lock | None


class Plan(NamedTuple):  # there may be thousands, and creating it takes a third of a dataclass's time
    """Declaration of an `artifact()`.

    Attributes:
        program: the buildscript, or the function as it was when dodo.py was loaded.
        targets: path of each target, by the output's name.
        folders: names of the outputs whose target is a folder; a name with `*`, `?` or `[…]` is a pattern.
        modules: local modules, by path relative to the program's folder.
        inputs: local path of each input, by its name in the program's working directory.
        sources: upstream trees, by name.
        args: arguments by name, as canonical JSON.
        arch: Debian's name of the architecture; empty to use the setting.
        time_limit: seconds after which the builder ends the job; None to use the setting.
        lock: path of the lock file.
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
    folders: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the program."""
        return self.program.name

    def read(
        self, arch: str, content: Callable[[str], tuple[str, bool]] = opened_content_of, *, search: bool = True
    ) -> Contents:
        """Return the job's contents, read from the current files.

        Args:
            arch: the architecture of the settings.
            content: returns a file's SHA-256 and whether it is executable; raises OSError.
            search: search for the script's modules again, because a task of this run may have created one of them or
                the script.

        Raises:
            SettingsError: the script is not Python.
            SourceError: a source is not pinned.
            JobError: a file cannot be read.
        """
        program, modules = self.program, self.modules
        path = ""
        try:
            if isinstance(program, Path):
                if search:
                    modules = local_modules(program)
                path = str(program)
                identity = content(path)[0]
            else:
                identity = program.sha256
            hashes = {}
            for name, module in modules.items():
                path = str(module)
                hashes[name] = content(path)[0]
            inputs = {}
            for name, path in self.inputs.items():
                inputs[name] = content(path)
        except OSError as error:
            raise unreadable(path, error) from error
        if not self.sources:
            return Contents(self.arch or arch, identity, hashes, inputs, {}, {}, modules, None)
        lock = read_lock(self.lock)
        pins = {name: source.identity(lock) for name, source in self.sources.items()}
        metadata = {name: source.metadata(lock) for name, source in self.sources.items()}
        return Contents(self.arch or arch, identity, hashes, inputs, pins, metadata, modules, lock)

    def state(self, contents: Contents) -> str:
        """Return a hash of the whole job and the paths of its targets, which doit saves and compares.

        It is faster to compute than the job's digest, which an up-to-date run does not need.
        """
        python = ""
        if not isinstance(self.program, Path):
            from .function_digest import python_version

            python = python_version()
        whole = (FORMAT, python, self.name, self.args, [*self.targets.items()], self.folders, contents[:-2])
        return hashlib.sha256(ascii(whole).encode()).hexdigest()


declared: dict[Declared, None] = {}
"""All sources that this dodo.py declares, without duplicates, in order of declaration."""

_alternatives: set[str] = set()
"""Names of all options in their `either()` sources."""


def declare(source: Declared) -> None:
    """Register a source that an `artifact()` declares."""
    if source not in declared:
        declared[source] = None
        _alternatives.update(name for name, _ in getattr(source, "options", ()))


def check_choice(preference: str) -> None:
    """Check that the setting `sources` names an option of a declared `either()`, if there is one.

    Raises:
        SettingsError: the name is unknown.
    """
    if preference and _alternatives and preference not in _alternatives:
        from ..sources.alternatives import check_preference

        check_preference(preference, declared)


def read_lock(path: Path) -> Lock:
    """Return the content of the lock file, cached until the file changes."""
    from ..sources.lockfile import Lock

    try:
        about = os.stat(path)
    except OSError:
        return Lock.read(path)
    key = version(about)
    lock = _locks.get(key)
    if lock is None:
        lock = _locks[key] = Lock.read(path)
    return lock


def unreadable(path: str | Path, error: OSError) -> JobError:
    """Return the error for a file of a job that cannot be read."""
    return JobError(f"{path} cannot be read: {error.strerror}.", "Fix its path in dodo.py, or its permissions.")


_locks: dict[str, Lock] = {}
