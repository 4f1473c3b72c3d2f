"""Commits of git repositories, including submodules and Git LFS files.

The files equal those of `git clone` on Linux without configuration. `.gitattributes` apply (`eol`, `ident`,
`working-tree-encoding`), Git LFS pointers are replaced by their content, other filters do not run. The user's
configuration (`core.autocrlf`, filters, hooks) has no effect. Files are read from a bare repository in the cache; only
those with such an attribute are checked out.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import SettingsError
from ..util.subprocesses import ProgramError, run
from .base import REPORT, FetchedSource, Pin, check_url, public_url, remove
from .git_repository import DamagedError, Repository, environment, query, repository_folder
from .git_urls import is_local
from .lockfile import GitEntry, Lock, is_commit, is_tag


@dataclass(frozen=True)
class GitPin(Pin):
    """A commit.

    Attributes:
        commit: Full commit hash.
        submodules: Include submodules. The commit identifies them by their hashes.
    """

    commit: str
    submodules: bool

    def identity(self) -> dict[str, str | int | bool]:
        """Return the commit, and whether submodules are excluded."""
        return {"git": self.commit} if self.submodules else {"git": self.commit, "submodules": False}

    @property
    def file_name(self) -> str:
        """File name `git-<commit>`, or `git-<commit>-alone` without submodules."""
        return f"git-{self.commit}{'' if self.submodules else '-alone'}"


@dataclass(frozen=True)
class Git(FetchedSource[GitPin]):
    """A commit of a git repository.

    Attributes:
        url: Any URL that `git fetch` accepts.
        rev: Full commit hash, branch, tag, or full ref (`refs/…`).
        submodules: Include submodules, recursively.
    """

    url: str
    rev: str
    submodules: bool = True

    def __post_init__(self) -> None:
        """Reject values that git would interpret as an option or a pattern.

        Raises:
            SettingsError: An attribute is invalid.
        """
        check_url(self.url, "git()")
        if not isinstance(self.rev, str) or not re.fullmatch(
            r"[^-\s:~^?*\[\\\x00-\x20\x7f][^\s:~^?*\[\\\x00-\x20\x7f]*", self.rev
        ):
            raise SettingsError(
                f"git({self.url!r}): {self.rev!r} is not a commit, branch or tag.",
                "Use a name that `git ls-remote URL` lists, or a full commit hash.",
            )
        if is_commit(self.rev.lower()):
            object.__setattr__(self, "rev", self.rev.lower())

    def __str__(self) -> str:
        """Return the kind, the URL and the revision."""
        return f"git source {self.url} {self.rev}"

    @property
    def key(self) -> str:
        """Key in the lock file."""
        return f"{self.url} {self.rev}"

    @property
    def floating(self) -> bool:
        """Whether the revision is not a commit, so that the lock file has to pin it."""
        return not is_commit(self.rev)

    def pin(self, lock: Lock) -> GitPin | None:
        """Return the pin if the revision is a commit, or if the lock file has an entry for it."""
        entry = lock.git.get(self.key) if self.floating else GitEntry(self.rev)
        return GitPin(entry.commit, self.submodules) if entry else None

    def _metadata(self, pin: GitPin, lock: Lock) -> dict[str, str]:
        # Upstream may move or add a tag, so only a tag in the lock file is the same for everybody.
        tag = lock.git[self.key].tag if self.floating else ""
        return {"url": public_url(self.url), "commit": pin.commit, "tag": tag}

    def resolve(self) -> GitEntry:
        """Query the repository for the current commit of the branch or tag.

        Raises:
            SourceError: The repository cannot be reached, or has no such branch or tag.
        """
        if self.rev == "HEAD" or self.rev.startswith("refs/"):
            names = [self.rev]
        else:
            names = [f"refs/tags/{self.rev}", f"refs/heads/{self.rev}"]  # same order of precedence as `git rev-parse`
        peeled = [name for ref in names for name in (ref + "^{}", ref)]
        try:
            found = query(self.url, *peeled, "refs/tags/*")
        except ProgramError as error:
            raise self.error(f"cannot be resolved: {error.reason}", error.hint) from error
        for name in peeled:
            if is_commit(found.get(name)):
                return GitEntry(found[name], _tag_of(name, found))
        hint = f"Check the name: `git ls-remote {shlex.quote(self.url)}` lists branches and tags."
        if re.fullmatch(r"[0-9a-f]{4,63}", self.rev):
            hint = "Write an abbreviated commit hash in full."
        raise self.error("cannot be resolved: the repository has no branch or tag of that name", hint)

    def warning(self, lock: Lock) -> str:
        """Return a warning if the repository is a local checkout whose files differ from the pinned commit."""
        path = self.url.removeprefix("file://")
        pin = self.pin(lock)
        if pin is None or not is_local(self.url) or not os.path.lexists(os.path.join(path, ".git")):
            return ""
        options = ["git", "-C", path, "-c", "core.fsmonitor=false"]
        try:
            head = run([*options, "rev-parse", "HEAD"], env=environment()).decode().strip()
            changed = run([*options, "status", "--porcelain"], env=environment())
        except ProgramError:
            return ""  # fetching it reports the error
        if head == pin.commit and not changed:
            return ""
        differs = "has uncommitted changes" if head == pin.commit else f"is at {head[:12]}"
        return (
            f"{path} {differs}, and is built at the pinned commit {pin.commit[:12]}; "
            f"folder({path!r}) builds the working tree"
        )

    def _write_tar(self, out: BinaryIO, pin: GitPin, cache: Path, scratch: Path) -> None:
        try:
            self._write_commit(out, pin, cache, scratch)
        except DamagedError:
            out.seek(0)
            out.truncate()
            remove(repository_folder(cache, self.url, pin.commit))
            try:
                self._write_commit(out, pin, cache, scratch)
            except DamagedError as error:
                raise self.error(f"cannot be read: {error}", f"Remove {cache / 'git'}, then run doit again.") from error

    def _write_commit(self, out: BinaryIO, pin: GitPin, cache: Path, scratch: Path) -> None:
        from . import deterministic_tar  # here, so that declaring a source is cheap
        from .git_checkout import Checkout

        repository = Repository(cache, self.url, pin.commit)
        repository.fetch(pin.commit, self)
        commit = repository.git("cat-file", "commit", pin.commit + "^{commit}").partition(b"\n\n")[0]
        committed = re.search(rb"^committer .*> (\d{1,18}) [+-]\d+$", commit, re.MULTILINE)
        with contextlib.ExitStack() as stack:
            checkout = Checkout(self, self.submodules, cache, scratch, stack)
            try:
                entries = list(checkout.entries(repository, pin.commit, ""))
                deterministic_tar.write(out, entries, int(committed[1]) if committed else 0)
            except deterministic_tar.TreeError as error:
                raise self.error(f"is rejected: {error}", REPORT) from error


def _tag_of(ref: str, found: dict[str, str]) -> str:
    """Return the tag of a ref: the ref itself if it is a tag, or else the best tag of the same commit.

    Annotated tags precede lightweight ones, higher versions precede lower ones. The result is empty without a tag.

    Args:
        ref: A key of `found`.
        found: Output of `git ls-remote`: hashes by ref, with the commits of annotated tags at `<ref>^{}`.
    """
    tags = [name.removeprefix("refs/tags/") for name in found if name.startswith("refs/tags/") and "^" not in name]
    tags = [name for name in tags if name and is_tag(name)]
    own = ref.removeprefix("refs/tags/").removesuffix("^{}")
    if ref.startswith("refs/tags/") and own in tags:
        return own

    def commit_of(tag: str) -> str:
        return found.get(f"refs/tags/{tag}^{{}}", found[f"refs/tags/{tag}"])

    def rank(tag: str) -> tuple[bool, str]:
        version = re.sub(r"[0-9]+", lambda number: number[0].zfill(20), tag)
        return f"refs/tags/{tag}^{{}}" in found, f"{version}-\x7f"  # 1.0 after 1.0-rc1

    return max((tag for tag in tags if commit_of(tag) == found[ref]), key=rank, default="")
