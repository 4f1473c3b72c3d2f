"""Run programs of this machine: bounded output, a stall timeout, and an end together with this process."""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, BinaryIO

from ..runner.util import processes
from ..runner.util.atomic_files import CHUNK

PACKAGES = {
    "debugfs": "e2fsprogs",
    "dpkg-source": "dpkg-dev",
    "e2fsck": "e2fsprogs",
    "fsck.fat": "dosfstools",
    "git": "git",
    "mcopy": "mtools",
    "mdir": "mtools",
    "mdu": "mtools",
    "mmd": "mtools",
    "resize2fs": "e2fsprogs",
    "sfdisk": "fdisk",
    "xz": "xz-utils",
    "zstd": "zstd",
}
"""Debian package of each program that may be missing."""

OUTPUT_LIMIT = 256 << 20
"""Maximum bytes of a program's standard output, which may be from an untrusted server."""

ERROR_TAIL = 64 << 10
"""Trailing bytes of the standard error that are kept."""

POLL = 0.5
"""Seconds between checks whether a program has exited or stalled."""

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL for a program that has to end."""

BOILERPLATE = (
    "please make sure you have the correct access rights",
    "and the repository exists.",
    "the remote end hung up",
    "could not read from remote repository",
)
"""Lines that git prints after the line with the reason."""


class ProgramError(Exception):
    """A program failed.

    Attributes:
        program: Name of the program.
        status: Its exit status.
        output: The end of its standard error, or of its whole output if both are merged.
        hint: Suggested fix, if the type of the error implies one.
    """

    hint = ""

    def __init__(self, program: str, status: int, output: str) -> None:
        super().__init__(program, status, output)
        self.program = program
        self.status = status
        self.output = output

    @property
    def reason(self) -> str:
        """The last informative line of the standard error, without prefixes such as `fatal:`."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        informative = [line for line in lines if not any(words in line.lower() for words in BOILERPLATE)]
        if not lines:
            return f"{self.program} exited with status {self.status}"
        line = (informative or lines)[-1]
        for prefix in ("fatal: ", "error: ", "E: ", "W: ", "dpkg-source: error: "):
            line = line.removeprefix(prefix)
        return line.rstrip(".")


class StalledError(ProgramError):
    """A program made no progress and was terminated."""

    hint = "Check the network and the server, then run doit again."


class MissingProgramError(ProgramError):
    """A program is not installed."""

    def __init__(self, program: str) -> None:
        super().__init__(program, 127, f"{program} is not installed")
        self.hint = install_hint([program])


def install_hint(programs: Collection[str]) -> str:
    """Return the command that installs programs, or the names of their packages if this system has no apt."""
    packages = sorted({PACKAGES.get(program, program) for program in programs})
    if shutil.which("apt-get"):
        return f"sudo apt install {' '.join(packages)}"
    return f"Install (names of Debian's packages): {', '.join(packages)}"


