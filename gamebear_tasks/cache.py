"""What this machine keeps between runs: the trees of sources, in the user's cache folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from platformdirs import user_cache_path

from .errors import SourceError
from .runner.files import write_bytes


def sources_folder() -> Path:
    """Return where sources are kept."""
    return user_cache_path("gamebear-tasks", appauthor=False) / "sources"


def keep(data: bytes) -> Path:
    """Keep some bytes in a file named by their SHA-256, and return it; raises SourceError."""
    path = sources_folder() / hashlib.sha256(data).hexdigest()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.is_file():
            write_bytes(path, data)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}.", "Is there space, and is it yours?") from error
    return path
