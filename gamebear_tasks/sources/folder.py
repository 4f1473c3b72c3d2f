"""Local folders as sources: the current working tree, identified by its content.

In a git checkout, git lists the files: tracked ones, and untracked ones that are not ignored, submodules included.
Elsewhere, the folder is walked. The identity is the SHA-256 of the manifest (see `runner.protocol.manifest`), so every
edit, addition, removal and change of an executable bit is noticed, without a lock file and without a commit.

An unchanged folder is recognized by its files' device, inode, size, mode, mtime and ctime, as git does. The cache file
in `build/logs` holds a hash of all of these in its first line, so that an unchanged folder takes one `lstat` per file
and reads one line (see `_Cache`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import marshal
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path

from ..errors import SettingsError, SourceError
from ..runner.protocol.manifest import Entry, encode
from ..runner.util.atomic_files import open_regular, sha256, written_aside
from ..util.file_hashes import SECOND, SETTLED
from ..util.locations import LOGS
from ..util.subprocesses import ProgramError, run
from .base import BaseSource, Pin
from .cache import keep
from .git_repository import environment as git_environment
from .lockfile import Lock

DATABASE = ".doit.db"
"""Prefix of the names of doit's database files, which no folder contains."""

FORMAT = "1"
"""Version of the cache file."""

Version = tuple[str, int, int, int, int, int, int]
"""Path and mode of a file; its device, inode, size, and mtime and ctime in nanoseconds."""


def checked_patterns(path: object, patterns: object) -> tuple[str, ...]:
    """Return the patterns of a folder.

    Raises:
        SettingsError: It is not a list of patterns, or one of them leads out of the folder.
    """
    if isinstance(path, str | os.PathLike) and isinstance(patterns, Iterable) and not isinstance(patterns, str):
        listed = tuple(patterns)
        if all(isinstance(each, str) and each.strip("/") and ".." not in each.split("/") for each in listed):
            return listed
    raise SettingsError(
        f"folder({str(path)!r}): {patterns!r} is not a list of patterns of paths in the folder.",
        'Write it like lines of .gitignore: exclude=["docs/", "*.o"].',
    )


