"""Declare upstream source trees: `git()`, `archive()`, `debian()`, `folder()`, and `either()` of them.

Declaring a source, and computing its identity, uses no network and runs no program. Only `fetch` and `resolve`
(`gamebear lock`) do; the latter writes the pins of floating sources to the lock file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported on use, so that a dodo.py does not wait for unused kinds
    from .alternatives import Either, Source
    from .archive import Archive
    from .debian import Debian
    from .folder import Folder
    from .git import Git

LOCK_FILE = "gamebear.lock"
"""Name of the lock file."""


def git(url: str, rev: str, *, submodules: bool = True) -> Git:
    """Declare a commit of a git repository.

    Args:
        url: Any URL that `git fetch` accepts. The user's `insteadOf`, proxies and credentials apply.
        rev: Full commit hash, which is a pin; or a branch or tag, which `gamebear lock` pins.
        submodules: Include submodules, recursively.

    Raises:
        SettingsError: An argument is invalid.
    """
    from .git import Git

    return Git(url, rev, submodules)


def archive(url: str, sha256: str, *, strip: int = 1) -> Archive:
    """Declare an archive from the web: tar (plain, gzip, bzip2, xz) or zip.

    Args:
        url: URL with the scheme http, https or file.
        sha256: SHA-256 of the file, in hex.
        strip: Number of leading folders to strip.

    Raises:
        SettingsError: An argument is invalid.
    """
    from .archive import Archive

    return Archive(url, sha256, strip)


def debian(package: str, *, version: str | None = None, suite: str | None = None) -> Debian:
    """Declare a Debian source package, which `gamebear lock` pins.

    Args:
        package: Name of the source package.
        version: Full version, such as `1.3.10-1`. Default: the newest.
        suite: Suite of an apt source, such as `bookworm`. Default: all of them.

    Raises:
        SettingsError: An argument is invalid.
    """
    from .debian import Debian

    return Debian(package, version, suite)


def folder(path: str | PurePath = ".", *, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> Folder:
    """Declare a local folder, identified by its content: `folder()` is the project itself.

    In a git checkout it contains the tracked files and the untracked ones that are not ignored, submodules included.
    Elsewhere it contains everything but `__pycache__`. It never contains `.git`, doit's database, the project's `build`
    folder, or the task's own targets. Only content, executable bits and symbolic links count; timestamps do not.

    Args:
        path: The folder, relative to `dodo.py`.
        include: Patterns as in `.gitignore`, without negation; the folder contains only what matches one of them.
        exclude: Patterns of files and folders to leave out.

    Raises:
        SettingsError: An argument is invalid.
    """
    from .folder import Folder, checked_patterns

    return Folder(os.fspath(path), checked_patterns(path, include), checked_patterns(path, exclude))


def either(**options: Source) -> Either:
    """Declare interchangeable sources: `either(git=git(…), debian=debian(…))`.

    The first one is used, unless the setting `sources` selects another.

    Raises:
        SettingsError: There are none, or one of them is not a source.
    """
    from .alternatives import Either

    return Either(tuple(options.items()))
