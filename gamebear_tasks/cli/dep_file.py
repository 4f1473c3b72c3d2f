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
"""What the implementations of dbm append to a database's name, see the module `dbm`."""


class DatabaseError(GamebearError, InvalidDodoFile):  # type: ignore[misc]  # doit has no types
    """doit's database cannot be used. doit shows it like an error in `dodo.py`."""


def guarded(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that opens a database of doit's, which then raises DatabaseError for whatever fails.

    Args:
        backend: doit's class, called with the file's name first.
    """

    def opened(name: str, *args: Any, **kwargs: Any) -> Database:
        check_regular(name)
        with errors_of(name, "opened"):
            return Database(name, backend(name, *args, **kwargs))

    return opened


class Database:
    """A database of doit's whose methods raise DatabaseError.

    Args:
        name: its file's name.
        backend: doit's object.
    """

    def __init__(self, name: str, backend: Any) -> None:
        self.name = name
        self._backend = backend

    def get(self, task_id: str, dependency: str) -> Any:
        """Return a task's value, None where there is none. No context manager: it is called for every dependency."""
        try:
            return self._backend.get(task_id, dependency)
        except Exception as error:
            raise _error(self.name, "read", error) from error

    def in_(self, task_id: str) -> Any:
        """Return whether anything is known of a task."""
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
        """Write what is new, and close the file."""
        with errors_of(self.name, "written"):
            self._backend.dump()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def check_regular(name: str) -> None:
    """Raise DatabaseError where the file is neither absent nor a regular file: opening a FIFO would wait for ever."""
    for suffix in SUFFIXES:
        try:
            mode = os.stat(name + suffix).st_mode
        except OSError:
            continue
        if not stat.S_ISREG(mode):
            path = shlex.quote(name + suffix)
            raise DatabaseError(
                f"doit's database {name + suffix} cannot be opened: it is not a regular file.",
                f"See what it is, then move it away: ls -ld {path}",
            )


@contextmanager
def errors_of(name: str, what: str) -> Iterator[None]:
    """Raise DatabaseError for whatever the block raises: each Python's databases have errors of their own.

    Args:
        name: the database's file.
        what: what is done with it, such as `opened`.
    """
    try:
        yield
    except InvalidCommand:
        raise
    except Exception as error:
        if what == "written" and isinstance(error, TypeError):
            raise  # a task's value is no JSON: the traceback names it
        raise _error(name, what, error) from error


def _error(name: str, what: str, error: Exception) -> DatabaseError:
    number = _number(name, error)
    files = f"{shlex.quote(name)}*"
    why = os.strerror(number) if number else "it is damaged, or another Python's"
    hint = f"See whose it is, and its folder: ls -ld {shlex.quote(os.path.dirname(name) or '.')} {files}"
    if not number:
        hint = f"Remove it: rm -r {files}; doit then finds on the builder what was built."
    elif number in _BUSY:
        hint = "Another doit runs in this folder: wait until it has ended."
    elif number in _FULL:
        hint = "Make room there, then run doit again, which finds on the builder what was built."
    return DatabaseError(f"doit's database {name} cannot be {what}: {why}.", hint)


def _number(name: str, error: Exception) -> int:
    """Return the errno of what is wrong, 0 where it is none that an operating system has; SQLite has only words."""
    cause = error.__context__ if isinstance(error, DatabaseException) else error
    if isinstance(cause, OSError) and cause.errno:
        return cause.errno
    if "is locked" in str(error):
        return errno.EAGAIN
    if "disk is full" in str(error):
        return errno.ENOSPC
    place = name if os.path.exists(name) else os.path.dirname(name) or "."
    return 0 if os.access(place, os.R_OK | os.W_OK) else errno.EACCES
