"""Archive of a folder output: a deterministic tar file, so that equal folders have equal SHA-256.

The format is GNU tar. Entries are sorted, folders before their content. Owners and timestamps are zero.
Modes keep their nine permission bits; the owner may always read. Only folders, regular files and symbolic links within
the folder are allowed.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

PERMISSIONS = 0o777
"""Mode bits that are kept: neither set-user-ID and set-group-ID nor sticky."""


class FolderError(Exception):
    """An entry of a folder cannot be archived.

    Args:
        path: its path in the folder.
        reason: a phrase that follows the path, such as "is a device".
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path
        self.reason = reason


def is_inner_link(path: str, target: str) -> bool:
    """Return whether a symbolic link leads to a place in its folder.

    Args:
        path: path of the link in the folder.
        target: text of the link.
    """
    if not target or target.startswith("/") or "\0" in target:
        return False
    end = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return end != ".." and not end.startswith("../")


def entries(top: str) -> list[str]:
    """Return the paths of all entries below a folder, sorted, folders before their content; raises OSError."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, names in os.walk(top, onerror=fail):
        prefix = folder[len(top) + 1 :]
        found += [posixpath.join(prefix, name) for name in (*folders, *names)]
    return sorted(found, key=lambda path: os.fsencode(path).split(b"/"))


def write(out: BinaryIO, top: str, paths: Iterable[str], check_stop: Callable[[], None] = lambda: None) -> None:
    """Write entries of a folder to an archive.

    Args:
        out: the archive; left open.
        top: path of the folder.
        paths: paths of the entries in it, folders before their content.
        check_stop: called repeatedly; an exception that it raises ends the operation.

    Raises:
        FolderError: an entry is neither a folder, a regular file nor a link within the folder.
        OSError: an entry cannot be read, or changes meanwhile; or writing failed.
    """
    import tarfile  # slow to import, and most jobs have no folder

    with tarfile.open(
        fileobj=out, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for path in paths:
            check_stop()
            place = f"{top}/{path}"
            about = os.lstat(place)
            info = tarfile.TarInfo(path)
            info.mode = about.st_mode & PERMISSIONS | stat.S_IRUSR
            if stat.S_ISDIR(about.st_mode):
                info.mode |= stat.S_IRWXU
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            elif stat.S_ISLNK(about.st_mode):
                info.type = tarfile.SYMTYPE
                info.mode = PERMISSIONS
                info.linkname = os.readlink(place)
                if not is_inner_link(path, info.linkname):
                    raise FolderError(path, f"is a link that leads out of the folder, to {info.linkname}")
                tar.addfile(info)
            elif stat.S_ISREG(about.st_mode):
                info.size = about.st_size
                fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                with open(fd, "rb") as file:
                    tar.addfile(info, _Checked(file, check_stop))
            else:
                raise FolderError(path, "is neither a file, a folder nor a link")


class _Checked:
    """A file that checks whether to stop before each read."""

    def __init__(self, file: BinaryIO, check_stop: Callable[[], None]) -> None:
        self._file = file
        self._check_stop = check_stop

    def read(self, size: int = -1, /) -> bytes:
        self._check_stop()
        return self._file.read(size)


class _Hash:
    """A file that only hashes what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size


def sha256_of_folder(top: str) -> str:
    """Return the SHA-256 of the archive of all entries of a folder.

    Raises:
        FolderError, OSError: as in `write`.
    """
    out: Any = _Hash()
    write(out, top, entries(top))
    digest: str = out.digest.hexdigest()
    return digest
