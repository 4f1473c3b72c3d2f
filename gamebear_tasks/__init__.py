"""doit tasks that build native software in clean containers on the machine it is for, and bring the artifacts back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import GamebearError
from .sources import archive, debian, either, git
from .tasks import artifact
from .tools import task_lock, task_prune, task_sources

if TYPE_CHECKING:
    from .image import file, sd_image, tar, user

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
    """Load what belongs to SD-card images when a dodo.py imports it, and not for those that bake none."""
    if name not in ("file", "sd_image", "tar", "user"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import image

    return getattr(image, name)
