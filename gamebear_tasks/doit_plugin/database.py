"""doit's database of what was built, with a paragraph for what is wrong with it: doit itself shows a traceback.

doit finds databases as it finds reporters, by entry points (group `doit.BACKEND`), which come before its own of the
same name. These are its own, and only what they raise is told in other words.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shlex
from collections.abc import Iterator
from typing import Any

from doit.dependency import DatabaseException, DbmDB, JsonDB, SqliteDB
from doit.exceptions import InvalidDodoFile

from ..errors import GamebearError

_BUSY = (errno.EAGAIN, errno.EBUSY)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DatabaseError(GamebearError, InvalidDodoFile):  # type: ignore[misc]  # doit has no types
    """doit's database cannot be used; doit shows it as it shows what is wrong with a `dodo.py`."""


class Told:
    """A database of doit's whose errors are told.

    Args:
        name: its file, as it is set (`dep_file`); some add something to it, or make several.
        more: whatever else the release of doit gives it.
        named: the same.
    """

    def __init__(self, name: str, *more: Any, **named: Any) -> None:
        for file in glob.glob(f"{glob.escape(name)}*"):
            if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
                raise DatabaseError(  # opening a FIFO would block
                    f"doit's database {file} cannot be opened: it is not a regular file.", f"Remove it: rm {file}"
                )
        with _told(name, "opened"):
            super().__init__(name, *more, **named)  # type: ignore[call-arg]
        self._file = name

    def get(self, task_id: str, dependency: str) -> Any:
        """Return what is known of a task, None where that is nothing."""
        try:  # and no context manager: this is asked for each thing that a task depends on
            return super().get(task_id, dependency)  # type: ignore[misc]
        except Exception as error:
            raise _in_words(self._file, "read", error) from error

    def in_(self, task_id: str) -> Any:
        """Say whether anything is known of a task."""
        with _told(self._file, "read"):
            return super().in_(task_id)  # type: ignore[misc]

    def remove(self, task_id: str) -> None:
        """Forget a task."""
        with _told(self._file, "written"):
            super().remove(task_id)  # type: ignore[misc]

    def remove_all(self) -> None:
        """Forget all tasks."""
        with _told(self._file, "written"):
            super().remove_all()  # type: ignore[misc]

    def dump(self) -> None:
        """Write what is new, and close it."""
        with _told(self._file, "written"):
            super().dump()  # type: ignore[misc]


class Dbm(Told, DbmDB):  # type: ignore[misc]
    """doit's `dbm`, its default."""


class Json(Told, JsonDB):  # type: ignore[misc]
    """doit's `json`."""


class Sqlite(Told, SqliteDB):  # type: ignore[misc]
    """doit's `sqlite3`."""


@contextlib.contextmanager
def _told(name: str, what: str) -> Iterator[None]:
    """Raise DatabaseError for whatever the block raises: each Python's databases have errors of their own."""
    try:
        yield
    except Exception as error:
        if what == "written" and isinstance(error, TypeError):
            raise  # what a task of somebody's wants to be kept is no JSON
        raise _in_words(name, what, error) from error


def _in_words(name: str, what: str, error: Exception) -> DatabaseError:
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
