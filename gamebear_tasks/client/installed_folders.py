"""Installation of folder outputs: unpacked beside the target, verified, then swapped in by rename.

The entries that were installed are listed in `build/logs/.folders`. Only these are ever removed: `doit clean`, and the
next installation, never delete a file that somebody else has put into the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import JobError
from ..runner.util.atomic_files import CHUNK, is_relative_path, read_json, sync_folder, write_all, write_json
from ..runner.util.folder_archive import PERMISSIONS, entries, is_inner_link
from ..util.locations import LOGS

if TYPE_CHECKING:
    from typing_extensions import Self

LISTS = LOGS / ".folders"
"""Folder of the lists of installed entries, each named by a hash of the target's path."""


class ArchiveError(Exception):
    """An archive from a builder contains what no archive of a folder output contains."""


LONGEST_NAME = 64 << 10
"""Maximum bytes of a name in an archive, which `tarfile` reads into memory."""


class _Member(tarfile.TarInfo):
    """A member's header; rejects types that `folder_archive` does not write, before `tarfile` interprets them."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            if member.size <= LONGEST_NAME:
                return member
        elif member.type in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE):
            return member
        raise ArchiveError(f"a member of the type {member.type!r} and {member.size} bytes")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an untrusted archive into a new folder, and sync it.

    Args:
        archive: the archive (see `folder_archive`).
        folder: the folder to create.

    Raises:
        ArchiveError: a member's name leads out of the folder, through a link, or occurs twice; or the member is neither
            a folder, a regular file nor a link within the folder.
        OSError: the folder cannot be written.
    """
    folder.mkdir(mode=0o700)
    modes = {"": 0o755}
    names: set[str] = set()
    try:
        with tarfile.open(archive, "r:", tarinfo=_Member, encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                name = member.name
                if not is_relative_path(name) or name in names or name.rpartition("/")[0] not in modes:
                    raise ArchiveError(f"the name {name!r}")
                names.add(name)
                _create(tar, member, f"{folder}/{name}")
                if member.isdir():
                    modes[name] = member.mode & PERMISSIONS | stat.S_IRWXU
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise ArchiveError(str(error)) from error
    for name, mode in reversed(modes.items()):  # last, because a folder may be read-only
        path = folder / name
        path.chmod(mode)
        sync_folder(path)


def _create(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    if member.isdir():
        os.mkdir(path, 0o700)
    elif member.issym():
        if not is_inner_link(member.name, member.linkname):
            raise ArchiveError(f"the link {member.name!r} to {member.linkname!r}")
        os.symlink(member.linkname, path)
    else:
        data = tar.extractfile(member)
        assert data is not None
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            while chunk := data.read(CHUNK):
                write_all(fd, chunk)
            os.fchmod(fd, member.mode & PERMISSIONS | stat.S_IRUSR)
            os.fsync(fd)
        finally:
            os.close(fd)


def check_replaceable(target: Path) -> None:
    """Check that a folder holds nothing but what was installed there.

    Raises:
        JobError: it holds something else, or is not a folder.
    """
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise JobError(f"{target} is not a folder, and the task creates a folder there.", f"Move it: mv {target} …")
    known = _listed(target)
    foreign = [path for path in entries(str(target)) if path not in known]
    if foreign:
        raise JobError(
            f"{target} holds {foreign[0]!r}, which this task did not create.",
            f"Move it elsewhere, or give the task a folder that only it writes to. `doit clean` leaves {target}.",
        )


def is_complete(target: str) -> bool:
    """Return whether all entries that were installed in a folder still exist."""
    return all(os.path.lexists(f"{target}/{path}") for path in _listed(target))


def swap_in(new: Path, target: Path, old: Path) -> None:
    """Replace a folder with a new one: the target has the old content, none, or the new content, never a mixture.

    Args:
        new: the new folder, on the same file system.
        target: its place.
        old: path for the previous folder, which is then removed.

    Raises:
        JobError: the target holds something that was not installed.
        OSError: it cannot be replaced.
    """
    check_replaceable(target)
    installed = entries(str(new))
    _write(target, {*installed, *_listed(target)})  # whichever of the two is there after a crash
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, old)
    os.rename(new, target)
    _write(target, installed)
    remove_tree(old)


def remove(target: Path) -> None:
    """Remove what was installed in a folder, and the folder if nothing else is in it; raises OSError."""
    for path in sorted(_listed(target), reverse=True):
        place = target / path
        if place.is_dir() and not place.is_symlink():
            with contextlib.suppress(OSError):  # it holds something else
                place.rmdir()
        else:
            place.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        target.rmdir()
    _list_of(target).unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder that this module created, read-only folders in it too. Best effort."""
    for parent, folders, _ in os.walk(folder):
        for path in (os.path.join(parent, name) for name in folders):
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _list_of(target: Path | str) -> Path:
    name = os.path.relpath(target)
    return LISTS / hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _listed(target: Path | str) -> frozenset[str]:
    data = read_json(_list_of(target))
    found = data.get("entries") if isinstance(data, dict) else None
    return frozenset(map(str, found)) if isinstance(found, list) else frozenset()


def _write(target: Path, installed: Iterable[str]) -> None:
    LISTS.mkdir(parents=True, exist_ok=True)
    write_json(_list_of(target), {"target": os.path.relpath(target), "entries": sorted(installed)})
