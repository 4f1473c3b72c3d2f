"""doit tasks that build native software in clean containers on the machine it is for, and bring the artifacts back."""

from __future__ import annotations

from .errors import GamebearError
from .sources import archive, debian, either, git
from .tasks import artifact
from .tools import task_builder, task_lock, task_prune, task_sources

__all__ = [
    "GamebearError",
    "archive",
    "artifact",
    "debian",
    "either",
    "git",
    "task_builder",
    "task_lock",
    "task_prune",
    "task_sources",
]
