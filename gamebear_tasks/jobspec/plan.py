"""Plan: the declaration of an `artifact()`, and the job that it yields with the current content of its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import JobError
from ..runner.util.atomic_files import open_regular
from ..sources.declare import LOCK_FILE
from ..util.file_hashes import opened_content_of, version
from .module_finder import local_modules
from .spec import FORMAT

if TYPE_CHECKING:  # not needed to load dodo.py, nor in an up-to-date run
    from ..builders.base import Order
    from ..config import Settings
    from ..sources.alternatives import Declared, Source
    from ..sources.lockfile import Lock
    from .function_digest import PickledFunction
    from .spec import Json


NONE: Mapping[str, Any] = {}

METADATA_NAME = b"__sources__"
"""Global of a program that holds the metadata of its sources. A job contains them only if the program mentions it."""


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
            search: find the script's modules anew, because a task of this run may have created the script or a module.

        Raises:
            SettingsError: the script is not Python.
            SourceError: a source is not pinned.
            JobError: a file cannot be read.
        """
        program, modules = self.program, self.modules
        if search and isinstance(program, Path):
            modules = local_modules(program)
        path = str(program) if isinstance(program, Path) else ""
        try:
            identity = content(path)[0] if isinstance(program, Path) else program.sha256
            hashes = {}
            for name, module in modules.items():
                path = str(module)
                hashes[name] = content(path)[0]
            inputs = {}
            for name, path in self.inputs.items():
                inputs[name] = content(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        lock = read_lock(self.lock) if self.sources else None
        pins = {name: source.identity(lock) for name, source in self.sources.items() if lock}
        metadata = {name: source.metadata(lock) for name, source in self.sources.items() if lock}
        return Contents(self.arch or arch, identity, hashes, inputs, pins, metadata, modules, lock)

    def state(self, contents: Contents) -> str:
        """Return a hash of the whole job and the paths of its targets, which doit saves and compares.

        It is faster to compute than the job's digest, which an up-to-date run does not need.
        """
        python = ""
        if not isinstance(self.program, Path):
            from .function_digest import python_version

            python = python_version()
        whole = (FORMAT, python, self.name, self.args, [*self.targets.items()], contents[:-2])
        return hashlib.sha256(ascii(whole).encode()).hexdigest()

    def order(self, chosen: Settings, contents: Contents | None = None) -> Order:
        """Create the job and the order that submits it.

        Args:
            chosen: the settings.
            contents: the job's contents; by default the result of `read`.

        Raises:
            SettingsError, SourceError, JobError: as in `read`.
        """
        from ..builders.base import Order
        from .spec import File, Job

        made_of = self.read(chosen.arch) if contents is None else contents
        program = self.program
        paths = {name: Path(path) for name, path in self.inputs.items()}
        files = {sha256: made_of.paths[name] for name, sha256 in made_of.modules.items()}
        files.update((sha256, paths[name]) for name, (sha256, _) in made_of.inputs.items())
        for source in self.sources.values():
            files.update(source.files())
        python = ""
        if isinstance(program, Path):
            files[made_of.program] = program
        else:
            from ..sources.cache import keep
            from .function_digest import python_version

            python = python_version()
            files[made_of.program] = keep(program.data)
        job = Job(
            arch=made_of.arch,
            program=self.name,
            identity=made_of.program,
            python=python,
            outputs=tuple(self.targets),
            modules={name: File(sha256) for name, sha256 in made_of.modules.items()},
            inputs={name: File(*content) for name, content in made_of.inputs.items()},
            sources=made_of.sources,
            args=json.loads(self.args),
            metadata=made_of.metadata if made_of.metadata and self._looks(made_of.paths.values()) else {},
        )
        return Order(
            job=job,
            files=files,
            fetch_trees=lambda: self._fetch_trees(made_of.lock),
            time_limit=chosen.time_limit if self.time_limit is None else self.time_limit,
            base=chosen.base,
            keep_failed=chosen.keep_failed,
            python=python or None,
        )

    def _looks(self, modules: Iterable[Path]) -> bool:
        """Return whether the program uses the metadata of its sources; if not, the job omits them, URLs included.

        The builder passes on exactly the job's metadata, so equal jobs see equal metadata.
        """
        own = _text(self.program) if isinstance(self.program, Path) else self.program.data
        return METADATA_NAME in own or any(METADATA_NAME in _text(path) for path in modules)

    def _fetch_trees(self, lock: Lock | None) -> dict[str, Path]:
        from ..records import task_record
        from ..sources.base import FetchedSource
        from ..sources.cache import keep, sources_folder
        from . import function_digest

        with task_record.phase("sources"):
            fetched = {name: source for name, source in self.sources.items() if isinstance(source, FetchedSource)}
            trees = {name: source.fetch(sources_folder(), lock) for name, source in fetched.items() if lock}
            if not isinstance(self.program, Path):
                trees["/function.lines"] = keep(self.program.lines)
                trees["/cloudpickle.zip"] = keep(function_digest.cloudpickle_archive())
        return trees


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


def _text(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: OSError) -> JobError:
    return JobError(
        f"{path} cannot be read: {error.strerror}.", "A job needs all of its files: mend its path or its permissions."
    )


_locks: dict[str, Lock] = {}
