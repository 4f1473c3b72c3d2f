"""Git LFS: pointer files, and their content as git-lfs stores it in a repository."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..runner.util.atomic_files import sha256_of
from ..util.disk_space import room_hint
from ..util.subprocesses import ProgramError, install_hint
from .base import REPORT, BaseSource
from .git_repository import BlobReader, Listed, Repository, git, setting
from .git_urls import location, upstream_url

POINTER_LIMIT = 1024
"""Bytes below which a file may be a Git LFS pointer, as in git-lfs."""

POINTER_START = re.compile(rb"version (https?://git-media\.io/v/2|https://(git-lfs|hawser)\.github\.com/spec/v1)\n")
POINTER = re.compile(POINTER_START.pattern + rb"oid sha256:(?P<oid>[0-9a-f]{64})\nsize (?P<size>[0-9]{1,18})\s*")
"""A Git LFS pointer (git-lfs, docs/spec.md). Pointers with extensions are not supported."""


def pointers_in(
    paths: Iterable[str], files: dict[str, Listed], read: BlobReader, source: BaseSource[Any]
) -> dict[str, tuple[str, int]]:
    """Return the SHA-256 and size of the content of each Git LFS pointer.

    A file with the attribute that was committed without git-lfs is not a pointer. A checkout leaves it unchanged.
    """
    pointers = {}
    for path in sorted(paths):
        item = files[path]
        if int(item.size) >= POINTER_LIMIT:
            continue
        with read(item) as content:
            text = content.read(int(item.size))
        if match := POINTER.fullmatch(text):
            pointers[path] = match["oid"].decode(), int(match["size"])
        elif POINTER_START.match(text):
            raise source.error(f"cannot be read: its file {path} is not a supported Git LFS pointer", REPORT)
    return pointers


def object_path(repository: Repository, oid: str) -> Path:
    """Return the path at which git-lfs stores the content with a SHA-256."""
    return repository.folder / "lfs" / "objects" / oid[:2] / oid[2:4] / oid


def missing_objects(repository: Repository, pointers: dict[str, tuple[str, int]]) -> list[str]:
    """Return the files whose content is missing. Damaged content is removed."""
    missing = []
    for path, (oid, size) in pointers.items():
        kept = object_path(repository, oid)
        try:
            if kept.lstat().st_size == size and sha256_of(kept) == oid:
                continue
            kept.unlink()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
        missing.append(path)
    return missing


def fetch_objects(
    repository: Repository,
    commit: str,
    pointers: dict[str, tuple[str, int]],
    config: Listed | None,
    source: BaseSource[Any],
) -> None:
    """Fetch the content of pointers into the repository (git-lfs-fetch(1)).

    Raises:
        SourceError: git-lfs is missing, or the fetch failed.
    """
    missing = missing_objects(repository, pointers)
    if not missing:
        return
    if not shutil.which("git-lfs"):
        raise source.error(
            f"cannot be fetched: git-lfs is not installed, and {missing[0]} is stored with Git LFS",
            install_hint(["git-lfs"]),
        )
    settings = [f"remote.origin.url={location(repository.url)}"]
    # Read .lfsconfig here, because git-lfs would follow its includes, even to local files.
    declared = repository.settings(config, r"^(lfs\.url|remote\.origin\.lfsurl)$", source)
    own = {key for key in declared if setting(key)}
    settings += [
        f"{key}={upstream_url(source, repository.url, url, 'Git LFS server')}"
        for key, url in declared.items()
        if key not in own
    ]
    storage = repository.folder / "lfs"
    try:
        # Set it in the repository's configuration and do not set GIT_DIR: if the server is a local path, git-lfs
        # would read that repository with the command line and environment of this one.
        git(f"--git-dir={repository.folder}", "config", "lfs.storage", storage)
        git(
            *(word for setting in (*settings, "safe.bareRepository=all") for word in ("-c", setting)),
            "lfs",
            "fetch",
            "--include=",
            "--exclude=",
            "origin",
            commit,
            variables={"GIT_LFS_FORCE_PROGRESS": "1"},
            cwd=repository.folder,
            growing=storage,
        )
    except ProgramError as error:
        missing = missing_objects(repository, pointers) or missing
        hint = error.hint or room_hint(repository.folder) or "Check the network and the login of the Git LFS server."
        raise source.error(f"cannot be fetched: the Git LFS file {missing[0]}: {error.reason}", hint) from error
    if missing := missing_objects(repository, pointers):
        raise source.error(f"cannot be fetched: the server lacks the Git LFS file {missing[0]}", REPORT)
