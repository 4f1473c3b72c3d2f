"""Archives from the web: tar (plain, gzip, bzip2, xz) or zip, verified by SHA-256.

An archive is never unpacked to the file system. Its members are copied directly to the new tar file.
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

from ..errors import SettingsError
from ..runner.util.atomic_files import CHUNK, is_sha256, sha256_of
from ..runner.util.locks import locked
from .base import FetchedSource, Pin, check_url, public_url, storage_error
from .deterministic_tar import BLOCK, LINK_LIMIT, Entry, File, Folder, Link, Readable, TreeError, decoded, write
from .lockfile import Lock

if TYPE_CHECKING:
    import tarfile
    import zipfile

SILENCE = 60
"""Seconds without data after which a download times out."""

ZIP = (b"PK\x03\x04", b"PK\x05\x06")
GZIP = b"\x1f\x8b"
BZIP2 = b"BZh"
XZ = b"\xfd7zXZ\0"
ZSTD = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class ArchivePin(Pin):
    """An archive file, and the number of leading folders that are stripped."""

    sha256: str
    strip: int

    def identity(self) -> dict[str, str | int | bool]:
        """Return the hash and the number of stripped folders. The format follows from the content."""
        return {"archive": self.sha256, "strip": self.strip}

    @property
    def file_name(self) -> str:
        """File name `archive-<sha256>-<strip>`."""
        return f"archive-{self.sha256}-{self.strip}"


@dataclass(frozen=True)
class Archive(FetchedSource[ArchivePin]):
    """An archive from the web.

    Attributes:
        url: URL with the scheme http, https or file.
        sha256: SHA-256 of the downloaded file, in hex.
        strip: Number of leading folders to strip. Each must be the only entry at its level.
    """

    url: str
    sha256: str
    strip: int = 1

    def __post_init__(self) -> None:
        """Validate the attributes without network access.

        Raises:
            SettingsError: An attribute is invalid.
        """
        check_url(self.url, "archive()")
        if not re.match(r"(https?|file)://", self.url):
            raise SettingsError(
                f"archive({self.url!r}): the URL has an unsupported scheme.",
                "Use a URL that begins with https://, http:// or file://.",
            )
        if not isinstance(self.sha256, str) or not is_sha256(self.sha256.lower()):
            raise SettingsError(
                f"archive({self.url!r}): {self.sha256!r} is not a SHA-256 (64 hex digits).",
                "Use the output of `sha256sum FILE`.",
            )
        object.__setattr__(self, "sha256", self.sha256.lower())
        if not isinstance(self.strip, int) or self.strip < 0:
            raise SettingsError(
                f"archive({self.url!r}): strip={self.strip!r} is not a number of folders.",
                "Use strip=0, or the number of leading folders to strip.",
            )

    def __str__(self) -> str:
        """Return the kind and the URL."""
        return f"archive source {self.url}"

    def pin(self, lock: Lock) -> ArchivePin:
        """Return the pin, which does not depend on the lock file."""
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
            # The sorted output reads members in another order than the archive's, so the archive is decompressed first.
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
                f"cannot be used: {error}", "Check URL and strip=: `tar tf` lists the members of an archive."
            ) from error
        except (tarfile.ReadError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, NotImplementedError) as error:
            raise self.error(
                f"cannot be unpacked: {error}", "Use a tar file (plain, gzip, bzip2, xz) or a zip file."
            ) from error
        except Exception as error:
            # The parsers of the standard library raise various errors for damaged files: ValueError, OverflowError,
            # struct.error, RecursionError, MemoryError, an OSError of a seek. Other errors are errors of the disk.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise self.error(
                f"cannot be unpacked: it is damaged ({error or type(error).__name__})",
                "Use another archive, or report it upstream.",
            ) from error

    def download(self, cache: Path) -> Path:
        """Return the downloaded file in the cache. It is downloaded only if it is not cached.

        Args:
            cache: Cache folder, private to the user; created if missing.

        Raises:
            SourceError: The download failed, or its SHA-256 does not match.
        """
        target = cache / f"download-{self.sha256}"
        if target.is_file():
            with contextlib.suppress(OSError):
                os.utime(target)  # garbage collection uses the time of last use
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
            raise storage_error(cache, error) from error
        return target

    def _download_verified(self, target: Path) -> None:
        self._download(target)
        actual = sha256_of(target)
        if actual != self.sha256:
            raise self.error(
                f"does not match its pin: its SHA-256 is {actual}, not {self.sha256}",
                "Verify the new file, then update sha256= in dodo.py.",
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
                hint = "Check the URL in dodo.py." if 400 <= error.code < 500 else "Try again later."
                raise self.error(f"cannot be downloaded: HTTP status {error.code} {error.reason}", hint) from error
            except urllib.error.URLError as error:
                reason = error.reason.strerror if isinstance(error.reason, OSError) else None
                hint = (
                    "Check the path in dodo.py." if self.url.startswith("file:") else "Check the URL and the network."
                )
                raise self.error(f"cannot be downloaded: {reason or error.reason}", hint) from error
            except (http.client.HTTPException, _ConnectionBrokenError, ValueError) as error:
                raise self.error(f"cannot be downloaded: {error or type(error).__name__}") from error
            if length.isdecimal() and file.tell() != int(length):
                raise self.error(f"cannot be downloaded: the connection ended after {file.tell()} of {length} bytes")

    def _check_file(self, path: str) -> None:
        """Reject a FIFO, which would block, and a device, which may be endless."""
        with contextlib.suppress(OSError, ValueError):  # urllib reports these errors
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise self.error("cannot be downloaded: it is not a regular file", "Check the path in dodo.py.")


class _ConnectionBrokenError(Exception):
    """The network connection failed during a download. Not raised for disk errors."""


def _received(answer: BinaryIO) -> bytes:
    try:
        return answer.read(CHUNK)
    except OSError as error:
        raise _ConnectionBrokenError(str(error)) from error


def stripped(entries: list[Entry], strip: int) -> Iterator[Entry]:
    """Strip the leading folders.

    Raises:
        TreeError: The archive is empty, or has more than one entry at a level to strip.
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
            raise TreeError(f"it has no single folder at level {level + 1} but {names}; use strip={level}")
    kept = [
        dataclasses.replace(entry, path="/".join(path[strip:]))
        for entry, path in zip(entries, paths, strict=True)
        if len(path) > strip
    ]
    if not kept:
        raise TreeError("it is empty")
    yield from kept


