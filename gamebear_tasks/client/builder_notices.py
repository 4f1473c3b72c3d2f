"""Builder notices: warnings that a builder reports about itself, each shown once.

The notices that were shown last are stored per builder in the user's cache, under a file lock.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator

from ..runner.util.atomic_files import read_json, write_json
from ..runner.util.locks import locked
from ..util.locations import cache_folder
from ..util.messages import notice

_shown: dict[str, set[str]] = {}
"""Notices of each builder that this process has handled, by URL."""


@contextlib.contextmanager
def shown_before(url: str, texts: Collection[str]) -> Iterator[list[str]]:
    """Yield the notices of a builder that were shown before; record the current ones after the block.

    A file lock, best effort, excludes other processes during the block.

    Args:
        url: the builder's URL.
        texts: all current notices of the builder.
    """
    path = cache_folder() / "told" / hashlib.sha256(url.encode()).hexdigest()
    if not texts and not path.exists():
        yield []
        return
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            held.enter_context(locked(path.with_suffix(".lock")))
        known = read_json(path)
        yield [*(known if isinstance(known, list) else ()), *_shown.get(url, ())]
        _shown.setdefault(url, set()).update(texts)
        with contextlib.suppress(OSError):
            if known != list(texts):
                write_json(path, list(texts))


def notice_once(url: str, texts: Collection[str]) -> None:
    """Print the notices of a builder, except those that were current the last time.

    Args:
        url: the builder's URL.
        texts: all current notices of the builder, each worded to follow "on this builder".
    """
    with shown_before(url, texts) as shown:
        for text in texts:
            if text not in shown:
                notice(f"on {url} {text}")
