"""Commits of git repositories, including submodules and Git LFS files.

The files equal those of `git clone` on Linux without configuration. `.gitattributes` apply (`eol`, `ident`,
`working-tree-encoding`), Git LFS pointers are replaced by their content, other filters do not run. The user's
configuration (`core.autocrlf`, filters, hooks) has no effect. Files are read from a bare repository in the cache; only
those with such an attribute are checked out.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import SettingsError, SourceError
from ..runner.util.atomic_files import sha256_of
from ..runner.util.locks import locked
from ..util.subprocesses import MissingProgramError, ProgramError, StalledError, end, run, start
from .base import BaseSource, Pin, check_url, public_url, remove
from .lockfile import GitEntry, Lock, is_commit, is_tag

if TYPE_CHECKING:  # imported only when a tree is written: declaring a source must be cheap
    from . import deterministic_tar

SUBMODULE_SCHEMES = ("https://", "http://", "ssh://", "git://", "git+ssh://", "ssh+git://")
"""Schemes that `.gitmodules` may use, besides `host:path` and relative URLs. `ext::` and local files are rejected."""

UNREACHABLE = (
    r"could not resolve|unable to (look up|connect|access)|(could not|couldn't|failed to) connect|timed out"
    r"|connection (refused|reset)|authentication failed|permission denied|access denied|could not read"
    r"|not found|does not exist|does not appear to be|terminal prompts disabled|certificate"
)
"""Pattern of git's messages for errors that another kind of fetch would not avoid."""

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

ATTRIBUTES = ("filter", "eol", "ident", "working-tree-encoding")
"""Attributes by which a checked-out file may differ from the committed one (gitattributes(5))."""

PATHS_AT_ONCE = 50_000
"""Number of paths whose attributes are queried at once. The answer has some hundred bytes per path."""

POINTER_LIMIT = 1024
"""Bytes below which a file may be a Git LFS pointer, as in git-lfs."""

POINTER_START = re.compile(rb"version (https?://git-media\.io/v/2|https://(git-lfs|hawser)\.github\.com/spec/v1)\n")
POINTER = re.compile(POINTER_START.pattern + rb"oid sha256:(?P<oid>[0-9a-f]{64})\nsize (?P<size>[0-9]{1,18})\s*")
"""A Git LFS pointer (git-lfs, docs/spec.md). Pointers with extensions are not supported."""

SETTINGS_LIMIT = 1 << 20
"""Maximum bytes of a `.gitmodules` or `.lfsconfig`."""

SILENCE = 300.0
"""Seconds without progress after which a git command counts as stalled."""

SUBMODULES = 300
"""Maximum number of submodules of a tree. A hostile one could include itself twice, at an older commit."""


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
class Git(BaseSource[GitPin]):
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
            listing = _git("ls-remote", "--", _location(self.url), *peeled, "refs/tags/*").decode(errors="replace")
        except ProgramError as error:
            raise self.error(
                f"cannot be looked up: {error.reason}", error.hint or "Is the URL right, and the network there?"
            ) from error
        found = {ref: commit for commit, _, ref in (line.partition("\t") for line in listing.splitlines())}
        for name in peeled:
            if is_commit(found.get(name)):
                return GitEntry(found[name], _tag_of(name, found))
        hint = "Look for its name with `git ls-remote`."
        if re.fullmatch(r"[0-9a-f]{4,63}", self.rev):
            hint = "If it is an abbreviated commit, write it in full; only that is a pin."
        raise self.error("cannot be looked up: the repository has no branch or tag of that name", hint)

    def _write_tar(self, out: BinaryIO, pin: GitPin, cache: Path, scratch: Path) -> None:
        try:
            self._write_commit(out, pin, cache, scratch)
        except _DamagedError:
            out.seek(0)
            out.truncate()
            remove(_folder(cache, self.url, pin.commit))
            try:
                self._write_commit(out, pin, cache, scratch)
            except _DamagedError as error:
                raise self.error(f"cannot be read: {error}", f"Remove {cache / 'git'} and try again.") from error

    def _write_commit(self, out: BinaryIO, pin: GitPin, cache: Path, scratch: Path) -> None:
        from . import deterministic_tar

        repository = _Repository(cache, self.url, pin.commit)
        repository.fetch(pin.commit, self)
        commit = repository.git("cat-file", "commit", pin.commit + "^{commit}").partition(b"\n\n")[0]
        committed = re.search(rb"^committer .*> (\d{1,18}) [+-]\d+$", commit, re.MULTILINE)
        with contextlib.ExitStack() as stack:
            checkout = _Checkout(self, cache, scratch, stack)
            try:
                entries = list(checkout.entries(repository, pin.commit, ""))
                deterministic_tar.write(out, entries, int(committed[1]) if committed else 0)
            except deterministic_tar.TreeError as error:
                raise self.error(f"is refused: {error}", "Tell its authors.") from error


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


