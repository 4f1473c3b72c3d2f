"""Run the programs that fetch sources, with bounded output and a stall timeout."""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import SourceError
from ..runner.util.atomic_files import CHUNK
from ..util.child_processes import ended_with_us
from ..util.process import check_not_interrupted

INSTALL = {
    "git": "Install git (Debian: `apt install git`; macOS: `xcode-select --install`).",
    "dpkg-source": "Install it with `apt install dpkg-dev`.",
}
"""Hints for missing programs."""

SILENCE = 300.0
"""Seconds without progress after which a git command that uses the network counts as stalled."""

OUTPUT_LIMIT = 256 << 20
"""Maximum bytes of a program's standard output, which may be from an untrusted server."""

ERROR_TAIL = 64 << 10
"""Trailing bytes of the standard error that are kept."""

POLL = 0.5
"""Seconds between checks whether a program has exited while its child process keeps the pipes open."""

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL for a stalled program."""

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
        said: Its standard error.
        hint: Suggested fix, if the type of the error implies one.
    """

    hint = ""

    def __init__(self, program: str, status: int, said: str) -> None:
        super().__init__(program, status, said)
        self.program = program
        self.status = status
        self.said = said

    @property
    def reason(self) -> str:
        """The last informative line of the standard error, without prefixes such as `fatal:`."""
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        telling = [line for line in lines if not any(words in line.lower() for words in BOILERPLATE)]
        if not (telling or lines):
            return f"{self.program} ended with status {self.status}"
        line = (telling or lines)[-1]
        for prefix in ("fatal: ", "error: ", "E: ", "W: ", "dpkg-source: error: "):
            line = line.removeprefix(prefix)
        return line.rstrip(".")


class StalledError(ProgramError):
    """A program made no progress and was terminated."""

    hint = "See whether the server answers, then run doit again."


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: BinaryIO | None = None,
    silence: float = math.inf,
    growing: Path | None = None,
) -> bytes:
    """Run a program and return its standard output.

    Args:
        argv: The program, looked up in `PATH`, and its arguments.
        env: Environment. Default: the current one. The locale is always C, so that messages are in English.
        cwd: Working folder. Default: the current one.
        stdin: Standard input. Default: empty.
        silence: Seconds without progress after which the program counts as stalled.
        growing: Folder whose growth counts as progress, besides output.

    Raises:
        ProgramError: The exit status is not 0, or the output exceeds `OUTPUT_LIMIT`.
        StalledError: The program made no progress.
        SourceError: The program is not installed.
        KeyboardInterrupt: Ctrl-C ended the program.
    """
    program = str(argv[0])
    try:
        process = subprocess.Popen(
            ended_with_us(argv),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env={**(os.environ if env is None else env), "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise SourceError(f"The program {program} is not installed here.", INSTALL.get(program, "")) from error
    with process:
        try:
            out, said = _output(process, program, silence, growing)
        except BaseException:
            _end(process)
            raise
    check_not_interrupted(process.returncode)
    if process.returncode != 0:
        raise ProgramError(program, process.returncode, said.decode(errors="replace"))
    return bytes(out)


def _output(
    process: subprocess.Popen[bytes], program: str, silence: float, growing: Path | None
) -> tuple[bytearray, bytearray]:
    """Wait for a program and return its standard output and the end of its standard error.

    Raises:
        ProgramError: The output exceeds `OUTPUT_LIMIT`.
        StalledError: The program made no progress.
    """
    out, said = bytearray(), bytearray()
    heard = time.monotonic()
    grown = -1
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ, out)  # type: ignore[arg-type]  # it is a pipe
        waiting.register(process.stderr, selectors.EVENT_READ, said)  # type: ignore[arg-type]
        while waiting.get_map():
            ended = process.poll() is not None
            ready = waiting.select(0 if ended else POLL)
            for key, _ in ready:
                data = os.read(key.fd, CHUNK)
                if not data:
                    waiting.unregister(key.fileobj)
                key.data.extend(data)
                heard = time.monotonic()
            if not ready and ended:
                break  # a surviving child process, such as ssh's ControlPersist, keeps the pipe open
            if len(out) > OUTPUT_LIMIT:
                raise ProgramError(program, 0, f"{program} wrote more than {OUTPUT_LIMIT >> 20} MiB")
            del said[:-ERROR_TAIL]
            if time.monotonic() - heard > silence:
                before, grown = grown, _bytes_in(growing)
                if grown == before:
                    raise StalledError(program, 0, f"no progress for {silence:g} seconds")
                heard = time.monotonic()
    process.wait()
    return out, said


def _bytes_in(folder: Path | None) -> int:
    """Return the total size of all files in a folder, in bytes."""
    total = 0
    for path in folder.rglob("*") if folder else ():
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a program and its descendants, such as git's ssh, which would otherwise wait for the network."""
    family = [process.pid, *_descendants(process.pid)]
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    for pid in family[1:]:
        with contextlib.suppress(OSError):
            os.kill(pid, 15)
    process.kill()
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()


def _descendants(pid: int) -> Iterator[int]:
    """Yield the living descendants of a process (proc(5)), or none if /proc does not list them."""
    with contextlib.suppress(OSError, ValueError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield int(child)
            yield from _descendants(int(child))