class Snapshot:
    """The content of a folder at one time.

    Args:
        entries: the files, links and empty folders.
    """

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries

    @cached_property
    def manifest(self) -> bytes:
        """The manifest."""
        return encode(self.entries)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the manifest."""
        return hashlib.sha256(self.manifest).hexdigest()


@dataclasses.dataclass(frozen=True)
class FolderPin(Pin):
    """The content of a folder.

    Attributes:
        sha256: SHA-256 of the manifest.
    """

    sha256: str

    def identity(self) -> dict[str, str | int | bool]:
        """Return the SHA-256 of the manifest."""
        return {"folder": self.sha256}

    @property
    def file_name(self) -> str:
        """File name `folder-<sha256>`."""
        return f"folder-{self.sha256}"


@dataclasses.dataclass(frozen=True)
class Folder(BaseSource[FolderPin]):
    """A local folder.

    Attributes:
        path: The folder, relative to `dodo.py`.
        include: Patterns of the files to include; empty for all.
        exclude: Patterns of the files and folders to exclude.
        targets: Targets of the task, which are excluded: they would make each build outdated.
    """

    path: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    targets: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        return f"folder {self.path}"

    def pin(self, lock: Lock) -> FolderPin:
        """Return the pin: the content of the folder now.

        Raises:
            SourceError: The folder, or a file in it, cannot be read, or the folder has no files.
        """
        return FolderPin(_cache_of(self).current())

    def _metadata(self, pin: FolderPin, lock: Lock) -> dict[str, str]:
        return {"kind": "folder", "sha256": pin.sha256}

    def files(self) -> dict[str, Path]:
        """Return the path of the manifest and of each file, by SHA-256."""
        snapshot = _cache_of(self).snapshot()
        found = {entry.value: Path(f"{self.path}/{entry.path}") for entry in snapshot.entries if entry.is_file}
        return {**found, snapshot.sha256: keep(snapshot.manifest)}

    def warning(self, lock: Lock) -> str:
        """Return a warning if git tracks files in the project's `build` folder, which is excluded."""
        excluded = os.path.relpath(LOGS.parent, self.path)
        if excluded == "." or excluded.startswith(".."):
            return ""
        try:
            tracked = run(["git", "-C", self.path, "ls-files", "-z", "--", f"{excluded}/"], env=git_environment())
        except ProgramError:
            return ""  # not a checkout
        return f"{self} leaves out {excluded}/, in which git tracks files" if tracked else ""

    def without(self, targets: Iterable[str]) -> Folder:
        """Return the folder without a task's targets."""
        return dataclasses.replace(self, targets=tuple(targets))

    # listing

    def listed(self) -> list[Version]:
        """Return the path and version of each file, link and empty folder.

        Raises:
            SourceError: The folder cannot be read, git fails, or a submodule is not checked out.
        """
        top = os.path.abspath(self.path)
        own = self._own_files(top)
        included = _matcher(self.include) if self.include else None
        excluded = _matcher(self.exclude) if self.exclude else None
        try:
            is_checkout = any(os.path.lexists(f"{parent}/.git") for parent in (top, *map(str, Path(top).parents)))
            found = _checked_out(top) if is_checkout else _walked(top, excluded or (lambda path: False))
            listed = [
                (path, about.st_mode, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
                for path, about in found
                if not (path.startswith(own) and any(f"{path}/".startswith(f"{each}/") for each in own))
                and not (DATABASE in path and path.rpartition("/")[2].startswith(DATABASE))
                and not (excluded is not None and excluded(path))
                and (included is None or included(path))
            ]
        except ProgramError as error:
            hint = error.hint or f"Run `git status` in {self.path} and fix what it reports."
            raise SourceError(f"{self}: git cannot list its files: {error.reason}.", hint) from error
        except OSError as error:
            raise self.failure(error) from error
        missing = next((path for path, mode, *_ in listed if is_checkout and stat.S_ISDIR(mode)), None)
        if missing is not None:
            raise SourceError(
                f"{self}: the submodule {missing} is not checked out.",
                f"Run `git -C {self.path} submodule update --init --recursive`, or exclude it.",
            )
        return listed

    def _own_files(self, top: str) -> tuple[str, ...]:
        """Return the paths of the project's `build` folder and of the task's targets, relative to the folder."""
        found = []
        for path in (str(LOGS.parent), *self.targets):
            relative = os.path.relpath(os.path.abspath(path), top)
            if relative != "." and not relative.startswith("../") and relative != "..":
                found.append(relative)
        return tuple(found)

    def failure(self, error: OSError) -> SourceError:
        """Return the error for a file that cannot be read."""
        name = error.filename if isinstance(error.filename, str) else self.path
        return SourceError(
            f"{self}: {name} cannot be read: {error.strerror or error}.",
            f'Change its permissions, or exclude it: folder({self.path!r}, exclude=["…"]).',
        )


def _checked_out(top: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files that git tracks or does not ignore, those of submodules and nested checkouts included.

    A submodule that is not checked out is yielded as a folder.

    Raises:
        ProgramError: Git fails.
        OSError: A file or folder cannot be read.
    """
    command = ["git", "-c", "core.fsmonitor=false", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    lstat = os.lstat
    for path in os.fsdecode(run(command, cwd=Path(top), env=git_environment())).split("\0"):
        try:
            about = lstat(f"{top}/{path}")
        except (FileNotFoundError, NotADirectoryError):
            continue  # tracked by git, but deleted
        if not stat.S_ISDIR(about.st_mode):
            yield path, about
        elif path:  # a submodule, a nested checkout, or a folder in place of a tracked file
            name = path.rstrip("/")
            if os.path.lexists(f"{top}/{name}/.git"):
                for inner, about in _checked_out(f"{top}/{name}"):
                    yield f"{name}/{inner}", about
            elif not os.listdir(f"{top}/{name}"):
                yield name, about


def _walked(top: str, excluded: Callable[[str], bool]) -> Iterator[tuple[str, os.stat_result]]:
    """Yield all files, links and empty folders below a folder, except bytecode and excluded folders.

    Raises:
        OSError: A file or folder cannot be read.
    """
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        is_empty = True
        with os.scandir(top + prefix) as entries:
            for entry in entries:
                path = f"{prefix}/{entry.name}"
                is_empty = False
                if not entry.is_dir(follow_symlinks=False):
                    yield path[1:], entry.stat(follow_symlinks=False)
                elif entry.name not in (".git", "__pycache__") and not excluded(f"{path[1:]}/"):
                    waiting.append(path)
        if is_empty and prefix:
            yield prefix[1:], os.lstat(top + prefix)


def _matcher(patterns: Collection[str]) -> Callable[[str], bool]:
    """Return a function that checks whether a path matches one of several patterns, or is below a folder that does."""
    if not patterns:
        return lambda path: False
    match = re.compile("|".join(map(_regex, patterns))).match
    return lambda path: match(path) is not None


def _regex(pattern: str) -> str:
    """Translate a pattern as in gitignore(5), without negation.

    A pattern without a slash matches at any depth, another one from the folder itself. `*` and `?` do not match a
    slash, `**` does. A trailing slash matches folders only.
    """
    body = pattern.strip("/")
    anchored = "/" in pattern.rstrip("/")
    parts = re.split(r"(\*\*/|/\*\*\Z|\*\*|\*|\?|\[[^\]/]+\])", body)
    translated = {"**/": "(?:.*/)?", "/**": "/.*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    text = ""
    for part in parts:
        if part in translated:
            text += translated[part]
        elif part.startswith("[") and part.endswith("]"):
            text += f"[^{part[2:-1]}]" if part[1] in "!^" else part
        else:
            text += re.escape(part)
    end = "/" if pattern.endswith("/") else r"(?:/|\Z)"
    return f"(?s:{'' if anchored else '(?:.*/)?'}{text}{end})"


# snapshots


class _Cache:
    """Cached SHA-256 of a folder's files, in memory and in `build/logs`.

    The file's first line is JSON with the format, the state's key and the SHA-256 of the manifest. The second is JSON
    with version and value of each path. The second is read only if something has changed or the folder is sent.
    """

    def __init__(self, source: Folder) -> None:
        self._source = source
        identity = json.dumps([os.path.abspath(source.path), source.include, source.exclude, source.targets])
        self._place = LOGS / f".folder-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]}"
        self._values: dict[str, tuple[str, str]] = {}
        self._snapshot: Snapshot | None = None
        self._key = ""
        self._current = ""

    def current(self) -> str:
        """Return the SHA-256 of the manifest of the folder's current content; raises SourceError."""
        listed = self._source.listed()
        key = _key(listed)
        known: object = None
        if key and key == self._key:
            known = self._current
        elif key:
            head = _first_line(self._place)
            if head.get("format") == FORMAT and head.get("key") == key:
                known = head.get("manifest")
        self._current = known if isinstance(known, str) else self._read(listed).sha256
        return self._current

    def snapshot(self) -> Snapshot:
        """Return the content of which `current` has returned the SHA-256.

        Raises:
            SourceError: The folder has changed since, or cannot be read.
        """
        if self._snapshot is None or self._snapshot.sha256 != self._current:
            self._read(self._source.listed())
        if self._snapshot is None or self._snapshot.sha256 != self._current:
            raise SourceError(f"{self._source} changed while it was read.", "Run doit again.")
        return self._snapshot

    def _read(self, listed: list[Version]) -> Snapshot:
        """Hash the files that have changed, and write the cache file."""
        if not listed:
            raise SourceError(
                f"{self._source} has no files.",
                f"See `ls -A {self._source.path}`. Files that git ignores do not count, nor does the `build` folder.",
            )
        known = self._values or _values(self._place)
        values: dict[str, tuple[str, str]] = {}
        entries = []
        settled = time.time_ns() - int(SETTLED * SECOND)
        try:
            for path, mode, *numbers in listed:
                version = " ".join(map(str, numbers))
                found = known.get(path, ("", ""))
                entry = _entry(f"{self._source.path}/{path}", path, mode, found[1] if found[0] == version else "")
                entries.append(entry)
                if _is_settled(numbers[-1], settled):
                    values[path] = version, entry.value
        except OSError as error:
            raise self._source.failure(error) from error
        self._snapshot = snapshot = Snapshot(entries)
        self._values = values
        self._key = _key(listed)
        head = {"format": FORMAT, "key": self._key, "manifest": snapshot.sha256}
        if LOGS.is_dir():
            with contextlib.suppress(OSError), written_aside(self._place, sync=False) as file:
                file.write(f"{json.dumps(head)}\n{json.dumps(values)}\n".encode("ascii"))
        return snapshot


def _is_settled(changed: int, until: int) -> bool:
    """Return whether another write would change a file's version (see `file_hashes.is_settled`).

    Args:
        changed: The file's ctime in nanoseconds.
        until: The latest settled ctime.
    """
    return changed % SECOND != 0 and changed < until


def _key(listed: list[Version]) -> str:
    """Return a hash of all paths, modes and versions; empty if another write might leave it unchanged.

    Marshalling takes 4 ms for 20,000 files; `repr` and JSON take 25 ms.
    """
    settled = time.time_ns() - int(SETTLED * SECOND)
    if not all(_is_settled(version[-1], settled) for version in listed):
        return ""
    return hashlib.sha256(marshal.dumps(listed, 2)).hexdigest()  # version 2 does not depend on the objects' identity


def _entry(place: str, path: str, mode: int, value: str) -> Entry:
    """Return the entry of a file, link or empty folder.

    Args:
        place: Its path.
        path: Its path in the folder.
        mode: Its mode, of `lstat`.
        value: Its value if that is known, otherwise empty.

    Raises:
        OSError: It cannot be read, or it is neither of these.
    """
    if stat.S_ISDIR(mode):
        return Entry("d", path)
    if stat.S_ISLNK(mode):
        return Entry("l", path, value or os.readlink(place))
    if not value:
        with open_regular(place) as file:
            value = sha256(file)
    return Entry("x" if mode & 0o100 else "f", path, value)


def _first_line(place: Path) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError), place.open("rb") as file:
        head = json.loads(file.readline())
        if isinstance(head, dict):
            return head
    return {}


def _values(place: Path) -> dict[str, tuple[str, str]]:
    """Return version and value of each path from a cache file; empty if it is missing, damaged or of another format."""
    with contextlib.suppress(OSError, ValueError, TypeError), place.open("rb") as file:
        head = json.loads(file.readline())
        if head["format"] == FORMAT:
            return {
                str(path): (str(version), str(value)) for path, (version, value) in json.loads(file.readline()).items()
            }
    return {}


_caches: dict[Folder, dict[tuple[str, ...], _Cache]] = {}


def _cache_of(source: Folder) -> _Cache:
    """Return the cache of a folder, one per process."""
    return _caches.setdefault(source, {}).setdefault(source.targets, _Cache(source))
