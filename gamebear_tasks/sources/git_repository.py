"""Bare git repositories in the cache, one per URL, and git commands that ignore the user's settings."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..runner.util.locks import locked
from ..util.disk_space import room_hint
from ..util.subprocesses import MissingProgramError, ProgramError, StalledError, end, run, start
from .base import REPORT, BaseSource, remove
from .git_urls import location

FOREIGN = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_COMMON_DIR",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
    "GIT_SHALLOW_FILE",
    "GIT_GRAFT_FILE",
    "GIT_QUARANTINE_PATH",
    "GIT_CONFIG",
    "GIT_ATTR_SOURCE",
    "GIT_LITERAL_PATHSPECS",
    "GIT_GLOB_PATHSPECS",
    "GIT_NOGLOB_PATHSPECS",
    "GIT_ICASE_PATHSPECS",
)
"""Environment variables that select another repository (a git hook may run doit) or change how it is read."""

CONFIGURATION = (
    "-c", "core.hooksPath=/dev/null",
    "-c", "core.fsmonitor=false",
    "-c", "core.attributesFile=/dev/null",
    "-c", "core.autocrlf=false",
    "-c", "core.eol=lf",
    "-c", "gc.auto=0",
    "-c", "maintenance.auto=false",
    "-c", "http.lowSpeedLimit=1",
    "-c", "http.lowSpeedTime=120",
)  # fmt: skip
"""Options of every git command: the user's hooks and settings have no effect, and a silent server times out."""

SETTINGS_LIMIT = 1 << 20
"""Maximum bytes of a `.gitmodules` or `.lfsconfig`."""

SILENCE = 300.0
"""Seconds without progress after which a git command counts as stalled."""


@dataclass(frozen=True)
class Listed:
    """A line of `git ls-tree`."""

    mode: str
    kind: str
    hash: str
    size: str
    path: str


class DamagedError(Exception):
    """A cached repository lacks an object, or is damaged otherwise."""


class Repository:
    """Bare repository in the cache, one per URL."""

    def __init__(self, cache: Path, url: str, commit: str) -> None:
        self.cache = cache
        self.url = url
        self.folder = repository_folder(cache, url, commit)
        self.format = "sha256" if len(commit) == 64 else "sha1"

    def git(self, *arguments: str) -> bytes:
        """Run git on the cached repository.

        Raises:
            DamagedError: git failed.
        """
        try:
            return git(f"--git-dir={self.folder}", *arguments)
        except (StalledError, MissingProgramError):  # the repository may be intact
            raise
        except ProgramError as error:
            raise DamagedError(error.reason) from error

    def settings(self, item: Listed | None, pattern: str, source: BaseSource[Any]) -> dict[str, str]:
        """Return the settings of a file such as `.gitmodules` whose names match a pattern; none if it is missing.

        Raises:
            SourceError: The file is too large or invalid.
        """
        from . import deterministic_tar  # not at the top: only needed when a tree is written

        if item is None:
            return {}
        if int(item.size) > SETTINGS_LIMIT:
            raise source.error(f"is rejected: its {item.path} has {item.size} bytes", REPORT)
        try:
            # An include could refer to local files, and block forever on a FIFO.
            text = git(f"--git-dir={self.folder}", "config", "--blob", item.hash, "--no-includes", "-z", "--list")
        except ProgramError as error:
            cause = error.output.partition("\n")[0].removeprefix("error: ") or error.reason  # the last line is general
            raise source.error(f"is rejected: its {item.path}: {cause}", REPORT) from error
        settings = (line.partition("\n") for line in deterministic_tar.decoded(text).split("\0"))
        return {key: value for key, _, value in settings if re.search(pattern, key)}

    def fetch(self, commit: str, source: BaseSource[Any], which: str = "") -> None:
        """Fetch a commit unless it is cached, without its history if the server supports that.

        Args:
            commit: Commit hash.
            source: The source, for error messages.
            which: Name of the submodule that is fetched, with a trailing space; empty for `source` itself.

        Raises:
            SourceError: The repository cannot be reached or does not contain the commit.
        """
        ref = f"refs/gamebear/{commit}"  # set last: marks the commit as completely fetched
        self.folder.parent.mkdir(exist_ok=True)
        with locked(self.folder.with_suffix(".lock")):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.folder)  # garbage collection uses the time of last use
            with contextlib.suppress(DamagedError):
                if self.git("cat-file", "-t", ref + "^{commit}"):
                    return
            try:
                self._remove_stale()
                if not (self.folder / "objects").is_dir():
                    git("init", "--quiet", "--bare", "--template=", f"--object-format={self.format}", "--", self.folder)
                self._fetch(commit, ref)
            except ProgramError as error:
                hint = error.hint or room_hint(self.folder.parent)
                self._remove_stale()
                raise source.error(
                    f"cannot be fetched: {which}{error.reason}",
                    hint or f"See what `git clone {shlex.quote(self.url)}` prints.",
                ) from error

    def _remove_stale(self) -> None:
        """Remove temporary files of a failed or killed git. The lock excludes other processes."""
        for stale in [*self.folder.glob("*.lock"), *self.folder.glob("objects/pack/tmp_*")]:
            remove(stale)

    def _fetch(self, commit: str, ref: str) -> None:
        try:
            self._fetch_refs("--depth=1", refs=[f"+{commit}:{ref}"])
        except (StalledError, MissingProgramError):
            raise
        except ProgramError:
            # git's status does not depend on the cause. A server may also refuse single commits, so fetch everything
            # unless the disk is full or the server cannot even be queried.
            if room_hint(self.folder.parent):
                raise
            query(self.url, "HEAD")
        else:
            return
        unshallow = ["--unshallow"] if (self.folder / "shallow").exists() else []
        self._fetch_refs("--prune", *unshallow, refs=["+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"])
        try:
            self.git("cat-file", "-t", commit + "^{commit}")
        except DamagedError as error:
            missing = ProgramError("git", 1, f"no branch or tag contains the commit {commit}")
            missing.hint = f"Check the commit: `git ls-remote {shlex.quote(self.url)}` lists branches and tags."
            raise missing from error
        self.git("update-ref", ref, commit)

    def _fetch_refs(self, *options: str, refs: list[str]) -> None:
        git(
            f"--git-dir={self.folder}",
            "fetch",
            "--progress",
            "--no-tags",
            "--no-recurse-submodules",
            *options,
            "--",
            location(self.url),
            *refs,
            growing=self.folder,
        )


