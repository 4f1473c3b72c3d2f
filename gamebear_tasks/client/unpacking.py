"""Unpack the archive of a folder output (see `runner.util.folder_archive`), which is untrusted."""

from __future__ import annotations

import os
import stat
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..runner.util.atomic_files import CHUNK, is_relative_path, sync_folder, write_all
from ..runner.util.folder_archive import PERMISSIONS, is_inner_link

if TYPE_CHECKING:
    from typing_extensions import Self


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
