"""What this machine keeps between runs: the trees of sources, what builders have said; in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path

from platformdirs import user_cache_path

from .errors import SourceError
from .runner.files import locked, read_json, write_bytes, write_json

_told: dict[str, set[str]] = {}
"""What each builder has said to this process."""


def sources_folder() -> Path:
    """Return where sources are kept."""
    return user_cache_path("gamebear-tasks", appauthor=False) / "sources"


@contextlib.contextmanager
def told_before(url: str, texts: Collection[str]) -> Iterator[list[str]]:
    """Give what a builder was last known to say of itself, for a block that tells the rest; no other may meanwhile.

    Args:
        url: the builder.
        texts: what it says now, which is known afterwards.
    """
    path = user_cache_path("gamebear-tasks", appauthor=False) / "told" / hashlib.sha256(url.encode()).hexdigest()
    if not texts and not path.exists():
        yield []
        return
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            held.enter_context(locked(path.with_suffix(".lock")))
        known = read_json(path)
        yield [*(known if isinstance(known, list) else ()), *_told.get(url, ())]
        _told.setdefault(url, set()).update(texts)
        with contextlib.suppress(OSError):
            if known != list(texts):
                write_json(path, list(texts))


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
