"""Upstream trees that jobs are built from: `git()`, `archive()`, `debian()`, and `either()` of them.

Declaring a source, and asking for its identity, reads no network and runs no program; `fetch` does, once, and
`resolve` (`doit lock`), which writes what floats to the lock file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a dodo.py that has none of a kind does not wait for it to be imported
    from .alternatives import Either, Source
    from .archive import Archive
    from .debian import Debian
    from .git import Git

LOCK_FILE = "gamebear.lock"
"""The lock file's name."""


def git(url: str, rev: str, *, submodules: bool = True) -> Git:
    """Declare a commit of a git repository.

    Args:
        url: whatever `git fetch` takes; the user's `insteadOf`, proxies and credentials are honoured.
        rev: a commit in full, which is a pin; or a branch or tag, which `doit lock` pins.
        submodules: with submodules, and theirs.

    Raises:
        SettingsError: an argument makes no sense.
    """
    from .git import Git

    return Git(url, rev, submodules)


def archive(url: str, sha256: str, *, strip: int = 1) -> Archive:
    """Declare an archive from the web: tar (plain, gzip, bzip2, xz) or zip.

    Args:
        url: http, https or file.
        sha256: of the file, in hex.
        strip: how many folders around everything to leave out.

    Raises:
        SettingsError: an argument makes no sense.
    """
    from .archive import Archive

    return Archive(url, sha256, strip)


def debian(package: str, *, version: str | None = None, suite: str | None = None) -> Debian:
    """Declare a Debian source package, which `doit lock` pins.

    Args:
        package: the source package's name.
        version: in full, as in `1.3.10-1`; the newest when not given.
        suite: where to look, as apt's sources have it (`bookworm`); everywhere when not given.

    Raises:
        SettingsError: an argument makes no sense.
    """
    from .debian import Debian

    return Debian(package, version, suite)


def either(**options: Source) -> Either:
    """Declare sources that will do as well as each other: `either(git=git(…), debian=debian(…))`.

    The first is taken, unless the setting `sources` names another.

    Raises:
        SettingsError: there is none, or one is no source.
    """
    from .alternatives import Either

    return Either(tuple(options.items()))
