"""Base images: found or downloaded, and unpacked to a sparse file."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from ..errors import ImageError
from ..runner.util.atomic_files import CHUNK, data_extents
from ..sources.archive import Archive
from ..util.subprocesses import check_not_interrupted, end, start
from ..util.text import size as readable_size
from .program import check_installed, environment, failure


class Readable(Protocol):
    """Source of an uncompressed image."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, or an empty value at the end."""


BLOCK = 1 << 16
"""Bytes of a block. All-zero blocks become holes."""

ZEROS = bytes(BLOCK)

MOST_READ = 64 << 20
"""Maximum bytes of a file from the base or a tar that is read into memory, such as a user table or a program."""

MAGIC = {
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
}
"""Magic numbers of the supported compression formats."""


def unpack(base: Path | Archive, target: Path) -> None:
    """Write the uncompressed base image to a new file.

    Args:
        base: Plain or compressed image (xz, zstd, gzip, or a zip file with one image), detected by its first bytes.
        target: The new file.

    Raises:
        ImageError: The base is damaged, or contains no image.
        SourceError: The base cannot be downloaded.
    """
    from ..sources.cache import sources_folder

    path = base if isinstance(base, Path) else base.download(sources_folder())
    with path.open("rb") as file:
        start = file.read(8)
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), "")
    with target.open("wb") as out:
        if not kind:
            copy_sparse(path, out)
            return
        with _reader(path, kind) as plain:
            write_sparse(plain, out)


@contextlib.contextmanager
def _reader(path: Path, kind: str) -> Iterator[Readable]:
    """Yield the decompressed content of a file."""
    import gzip
    import lzma
    import zipfile

    if kind in ("xz", "zstd"):
        with _output_of([kind, "--decompress", "--stdout", "--quiet"], path) as plain:
            yield plain
        return
    try:
        if kind == "gzip":
            with gzip.open(path) as plain:
                yield plain
            return
        with zipfile.ZipFile(path) as archive:
            # macOS stores resource forks and metadata in this folder, under the file's name.
            names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
            images = [name for name in names if name.lower().endswith((".img", ".raw"))]
            if len(images) != 1:
                found = ", ".join(images or names)[:200] or "nothing"
                raise ImageError(f"{path} should hold one image, and holds {found}.", "Unpack the right one yourself.")
            with archive.open(images[0]) as plain:
                yield plain
    except (
        EOFError,
        gzip.BadGzipFile,
        lzma.LZMAError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise ImageError(f"{path} cannot be unpacked: {error}.", "Download it again.") from error


@contextlib.contextmanager
def _output_of(command: list[str], path: Path) -> Iterator[IO[bytes]]:
    """Yield the output of a program that reads a file from stdin. xz uses all processors."""
    check_installed(command[:1])
    threads = ["--threads=0"] if command[0] == "xz" else []
    with path.open("rb") as packed, tempfile.TemporaryFile() as errors:
        process = start([*command, *threads], env=environment(), stdin=packed, stderr=errors)
        try:
            assert process.stdout
            yield process.stdout
            process.wait()
        finally:
            end(process)
        check_not_interrupted(process.returncode)
        if process.returncode != 0:
            errors.seek(0)
            raise failure(f"{path} cannot be unpacked", command[0], errors.read().decode("utf-8", "replace"))


def read_bounded(path: Path, name: str) -> bytes:
    """Return the content of a file that is expected to be short. Its size is untrusted: a base, tar or builder sets it.

    Args:
        path: The file.
        name: Display name.

    Raises:
        ImageError: The file is longer than `MOST_READ`. It is not read.
    """
    with path.open("rb") as file:
        check_readable(os.fstat(file.fileno()).st_size, name)
        return file.read(MOST_READ)


def check_readable(count: int, name: str) -> None:
    """Validate the size of a file before it is read into memory.

    Raises:
        ImageError: It exceeds `MOST_READ`.
    """
    if count > MOST_READ:
        raise ImageError(
            f"{name} has {readable_size(count)}, and no more than {readable_size(MOST_READ)} of such a file are read.",
            "It should be a short text, or a program: see what it is.",
        )


def write_sparse(source: Readable, out: IO[bytes]) -> None:
    """Write a stream to a file, with holes for all-zero blocks."""
    size = 0
    while data := source.read(CHUNK):
        size += len(data)
        if data.count(0) != len(data):
            _write_blocks(data, out)
        else:
            out.seek(len(data), os.SEEK_CUR)
    out.truncate(size)


def _write_blocks(data: bytes, out: IO[bytes]) -> None:
    for at in range(0, len(data), BLOCK):
        block = data[at : at + BLOCK]
        if block == ZEROS[: len(block)]:
            out.seek(len(block), os.SEEK_CUR)
        else:
            out.write(block)


def copy_sparse(source: Path, out: IO[bytes]) -> None:
    """Copy a whole file to an empty one. Holes stay holes, and all-zero blocks become holes."""
    with source.open("rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        for start, stop in data_extents(file.fileno(), 0, end):
            file.seek(start)
            out.seek(start)
            left = stop - start
            while left and (data := file.read(min(left, CHUNK))):
                _write_blocks(data, out)
                left -= len(data)
        out.truncate(end)


def copy_part(source: Path, start: int, size: int, target: Path, at: int) -> None:
    """Copy a byte range of a file into another file. Holes are skipped.

    The target range must be a hole, or have holes wherever the source has holes.

    Args:
        source: File to read.
        start: Offset of the range.
        size: Bytes to copy.
        target: File to write.
        at: Offset in the target.
    """
    # Unbuffered, because lseek(SEEK_DATA) moves the file offset, which a buffered reader does not notice.
    with source.open("rb", buffering=0) as file, target.open("r+b") as out:
        for first, end in data_extents(file.fileno(), start, start + size):
            file.seek(first)
            out.seek(at + first - start)
            while first < end and (data := file.read(min(end - first, CHUNK))):
                out.write(data)
                first += len(data)