class _Checkout:
    """Reader of a commit and its submodules as entries of one tree.

    Args:
        source: The source, for error messages.
        cache: Cache folder that contains the repositories.
        scratch: Folder for temporary files.
        stack: Closed after all entries are read.
    """

    def __init__(self, source: Git, cache: Path, scratch: Path, stack: contextlib.ExitStack) -> None:
        self.source = source
        self.cache = cache
        self.scratch = scratch
        self.stack = stack
        self.count = 0

    def entries(self, repository: _Repository, commit: str, prefix: str) -> Iterator[deterministic_tar.Entry]:
        """Yield the entries of a commit and, below their paths, of its submodules.

        Args:
            repository: Repository that contains the commit.
            commit: Commit hash.
            prefix: Path of the submodule with a trailing slash; empty for the source itself.

        Raises:
            SourceError: Fetching failed, or the tree is rejected.
            TreeError: A name or a link is unsafe.
            _DamagedError: An object is missing in the repository.
        """
        from . import deterministic_tar

        blobs = self.stack.enter_context(_blobs(repository))
        listed = []
        for line in repository.git("ls-tree", "-r", "-l", "-z", "--full-tree", commit).split(b"\0")[:-1]:
            description, _, path = line.partition(b"\t")
            mode, kind, blob, size = description.decode().split()
            if size == "BAD":
                raise _DamagedError(f"the object {blob} is missing")
            item = _Listed(mode, kind, blob, size, deterministic_tar.decoded(path))
            if any(part.lower() == ".git" for part in item.path.split("/")):
                raise deterministic_tar.TreeError(f"it holds the unsafe name {item.path!r}")
            listed.append(item)
        files = {item.path: item for item in listed if item.mode in ("100644", "100755", "100664")}
        replaced = self._replaced(repository, commit, files, blobs)
        modules: dict[str, str] | None = None
        for item in listed:
            inside = prefix + item.path
            if item.mode == "120000":
                if int(item.size) > deterministic_tar.LINK_LIMIT:
                    raise deterministic_tar.TreeError(f"its link {inside!r} has a target of {item.size} bytes")
                with blobs(item) as content:
                    yield deterministic_tar.Link(inside, deterministic_tar.decoded(content.read(int(item.size))))
            elif item.path in replaced:
                yield deterministic_tar.from_file(inside, replaced[item.path], item.mode == "100755")
            elif item.kind == "blob":
                yield deterministic_tar.File(
                    inside, int(item.size), item.mode == "100755", functools.partial(blobs, item)
                )
            elif item.kind == "commit":
                yield deterministic_tar.Folder(inside)
                if self.source.submodules:
                    if modules is None:
                        modules = self._modules(repository, files.get(".gitmodules"))
                    yield from self._submodule(modules.get(item.path), item.hash, inside)

    # Attributes

    def _replaced(
        self, repository: _Repository, commit: str, files: dict[str, _Listed], blobs: _BlobReader
    ) -> dict[str, Path]:
        """Return the files that a checkout changes, each with the path of its new content."""
        if not any(path.rpartition("/")[2] == ".gitattributes" for path in files):
            return {}
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        (folder / "tree").mkdir()
        settings = [f"--git-dir={repository.folder}", f"--work-tree={folder / 'tree'}"]
        index = {"GIT_INDEX_FILE": str(folder / "index")}
        try:
            _git(*settings, "read-tree", commit, variables=index)
        except ProgramError as error:
            raise self.source.error(f"cannot be read: {error.reason}", "Tell its authors.") from error
        attributes = self._attributes(settings, index, files)
        pointers = self._pointers({path for path, (filter, *_) in attributes.items() if filter == "lfs"}, files, blobs)
        converted = [
            path
            for path, (_, eol, ident, encoding) in attributes.items()
            if path not in pointers
            and (eol == "crlf" or ident == "set" or encoding not in ("unspecified", "unset", "set"))
        ]
        if converted:
            filters = {filter for filter, *_ in attributes.values()} - {"unspecified", "unset", "set"}
            switched_off = [
                f"filter.{name}.{setting}"
                for name in sorted(filters)
                for setting in ("smudge=", "clean=", "process=", "required=false")
            ]
            options = [word for setting in switched_off for word in ("-c", setting)]
            command = ("checkout-index", "--quiet", "-z", "--stdin")
            _git(*settings, *options, *command, variables=index, stdin=_listing(converted))
        if pointers:
            self._fetch_lfs(repository, commit, pointers, files.get(".lfsconfig"))
        return {
            **{path: folder / "tree" / os.fsdecode(_encoded(path)) for path in converted},
            **{path: repository.lfs_object(oid) for path, (oid, _) in pointers.items()},
        }

    def _attributes(
        self, settings: list[str], index: dict[str, str], files: Iterable[str]
    ) -> dict[str, tuple[str, str, str, str]]:
        """Return the `ATTRIBUTES` of each path that has any."""
        from . import deterministic_tar

        found = {}
        paths = list(files)
        for first in range(0, len(paths), PATHS_AT_ONCE):
            listing = _listing(paths[first : first + PATHS_AT_ONCE])
            words = _git(
                *settings, "check-attr", "--cached", "-z", "--stdin", *ATTRIBUTES, variables=index, stdin=listing
            ).split(b"\0")[:-1]
            for path, values in zip(words[:: 3 * len(ATTRIBUTES)], _grouped(words[2::3]), strict=True):
                if any(value != "unspecified" for value in values):
                    found[deterministic_tar.decoded(path)] = values
        return found

    def _pointers(
        self, paths: Iterable[str], files: dict[str, _Listed], blobs: _BlobReader
    ) -> dict[str, tuple[str, int]]:
        """Return the SHA-256 and size of the content of each Git LFS pointer.

        A file with the attribute that was committed without git-lfs is not a pointer. A checkout leaves it unchanged.
        """
        pointers = {}
        for path in sorted(paths):
            item = files[path]
            if int(item.size) >= POINTER_LIMIT:
                continue
            with blobs(item) as content:
                text = content.read(int(item.size))
            if match := POINTER.fullmatch(text):
                pointers[path] = match["oid"].decode(), int(match["size"])
            elif POINTER_START.match(text):
                raise self.source.error(
                    f"cannot be read: its file {path} is a Git LFS pointer of an unknown kind", "Tell its authors."
                )
        return pointers

    def _fetch_lfs(
        self, repository: _Repository, commit: str, pointers: dict[str, tuple[str, int]], config: _Listed | None
    ) -> None:
        """Fetch the content of pointers into the repository (git-lfs-fetch(1)).

        Raises:
            SourceError: git-lfs is missing, or the fetch failed.
        """
        missing = repository.missing_lfs_objects(pointers)
        if not missing:
            return
        if not shutil.which("git-lfs"):
            raise self.source.error(
                f"needs git-lfs, which is not installed here: its file {missing[0]} is stored with Git LFS",
                "Install it (Debian: `apt install git-lfs`; macOS: `brew install git-lfs`).",
            )
        settings = [f"remote.origin.url={_location(repository.url)}"]
        # Read .lfsconfig here, because git-lfs would follow its includes, even to local files.
        declared = self._settings(repository, config, r"^(lfs\.url|remote\.origin\.lfsurl)$")
        own = {key for key in declared if _setting(key)}
        settings += [
            f"{key}={self._upstream_url(repository.url, url, 'Git LFS server')}"
            for key, url in declared.items()
            if key not in own
        ]
        storage = repository.folder / "lfs"
        try:
            # Set it in the repository's configuration and do not set GIT_DIR: if the server is a local path, git-lfs
            # would read that repository with the command line and environment of this one.
            _git(f"--git-dir={repository.folder}", "config", "lfs.storage", storage)
            _git(
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
            missing = repository.missing_lfs_objects(pointers) or missing
            raise self.source.error(
                f"cannot be fetched: the Git LFS file {missing[0]}: {error.reason}", error.hint
            ) from error
        if missing := repository.missing_lfs_objects(pointers):
            raise self.source.error(
                f"cannot be fetched: its server does not have the Git LFS file {missing[0]}", "Tell its authors."
            )

    # Submodules

    def _submodule(self, url: str | None, commit: str, path: str) -> Iterator[deterministic_tar.Entry]:
        leave_out = "Leave submodules out: git(…, submodules=False)."
        if url is None:
            raise self.source.error(f"has a submodule {path} whose URL its .gitmodules does not tell", leave_out)
        if not url:
            return
        self.count += 1
        if self.count > SUBMODULES:
            raise self.source.error(f"has more than {SUBMODULES} submodules", leave_out)
        inner = _Repository(self.cache, url, commit)
        inner.fetch(commit, self.source, f"its submodule {path} ({url}) ")
        yield from self.entries(inner, commit, path + "/")

    def _modules(self, repository: _Repository, item: _Listed | None) -> dict[str, str]:
        """Return the URL of each submodule by its path. The URL is empty if the submodule is not fetched."""
        values: dict[str, dict[str, str]] = {}
        for key, value in self._settings(repository, item, r"^submodule\..*\.(path|url|update)$").items():
            name, _, variable = key.rpartition(".")
            values.setdefault(name, {})[variable] = value
        return {
            module["path"]: (
                "" if module.get("update") == "none" else self._upstream_url(repository.url, module["url"])
            )
            for module in values.values()
            if module.get("path") and module.get("url")
        }

    def _settings(self, repository: _Repository, item: _Listed | None, pattern: str) -> dict[str, str]:
        """Return the settings of a file such as `.gitmodules` whose names match a pattern; none if it is missing.

        Raises:
            SourceError: The file is too large or invalid.
        """
        from . import deterministic_tar

        if item is None:
            return {}
        if int(item.size) > SETTINGS_LIMIT:
            raise self.source.error(f"is refused: its {item.path} has {item.size} bytes", "Tell its authors.")
        try:
            # An include could refer to local files, and block forever on a FIFO.
            text = _git(
                f"--git-dir={repository.folder}",
                "config",
                "--blob",
                item.hash,
                "--no-includes",
                "-z",
                "--get-regexp",
                pattern,
            )
        except ProgramError as error:
            if error.status == 1 and not error.said:  # no setting matches
                return {}
            raise self.source.error(f"is refused: its {item.path}: {error.reason}", "Tell its authors.") from error
        return {
            key: value
            for key, _, value in (line.partition("\n") for line in deterministic_tar.decoded(text).split("\0"))
            if key
        }

    def _upstream_url(self, parent: str, declared: str, what: str = "submodule") -> str:
        """Return the absolute form of an untrusted URL from an upstream repository.

        Raises:
            SourceError: The URL leads to local files, or is invalid.
        """
        url = relative_url(parent, declared) if declared.startswith(("./", "../")) else declared
        is_path_or_host = _is_local(parent) if _is_local(url) else re.match(r"[^-/:][^/:]*:(?!:)", url)
        if not url or not (url.startswith(SUBMODULE_SCHEMES) or is_path_or_host):
            raise self.source.error(
                f"has a {what} with the URL {declared!r}, which is refused",
                "Leave submodules out: git(…, submodules=False).",
            )
        try:
            check_url(url, f"{self.source}, {what}", upstream=True)
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
    """A cached repository lacks an object, or is damaged otherwise."""


class _Repository:
    """Bare repository in the cache, one per URL."""

    def __init__(self, cache: Path, url: str, commit: str) -> None:
        self.cache = cache
        self.url = url
        self.folder = _folder(cache, url, commit)
        self.format = "sha256" if len(commit) == 64 else "sha1"

    def git(self, *arguments: str) -> bytes:
        """Run git on the cached repository.

        Raises:
            _DamagedError: git failed.
        """
        try:
            return _git(f"--git-dir={self.folder}", *arguments)
        except (StalledError, MissingProgramError):  # the repository may be intact
            raise
        except ProgramError as error:
            raise _DamagedError(error.reason) from error

    def lfs_object(self, oid: str) -> Path:
        """Return the path at which git-lfs stores the content with a SHA-256."""
        return self.folder / "lfs" / "objects" / oid[:2] / oid[2:4] / oid

    def missing_lfs_objects(self, pointers: dict[str, tuple[str, int]]) -> list[str]:
        """Return the files whose content is missing. Damaged content is removed."""
        missing = []
        for path, (oid, size) in pointers.items():
            kept = self.lfs_object(oid)
            try:
                if kept.lstat().st_size == size and sha256_of(kept) == oid:
                    continue
                kept.unlink()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    raise
            missing.append(path)
        return missing

    def fetch(self, commit: str, source: Git, which: str = "") -> None:
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
            with contextlib.suppress(_DamagedError):
                if self.git("cat-file", "-t", ref + "^{commit}"):
                    return
            if not (self.folder / "objects").is_dir():
                _git(
                    "init", "--quiet", "--bare", "--template=", f"--object-format={self.format}", "--", self.folder
                )  # fmt: skip
            # Leftovers of a killed git. The lock excludes other processes.
            for stale in [*self.folder.glob("*.lock"), *self.folder.glob("objects/pack/tmp_*")]:
                remove(stale)
            try:
                self._fetch(commit, ref)
            except ProgramError as error:
                raise source.error(f"cannot be fetched: {which}{error.reason}", error.hint) from error

    def _fetch(self, commit: str, ref: str) -> None:
        try:
            self._fetch_refs("--depth=1", refs=[f"+{commit}:{ref}"])
        except ProgramError as error:
            if isinstance(error, StalledError) or re.search(UNREACHABLE, error.said, re.IGNORECASE):
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
            "fetch",
            "--progress",
            "--no-tags",
            "--no-recurse-submodules",
            *options,
            "--",
            _location(self.url),
            *refs,
            growing=self.folder,
        )


