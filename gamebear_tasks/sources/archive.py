"""An archive from the web: tar (plain, gzip, bzip2, xz) or zip, known by its SHA-256.

It is never unpacked to the file system: its members go straight into the new tar file.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import SettingsError, SourceError
from ..runner.util.atomic_files import CHUNK, is_sha256, locked, sha256_of
from .base import BaseSource, Pin, check_url, public_url
from .deterministic_tar import BLOCK, LINK_LIMIT, Entry, File, Folder, Link, Readable, TreeError, decoded, write
from .lockfile import Lock

if TYPE_CHECKING:
    import tarfile
    import zipfile

SILENCE = 60
"""Seconds without a byte after which a download has failed."""

ZIP = (b"PK\x03\x04", b"PK\x05\x06")
GZIP = b"\x1f\x8b"
BZIP2 = b"BZh"
XZ = b"\xfd7zXZ\0"
ZSTD = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class ArchivePin(Pin):
    """An archive file, and how many folders are stripped from its names."""

    sha256: str
    strip: int

    def identity(self) -> dict[str, str | int | bool]:
        """Return the hash and the depth; the format follows from the content."""
        return {"archive": self.sha256, "strip": self.strip}

    @property
    def file_name(self) -> str:
        """`archive-<sha256>-<strip>`."""
        return f"archive-{self.sha256}-{self.strip}"


@dataclass(frozen=True)
class Archive(BaseSource[ArchivePin]):
    """An archive from the web.

    Attributes:
        url: http, https or file.
        sha256: of the file as it is downloaded, in hex.
        strip: how many folders around everything to leave out; each must be the only one at its level.
    """

    url: str
    sha256: str
    strip: int = 1

    def __post_init__(self) -> None:
        """Refuse what can be seen to be wrong without a network."""
        check_url(self.url, "archive()")
        if not re.match(r"(https?|file)://", self.url):
            raise SettingsError(
                f"archive({self.url!r}): that is no URL of a file to download.",
                "It begins with https://, http:// or file://.",
            )
        if not isinstance(self.sha256, str) or not is_sha256(self.sha256.lower()):
            raise SettingsError(
                f"archive({self.url!r}): {self.sha256!r} is no SHA-256 (64 hex digits).",
                "`sha256sum` prints that of a file.",
            )
        object.__setattr__(self, "sha256", self.sha256.lower())
        if not isinstance(self.strip, int) or self.strip < 0:
            raise SettingsError(
                f"archive({self.url!r}): strip={self.strip!r} is no count of folders.",
                "Say strip=0 for none, or how many folders are around everything.",
            )

    def __str__(self) -> str:
        """Return the kind and the URL."""
        return f"archive source {self.url}"

    def pin(self, lock: Lock) -> ArchivePin:
        """Return the hash; the lock file is not needed for it."""
        return ArchivePin(self.sha256, self.strip)

    def _metadata(self, pin: ArchivePin, lock: Lock) -> dict[str, str]:
        return {"url": public_url(self.url), "sha256": pin.sha256}

    def _write_tar(self, out: BinaryIO, pin: ArchivePin, cache: Path, scratch: Path) -> None:
        import bz2
        import gzip
        import lzma
        import tarfile
        import zipfile

        packed = scratch / "archive"
        self._download_verified(packed)
        try:
            with packed.open("rb") as file:
                magic = file.read(6)
            if magic.startswith(ZSTD):
                raise TreeError("it is compressed with zstd, which is not supported")
            if magic.startswith(ZIP):
                with zipfile.ZipFile(packed) as archive:
                    entries, mtime = _zip_entries(archive)
                    write(out, stripped(entries, pin.strip), mtime)
                return
            # Sorted output reads the members in another order than they are in; so first without compression.
            plain = packed
            for kind, opener in ((GZIP, gzip.GzipFile), (BZIP2, bz2.BZ2File), (XZ, lzma.LZMAFile)):
                if magic.startswith(kind):
                    plain = scratch / "plain.tar"
                    with opener(packed) as source, plain.open("wb") as unpacked:
                        shutil.copyfileobj(source, unpacked, CHUNK)
            with (
                _Bounded(plain) as bounded,
                tarfile.TarFile(fileobj=bounded, encoding="utf-8", errors="surrogateescape") as tar,
            ):
                entries, mtime = _tar_entries(tar)
                write(out, stripped(entries, pin.strip), mtime)
        except TreeError as error:
            raise self.error(
                f"cannot be used: {error}", "See what is in it, and whether it is the right file."
            ) from error
        except (tarfile.ReadError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, NotImplementedError) as error:
            raise self.error(
                f"cannot be unpacked: {error}", "It must be a tar file (plain, gzip, bzip2, xz) or a zip file."
            ) from error
        except Exception as error:
            # The parsers of the standard library raise whatever a damaged file leads to: ValueError, OverflowError,
            # struct.error, RecursionError, MemoryError, an OSError of a seek. Others are about the disk.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise self.error(
                f"cannot be unpacked: it is damaged ({error or type(error).__name__})",
                "See whether upstream has it whole, under another SHA-256.",
            ) from error

    def download(self, cache: Path) -> Path:
        """Return the file itself, as it is downloaded, in the cache; fetched only if it is not there.

        Args:
            cache: a folder of the user's own; made if need be.

        Raises:
            SourceError: it cannot be had, or is not what its SHA-256 says.
        """
        target = cache / f"download-{self.sha256}"
        if target.is_file():
            with contextlib.suppress(OSError):
                os.utime(target)  # says when it was last used
            return target
        part = cache / f".{target.name}.part"
        try:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(cache / f".{target.name}.lock"):
                try:
                    if not target.is_file():
                        self._download_verified(part)
                        os.replace(part, target)
                finally:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise SourceError(
                f"{self} cannot be kept in {cache}: {error.strerror or error}.", "Is there space, and is it yours?"
            ) from error
        return target

    def _download_verified(self, target: Path) -> None:
        self._download(target)
        actual = sha256_of(target)
        if actual != self.sha256:
            raise self.error(
                f"is not what was asked for: its SHA-256 is {actual}, dodo.py says {self.sha256}",
                "If upstream has replaced the file and you trust the new one, write its SHA-256 in dodo.py.",
            )

    def _download(self, target: Path) -> None:
        import http.client
        import urllib.error
        import urllib.parse
        import urllib.request

        if self.url.startswith("file:"):
            self._check_file(urllib.request.url2pathname(urllib.parse.urlsplit(self.url).path))
        request = urllib.request.Request(self.url, headers={"User-Agent": "gamebear-tasks"})
        with target.open("wb") as file:
            try:
                with urllib.request.build_opener().open(request, timeout=SILENCE) as answer:
                    length = answer.headers.get("Content-Length") or ""
                    while chunk := _received(answer):
                        file.write(chunk)
            except urllib.error.HTTPError as error:
                raise self.error(f"cannot be downloaded: the server says {error.code} {error.reason}") from error
            except urllib.error.URLError as error:
                reason = error.reason.strerror if isinstance(error.reason, OSError) else None
                raise self.error(f"cannot be downloaded: {reason or error.reason}") from error
            except (http.client.HTTPException, _ConnectionBrokenError, ValueError) as error:
                raise self.error(f"cannot be downloaded: {error or type(error).__name__}") from error
            if length.isdecimal() and file.tell() != int(length):
                raise self.error(f"cannot be downloaded: the connection ended after {file.tell()} of {length} bytes")

    def _check_file(self, path: str) -> None:
        """Refuse a FIFO, which would block, and a device, which may not end."""
        with contextlib.suppress(OSError, ValueError):  # urllib says why
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise self.error("cannot be downloaded: it is not a regular file", "See whether its path is right.")


class _ConnectionBrokenError(Exception):
    """The network failed in the middle of a download; not the disk."""


def _received(answer: BinaryIO) -> bytes:
    try:
        return answer.read(CHUNK)
    except OSError as error:
        raise _ConnectionBrokenError(str(error)) from error


def stripped(entries: list[Entry], strip: int) -> Iterator[Entry]:
    """Leave out the folders around everything.

    Raises:
        TreeError: there is nothing in it, or more than one entry where one folder should be.
    """
    import dataclasses

    paths = [entry.path.split("/") for entry in entries]
    for level in range(strip):
        tops = {path[level] for path in paths if len(path) > level}
        files = [
            entry.path
            for entry, path in zip(entries, paths, strict=True)
            if len(path) == level + 1 and not isinstance(entry, Folder)
        ]
        if len(tops) > 1 or files:
            names = ", ".join(sorted(tops)[:4])
            raise TreeError(f"it has no single folder to strip at level {level + 1} but {names}: say strip={level}")
    kept = [
        dataclasses.replace(entry, path="/".join(path[strip:]))
        for entry, path in zip(entries, paths, strict=True)
        if len(path) > strip
    ]
    if not kept:
        raise TreeError("there is nothing in it")
    yield from kept


def _clean(name: str) -> str:
    """Return a member's name without `./` and doubled slashes; raises TreeError where it leads elsewhere."""
    if name.startswith("/") or ".." in name.split("/"):
        raise TreeError(f"it holds the unsafe name {name!r}")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


