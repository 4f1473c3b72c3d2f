"""Base images: found or downloaded, and unpacked to a sparse file."""

from __future__ import annotations

import contextlib
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import ImageError
from ..sources.archive import Archive
from ..util.subprocesses import check_not_interrupted, end, start
from .filesystems.program import check_installed, environment, failure
from .filesystems.sparse_files import Readable, copy_sparse, write_sparse

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
                raise ImageError(f"{path} does not contain exactly one image, but {found}.", "Unpack the image first.")
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
