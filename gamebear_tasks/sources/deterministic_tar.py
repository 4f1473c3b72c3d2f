"""The tar file that a source becomes: the same tree gives the same bytes, on every machine and Python.

The format is GNU tar, uncompressed: sorted by the bytes of the names, folders before what is in them, owner 0:0
without names, modes 755 and 644 only, one time for all, padded to records of 10,240 bytes. GNU and not PAX,
because it holds names that are not UTF-8 as they are.
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
"""Bytes that headers and contents are padded to."""

RECORD = 20 * BLOCK
"""Bytes that the whole is padded to, as tar does."""

LATEST = (1 << 33) - 1
"""The last second that fits the 11 octal digits of a tar header."""


LINK_LIMIT = 4095
"""Bytes that the target of a symbolic link may have: Linux's PATH_MAX without the NUL."""


class TreeError(Exception):
    """A tree holds what must not or cannot be unpacked."""


class Readable(Protocol):
    """What a file's content is read from."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, `b""` at the end."""
        ...


@dataclass(frozen=True)
class Folder:
    """A folder; those that only lead to files need not be given.

    Attributes:
        path: where in the tree, with `/`; see `decoded`.
    """

    path: str


@dataclass(frozen=True)
class Link:
    """A symbolic link, kept as it is, wherever it points."""

    path: str
    target: str


@dataclass(frozen=True)
class File:
    """A regular file.

    Attributes:
        path: where in the tree.
        size: bytes.
        executable: mode 755 instead of 644.
        open: gives the content; called once, in the order of the sorted paths.
    """

    path: str
    size: int
    executable: bool
    open: Callable[[], AbstractContextManager[Readable]]


Entry = Folder | Link | File


def write(out: BinaryIO, entries: Iterable[Entry], mtime: int) -> None:
    """Write a tree as a tar file.

    Args:
        out: where to; left open.
        entries: what is in the tree, in any order; of two with the same path the last one counts.
        mtime: seconds since 1970, for everything in it.

    Raises:
        TreeError: a name leads out of the tree or through a link, or a file is shorter than it says.
        OSError: writing failed.
    """
    tree = _complete(entries)
    mtime = min(max(mtime, 0), LATEST)
    written = 0
    for path in sorted(tree, key=lambda path: _encoded(path).split(b"/")):
        entry = tree[path]
        written += out.write(_header(entry, mtime))
        if isinstance(entry, File):
            written += _copy(entry, out)
    end = 2 * BLOCK
    out.write(bytes(end + -(written + end) % RECORD))


def decoded(name: bytes) -> str:
    """Return a name as a tree has it: UTF-8, whatever the locale says, other bytes as surrogates."""
    return name.decode("utf-8", "surrogateescape")


def _encoded(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _is_target(target: str) -> bool:
    """Say whether a symbolic link can have a target."""
    try:
        return 0 < len(_encoded(target)) <= LINK_LIMIT and "\0" not in target
    except UnicodeEncodeError:
        return False


def _complete(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Check the names and add the folders that lead to entries."""
    tree: dict[str, Entry] = {}
    for entry in entries:
        if not is_relative_path(entry.path):
            raise TreeError(f"it holds the unsafe name {entry.path!r}")
        if isinstance(entry, Link) and not _is_target(entry.target):
            raise TreeError(f"its link {entry.path!r} has no valid target")
        tree[entry.path] = entry
    for path in list(tree):
        parent = path
        while "/" in parent:
            parent = parent.rpartition("/")[0]
            if not isinstance(tree.setdefault(parent, Folder(parent)), Folder):
                raise TreeError(f"its entry {path!r} lies below {parent!r}, which is no folder")
    return tree


def _header(entry: Entry, mtime: int) -> bytes:
    import tarfile  # not for a doit that has nothing to fetch

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
    """Write a file's content and its padding; return the bytes written."""
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
    """Give all that is below a folder.

    Raises:
        TreeError: there is something else than folders, regular files and symbolic links.
        OSError: something cannot be read.
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
                raise TreeError(f"its entry {inside!r} is neither a file nor a folder nor a symbolic link")


def from_file(inside: str, path: Path, executable: bool) -> File:
    """Return an entry with the content of a file of the file system; raises OSError."""
    return File(inside, path.stat().st_size, executable, functools.partial(_opened, path))


def _opened(path: Path) -> BinaryIO:
    return path.open("rb")
