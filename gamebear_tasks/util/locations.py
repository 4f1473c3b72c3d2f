"""Locations of files: the project's log folder and the user's cache folder."""

from __future__ import annotations

from pathlib import Path

LOGS = Path("build") / "logs"
"""Folder of the task logs, relative to the folder of `dodo.py`."""


def cache_folder() -> Path:
    """Return this user's cache folder."""
    from platformdirs import user_cache_path

    path = user_cache_path("gamebear-tasks", appauthor=False)
    # A relative XDG_CACHE_HOME must be ignored (XDG Base Directory Specification); platformdirs does not ignore it.
    return path if path.is_absolute() else Path.home() / ".cache" / path.name