def start(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """Start a program that receives SIGTERM when the thread that started it dies. End it with `end`.

    A thread dies with its own process, even if that is killed. util-linux's setpriv sets the signal
    (PR_SET_PDEATHSIG, prctl(2)), because a process with threads must not run Python between fork and exec. Fallback
    without this setpriv: the program ends when it notices that its pipes are closed.

    Args:
        argv: The program, looked up in the `PATH` of its environment, and its arguments.
        env: Complete environment. Default: the current one with the locale C, so that messages are in English.
        cwd: Working folder. Default: the current one.
        stdin: Standard input, as in `subprocess`.
        stdout: Standard output.
        stderr: Standard error.

    Raises:
        MissingProgramError: The program is not installed.
    """
    env = {**os.environ, "LC_ALL": "C"} if env is None else env
    if shutil.which(argv[0], path=env.get("PATH")) is None:
        raise MissingProgramError(str(argv[0]))
    return subprocess.Popen([*_prefix(), *argv], stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, env=env)


@cache
def _prefix() -> tuple[str, ...]:
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    prefix = (setpriv or "", "--pdeathsig", "TERM", "--")
    try:
        done = subprocess.run([*prefix, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return ()
    return () if done.returncode else prefix  # BusyBox's setpriv lacks the option


def end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a program and its descendants, such as git's ssh, which would otherwise wait for the network."""
    processes.end(process, GRACE)


def check_not_interrupted(status: int) -> None:
    """Raise KeyboardInterrupt if SIGINT ended a program, which may receive it before doit does.

    Args:
        status: Return code, as in `subprocess`.
    """
    if status == -signal.SIGINT:
        raise KeyboardInterrupt


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: BinaryIO | bytes = b"",
    stdout: BinaryIO | None = None,
    merged: bool = False,
    allowed: Collection[int] = (0,),
    silence: float = math.inf,
    growing: Path | None = None,
) -> bytes:
    """Run a program and return its standard output.

    Args:
        argv: See `start`.
        env: See `start`.
        cwd: See `start`.
        stdin: Standard input: data or an open file.
        stdout: File to write the standard output to. Default: it is returned.
        merged: Return the standard error too, in order with the output.
        allowed: Exit statuses that are not failures.
        silence: Seconds without progress after which the program counts as stalled.
        growing: Folder whose growth counts as progress, besides output.

    Raises:
        ProgramError: The program failed, or its output exceeds `OUTPUT_LIMIT`.
        StalledError: The program made no progress.
        MissingProgramError: The program is not installed.
        KeyboardInterrupt: Ctrl-C ended the program.
    """
    with _as_file(stdin) as source:
        process = start(
            argv,
            env=env,
            cwd=cwd,
            stdin=source,
            stdout=stdout or subprocess.PIPE,
            stderr=subprocess.STDOUT if merged else subprocess.PIPE,
        )
        try:
            out, err = _output(process, str(argv[0]), silence, growing)
        finally:
            end(process)
    check_not_interrupted(process.returncode)
    if process.returncode not in allowed:
        tail = out[-ERROR_TAIL:] if merged else err
        raise ProgramError(str(argv[0]), process.returncode, tail.decode(errors="replace"))
    return bytes(out)


@contextlib.contextmanager
def _as_file(stdin: BinaryIO | bytes) -> Iterator[int | BinaryIO]:
    """Yield the standard input of a program."""
    if not isinstance(stdin, bytes):
        yield stdin
    elif not stdin:
        yield subprocess.DEVNULL
    else:
        with tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            yield file


def _output(
    process: subprocess.Popen[bytes], program: str, silence: float, growing: Path | None
) -> tuple[bytearray, bytearray]:
    """Wait for a program and return its standard output and the end of its standard error.

    Raises:
        ProgramError: The output exceeds `OUTPUT_LIMIT`.
        StalledError: The program made no progress.
    """
    out, err = bytearray(), bytearray()
    last_progress = time.monotonic()
    bytes_grown = -1
    with selectors.DefaultSelector() as waiting:
        for pipe, buffer in ((process.stdout, out), (process.stderr, err)):
            if pipe:
                waiting.register(pipe, selectors.EVENT_READ, buffer)
        while True:
            ended = process.poll() is not None
            ready = waiting.select(0 if ended else POLL) if waiting.get_map() else []
            for key, _ in ready:
                data = os.read(key.fd, CHUNK)
                if not data:
                    waiting.unregister(key.fileobj)
                key.data.extend(data)
                last_progress = time.monotonic()
            if not ready and ended:
                return out, err  # a surviving child process, such as ssh's ControlPersist, may keep the pipe open
            if not waiting.get_map():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
            if len(out) > OUTPUT_LIMIT:
                raise ProgramError(program, 0, f"{program} wrote more than {OUTPUT_LIMIT >> 20} MiB")
            del err[:-ERROR_TAIL]
            if time.monotonic() - last_progress > silence:
                previous, bytes_grown = bytes_grown, _bytes_in(growing)
                if bytes_grown == previous:
                    raise StalledError(program, 0, f"no progress for {silence:g} seconds")
                last_progress = time.monotonic()


def _bytes_in(folder: Path | None) -> int:
    """Return the total size of all files in a folder, in bytes."""
    total = 0
    for path in folder.rglob("*") if folder else ():
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total
