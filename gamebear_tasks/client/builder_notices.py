"""What builders say of themselves, shown once."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator

from ..runner.util.atomic_files import locked, read_json, write_json
from ..util.locations import cache_folder
from ..util.messages import notice

_told: dict[str, set[str]] = {}
"""What each builder has said to this process."""


@contextlib.contextmanager
def told_before(url: str, texts: Collection[str]) -> Iterator[list[str]]:
    """Give what a builder was last known to say of itself, for a block that tells the rest; no other may meanwhile.

    Args:
        url: the builder.
        texts: what it says now, which is known afterwards.
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
        yield [*(known if isinstance(known, list) else ()), *_told.get(url, ())]
        _told.setdefault(url, set()).update(texts)
        with contextlib.suppress(OSError):
            if known != list(texts):
                write_json(path, list(texts))


def notice_once(url: str, texts: Collection[str]) -> None:
    """Tell what a builder says of itself, but nothing that was told before and has been so ever since.

    Args:
        url: the builder.
        texts: all that it says now, each as what may follow "on this builder".
    """
    with told_before(url, texts) as told:
        for text in texts:
            if text not in told:
                notice(f"on {url} {text}")
