"""Marks: from which state each target was placed.

doit's database knows the last success of each task. It does not know what a run placed that was killed or interrupted
before the task's end, that used another database, or that called the task by another name. A mark is an empty file in
`build/logs/.placed`, named by a hash of the target's path and by the state. While a target is being placed, its mark
has no state.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator

from ..config import variables_of_this_run
from ..runner.util.atomic_files import sync_folder
from ..util.locations import LOGS

PLACED = LOGS / ".placed"
"""The marks' folder."""

LENGTH = 32
"""Hexadecimal digits that a mark has of each hash."""


@contextlib.contextmanager
def placing(targets: Iterable[str], state: str) -> Iterator[None]:
    """Mark some targets as placed from a state, once a block has placed them; raises OSError.

    If the block fails, they count as placed from nothing: some may have changed.
    """
    marks = _marks()
    mark = state[:LENGTH]
    keys = [key for key in map(_key, targets) if key in marks or key + mark not in marks]
    if keys:
        os.makedirs(PLACED, exist_ok=True)
        for key in keys:
            (PLACED / key).touch()
        old = [name for name in os.listdir(PLACED) if name.startswith(tuple(keys)) and name not in keys]
        for name in old:
            (PLACED / name).unlink(missing_ok=True)
        marks.difference_update(old)
        marks.update(keys)
        if old:
            sync_folder(PLACED)  # before the targets are: a power cut may restore an old database
    yield
    for key in keys:
        try:
            os.rename(PLACED / key, PLACED / f"{key}{mark}")
        except FileNotFoundError:  # another doit has placed this target meanwhile; which one was last is not known
            os.makedirs(PLACED, exist_ok=True)
            (PLACED / key).touch()
        else:
            marks.add(key + mark)
            marks.discard(key)


def is_placed(targets: Iterable[str], state: str) -> bool:
    """Say whether some targets were placed from a state, as far as there are marks."""
    marks = _marks()
    mark = state[:LENGTH]
    others = [key for key in map(_key, targets) if key in marks or key + mark not in marks]
    return not others or not any(name.startswith(tuple(others)) for name in list(marks))


def _key(target: str) -> str:
    return f"{hashlib.sha256(os.fsencode(target)).hexdigest()[:LENGTH]}."


def _marks() -> set[str]:
    """Return the names of all marks; listed once in a run of doit, whose other processes place other targets."""
    global _listing
    run = variables_of_this_run()
    if run is None or _listing[0] is not run:
        names: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            names.update(os.listdir(PLACED))
        _listing = run, names
    return _listing[1]


_listing: tuple[object, set[str]] = None, set()
"""The run of doit for which the marks were listed, and their names."""