class _Bounded(io.FileIO):
    """A tar file of which no more is read into memory at once than a header needs.

    A tar file says how long the records are that have its names and links; they come before what they describe.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        """Read some bytes; raises TreeError for more than `CHUNK`, and for a negative number."""
        if size is None or not 0 <= size <= CHUNK:
            raise TreeError(f"it is damaged: it has a header of {size} bytes")
        return super().read(size) or b""


def _tar_entries(archive: tarfile.TarFile) -> tuple[list[Entry], int]:
    """Return what is in a tar file, and the latest of its times."""
    entries: list[Entry] = []
    members: dict[str, tarfile.TarInfo] = {}
    latest = 0
    for member in archive:
        path = _clean(member.name)
        if member.size < 0:  # the next header would be looked for before this one, for ever
            raise TreeError(f"it is damaged: its entry {path!r} has a size of {member.size} bytes")
        if not math.isfinite(member.mtime):
            raise TreeError(f"it is damaged: its entry {path!r} has the time {member.mtime}")
        latest = max(latest, int(member.mtime))
        content = member
        if member.islnk():
            linked = members.get(_clean(member.linkname))
            if linked is None:
                raise TreeError(f"its entry {path!r} is a hard link to {member.linkname!r}, which is not in it")
            content = linked
        if not path:
            continue
        members[path] = content
        if content.isdir():
            entries.append(Folder(path))
        elif content.issym():
            entries.append(Link(path, content.linkname))
        elif content.isreg():
            entries.append(
                File(
                    path,
                    content.size,
                    bool(content.mode & 0o111),
                    functools.partial(_tar_content, archive, content),
                )
            )
        else:
            raise TreeError(f"its entry {path!r} is a device or a pipe")
    _check_end(archive)
    return entries, latest


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise TreeError where a tar file goes on with something that is no member: Python takes that for its end."""
    assert archive.fileobj
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(BLOCK).strip(b"\0"):
        raise TreeError(f"it is damaged: at byte {archive.offset} there is neither a member nor its end")


