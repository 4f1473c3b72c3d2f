"""Programs that fetch sources: one way to run them, with bounded output and a watchdog."""

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
"""What to do when a program is missing."""

SILENCE = 300.0
"""Seconds without progress after which a git that may wait for a server counts as stalled."""

OUTPUT_LIMIT = 256 << 20
"""Bytes that a program may write to its standard output, which may come from an untrusted server."""

ERROR_TAIL = 64 << 10
"""Bytes at the end of the standard error that are kept."""

POLL = 0.5
"""Seconds between two looks whether a program has ended while a child of its own keeps its output open."""

GRACE = 5.0
"""Seconds between asking a stalled program to end and killing it."""

BOILERPLATE = (
    "please make sure you have the correct access rights",
    "and the repository exists.",
    "the remote end hung up",
    "could not read from remote repository",
)
"""Lines of git that come after the line which says what was wrong."""


class ProgramError(Exception):
    """A program ended with another status than 0.

    Attributes:
        said: what it wrote to its standard error.
        hint: what to do, if the kind of the error tells.
    """

    hint = ""

    def __init__(self, program: str, status: int, said: str) -> None:
        super().__init__(program, status, said)
        self.program = program
        self.status = status
        self.said = said

    @property
    def reason(self) -> str:
        """The last line of the program's own message that says something, without `fatal:` and the like."""
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        telling = [line for line in lines if not any(words in line.lower() for words in BOILERPLATE)]
        if not (telling or lines):
            return f"{self.program} ended with status {self.status}"
        line = (telling or lines)[-1]
        for prefix in ("fatal: ", "error: ", "E: ", "W: ", "dpkg-source: error: "):
            line = line.removeprefix(prefix)
        return line.rstrip(".")


class StalledError(ProgramError):
    """A program made no progress and was ended."""

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
    """Run a program and return what it wrote to its standard output.

    Args:
        argv: the program, looked up in `PATH`, and its arguments.
        env: the environment, ours when not given; messages are asked for in English.
        cwd: the folder it runs in; ours when not given.
        stdin: its standard input; empty when not given.
        silence: seconds without progress after which it counts as stalled.
        growing: a folder whose growth is progress, besides output of either kind.

    Raises:
        ProgramError: it ended with another status than 0, or wrote more than `OUTPUT_LIMIT`.
        StalledError: it made no progress.
        SourceError: it is not installed.
        KeyboardInterrupt: Ctrl-C has ended it.
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
    """Return the standard output and the end of the standard error of a program, which has ended then."""
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
                break  # a child that lives on, such as ssh's ControlPersist, has the pipe
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
    """Return the bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*") if folder else ():
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and its descendants, such as git's ssh, which would wait for the network alone."""
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
    """Give the living descendants of a process, by proc(5); none where there is no such file."""
    with contextlib.suppress(OSError, ValueError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield int(child)
            yield from _descendants(int(child))
