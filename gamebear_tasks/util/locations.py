"""Where files are kept: in the project, and in the user's cache."""

from __future__ import annotations

from pathlib import Path

LOGS = Path("build") / "logs"
"""Where the log of each task's last build is kept, below the folder of `dodo.py`."""


def cache_folder() -> Path:
    """Return the folder of all that is cached for this user."""
    from platformdirs import user_cache_path

    path = user_cache_path("gamebear-tasks", appauthor=False)
    # A relative XDG_CACHE_HOME is to be ignored (XDG Base Directory Specification), which platformdirs does not.
    return path if path.is_absolute() else Path.home() / ".cache" / path.name
