"""Files of a commit and its submodules, as `git clone` would check them out."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..util.disk_space import room_hint
from ..util.subprocesses import ProgramError
from . import deterministic_tar
from .base import REPORT, BaseSource
from .git_attributes import attributes_of, check_out, converted
from .git_lfs import fetch_objects, object_path, pointers_in
from .git_repository import BlobReader, DamagedError, Listed, Repository, blobs, git
from .git_urls import LEAVE_OUT, upstream_url

SUBMODULES = 300
"""Maximum number of submodules of a tree. A hostile one could include itself twice, at an older commit."""


class Checkout:
    """Reader of a commit and its submodules as entries of one tree.

    Args:
        source: The source, for error messages.
        submodules: Include submodules.
        cache: Cache folder that contains the repositories.
        scratch: Folder for temporary files.
        stack: Closed after all entries are read.
    """

    def __init__(
        self, source: BaseSource[Any], submodules: bool, cache: Path, scratch: Path, stack: contextlib.ExitStack
    ) -> None:
        self.source = source
        self.submodules = submodules
        self.cache = cache
        self.scratch = scratch
        self.stack = stack
        self.count = 0

    def entries(self, repository: Repository, commit: str, prefix: str) -> Iterator[deterministic_tar.Entry]:
        """Yield the entries of a commit and, below their paths, of its submodules.

        Args:
            repository: Repository that contains the commit.
            commit: Commit hash.
            prefix: Path of the submodule with a trailing slash; empty for the source itself.

        Raises:
            SourceError: Fetching failed, or the tree is rejected.
            TreeError: A name or a link is unsafe.
            DamagedError: An object is missing in the repository.
        """
        read = self.stack.enter_context(blobs(repository))
        listed = []
        for line in repository.git("ls-tree", "-r", "-l", "-z", "--full-tree", commit).split(b"\0")[:-1]:
            description, _, path = line.partition(b"\t")
            mode, kind, blob, size = description.decode().split()
            if size == "BAD":
                raise DamagedError(f"the object {blob} is missing")
            item = Listed(mode, kind, blob, size, deterministic_tar.decoded(path))
            if any(part.lower() == ".git" for part in item.path.split("/")):
                raise deterministic_tar.TreeError(f"it contains the unsafe name {item.path!r}")
            listed.append(item)
        files = {item.path: item for item in listed if item.mode in ("100644", "100755", "100664")}
        replaced = self._replaced(repository, commit, files, read)
        modules: dict[str, str] | None = None
        for item in listed:
            inside = prefix + item.path
            if item.mode == "120000":
                if int(item.size) > deterministic_tar.LINK_LIMIT:
                    raise deterministic_tar.TreeError(f"its link {inside!r} has a target of {item.size} bytes")
                with read(item) as content:
                    yield deterministic_tar.Link(inside, deterministic_tar.decoded(content.read(int(item.size))))
            elif item.path in replaced:
                yield deterministic_tar.from_file(inside, replaced[item.path], item.mode == "100755")
            elif item.kind == "blob":
                yield deterministic_tar.File(
                    inside, int(item.size), item.mode == "100755", functools.partial(read, item)
                )
            elif item.kind == "commit":
                yield deterministic_tar.Folder(inside)
                if self.submodules:
                    if modules is None:
                        modules = self._modules(repository, files.get(".gitmodules"))
                    yield from self._submodule(modules.get(item.path), item.hash, inside)

    def _replaced(
        self, repository: Repository, commit: str, files: dict[str, Listed], read: BlobReader
    ) -> dict[str, Path]:
        """Return the files that a checkout changes, each with the path of its new content."""
        if not any(path.rpartition("/")[2] == ".gitattributes" for path in files):
            return {}
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        (folder / "tree").mkdir()
        settings = [f"--git-dir={repository.folder}", f"--work-tree={folder / 'tree'}"]
        index = {"GIT_INDEX_FILE": str(folder / "index")}
        try:
            git(*settings, "read-tree", commit, variables=index)
        except ProgramError as error:
            raise self.source.error(
                f"cannot be read: {error.reason}", error.hint or room_hint(self.scratch) or REPORT
            ) from error
        attributes = attributes_of(settings, index, files)
        tracked = {path for path, (filter, *_) in attributes.items() if filter == "lfs"}
        pointers = pointers_in(tracked, files, read, self.source)
        changed = [path for path in converted(attributes) if path not in pointers]
        if changed:
            check_out(settings, index, attributes, changed)
        if pointers:
            fetch_objects(repository, commit, pointers, files.get(".lfsconfig"), self.source)
        return {
            **{path: folder / "tree" / os.fsdecode(deterministic_tar.encoded(path)) for path in changed},
            **{path: object_path(repository, oid) for path, (oid, _) in pointers.items()},
        }

    def _submodule(self, url: str | None, commit: str, path: str) -> Iterator[deterministic_tar.Entry]:
        if url is None:
            raise self.source.error(f"has a submodule {path} without a URL in its .gitmodules", LEAVE_OUT)
        if not url:
            return
        self.count += 1
        if self.count > SUBMODULES:
            raise self.source.error(f"has more than {SUBMODULES} submodules", LEAVE_OUT)
        inner = Repository(self.cache, url, commit)
        inner.fetch(commit, self.source, f"its submodule {path} ({url}) ")
        yield from self.entries(inner, commit, path + "/")

    def _modules(self, repository: Repository, item: Listed | None) -> dict[str, str]:
        """Return the URL of each submodule by its path. The URL is empty if the submodule is not fetched."""
        values: dict[str, dict[str, str]] = {}
        for key, value in repository.settings(item, r"^submodule\..*\.(path|url|update)$", self.source).items():
            name, _, variable = key.rpartition(".")
            values.setdefault(name, {})[variable] = value
        return {
            module["path"]: (
                ""
                if module.get("update") == "none"
                else upstream_url(self.source, repository.url, module["url"], "submodule")
            )
            for module in values.values()
            if module.get("path") and module.get("url")
        }
