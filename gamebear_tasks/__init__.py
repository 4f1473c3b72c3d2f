"""doit tasks that build native software in clean containers on the target machine, and fetch the artifacts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .doit_plugin.artifact import artifact
from .errors import GamebearError, SettingsError
from .sources.declare import archive, debian, either, folder, git

if TYPE_CHECKING:
    from .doit_plugin.reporter import LiveReporter as live
    from .doit_plugin.sd_image import sd_image
    from .sdcard.recipe import file, tar, user

__all__ = [
    "GamebearError",
    "archive",
    "artifact",
    "debian",
    "either",
    "file",
    "folder",
    "git",
    "live",
    "sd_image",
    "tar",
    "user",
]


def __getattr__(name: str) -> Any:
    """Import the live reporter and the functions for SD-card images on first use, to keep other imports fast."""
    if name in ("task_lock", "task_prune", "task_sources"):  # of 0.1
        command = name.removeprefix("task_")
        raise SettingsError(
            f"dodo.py imports {name}, which is now a command.", f"Remove the import, and run: gamebear {command}"
        )
    if name not in ("file", "live", "sd_image", "tar", "user"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "live":
        from .doit_plugin.reporter import LiveReporter

        return LiveReporter
    if name == "sd_image":
        from .doit_plugin.sd_image import sd_image

        return sd_image
    from .sdcard import recipe

    return getattr(recipe, name)
