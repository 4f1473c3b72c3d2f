"""Guards for doit's dependency database (`.doit.db`): two-line errors instead of a traceback or a hang."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from doit.dependency import DatabaseException
from doit.exceptions import InvalidCommand, InvalidDodoFile

from ..errors import GamebearError

_BUSY = (errno.EAGAIN, errno.EBUSY)
_FULL = (errno.ENOSPC, errno.EDQUOT)

SUFFIXES = ("", ".db", ".dat", ".dir", ".pag", ".bak")
"""Suffixes that the implementations of dbm append to a database's name, see the module `dbm`."""


class DatabaseError(GamebearError, InvalidDodoFile):  # type: ignore[misc]  # doit has no types
    """doit's database cannot be used. doit shows it like an error in `dodo.py`."""


def guarded(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a database class of doit's, so that each failure raises DatabaseError.

    Args:
        backend: doit's class; its first argument is the name of the file.
    """

    def opened(name: str, *args: Any, **kwargs: Any) -> Database:
        check_regular(name)
        with errors_of(name, "opened"):
            return Database(name, backend(name, *args, **kwargs))

    return opened


class Database:
    """A database of doit's whose methods raise DatabaseError.

    Args:
        name: Name of its file.
        backend: doit's object.
    """

    def __init__(self, name: str, backend: Any) -> None:
        self.name = name
        self._backend = backend

    def get(self, task_id: str, dependency: str) -> Any:
        """Return a task's value, or None. Without a context manager, which costs time for every dependency."""
        try:
            return self._backend.get(task_id, dependency)
        except Exception as error:
            raise _error(self.name, "read", error) from error

    def in_(self, task_id: str) -> Any:
        """Return whether the database contains a task."""
        with errors_of(self.name, "read"):
            return self._backend.in_(task_id)

    def remove(self, task_id: str) -> None:
        """Forget a task."""
        with errors_of(self.name, "written"):
            self._backend.remove(task_id)

    def remove_all(self) -> None:
        """Forget all tasks."""
        with errors_of(self.name, "written"):
            self._backend.remove_all()

    def dump(self) -> None:
        """Write changes, and close the file."""
        with errors_of(self.name, "written"):
            self._backend.dump()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def check_regular(name: str) -> None:
    """Raise DatabaseError if the file exists and is not a regular file: opening a FIFO would block."""
    for suffix in SUFFIXES:
        try:
            mode = os.stat(name + suffix).st_mode
        except OSError:
            continue
        if not stat.S_ISREG(mode):
            path = shlex.quote(name + suffix)
            raise DatabaseError(
                f"doit's database {name + suffix} cannot be opened: it is not a regular file.",
                f"Move it away: mv {path} {path}.old",
            )


@contextmanager
def errors_of(name: str, what: str) -> Iterator[None]:
    """Convert all exceptions of the block to DatabaseError: their types differ between versions of Python.

    Args:
        name: The database's file.
        what: The operation, as a participle such as `opened`.
    """
    try:
        yield
    except (InvalidCommand, BrokenPipeError):
        raise
    except Exception as error:
        if what == "written" and isinstance(error, TypeError):
            raise  # a task's value is not JSON: the traceback names it
        raise _error(name, what, error) from error


def _error(name: str, what: str, error: Exception) -> DatabaseError:
    number = _number(name, error)
    files = f"{shlex.quote(name)}*"
    cause = os.strerror(number) if number else "it is damaged, or was written by another Python"
    hint = f"Check owner and permissions: ls -ld {shlex.quote(os.path.dirname(name) or '.')} {files}"
    if not number:
        hint = f"Remove it: rm -r {files}; doit then fetches finished results from the builder."
    elif number in _BUSY:
        hint = "Wait until the other doit in this folder has ended."
    elif number in _FULL:
        hint = "Free disk space, then run doit again; it fetches finished results from the builder."
    return DatabaseError(f"doit's database {name} cannot be {what}: {cause}.", hint)


def _number(name: str, error: Exception) -> int:
    """Return the errno of a database error, or 0 if the file is damaged. SQLite's errors of doit's have no errno."""
    cause = error.__context__ if isinstance(error, DatabaseException) else error
    if isinstance(cause, OSError) and cause.errno:
        return cause.errno
    if "is locked" in str(error):
        return errno.EAGAIN
    if "disk is full" in str(error):
        return errno.ENOSPC
    place = name if os.path.exists(name) else os.path.dirname(name) or "."
    return 0 if os.access(place, os.R_OK | os.W_OK) else errno.EACCES
