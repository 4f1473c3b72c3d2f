"""Read and validate the files and tars of an image, and add them to its tree."""

from __future__ import annotations

import contextlib
import lzma
import re
import stat
import tarfile
import zlib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import IO

from ..errors import ImageError
from ..runner.util.atomic_files import CHUNK
from . import elf
from .filesystems.file_tree import Entry, Tree
from .filesystems.sparse_files import write_sparse
from .recipe import MISSING_INPUT, File, Tar

XATTR = "SCHILY.xattr."
"""Prefix of extended attributes in pax headers, as written by star and GNU tar."""

ACL = ("SCHILY.acl.", "SCHILY.xattr.system.posix_acl_")

LARGEST = 2**44
"""Maximum bytes of a file on ext4."""

EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Types of headers that describe the following member."""

LONGEST_HEADER = 1 << 20
"""Maximum bytes of such a header. A name has at most 4096 bytes, attributes on ext4 at most 64 KiB."""

YEARS = 5 * 2**31
"""Seconds since 1970 (April 2310) from which e2fsck misreads a time as one before 1970."""

TYPES = {
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def add(item: File | Tar, tree: Tree, arch: str) -> None:
    """Add an item to a tree and stage its content.

    Args:
        item: A file or a tar.
        tree: The tree of the image.
        arch: Debian's name for the image's architecture.

    Raises:
        ImageError: The item cannot be read, is for another architecture, or conflicts with the tree.
    """
    try:
        if isinstance(item, File):
            _put_file(item, tree, arch)
        else:
            _put_tar(item, tree, arch)
    except FileNotFoundError as error:
        if error.filename != str(item.path):
            raise
        raise ImageError(f"{item.path} does not exist.", MISSING_INPUT) from error


def _put_file(item: File, tree: Tree, arch: str) -> None:
    origin = str(item.path)
    staged = tree.new_staged()
    with item.path.open("rb") as source:
        size = _stage(source, tree.staging / staged, arch, origin)
    path = item.destination
    if path.endswith("/") or tree.is_folder(path):
        path = f"{path.rstrip('/')}/{item.path.name}"
    entry = Entry(
        stat.S_IFREG | item.permissions,
        origin,
        item.owner,
        item.group,
        mtime=tree.now,
        atime=tree.now,
        size=size,
        staged=staged,
    )
    tree.add(path, entry)


def _stage(source: IO[bytes], target: Path, arch: str, name: str) -> int:
    """Copy content to a staging file and return its size in bytes.

    Raises:
        ImageError: The content is a program for another architecture.
    """
    with target.open("w+b") as out:
        write_sparse(source, out)
        out.seek(0)
        other = elf.architecture(out.read(64))
    if other and other != arch:
        raise ImageError(
            f"{name} is a program for {other}, not for {arch}.",
            f"Build it with arch={arch}, or use a base for {other}.",
        )
    return target.stat().st_size


def _put_tar(item: Tar, tree: Tree, arch: str) -> None:
    entries: dict[str, Entry] = {}  # a hard link refers to the name of an earlier member
    with _opened(item.path) as archive:
        for member in _members(archive):
            name = _name(member.name, item.path)
            if not name:
                continue  # the packed folder itself must not change the folder that it is unpacked over
            origin = f"{item.path}: {name if name.isprintable() else ascii(name)}"
            if member.islnk():
                linked = entries.get(_name(member.linkname, item.path))
                if linked is None:
                    raise ImageError(
                        f"{origin} is a hard link to {member.linkname!r}, which does not precede it in the tar.",
                        "Pack both into one tar.",
                    )
                entry = linked
            else:
                entry = _entry(archive, member, tree, arch, origin)
            entries[name] = entry
            tree.add(f"{item.destination}/{name}", entry)
        _read_to_the_end(archive)


class _Member(tarfile.TarInfo):
    """Tar header of bounded size: `tarfile` reads long names and attributes into memory, whatever size they claim."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member: _Member = super().frombuf(buf, encoding, errors)
        if member.type in EXTENDED and member.size > LONGEST_HEADER:
            raise ValueError(f"{member.size} bytes")  # not a ReadError: `tarfile` would then try other compressions
        return member


class _HeaderError(tarfile.ReadError):
    """A header of a tar is malformed."""


@contextlib.contextmanager
def _reading_headers() -> Iterator[None]:
    """Convert the exceptions that malformed headers cause in `tarfile` to TarError."""
    try:
        yield
    except (ArithmeticError, ValueError, MemoryError) as error:
        raise _HeaderError(f"a header is invalid ({type(error).__name__})") from error


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    with _reading_headers():
        yield from archive


