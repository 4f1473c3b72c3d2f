"""What a person reads when something fails: one paragraph, with the way out."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from doit.exceptions import InvalidDodoFile

from .util.text import in_line

NONSENSE = (
    "Run doit again; if it stays so, see on the builder what runs there as ~/.cache/gamebear/v1/runner, and remove it;"
    " it is sent anew."
)
"""What to do about answers that our runner does not give."""


_REMEDIES = {
    errno.EMFILE: "Let doit open more files: ulimit -n 1024",
    errno.ENFILE: "All of this machine's programs have too many files open: end some.",
    errno.ENOMEM: "No memory is left here: end some programs, or allow more (ulimit -v).",
}
"""What to do where this machine's limits are the reason, whatever could not be done."""


DEEP = 9
"""How many causes of an error, each of the one before, are looked at."""


def remedy(error: BaseException | None) -> str:
    """Return what to do about a limit of this machine that an error came of; empty where it came of something else."""
    for _ in range(DEEP):  # an error that is raised again may be its own cause
        if error is None or isinstance(error, OSError):
            break
        error = error.__cause__
    return _REMEDIES.get(error.errno or 0, "") if isinstance(error, OSError) else ""


class GamebearError(Exception):
    """Something failed in a way that a person can act on.

    Args:
        message: what failed, and where (which builder, which source, which file).
        hint: what to do now; a sentence or two.

    Both become one line, whatever the names in them hold.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = in_line(message)
        self._hint = in_line(hint)

    @property
    def hint(self) -> str:
        """What to do now."""
        return remedy(self.__cause__) or self._hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class SettingsError(GamebearError, InvalidDodoFile):  # type: ignore[misc]  # doit has no types
    """A setting, an argument of `artifact()` or a URL makes no sense; doit shows it as it shows its own such errors."""


class SourceError(GamebearError, InvalidDodoFile):  # type: ignore[misc]  # doit has no types
    """A source cannot be had, or is not what its pin says."""


class BuilderError(GamebearError):
    """A builder cannot be reached, or cannot do what it was asked."""


class BuilderLost(BuilderError):
    """The connection to a builder broke; what runs there goes on, and asking again may succeed."""

    def __init__(self, message: str, hint: str = "What runs there goes on; doit again finds it.") -> None:
        super().__init__(message, hint)


class BuilderCrowded(BuilderLost):
    """The builder is there, but takes no further connection now (sshd's `MaxStartups`); it may in a moment."""


class HostKeyError(BuilderError):
    """The builder is not known to be the one that it says it is."""


class LogInError(BuilderError):
    """The builder is there, and does not let us in."""


class PythonError(BuilderError):
    """The builder lets us in, and has no Python that runs the runner."""


class StoreError(BuilderError):
    """The builder lets us in and has Python, and no place to keep anything: a full disk, a home that is not ours."""


class JobError(GamebearError):
    """A job ran and failed, was cancelled, or its result cannot be used.

    Args:
        message: what failed, and where.
        hint: what to do now.
        lines: what is told in lines of their own between the two, such as the end of a log.
    """

    def __init__(self, message: str, hint: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message, hint)
        self.lines = tuple(map(in_line, lines))

    def __str__(self) -> str:
        return " ".join(filter(None, ["\n".join([self.message, *self.lines]), self.hint]))


class ImageError(GamebearError):
    """An image cannot be baked: its base, what goes in, the room, or a program that is missing."""


class BuilderBusy(BuilderError):
    """The builder gives no further channel now; those that are open go on working."""
