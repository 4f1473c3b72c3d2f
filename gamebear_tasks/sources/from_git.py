"""A commit of a git repository, with its submodules.

The files are the blobs as they were committed, read from a bare repository in the cache without a checkout: neither
the user's configuration (`core.autocrlf`, filters, hooks) nor `.gitattributes` (`export-ignore`, `eol`, LFS) changes
them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import SettingsError, SourceError
from ..runner.files import locked
from .lock import Lock, is_commit
from .program import ProgramError, run
from .source import BaseSource, Pin, check_url, remove

if TYPE_CHECKING:  # imported when a tree is written: declaring a source is to cost nothing
    from . import tree

SUBMODULE_SCHEMES = ("https://", "http://", "ssh://", "git://", "git+ssh://", "ssh+git://")
"""What a `.gitmodules` may name besides `host:path` and relative URLs; not `ext::` or the user's own files."""

UNREACHABLE = (
    r"could not resolve|unable to (look up|connect|access)|(could not|couldn't|failed to) connect|timed out"
    r"|connection (refused|reset)|authentication failed|permission denied|access denied|could not read"
    r"|not found|does not exist|does not appear to be|terminal prompts disabled|certificate"
)
"""What git says (a pattern) where another kind of fetch would fail as well."""

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
)
"""Variables that would point git to another repository (doit may be run by a hook)."""


@dataclass(frozen=True)
class GitPin(Pin):
    """A commit.

    Attributes:
        commit: its hash in full.
        submodules: with those of its submodules, which it names by their hashes.
    """

    commit: str
    submodules: bool

    def identity(self) -> dict[str, str | int | bool]:
        """Return the commit; and that submodules are left out, if they are."""
        return {"git": self.commit} if self.submodules else {"git": self.commit, "submodules": False}

    @property
    def file_name(self) -> str:
        """`git-<commit>.tar`, or `git-<commit>-alone.tar` without submodules."""
        return f"git-{self.commit}{'' if self.submodules else '-alone'}.tar"