@contextlib.contextmanager
def _blobs(repository: _Repository) -> Iterator[_BlobReader]:
    """Yield a reader of blobs that uses one `git cat-file` process sequentially."""
    process = start(
        ["git", *CONFIGURATION, f"--git-dir={repository.folder}", "cat-file", "--batch"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
    )
    try:
        yield _BlobReader(process)
    finally:
        end(process)


class _BlobReader:
    """Reader of blobs from `git cat-file --batch`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    @contextlib.contextmanager
    def __call__(self, item: _Listed) -> Iterator[BinaryIO]:
        """Yield a file object. The caller must read exactly the blob's size."""
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


def _git(
    *arguments: str | Path,
    variables: dict[str, str] | None = None,
    stdin: bytes = b"",
    cwd: Path | None = None,
    growing: Path | None = None,
) -> bytes:
    return run(
        ["git", *CONFIGURATION, *arguments],
        env={**_environment(), **(variables or {})},
        cwd=cwd,
        stdin=stdin,
        silence=SILENCE,
        growing=growing,
    )


def _setting(name: str) -> bytes:
    """Return a setting of the user's git, or an empty value if it is not set."""
    with contextlib.suppress(ProgramError):
        return _git("config", "--get", name)
    return b""


def _listing(paths: Iterable[str]) -> bytes:
    """List paths for git's `-z --stdin`."""
    return b"".join(_encoded(path) + b"\0" for path in paths)


def _encoded(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _grouped(values: list[bytes]) -> Iterator[tuple[str, str, str, str]]:
    """Group a flat list of values into the values of `ATTRIBUTES` of each path."""
    each = iter(value.decode("utf-8", "replace") for value in values)
    return zip(each, each, each, each, strict=True)


def _environment() -> dict[str, str]:
    """Return the environment for git: the user's, without variables that would change the result."""
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    environment["LC_ALL"] = "C"
    environment["GIT_NO_REPLACE_OBJECTS"] = "1"
    environment["GIT_ATTR_NOSYSTEM"] = "1"
    if not sys.stdin or not sys.stdin.isatty():
        environment.setdefault("GIT_TERMINAL_PROMPT", "0")
    return environment


def _folder(cache: Path, url: str, commit: str) -> Path:
    name = hashlib.sha256(_location(url).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache / "git" / f"{name}{'-sha256' if len(commit) == 64 else ''}.git"


def _is_local(url: str) -> bool:
    """Return whether git treats a URL as a path of this machine."""
    return url.startswith("file://") or ("://" not in url and ":" not in url.partition("/")[0])


def _location(url: str) -> str:
    """Make a path absolute, because git runs in another working folder. Other URLs are returned unchanged."""
    return url if "://" in url or not _is_local(url) else os.path.abspath(url)


def relative_url(parent: str, url: str) -> str:
    """Resolve a submodule's `./…` or `../…` against its parent's URL (git-submodule(1)).

    Returns:
        The URL, or an empty string if it leads out of the parent's host.
    """
    base = (parent if "://" in parent or not _is_local(parent) else _location(parent)).rstrip("/")
    host = re.match(r"[A-Za-z0-9+.-]+://[^/]*|[^/:]+:|", base)
    root, path = (host[0], base[host.end() :]) if host else ("", base)
    parts = [part for part in path.split("/") if part]
    while url.startswith(("./", "../")):
        if url.startswith("../"):
            if not parts:
                return ""
            parts.pop()
        url = url.partition("/")[2].lstrip("/")
    separator = "" if root.endswith(":") and not path.startswith("/") else "/"
    return root + separator + "/".join([*parts, url.rstrip("/")])
