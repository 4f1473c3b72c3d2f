"""Outputs in a job's working directory: files, folders, and the files that match a pattern."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


def is_pattern(name: str) -> bool:
    """Return whether the name of an output is a pattern of files: it has `*`, `?` or `[…]`, see fnmatch."""
    return re.search(r"[*?]|\[.+\]", name, re.DOTALL) is not None


def given(document: Mapping[str, Any]) -> set[str]:
    """Return the names in the working directory that the job started with."""
    names = {path.split("/")[0] for part in ("modules", "inputs", "sources") for path in document.get(part) or ()}
    return {*names, (document.get("script") or {}).get("name", ""), "__pycache__"}


def matching(work: Path, document: Mapping[str, Any], pattern: str) -> list[str]:
    """Return the files that match a pattern, sorted: neither the job's own files nor its other outputs.

    A leading dot must be matched explicitly, as in a shell.
    """
    others = {*given(document), *document["outputs"]}
    return sorted(
        name
        for name in os.listdir(work)
        if name not in others
        and fnmatchcase(name, pattern)
        and not (name.startswith(".") and not pattern.startswith("."))
    )


def own(path: str) -> None:
    """Make a file, or a folder with its content, belong to this process's user and readable by it.

    Containers leave files of other users. The supervisor, outside of the namespace, cannot read these.

    Raises:
        OSError: the owner or mode cannot be changed.
    """
    about = os.lstat(path)
    if os.geteuid() == 0 and about.st_uid != 0:
        os.chown(path, 0, 0, follow_symlinks=False)  # the namespace's root is the builder's user
    if stat.S_ISLNK(about.st_mode):
        return
    needed = stat.S_IRWXU if stat.S_ISDIR(about.st_mode) else stat.S_IRUSR
    if about.st_mode & needed != needed:
        os.chmod(path, stat.S_IMODE(about.st_mode) | needed)
    if stat.S_ISDIR(about.st_mode):
        for name in os.listdir(path):
            own(os.path.join(path, name))
