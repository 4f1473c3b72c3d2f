"""Deterministic tar files: equal trees yield equal bytes on every machine and Python version.

The format is uncompressed GNU tar. Entries are sorted by the bytes of their names, folders before their content, with
owner 0:0 without names, modes 755 and 644 only, and one modification time for all. The file is padded to records of
10,240 bytes. GNU and not PAX, because GNU tar stores names that are not UTF-8 unchanged.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from ..runner.util.atomic_files import CHUNK, is_relative_path

BLOCK = 512
"""Bytes of a block. Headers and contents are padded to it."""

RECORD = 20 * BLOCK
"""Bytes of a record. The file is padded to it, as by tar."""

LATEST = (1 << 33) - 1
"""Largest time that fits in the 11 octal digits of a tar header, in seconds since 1970."""


LINK_LIMIT = 4095
"""Maximum bytes of a symbolic link's target: Linux's PATH_MAX without the NUL."""


class TreeError(Exception):
    """A tree contains an unsafe or unsupported entry."""


class Readable(Protocol):
    """Source of a file's content."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, or `b""` at the end."""
        ...


@dataclass(frozen=True)
class Folder:
    """A folder. Parent folders of other entries may be omitted.

    Attributes:
        path: Path in the tree, with `/`. See `decoded`.
    """

    path: str


@dataclass(frozen=True)
class Link:
    """A symbolic link, stored unchanged, wherever it points."""

    path: str
    target: str


@dataclass(frozen=True)
class File:
    """A regular file.

    Attributes:
        path: Path in the tree.
        size: Bytes.
        executable: Mode 755 instead of 644.
        open: Opens the content. Called once, in the order of the sorted paths.
    """

    path: str
    size: int
    executable: bool
    open: Callable[[], AbstractContextManager[Readable]]


Entry = Folder | Link | File


def write(out: BinaryIO, entries: Iterable[Entry], mtime: int) -> None:
    """Write a tree as a tar file.

    Args:
        out: Output file; left open.
        entries: Entries in any order. The last one of a path wins.
        mtime: Modification time of all entries, in seconds since 1970.

    Raises:
        TreeError: A path leads out of the tree or through a link, or a file is shorter than its size.
        OSError: Writing failed.
    """
    tree = _complete(entries)
    mtime = min(max(mtime, 0), LATEST)
    written = 0
    for path in sorted(tree, key=lambda path: encoded(path).split(b"/")):
        entry = tree[path]
        written += out.write(_header(entry, mtime))
        if isinstance(entry, File):
            written += _copy(entry, out)
    end = 2 * BLOCK
    out.write(bytes(end + -(written + end) % RECORD))


def decoded(name: bytes) -> str:
    """Decode a name as UTF-8, independent of the locale. Invalid bytes become surrogates."""
    return name.decode("utf-8", "surrogateescape")


def encoded(path: str) -> bytes:
    """Encode a name; the inverse of `decoded`."""
    return path.encode("utf-8", "surrogateescape")


def _is_target(target: str) -> bool:
    """Return whether a string is a valid target of a symbolic link."""
    try:
        return 0 < len(encoded(target)) <= LINK_LIMIT and "\0" not in target
    except UnicodeEncodeError:
        return False


def _complete(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Validate the paths and add missing parent folders."""
    tree: dict[str, Entry] = {}
    for entry in entries:
        if not is_relative_path(entry.path):
            raise TreeError(f"it contains the unsafe name {entry.path!r}")
        if isinstance(entry, Link) and not _is_target(entry.target):
            raise TreeError(f"its link {entry.path!r} has no valid target")
        tree[entry.path] = entry
    for path in list(tree):
        parent = path
        while "/" in parent:
            parent = parent.rpartition("/")[0]
            if not isinstance(tree.setdefault(parent, Folder(parent)), Folder):
                raise TreeError(f"its entry {path!r} is below {parent!r}, which is not a folder")
    return tree


def _header(entry: Entry, mtime: int) -> bytes:
    import tarfile  # not at the top: an up-to-date doit fetches nothing

    info = tarfile.TarInfo(entry.path)
    info.mtime = mtime
    if isinstance(entry, Folder):
        info.name += "/"
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    elif isinstance(entry, Link):
        info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, entry.target
    else:
        info.mode, info.size = 0o755 if entry.executable else 0o644, entry.size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _copy(file: File, out: BinaryIO) -> int:
    """Write a file's content and its padding. Return the bytes written."""
    left = file.size
    with file.open() as content:
        while left:
            chunk = content.read(min(left, CHUNK))
            if not chunk:
                raise TreeError(f"its file {file.path!r} ends {left} bytes early")
            out.write(chunk)
            left -= len(chunk)
    padding = -file.size % BLOCK
    out.write(bytes(padding))
    return file.size + padding


def from_folder(root: Path) -> Iterator[Entry]:
    """Yield everything below a folder.

    Raises:
        TreeError: There is anything but folders, regular files and symbolic links.
        OSError: Something cannot be read.
    """
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            inside = decoded(os.fsencode(path.relative_to(root)))
            if path.is_symlink():
                yield Link(inside, decoded(os.readlink(os.fsencode(path))))
            elif path.is_dir():
                yield Folder(inside)
            elif path.is_file():
                yield from_file(inside, path, bool(path.stat().st_mode & 0o111))
            else:
                raise TreeError(f"its entry {inside!r} is not a file, folder or symbolic link")


def from_file(inside: str, path: Path, executable: bool) -> File:
    """Return an entry whose content is a file of the file system.

    Raises:
        OSError: The file cannot be inspected.
    """
    return File(inside, path.stat().st_size, executable, functools.partial(_opened, path))


def _opened(path: Path) -> BinaryIO:
    return path.open("rb")