@dataclass(frozen=True)
class Git(BaseSource[GitPin]):
    """A commit of a git repository.

    Attributes:
        url: whatever `git fetch` takes.
        rev: a commit in full, a branch, a tag, or a ref in full (`refs/…`).
        submodules: with submodules, and theirs.
    """

    url: str
    rev: str
    submodules: bool = True

    def __post_init__(self) -> None:
        """Refuse what git would take for an option or a pattern."""
        check_url(self.url, "git()")
        if not isinstance(self.rev, str) or not re.fullmatch(
            r"[^-\s:~^?*\[\\\x00-\x20\x7f][^\s:~^?*\[\\\x00-\x20\x7f]*", self.rev
        ):
            raise SettingsError(
                f"git({self.url!r}): {self.rev!r} is no commit, branch or tag.",
                "`git ls-remote URL` lists what there is.",
            )
        if is_commit(self.rev.lower()):
            object.__setattr__(self, "rev", self.rev.lower())

    def __str__(self) -> str:
        """Return the kind, the URL and the revision."""
        return f"git source {self.url} {self.rev}"

    @property
    def key(self) -> str:
        """Its key in the lock file."""
        return f"{self.url} {self.rev}"

    @property
    def floating(self) -> bool:
        """Whether only the lock file says which commit it is."""
        return not is_commit(self.rev)

    def pin(self, lock: Lock) -> GitPin | None:
        """Return the commit if the revision is one, or if the lock file knows it."""
        commit = lock.git.get(self.key) if self.floating else self.rev
        return GitPin(commit, self.submodules) if commit else None

    def resolve(self) -> str:
        """Ask the repository for the commit that the branch or tag is at now.

        Raises:
            SourceError: it cannot be reached, or has none of that name.
        """
        if self.rev == "HEAD" or self.rev.startswith("refs/"):
            names = [self.rev]
        else:
            names = [f"refs/tags/{self.rev}", f"refs/heads/{self.rev}"]  # as `git rev-parse` prefers them
        peeled = [name for ref in names for name in (ref + "^{}", ref)]
        try:
            listing = _git("ls-remote", "--", _location(self.url), *peeled).decode(errors="replace")
        except ProgramError as error:
            raise self.error(
                f"cannot be looked up: {error.reason}", "Is the URL right, and the network there?"
            ) from error
        found = {ref: commit for commit, _, ref in (line.partition("\t") for line in listing.splitlines())}
        for name in peeled:
            if is_commit(found.get(name)):
                return found[name]
        hint = "Look for its name with `git ls-remote`."
        if re.fullmatch(r"[0-9a-f]{4,63}", self.rev):
            hint = "If it is an abbreviated commit, write it in full; only that is a pin."
        raise self.error("cannot be looked up: the repository has no branch or tag of that name", hint)

    def _write_tar(self, out: BinaryIO, pin: GitPin, cache: Path, scratch: Path) -> None:
        try:
            self._write_commit(out, pin, cache)
        except _DamagedError:
            out.seek(0)
            out.truncate()
            remove(_folder(cache, self.url, pin.commit))
            try:
                self._write_commit(out, pin, cache)
            except _DamagedError as error:
                raise self.error(f"cannot be read: {error}", f"Remove {cache / 'git'} and try again.") from error

    def _write_commit(self, out: BinaryIO, pin: GitPin, cache: Path) -> None:
        from . import tree

        repository = _Repository(cache, self.url, pin.commit)
        repository.fetch(pin.commit, self)
        commit = repository.git("cat-file", "commit", pin.commit + "^{commit}").partition(b"\n\n")[0]
        committed = re.search(rb"^committer .*> (\d+) [+-]\d+$", commit, re.MULTILINE)
        with contextlib.ExitStack() as stack:
            entries = list(self._entries(repository, pin.commit, "", stack))
            try:
                tree.write(out, entries, int(committed[1]) if committed else 0)
            except tree.TreeError as error:
                raise self.error(f"is refused: {error}", "Tell its authors.") from error

    def _entries(
        self, repository: _Repository, commit: str, prefix: str, stack: contextlib.ExitStack
    ) -> Iterator[tree.Entry]:
        """Give what is in a commit and, below its path, in each submodule."""
        from . import tree

        blobs = stack.enter_context(_blobs(repository))
        listed = []
        for line in repository.git("ls-tree", "-r", "-l", "-z", "--full-tree", commit).split(b"\0")[:-1]:
            description, _, path = line.partition(b"\t")
            mode, kind, blob, size = description.decode().split()
            if size == "BAD":
                raise _DamagedError(f"the object {blob} is missing")
            listed.append(_Listed(mode, kind, blob, size, prefix + tree.decoded(path)))
        modules: dict[str, str] | None = None
        for item in listed:
            if item.mode == "120000":
                with blobs(item) as content:
                    yield tree.Link(item.path, tree.decoded(content.read(int(item.size))))
            elif item.kind == "blob":
                yield tree.File(item.path, int(item.size), item.mode == "100755", functools.partial(blobs, item))
            elif item.kind == "commit":
                yield tree.Folder(item.path)
                if self.submodules:
                    if modules is None:
                        modules = self._modules(repository, listed, prefix)
                    url = modules.get(item.path)
                    if url is None:
                        raise self.error(
                            f"has a submodule {item.path} whose URL its .gitmodules does not tell",
                            "Leave submodules out: git(…, submodules=False).",
                        )
                    if url:
                        inner = _Repository(repository.cache, url, item.hash)
                        inner.fetch(item.hash, self, f"its submodule {item.path} ({url}) ")
                        yield from self._entries(inner, item.hash, item.path + "/", stack)

    def _modules(self, repository: _Repository, listed: list[_Listed], prefix: str) -> dict[str, str]:
        """Return the URL of each submodule by its path; an empty one where it is not to be fetched."""
        from . import tree

        values: dict[str, dict[str, str]] = {}
        for item in listed:
            if item.path == prefix + ".gitmodules" and item.kind == "blob":
                text = tree.decoded(
                    repository.git(
                        "config", "--blob", item.hash, "-z", "--get-regexp", r"^submodule\..*\.(path|url|update)$"
                    )
                )
                for line in text.split("\0"):
                    key, _, value = line.partition("\n")
                    name, _, variable = key.rpartition(".")
                    values.setdefault(name, {})[variable] = value
        return {
            prefix + module["path"]: (
                "" if module.get("update") == "none" else self._submodule_url(repository.url, module["url"])
            )
            for module in values.values()
            if module.get("path") and module.get("url")
        }

    def _submodule_url(self, parent: str, url: str) -> str:
        if url.startswith(("./", "../")):
            url = relative_url(parent, url)
        elif not url.startswith(SUBMODULE_SCHEMES) and not (
            _is_local(parent) if _is_local(url) else re.match(r"[^-/:][^/:]*:(?!:)", url)
        ):
            raise self.error(
                f"has a submodule with the URL {url!r}, which is refused",
                "Leave submodules out: git(…, submodules=False).",
            )
        try:
            check_url(url, f"{self}, submodule", upstream=True)
        except SettingsError as error:
            raise SourceError(error.message, error.hint) from error
        return url


@dataclass(frozen=True)
class _Listed:
    """A line of `git ls-tree`."""

    mode: str
    kind: str
    hash: str
    size: str
    path: str


class _DamagedError(Exception):
    """A repository in the cache lacks what it should have."""


