"""Manifest of a folder source: path, mode and SHA-256 of each file. Its own SHA-256 identifies the folder.

The client sends the manifest like any other blob, and then only the files that the builder does not have.

Format: `HEADER`, then one entry per path, sorted by the bytes of the path, so that equal folders have equal manifests::

    f <sha256> <path> NUL        a file
    x <sha256> <path> NUL        an executable file
    l <path> NUL <target> NUL    a symbolic link
    d <path> NUL                 an empty folder
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from ..util.atomic_files import is_relative_path, is_sha256

HEADER = b"gamebear folder 1\0"
"""Magic number with the version of the format."""

MTIME = 315532800
"""Modification time of all files in the job's working directory, in seconds since 1970: the start of 1980, the
earliest that zip files can store. The timestamps of the original files are not part of a folder's identity."""


class ManifestError(ValueError):
    """The data is not a valid manifest."""


class Entry(NamedTuple):
    """A file, symbolic link or empty folder.

    Attributes:
        kind: `f` (file), `x` (executable file), `l` (symbolic link), `d` (empty folder).
        path: path relative to the folder. Bytes that are not UTF-8 are surrogates, as with os.fsdecode.
        value: SHA-256 of a file, target of a link, otherwise empty.
    """

    kind: str
    path: str
    value: str = ""

    @property
    def is_file(self) -> bool:
        """Whether it is a file, whose content is a blob."""
        return self.kind in "fx"


def encode(entries: Iterable[Entry]) -> bytes:
    """Encode entries as a manifest; their order does not matter."""
    lines = []
    for kind, path, value in entries:
        if kind == "l":
            line = f"l {path}\0{value}\0"
        elif kind == "d":
            line = f"d {path}\0"
        else:
            line = f"{kind} {value} {path}\0"
        lines.append((os.fsencode(path), os.fsencode(line)))
    lines.sort()
    return HEADER + b"".join([line for _, line in lines])


def decode(data: bytes) -> list[Entry]:
    """Decode and validate a manifest.

    Raises:
        ManifestError: it is not a manifest; or a path is not relative, occurs twice, or leads through a file or link.
    """
    if not data.startswith(HEADER) or not data.endswith(b"\0"):
        raise ManifestError("this is not a manifest of a folder")
    fields = iter(os.fsdecode(data[len(HEADER) :]).split("\0")[:-1])
    entries: list[Entry] = []
    leaves = set()
    parents = set()
    for field in fields:
        kind, _, rest = field.partition(" ")
        value = ""
        if kind in ("f", "x"):
            value, _, rest = rest.partition(" ")
            if not is_sha256(value):
                raise ManifestError(f"{rest!r} has no SHA-256")
        elif kind == "l":
            value = next(fields, "")
            if not value:
                raise ManifestError(f"the link {rest!r} has no target")
        elif kind != "d":
            raise ManifestError(f"there is no kind {kind!r}")
        if not is_relative_path(rest) or rest in leaves:
            raise ManifestError(f"{rest!r} is not a valid path, or occurs twice")
        leaves.add(rest)
        parent = rest.rpartition("/")[0]
        while parent and parent not in parents:
            parents.add(parent)
            parent = parent.rpartition("/")[0]
        entries.append(Entry(kind, rest, value))
    if leaves & parents:
        raise ManifestError(f"{min(leaves & parents)!r} is both a file and a folder")
    return entries