def _clean(name: str) -> str:
    """Return a member's name without `./` and duplicate slashes.

    Raises:
        TreeError: The name is absolute or contains `..`.
    """
    if name.startswith("/") or ".." in name.split("/"):
        raise TreeError(f"it contains the unsafe name {name!r}")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


class _Bounded(io.FileIO):
    """A tar file whose reads are bounded.

    The size of the records that contain long names and links is untrusted: `tarfile` reads them into memory at once.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes.

        Raises:
            TreeError: The size is negative, or exceeds `CHUNK`.
        """
        if size is None or not 0 <= size <= CHUNK:
            raise TreeError(f"it is damaged: a header claims {size} bytes")
        return super().read(size) or b""


def _tar_entries(archive: tarfile.TarFile) -> tuple[list[Entry], int]:
    """Return the entries of a tar file and its latest modification time."""
    entries: list[Entry] = []
    members: dict[str, tarfile.TarInfo] = {}
    latest = 0
    for member in archive:
        path = _clean(member.name)
        if member.size < 0:  # `tarfile` would search for the next header before this one, in an endless loop
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
    """Ensure that a tar file ends with an end marker. `tarfile` treats a damaged header as the end.

    Raises:
        TreeError: There is a damaged header.
    """
    assert archive.fileobj
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(BLOCK).strip(b"\0"):
        raise TreeError(f"it is damaged: at byte {archive.offset} there is neither a member nor its end")


@contextlib.contextmanager
def _tar_content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[Readable]:
    content = archive.extractfile(member)
    assert content  # true for regular files
    with content:
        yield content


DOS = (0, 6, 10, 11, 14)
"""Host systems whose names contain backslashes: FAT, HPFS, NTFS (two numbers), VFAT (APPNOTE.TXT, 4.4.2)."""

UNIX = (3, 19)
"""Host systems whose names are bytes: Unix, macOS."""

DOS_FOLDER = 0x10
"""DOS attribute bit of folders."""

UTF8_NAME = 0x800
"""Flag of a UTF-8 name (APPNOTE.TXT, 4.4.4)."""

UNICODE_PATH = 0x7075
"""Extra field that contains a UTF-8 name (APPNOTE.TXT, 4.6.9)."""


def _zip_entries(archive: zipfile.ZipFile) -> tuple[list[Entry], int]:
    """Return the entries of a zip file and its latest modification time. Zip times have no zone; UTC is assumed."""
    import calendar

    entries: list[Entry] = []
    latest = 0
    for member in archive.infolist():
        name = _zip_name(member)
        is_dos = member.create_system in DOS
        if is_dos:
            name = name.replace("\\", "/")
            if re.match("[A-Za-z]:", name):
                raise TreeError(f"it contains the unsafe name {name!r}")
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
    """Return a member's name as unzip decodes it, the same on every Python version.

    A name is UTF-8 if a flag or an extra field marks it so, bytes if its host system is Unix, otherwise code page 437.
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
