"""Reproducible, multi-threaded compression of the finished image."""

from __future__ import annotations

import os
from pathlib import Path

from ..util.disk_space import room_hint
from ..util.subprocesses import ProgramError, run
from .filesystems.program import environment, failure


def pack(image: Path, target: Path, program: str) -> None:
    """Compress an image to a new file, or rename it if it is to stay uncompressed.

    Args:
        image: The image file.
        target: The new file, on the same file system.
        program: `xz`, `zstd`, or empty for no compression.

    Raises:
        ImageError: Compression failed, for instance because the disk is full.
    """
    if not program:
        os.rename(image, target)
        return
    # xz's default level needs minutes for a card image and saves little compared to -1. zstd's default is fast.
    # The output does not depend on the number of threads, except that single-threaded xz writes another format.
    threads = max(2, os.cpu_count() or 1)
    options = ["-1", "--quiet", "--stdout", f"--threads={threads}"] if program == "xz" else ["-q", "-c", f"-T{threads}"]
    try:
        with image.open("rb") as plain, target.open("wb") as out:
            run([program, *options], env=environment(), stdin=plain, stdout=out)
    except ProgramError as error:
        raise failure(
            "The image cannot be compressed", program, error.output, error.hint or room_hint(target.parent)
        ) from error