@contextlib.contextmanager
def _tar_content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[Readable]:
    content = archive.extractfile(member)
    assert content  # it is a regular file
    with content:
        yield content


DOS = (0, 6, 10, 11, 14)
"""Numbers of the systems whose names have backslashes for slashes: FAT, HPFS, NTFS (two), VFAT; see APPNOTE, 4.4.2."""

UNIX = (3, 19)
"""Numbers of the systems whose names are bytes: Unix, macOS."""

DOS_FOLDER = 0x10
"""The attribute of a folder on DOS."""

UTF8_NAME = 0x800
"""The flag that says that a member's name is UTF-8, see APPNOTE, 4.4.4."""

UNICODE_PATH = 0x7075
"""The extra field with a member's name in UTF-8, see APPNOTE, 4.6.9."""


def _zip_entries(archive: zipfile.ZipFile) -> tuple[list[Entry], int]:
    """Return what is in a zip file, and the latest of its times (which have no zone: taken as UTC)."""
    import calendar

    entries: list[Entry] = []
    latest = 0
    for member in archive.infolist():
        name = _zip_name(member)
        is_dos = member.create_system in DOS
        if is_dos:
            name = name.replace("\\", "/")
            if re.match("[A-Za-z]:", name):
                raise TreeError(f"it holds the unsafe name {name!r}")
        path = _clean(name)
        with contextlib.suppress(ValueError, OverflowError):
            latest = max(latest, calendar.timegm((*member.date_time, 0, 0, 0)))
        mode = member.external_attr >> 16
        if not path:
            continue
        if (
            name.endswith("/")
            or stat.S_ISDIR(mode)
            or (is_dos and member.external_attr & DOS_FOLDER and not member.file_size)
        ):
            entries.append(Folder(path))
        elif stat.S_ISLNK(mode):
            with archive.open(member) as content:
                target = content.read(LINK_LIMIT + 1)
            if len(target) > LINK_LIMIT:
                raise TreeError(f"its link {path!r} has a target of more than {LINK_LIMIT} bytes")
            entries.append(Link(path, decoded(target)))
        elif stat.S_IFMT(mode) in (0, stat.S_IFREG):
            entries.append(File(path, member.file_size, bool(mode & 0o111), functools.partial(archive.open, member)))
        else:
            raise TreeError(f"its entry {path!r} is a device or a pipe")
    return entries, latest


def _zip_name(member: zipfile.ZipInfo) -> str:
    """Return a member's name as unzip reads it, the same on every Python.

    It is UTF-8 if a flag or an extra field says so, bytes if it comes from Unix, else in DOS's code page 437.
    """
    import zlib

    name = member.orig_filename
    if member.flag_bits & UTF8_NAME:
        return name
    raw = name.encode("cp437")
    extra = member.extra
    while len(extra) >= 4:
        kind, size = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == UNICODE_PATH and field[:5] == b"\1" + zlib.crc32(raw).to_bytes(4, "little"):
            return decoded(field[5:])
    return decoded(raw) if member.create_system in UNIX else name
