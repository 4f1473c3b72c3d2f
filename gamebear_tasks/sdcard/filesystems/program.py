"""Find and run the system programs that image builds need."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from ...errors import ImageError
from ...util import subprocesses
from ...util.disk_space import room_hint
from ...util.subprocesses import ProgramError, install_hint


def environment(now: int = 0) -> dict[str, str]:
    """Return a reproducible environment for the programs: fixed locale, time zone and time, no user configuration.

    Args:
        now: Time that the programs assume, in seconds since 1970; 0 for the real time.
    """
    kept = {name: os.environ[name] for name in ("TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    path = os.environ.get("PATH", os.defpath)
    fixed = {
        **kept,
        "PATH": f"{path}:/usr/sbin:/sbin",  # Debian has most of them there, outside of an ordinary user's PATH
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "HOME": os.devnull,  # mtools reads ~/.mtoolsrc in addition to MTOOLSRC
        "MTOOLSRC": os.devnull,
        "MTOOLS_SKIP_CHECK": "1",
    }
    if now:
        fixed |= {"E2FSPROGS_FAKE_TIME": str(now), "E2FSCK_TIME": str(now), "SOURCE_DATE_EPOCH": str(now)}
    return fixed


def check_installed(programs: Iterable[str]) -> None:
    """Ensure that programs are installed.

    Raises:
        ImageError: Programs are missing. The error lists all of them, with their Debian packages.
    """
    path = environment()["PATH"]
    missing = sorted(name for name in set(programs) if not shutil.which(name, path=path))
    if missing:
        raise ImageError(f"Images cannot be baked: {', '.join(missing)} not installed.", install_hint(missing))


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
    """Run a program and return its output and errors.

    Args:
        argv: The program and its arguments.
        folder: Working folder. File names are relative to it, so that special characters in its path have no effect.
        now: See `environment`.
        what: Beginning of the error message: the operation that failed.
        stdin: Data for its standard input.
        allowed: Exit statuses that are not failures.
        hint: Suggested fix.

    Raises:
        ImageError: The program failed.
        KeyboardInterrupt: Ctrl-C ended the program.
    """
    try:
        output = subprocesses.run(argv, env=environment(now), cwd=folder, stdin=stdin, merged=True, allowed=allowed)
    except ProgramError as error:
        raise failure(what, argv[0], error.output or error.reason, error.hint or room_hint(folder) or hint) from error
    return output.decode("utf-8", "replace")


def failure(what: str, program: str, output: str, hint: str = "") -> ImageError:
    """Return the error for a failed program.

    Args:
        what: The operation that failed.
        program: Name of the program.
        output: Its output. The error contains the last lines.
        hint: Suggested fix, if it is not the default one.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    hint = hint or "Check the base image: download or copy it again."
    return ImageError(f"{what}: {program}: {' / '.join(lines[-4:])[:600].rstrip('.')}.", hint)
