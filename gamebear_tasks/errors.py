"""Errors that are shown to users: a message and a suggested fix."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from doit.exceptions import InvalidDodoFile

from .util.text import arrow, in_line

INVALID_REPLY = (
    "Run doit again. If the error persists, remove ~/.cache/gamebear/v1/runner on the builder; doit uploads it again."
)
"""Hint for responses that the runner never sends."""


_REMEDIES = {
    errno.EMFILE: "Let doit open more files: ulimit -n 1024",
    errno.ENFILE: "End some programs: this machine's limit of open files is reached (sysctl fs.file-max).",
    errno.ENOMEM: "Free memory: end some programs, or raise the limit (ulimit -v).",
}
"""Fixes for exceeded limits of this machine, independent of the failed operation."""


CAUSES = 9
"""Maximum number of chained causes of an error that are inspected."""


def remedy(error: BaseException | None) -> str:
    """Return the fix for an exceeded limit of this machine that caused an error; empty for other causes."""
    for _ in range(CAUSES):  # bounded, because a re-raised error may be its own cause
        if error is None or isinstance(error, OSError):
            break
        error = error.__cause__
    return _REMEDIES.get(error.errno or 0, "") if isinstance(error, OSError) else ""


class GamebearError(Exception):
    """An error that a user can fix. It is shown as two lines: the failure, then the fix behind an arrow.

    Message and hint become a line each, whatever untrusted names in them contain.

    Args:
        message: The failure, its object (a builder, source or file) and its cause.
        hint: The command or edit that fixes it.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = in_line(message)
        self._hint = in_line(hint)

    @property
    def hint(self) -> str:
        """Suggested fix. The fix for an exceeded limit of this machine takes precedence."""
        return remedy(self.__cause__) or self._hint

    def __str__(self) -> str:
        fix = [f"{arrow()} {self.hint}"] if self.hint else []
        return "\n".join([self.message, *fix, *self._further()])

    def _further(self) -> Sequence[str]:
        """Return the lines after the fix."""
        return ()


class SettingsError(GamebearError, InvalidDodoFile):  # type: ignore[misc]  # doit has no types
    """A setting, an argument of `artifact()` or a URL is invalid. doit displays it like its own errors in dodo.py."""


class SourceError(GamebearError, InvalidDodoFile):  # type: ignore[misc]  # doit has no types
    """A source cannot be fetched, or does not match its pin."""


class BuilderError(GamebearError):
    """A builder cannot be reached, or cannot fulfill a request."""


class BuilderLost(BuilderError):
    """The connection to a builder was lost. Jobs continue to run there, and a retry may succeed."""

    def __init__(
        self, message: str, hint: str = "Run doit again: it finds the job, which continues on the builder."
    ) -> None:
        super().__init__(message, hint)


class BuilderCrowded(BuilderLost):
    """The builder currently refuses further connections (sshd's `MaxStartups`). A retry may succeed soon."""


class HostKeyError(BuilderError):
    """The builder's host key is unknown or does not match."""


class LogInError(BuilderError):
    """The builder was reached, but authentication failed."""


class PythonError(BuilderError):
    """Login succeeded, but the builder has no Python that can run the runner."""


class StoreError(BuilderError):
    """Login succeeded and Python exists, but the builder cannot store files, for example because its disk is full."""


class JobError(GamebearError):
    """A job failed or was cancelled, or its result cannot be used.

    Args:
        message: The failure and its object.
        hint: Suggested fix.
        lines: Further lines to display after the two, such as the end of a log.
    """

    def __init__(self, message: str, hint: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message, hint)
        self.lines = tuple(map(in_line, lines))

    def _further(self) -> Sequence[str]:
        return self.lines


class ImageError(GamebearError):
    """An image cannot be baked: invalid base or contents, not enough space, or a missing program."""


class BuilderBusy(BuilderError):
    """The builder currently refuses further channels. Open channels continue to work."""
