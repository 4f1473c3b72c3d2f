"""Copy sparse files, and read files of untrusted size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Protocol

from ...errors import ImageError
from ...runner.util.atomic_files import CHUNK, data_extents
from ...util.text import size as readable_size

BLOCK = 1 << 16
"""Bytes of a block. All-zero blocks become holes."""

ZEROS = bytes(BLOCK)

MOST_READ = 64 << 20
"""Maximum bytes of a file from the base or a tar that is read into memory, such as a user table or a program."""


class Readable(Protocol):
    """Source of an uncompressed image."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, or an empty value at the end."""


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
            f"{name} is too large: {readable_size(count)}, at most {readable_size(MOST_READ)} are read.",
            "Check the file: it must be a short text or a program.",
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
