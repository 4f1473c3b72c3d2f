"""SD-card images: a base with artifacts and settings in it, baked without root and without a loop device."""

from __future__ import annotations

from .recipe import file, tar, user
from .task import sd_image

__all__ = ["file", "sd_image", "tar", "user"]
