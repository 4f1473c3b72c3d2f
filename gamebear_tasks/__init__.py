"""doit tasks that build native software in clean containers on the machine it is for, and bring the artifacts back."""

from __future__ import annotations

from .errors import GamebearError
from .image import file, sd_image, tar, user
from .sources import archive, debian, either, git
from .tasks import artifact
from .tools import task_builder, task_lock, task_prune, task_sources

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
    "task_builder",
    "task_lock",
    "task_prune",
    "task_sources",
    "user",
]
