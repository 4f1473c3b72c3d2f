"""The finished image is compressed as its name says, with all processors; the same bytes on every machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ..util.child_processes import ended_with_us
from ..util.process import check_not_interrupted
from .program import environment, failure


def pack(image: Path, target: Path, program: str) -> None:
    """Compress an image to a new file, or rename it where nothing compresses it.

    Args:
        image: the file.
        target: the new one, in the same file system.
        program: xz, zstd, or empty.

    Raises:
        ImageError: there is no room, for instance.
    """
    if not program:
        os.rename(image, target)
        return
    # xz's default takes minutes for a card's image, and wins little over -1; zstd's is quick already.
    # How many threads there are does not show in the result, but one alone of xz writes another format.
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
