"""Placement marks: the state from which each target was installed.

doit's database records the last success of each task. That is not enough: a run may install targets and be killed or
interrupted before the task ends. It may also use another database, or another name for the task. A mark is an empty
file in `build/logs/.placed`, named by a hash of the target's path and by the state. While a target is being installed,
its mark has no state.
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
"""Folder of the marks."""

LENGTH = 32
"""Number of hexadecimal digits of each hash in a mark's name."""


@contextlib.contextmanager
def placing(targets: Iterable[str], state: str) -> Iterator[None]:
    """Mark targets as installed from a state once the block has installed them.

    If the block fails, their marks have no state, because some targets may have changed.

    Args:
        targets: paths of the targets.
        state: the state that they are built from (see `Plan.state`).

    Raises:
        OSError: a mark cannot be written.
    """
    marks = _marks()
    mark = state[:LENGTH]
    keys = [*map(_key, targets)]
    os.makedirs(PLACED, exist_ok=True)
    for key in keys:  # even if the state stays the same: another doit may install another one at the same time
        (PLACED / key).touch()
    old = [name for name in os.listdir(PLACED) if name.startswith(tuple(keys)) and name not in keys]
    for name in old:
        (PLACED / name).unlink(missing_ok=True)
    marks.difference_update(old)
    marks.update(keys)
    if any(not name.endswith(mark) for name in old):
        sync_folder(PLACED)  # before the targets change: a power cut may restore an old database
    yield
    for key in keys:
        try:
            os.rename(PLACED / key, PLACED / f"{key}{mark}")
        except FileNotFoundError:  # another doit installed this target at the same time; the last writer is unknown
            os.makedirs(PLACED, exist_ok=True)
            (PLACED / key).touch()
        else:
            marks.add(key + mark)
            marks.discard(key)


def is_placed(targets: Iterable[str], state: str) -> bool:
    """Return whether no mark contradicts that the targets were installed from a state.

    A target without a mark does not count as a contradiction.
    """
    marks = _marks()
    mark = state[:LENGTH]
    others = [key for key in map(_key, targets) if key in marks or key + mark not in marks]
    return not others or not any(name.startswith(tuple(others)) for name in list(marks))


def _key(target: str) -> str:
    if target.startswith("/") or ".." in target:  # two tasks may write one path in two ways, which doit allows
        target = os.path.relpath(target)
    return f"{hashlib.sha256(os.fsencode(target)).hexdigest()[:LENGTH]}."


def _marks() -> set[str]:
    """Return the names of all marks.

    The folder is listed once per run of doit: the run's other processes install other targets.
    """
    global _listing
    run = variables_of_this_run()
    if run is None or _listing[0] is not run:
        names: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            names.update(os.listdir(PLACED))
        _listing = run, names
    return _listing[1]


_listing: tuple[object, set[str]] = None, set()
"""The run of doit for which the marks were listed, and the names of the marks."""
