"""doit tasks that build native software in clean containers on the target machine, and fetch the artifacts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .doit_plugin.artifact import artifact
from .doit_plugin.tools import task_lock, task_prune, task_sources
from .errors import GamebearError
from .sources.declare import archive, debian, either, git

if TYPE_CHECKING:
    from .doit_plugin.sd_image import sd_image
    from .sdcard.recipe import file, tar, user

__all__ = [
    "GamebearError",
    "archive",
    "artifact",
    "debian",
    "either",
    "file",
    "git",
    "sd_image",
    "tar",
    "task_lock",
    "task_prune",
    "task_sources",
    "user",
]


def __getattr__(name: str) -> Any:
    """Import the names of SD-card images on first use, so that other projects do not load them."""
    if name not in ("file", "sd_image", "tar", "user"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "sd_image":
        from .doit_plugin.sd_image import sd_image

        return sd_image
    from .sdcard import recipe

    return getattr(recipe, name)
