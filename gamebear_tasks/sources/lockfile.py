"""The lock file: pins of the branches, tags and Debian packages that a dodo.py declares, written by `gamebear lock`.

It is JSON, sorted and indented for readable diffs. It is stored beside dodo.py and intended to be committed::

    {"version": 1,
     "git": {"<url> <rev>": {"commit": "<40 or 64 hex digits>", "tag": "<name, if there is one>"}},
     "debian": {"<package>[=<version>][/<suite>]": {"version": "…", "files": {"<name>": "<sha256>"}}}}
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..runner.util.atomic_files import is_file_name, is_sha256, open_regular, write_bytes
from ..util.process import file_mode

VERSION = 1
"""Version of the format. Other versions are rejected."""

LIMIT = 16 << 20
"""Maximum bytes of a lock file. A thousand sources need less than one MiB."""

RESTORE = "Restore it from version control, or remove it and run `gamebear lock`."


@dataclass(frozen=True)
class GitEntry:
    """A commit of a git repository.

    Attributes:
        commit: Full commit hash.
        tag: Name of a tag of exactly this commit at the time of `gamebear lock`, or empty.
    """

    commit: str
    tag: str = ""

    def __str__(self) -> str:
        return f"{self.commit} ({self.tag})" if self.tag else self.commit


@dataclass(frozen=True)
class DebianEntry:
    """A version of a Debian source package.

    Attributes:
        version: Debian version with epoch and revision.
        files: SHA-256 of each file by name, including the `.dsc`.
    """

    version: str
    files: Mapping[str, str]

    @property
    def dsc(self) -> str:
        """Name of the `.dsc`, which lists the SHA-256 of all other files."""
        return next(name for name in self.files if name.endswith(".dsc"))


@dataclass(frozen=True)
class Lock:
    """Content of a lock file.

    Attributes:
        git: The commit of each "<url> <rev>".
        debian: The version of each "<package>[=<version>][/<suite>]".
    """

    git: Mapping[str, GitEntry] = field(default_factory=dict)
    debian: Mapping[str, DebianEntry] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Lock:
        """Read a lock file. A missing file is an empty one.

        Raises:
            SourceError: The file is damaged, cannot be read, or has another version.
        """
        try:
            with open_regular(path) as file:
                if os.fstat(file.fileno()).st_size > LIMIT:
                    raise ValueError(f"it is larger than {LIMIT >> 20} MiB")
                return cls._parsed(json.loads(file.read(), object_pairs_hook=_without_duplicates))
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}.", RESTORE) from error
        except _NewerError as error:
            raise SourceError(
                f"{path} has the unsupported version {error.args[0]}; this gamebear-tasks supports {VERSION}.",
                "Upgrade gamebear-tasks.",
            ) from error
        except ValueError as error:
            raise SourceError(f"{path} is damaged: {error}.", RESTORE) from error
        except (RecursionError, MemoryError) as error:
            raise SourceError(f"{path} is damaged: its values are nested too deeply.", RESTORE) from error

    @classmethod
    def _parsed(cls, data: Any) -> Lock:
        if not isinstance(data, dict) or not isinstance(data.get("version"), int):
            raise ValueError("it has no version")
        if data["version"] != VERSION:
            raise _NewerError(data["version"])
        git = {
            key: GitEntry(entry["commit"], entry.get("tag", ""))
            for key, entry in _table(data, "git")
            if is_commit(entry.get("commit")) and is_tag(entry.get("tag", ""))
        }
        debian = {
            key: DebianEntry(entry["version"], dict(entry["files"]))
            for key, entry in _table(data, "debian")
            if isinstance(entry.get("version"), str) and _is_files(entry.get("files"))
        }
        for name, table in (("git", git), ("debian", debian)):
            for key, _ in _table(data, name):
                if key not in table:
                    raise ValueError(f"the entry {key!r} in {name!r} is invalid")
        return cls(git, debian)

    def write(self, path: Path) -> None:
        """Write the lock file by atomic rename.

        Raises:
            SourceError: It cannot be written.
        """
        data = {
            "version": VERSION,
            "git": {
                key: {"commit": entry.commit, **({"tag": entry.tag} if entry.tag else {})}
                for key, entry in self.git.items()
            },
            "debian": {
                key: {"version": entry.version, "files": dict(entry.files)} for key, entry in self.debian.items()
            },
        }
        text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        try:
            write_bytes(path, text.encode(), mode=file_mode())
        except OSError as error:
            from ..util.disk_space import room_hint

            hint = room_hint(path.parent) or f"Check the permissions of {path.parent.absolute()}."
            raise SourceError(f"{path} cannot be written: {error.strerror}.", hint) from error


class _NewerError(Exception):
    """The lock file has another version."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict.

    Raises:
        ValueError: A key occurs twice: after a merge, which pin is meant is unknown.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has {key!r} twice")
        found[key] = value
    return found


def is_commit(text: object) -> bool:
    """Return whether a value is a full commit hash: SHA-1 or SHA-256 in lower-case hex."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) is not None


def is_tag(text: object) -> bool:
    """Return whether a value is a valid tag name or empty (git-check-ref-format(1))."""
    return isinstance(text, str) and re.fullmatch(r"[^\s:~^?*\[\\\x00-\x20\x7f]*", text) is not None


def _table(data: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    table = data.get(name, {})
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise ValueError(f"{name!r} is not a table")
    return list(table.items())


def _is_files(files: object) -> bool:
    return (
        isinstance(files, dict)
        and all(is_file_name(name) and is_sha256(digest) for name, digest in files.items())
        and sum(name.endswith(".dsc") for name in files) == 1
    )
