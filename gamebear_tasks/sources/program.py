"""Programs that sources are fetched with: started in one way, what they say kept for the error."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import SourceError
from ..interrupt import check_not_interrupted
from ..programs import ended_with_us

INSTALL = {
    "git": "Install git (Debian: `apt install git`; macOS: `xcode-select --install`).",
    "dpkg-source": "Install it with `apt install dpkg-dev`.",
}
"""What to do when a program is missing."""

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
    """

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


def run(argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> bytes:
    """Run a program without input and return what it wrote to its standard output.

    Args:
        argv: the program, looked up in `PATH`, and its arguments.
        env: the environment, ours when not given; messages are asked for in English.
        cwd: the folder it runs in; ours when not given.

    Raises:
        ProgramError: it ended with another status than 0.
        SourceError: it is not installed.
        KeyboardInterrupt: Ctrl-C has ended it.
    """
    program = str(argv[0])
    try:
        done = subprocess.run(
            ended_with_us(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            cwd=cwd,
            env={**(os.environ if env is None else env), "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise SourceError(f"The program {program} is not installed here.", INSTALL.get(program, "")) from error
    check_not_interrupted(done.returncode)
    if done.returncode != 0:
        raise ProgramError(program, done.returncode, done.stderr.decode(errors="replace"))
    return done.stdout