def _read_to_the_end(archive: tarfile.TarFile) -> None:
    """Ensure that all members were read, and verify the checksums at the end of compressed files.

    `tarfile` treats a damaged or truncated header as the end of the tar.

    Raises:
        TarError: The end marker, a block of zeros, is missing. Errors of the decompression are raised, too.
    """
    assert archive.fileobj
    archive.fileobj.seek(archive.offset)
    end = archive.fileobj.read(tarfile.BLOCKSIZE)
    if end != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is truncated or damaged at byte {archive.offset}")
    while archive.fileobj.read(CHUNK):
        pass


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with contextlib.ExitStack() as stack:
            try:
                with _reading_headers():
                    archive = stack.enter_context(
                        tarfile.open(path, "r:*", encoding="utf-8", errors="surrogateescape", tarinfo=_Member)
                    )
            except _HeaderError:
                raise
            except tarfile.ReadError as error:  # its message has the error of each decompressor
                raise tarfile.ReadError("it is not a tar file, or compressed in another way") from error
            yield archive
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ImageError(
            f"{path} cannot be unpacked: {' '.join(str(error).split())}.",
            "Use a complete tar file (plain, gzip, bzip2, xz).",
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ImageError(f"{path} cannot be unpacked: {error}.", "Pack it again.") from error  # gzip, bz2: no errno


def _name(name: str, path: Path) -> str:
    """Return a member's name relative to the destination folder. Absolute names are relative to it, too.

    Raises:
        ImageError: The name contains `..`.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ImageError(f"{path} contains the unsafe name {name!r}.", "Pack it without `..` in names.")
    return "/".join(parts)


def _entry(archive: tarfile.TarFile, member: tarfile.TarInfo, tree: Tree, arch: str, origin: str) -> Entry:
    for what, number, most in (("owner", member.uid, 2**32 - 2), ("group", member.gid, 2**32 - 2)):
        if not 0 <= number <= most:
            raise ImageError(f"{origin} has the invalid {what} {number}.", "Pack it again with --owner and --group.")
    mtime = _time(member.pax_headers.get("mtime", member.mtime), origin)
    atime = _time(member.pax_headers["atime"], origin) if "atime" in member.pax_headers else mtime
    staged = target = ""
    size = 0
    device = (0, 0)
    if member.isreg():
        kind = stat.S_IFREG
        if member.size > LARGEST:
            raise ImageError(f"{origin} is too large for ext4: {member.size} bytes.", "Leave it out of the tar.")
        staged = tree.new_staged()
        source = archive.extractfile(member)
        assert source
        with source:
            size = _stage(source, tree.staging / staged, arch, origin)
    elif member.isdir():
        kind = stat.S_IFDIR
    elif member.issym():
        kind, target = stat.S_IFLNK, member.linkname
    elif member.type in TYPES:
        kind, device = TYPES[member.type], (member.devmajor, member.devminor)
    else:
        raise ImageError(f"{origin} has the unsupported type {member.type!r}.", "Leave it out of the tar.")
    return Entry(
        kind | (0o777 if kind == stat.S_IFLNK else member.mode & 0o7777),
        origin,
        member.uid,
        member.gid,
        mtime=mtime,
        atime=atime,
        size=size,
        staged=staged,
        target=target,
        device=device,
        xattrs=_xattrs(member, origin),
    )


def _time(value: str | float, origin: str) -> int:
    """Return a time in nanoseconds. Decimal is exact, a float is not.

    Raises:
        ImageError: ext4 cannot store the time.
    """
    try:
        time = int(Decimal(value) * 10**9)
    except (ArithmeticError, ValueError):
        time = -(10**30)
    if not -(2**31) * 10**9 <= time < YEARS * 10**9:
        raise ImageError(f"{origin} has the time {value}, which ext4 does not support.", "Pack it again with --mtime.")
    return time


def _xattrs(member: tarfile.TarInfo, origin: str) -> dict[str, bytes]:
    found = {}
    for key, value in member.pax_headers.items():
        if key.startswith(ACL):
            raise ImageError(f"{origin} has an access control list, which is not supported.", "Pack it with --no-acls.")
        if key.startswith(XATTR):
            name = key[len(XATTR) :].replace("%3D", "=").replace("%25", "%")
            if not re.match(r"(user|trusted|security)\.", name) or re.search(r"[\0\r\n]", name):
                raise ImageError(f"{origin} has the unsupported attribute {name!r}.", "Pack it without.")
            found[name] = value.encode("utf-8", "surrogateescape")
    return found
