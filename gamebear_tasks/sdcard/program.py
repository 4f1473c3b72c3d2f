"""The system's programs that an image is baked with: looked for before anything is begun, started in one way."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection, Iterable
from pathlib import Path

from ..errors import ImageError
from ..util.child_processes import ended_with_us
from ..util.process import check_not_interrupted

PACKAGES = {
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "sfdisk": "fdisk",
    "fsck.fat": "dosfstools",
    "mcopy": "mtools",
    "mdir": "mtools",
    "mdu": "mtools",
    "mmd": "mtools",
    "xz": "xz-utils",
    "zstd": "zstd",
}
"""Debian's package for each program."""


def environment(now: int = 0) -> dict[str, str]:
    """Return what the programs run with: one language, one time zone, one time, nobody's configuration.

    Args:
        now: what they take for the time, in seconds since 1970; 0 for the real one.
    """
    kept = {name: os.environ[name] for name in ("TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    path = os.environ.get("PATH", os.defpath)
    fixed = {
        **kept,
        "PATH": f"{path}:/usr/sbin:/sbin",  # where Debian has most of them, and an ordinary user does not look
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "HOME": os.devnull,  # where mtools looks for more than MTOOLSRC
        "MTOOLSRC": os.devnull,
        "MTOOLS_SKIP_CHECK": "1",
    }
    if now:
        fixed |= {"E2FSPROGS_FAKE_TIME": str(now), "E2FSCK_TIME": str(now), "SOURCE_DATE_EPOCH": str(now)}
    return fixed


def check_installed(programs: Iterable[str]) -> None:
    """Look for programs.

    Raises:
        ImageError: some are not installed here; all of them are named, with Debian's packages.
    """
    path = environment()["PATH"]
    missing = sorted(name for name in set(programs) if not shutil.which(name, path=path))
    if missing:
        packages = sorted({PACKAGES[name] for name in missing})
        raise ImageError(
            f"An image cannot be baked here without {', '.join(missing)}.",
            f"Install what is missing: `apt install {' '.join(packages)}`.",
        )


def run(
    argv: list[str],
    *,
    folder: Path,
    now: int,
    what: str,
    stdin: bytes = b"",
    allowed: Collection[int] = (0,),
    hint: str = "",
) -> str:
    """Run a program and return what it wrote, its errors among it.

    Args:
        argv: the program and its arguments.
        folder: where it runs; its files are named relative to that, so that no path of a person is in its way.
        now: see `environment`.
        what: what could not be done if it fails; begins the error.
        stdin: what it reads.
        allowed: the statuses that are no failure.
        hint: what to do if it fails.

    Raises:
        ImageError: it failed.
        KeyboardInterrupt: Ctrl-C has ended it.
    """
    env = environment(now)
    done = subprocess.run(
        ended_with_us(argv, env["PATH"]),
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        cwd=folder,
        env=env,
    )
    said = done.stdout.decode("utf-8", "replace")
    check_not_interrupted(done.returncode)
    if done.returncode not in allowed:
        raise failure(what, argv[0], said or f"it ended with status {done.returncode}", hint)
    return said


def failure(what: str, program: str, said: str, hint: str = "") -> ImageError:
    """Return the error for a program that failed.

    Args:
        what: what could not be done.
        program: its name.
        said: what it said; its last lines are shown.
        hint: what to do, where that is not the same as ever.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    hint = hint or "See that the base and what goes in are whole, then run doit again."
    if "no space left" in said.lower():
        hint = "Make room where the image is to be, then run doit again."
    return ImageError(f"{what}: {program} says: {' / '.join(lines[-4:])[:600].rstrip('.')}.", hint)
