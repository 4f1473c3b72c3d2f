"""Comparison of two files: the first differing offset and, for tar archives, the first differing members.

Files are compared in pieces of bounded size. They come from a builder, so the headers that `tarfile` reads into memory
are bounded too.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..runner.util.atomic_files import CHUNK

if TYPE_CHECKING:
    from typing_extensions import Self

MOST = 10
"""Maximum number of differing members that are described."""

LONGEST_HEADER = 64 << 10
"""Maximum bytes of a long name or an extended header in an archive."""

LONGEST_NAME = 200
"""Maximum characters of a member's name in a description."""

_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Types of members that `tarfile` reads into memory because they describe the next one."""

_READ_ERRORS = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, RecursionError, zlib.error)


def differences(first: Path, second: Path) -> list[str]:
    """Return the differences of two files, a phrase each; empty if their content is equal.

    The first phrase has the sizes in bytes and the first differing offset. If both files are tar archives (plain, gzip
    or bzip2), the other phrases are about members. The members are compared in order, until their names differ.

    Raises:
        OSError: A file cannot be read.
    """
    with first.open("rb") as one, second.open("rb") as other:
        offset = _first_difference(one, other)
    if offset is None:
        return []
    sizes = first.stat().st_size, second.stat().st_size
    lengths = f"{sizes[0]} bytes each" if sizes[0] == sizes[1] else f"{sizes[0]} and {sizes[1]} bytes"
    return [f"{lengths}, first difference at offset {offset}", *_members(first, second)]


def _first_difference(first: IO[bytes], second: IO[bytes]) -> int | None:
    """Return the offset of the first difference of two streams; None if they are equal."""
    offset = 0
    while True:
        one, other = first.read(CHUNK), second.read(CHUNK)
        if one != other:
            shared = min(len(one), len(other))
            return offset + next((at for at in range(shared) if one[at] != other[at]), shared)
        if not one:
            return None
        offset += len(one)


class _Member(tarfile.TarInfo):
    """A member's header. A header that is too long is rejected before `tarfile` reads it into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _HEADERS and member.size > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {member.size} bytes")
        return member


def _members(first: Path, second: Path) -> list[str]:
    """Return the first differences of the members of two archives; empty if one of the files is not an archive."""
    found: list[str] = []
    try:
        with _opened(first) as one, _opened(second) as other:
            for difference in _member_differences(one, other):
                if len(found) == MOST:
                    return [*found, "and more members"]
                found.append(difference)
    except _READ_ERRORS:
        return found
    return found or ["all members are equal: the archives differ in padding, headers or compression"]


def _opened(path: Path) -> tarfile.TarFile:
    """Open an archive; raises one of `_READ_ERRORS`. xz is left out: its decoder may need gigabytes of memory."""
    for mode in ("r:", "r:gz"):
        try:
            return tarfile.open(path, mode, tarinfo=_Member)
        except _READ_ERRORS:
            pass
    return tarfile.open(path, "r:bz2", tarinfo=_Member)


def _member_differences(first: tarfile.TarFile, second: tarfile.TarFile) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        one, other = _next(first), _next(second)
        if one is None and other is None:
            if number == 1:
                raise tarfile.ReadError("no members")  # a file that begins with zeros, such as a disk image
            return
        if one is None or other is None:
            member, build = (one, "first") if one is not None else (other, "second")
            yield f"{_name(member)} is only in the {build} build"
            return
        if one.name != other.name:
            yield f"member {number} is {_name(one)} in the first build and {_name(other)} in the second"
            return
        values = [
            ("type", one.type.decode("ascii", "replace"), other.type.decode("ascii", "replace")),
            ("mode", f"{one.mode:o}", f"{other.mode:o}"),
            ("owner", f"{one.uid}:{one.gid}", f"{other.uid}:{other.gid}"),
            ("owner", f"{one.uname}:{one.gname}", f"{other.uname}:{other.gname}"),
            ("mtime", str(one.mtime), str(other.mtime)),
            ("size", str(one.size), str(other.size)),
            ("link", one.linkname[:LONGEST_NAME], other.linkname[:LONGEST_NAME]),
        ]
        parts = [f"{what} {a} and {b}" for what, a, b in values if a != b]
        is_file = all(member.isreg() and not member.issparse() for member in (one, other))
        if is_file and one.size == other.size:
            content, other_content = first.extractfile(one), second.extractfile(other)
            assert content is not None and other_content is not None
            offset = _first_difference(content, other_content)
            if offset is not None:
                parts.append(f"content at offset {offset}")
        if parts:
            yield f"{_name(one)}: {', '.join(parts)}"


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Return the next member; `tarfile` must not collect them."""
    member = archive.next()
    archive.members.clear()  # type: ignore[attr-defined]
    return member


def _name(member: tarfile.TarInfo | None) -> str:
    return member.name[:LONGEST_NAME] if member is not None else ""