class _Repository:
    """The bare repository in the cache for one URL."""

    def __init__(self, cache: Path, url: str, commit: str) -> None:
        self.cache = cache
        self.url = url
        self.folder = _folder(cache, url, commit)
        self.format = "sha256" if len(commit) == 64 else "sha1"

    def git(self, *arguments: str) -> bytes:
        """Run git on what is here already.

        Raises:
            _DamagedError: it failed.
        """
        try:
            return _git(f"--git-dir={self.folder}", *arguments)
        except ProgramError as error:
            raise _DamagedError(error.reason) from error

    def fetch(self, commit: str, source: Git, which: str = "") -> None:
        """Have a commit, without its history where the server allows that.

        Args:
            commit: its hash.
            source: whom errors are about.
            which: what is fetched, if it is not `source` itself; ends with a space.

        Raises:
            SourceError: the repository cannot be reached or has no such commit.
        """
        ref = f"refs/gamebear/{commit}"  # set last: says that the commit is here with all its files
        self.folder.parent.mkdir(exist_ok=True)
        with locked(self.folder.with_suffix(".lock")):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.folder)  # says when it was last used
            with contextlib.suppress(_DamagedError):
                if self.git("cat-file", "-t", ref + "^{commit}"):
                    return
            if not (self.folder / "objects").is_dir():
                options = ["--object-format=sha256"] if self.format == "sha256" else []
                _git("init", "--quiet", "--bare", "--template=", *options, "--", self.folder)
            for stale in self.folder.glob("*.lock"):  # left by a git that was killed; nobody else is here
                remove(stale)
            try:
                self._fetch(commit, ref)
            except ProgramError as error:
                raise source.error(f"cannot be fetched: {which}{error.reason}") from error

    def _fetch(self, commit: str, ref: str) -> None:
        try:
            self._fetch_refs("--depth=1", refs=[f"+{commit}:{ref}"])
        except ProgramError as error:
            if re.search(UNREACHABLE, error.said, re.IGNORECASE):
                raise
        else:
            return
        unshallow = ["--unshallow"] if (self.folder / "shallow").exists() else []
        self._fetch_refs("--prune", *unshallow, refs=["+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"])
        try:
            self.git("cat-file", "-t", commit + "^{commit}")
        except _DamagedError as error:
            raise ProgramError("git", 1, f"none of its branches and tags holds the commit {commit}") from error
        self.git("update-ref", ref, commit)

    def _fetch_refs(self, *options: str, refs: list[str]) -> None:
        _git(
            f"--git-dir={self.folder}",
            "-c", "gc.auto=0",
            "-c", "maintenance.auto=false",
            "-c", "core.hooksPath=/dev/null",
            "-c", "http.lowSpeedLimit=1",
            "-c", "http.lowSpeedTime=120",
            "fetch",
            "--quiet",
            "--no-tags",
            "--no-recurse-submodules",
            *options,
            "--",
            _location(self.url),
            *refs,
        )  # fmt: skip


@contextlib.contextmanager
def _blobs(repository: _Repository) -> Iterator[_BlobReader]:
    """Give what reads blobs, one after the other, from one `git cat-file`."""
    process = subprocess.Popen(
        ["git", f"--git-dir={repository.folder}", "cat-file", "--batch"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
    )
    try:
        yield _BlobReader(process)
    finally:
        process.kill()
        process.communicate()


class _BlobReader:
    """Asks a `git cat-file --batch` for blobs."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    @contextlib.contextmanager
    def __call__(self, item: _Listed) -> Iterator[BinaryIO]:
        """Give a file to read exactly the blob's size from."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(item.hash.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise _DamagedError("git cat-file has ended") from error
        answer = self.process.stdout.readline().decode(errors="replace").split()
        if answer != [item.hash, "blob", item.size]:
            raise _DamagedError(f"{item.path} is missing: {' '.join(answer)}")
        yield self.process.stdout  # type: ignore[misc]
        self.process.stdout.read(1)


def _git(*arguments: str | Path) -> bytes:
    return run(["git", *arguments], env=_environment())


def _environment() -> dict[str, str]:
    """Return the variables for git: the user's, except those that would change what is read."""
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    environment["LC_ALL"] = "C"
    environment["GIT_NO_REPLACE_OBJECTS"] = "1"
    if not sys.stdin or not sys.stdin.isatty():
        environment.setdefault("GIT_TERMINAL_PROMPT", "0")
    return environment


def _folder(cache: Path, url: str, commit: str) -> Path:
    name = hashlib.sha256(_location(url).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache / "git" / f"{name}{'-sha256' if len(commit) == 64 else ''}.git"


def _is_local(url: str) -> bool:
    """Say, as git does, whether a URL is a path of this machine."""
    return url.startswith("file://") or ("://" not in url and ":" not in url.partition("/")[0])


def _location(url: str) -> str:
    """Return the URL with a path made absolute, since git is not run where we are."""
    return url if "://" in url or not _is_local(url) else os.path.abspath(url)


def relative_url(parent: str, url: str) -> str:
    """Resolve a submodule's `./…` or `../…` against its parent's URL, as git-submodule(1) says."""
    base = (parent if "://" in parent or not _is_local(parent) else _location(parent)).rstrip("/")
    separator = "/"
    while url.startswith(("./", "../")):
        if url.startswith("../"):
            head, slash, _ = base.rpartition("/")
            if not slash:
                head, colon, _ = base.rpartition(":")
                separator = ":" if colon else "/"
            base = head
            url = url[3:]
        else:
            url = url[2:]
    return f"{base}{separator}{url.rstrip('/')}"