@contextlib.contextmanager
def blobs(repository: Repository) -> Iterator[BlobReader]:
    """Yield a reader of blobs that uses one `git cat-file` process sequentially."""
    process = start(
        ["git", *CONFIGURATION, f"--git-dir={repository.folder}", "cat-file", "--batch"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    try:
        yield BlobReader(process)
    finally:
        end(process)


class BlobReader:
    """Reader of blobs from `git cat-file --batch`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    @contextlib.contextmanager
    def __call__(self, item: Listed) -> Iterator[BinaryIO]:
        """Yield a file object. The caller must read exactly the blob's size."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(item.hash.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise DamagedError("git cat-file has ended") from error
        answer = self.process.stdout.readline().decode(errors="replace").split()
        if answer != [item.hash, "blob", item.size]:
            raise DamagedError(f"{item.path} is missing: {' '.join(answer)}")
        yield self.process.stdout  # type: ignore[misc]
        self.process.stdout.read(1)


def git(
    *arguments: str | Path,
    variables: dict[str, str] | None = None,
    stdin: bytes = b"",
    cwd: Path | None = None,
    growing: Path | None = None,
) -> bytes:
    """Run git without the user's hooks and conversions and return its standard output.

    Args:
        arguments: Options, subcommand and arguments.
        variables: Additional environment variables.
        stdin: Standard input.
        cwd: Working folder.
        growing: Folder whose growth counts as progress, besides output.

    Raises:
        ProgramError: git failed, stalled, or is not installed.
    """
    return run(
        ["git", *CONFIGURATION, *arguments],
        env={**environment(), **(variables or {})},
        cwd=cwd,
        stdin=stdin,
        silence=SILENCE,
        growing=growing,
    )


def query(url: str, *refs: str) -> dict[str, str]:
    """Query a repository for refs and return the hash of each that exists.

    Args:
        url: URL of the repository.
        refs: Full names, or patterns.

    Raises:
        ProgramError: The host is unreachable, has no such repository, or refused the login. git's status does not
            distinguish these. The hint applies to each.
    """
    try:
        listing = git("ls-remote", "--", location(url), *refs).decode(errors="replace")
    except ProgramError as error:
        error.hint = error.hint or f"Check URL, network and login: `git ls-remote {shlex.quote(url)}`."
        raise
    return {ref: commit for commit, _, ref in (line.partition("\t") for line in listing.splitlines())}


def setting(name: str) -> bytes:
    """Return a setting of the user's git, or an empty value if it is not set."""
    with contextlib.suppress(ProgramError):
        return git("config", "--get", name)
    return b""


def environment() -> dict[str, str]:
    """Return the environment for git: the user's, without variables that would change the result."""
    chosen = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    chosen["LC_ALL"] = "C"
    chosen["GIT_NO_REPLACE_OBJECTS"] = "1"
    chosen["GIT_ATTR_NOSYSTEM"] = "1"
    if not sys.stdin or not sys.stdin.isatty():
        chosen.setdefault("GIT_TERMINAL_PROMPT", "0")
    return chosen


def repository_folder(cache: Path, url: str, commit: str) -> Path:
    """Return the path of the repository for a URL and the hash algorithm of a commit."""
    name = hashlib.sha256(location(url).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache / "git" / f"{name}{'-sha256' if len(commit) == 64 else ''}.git"
