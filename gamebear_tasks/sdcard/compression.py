"""Reproducible, multi-threaded compression of the finished image."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ..util.child_processes import ended_with_us
from ..util.process import check_not_interrupted
from .program import environment, failure


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
    with image.open("rb") as plain, target.open("wb") as out:
        done = subprocess.run(
            ended_with_us([program, *options]),
            stdin=plain,
            stdout=out,
            stderr=subprocess.PIPE,
            check=False,
            env=environment(),
        )
    check_not_interrupted(done.returncode)
    if done.returncode != 0:
        raise failure("The image cannot be compressed", program, done.stderr.decode("utf-8", "replace"))
