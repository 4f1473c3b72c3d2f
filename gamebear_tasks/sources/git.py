"""A commit of a git repository, with its submodules.

The files are what `git clone` of the commit gives on Linux without a configuration: `.gitattributes` apply (`eol`,
`ident`, `working-tree-encoding`), Git LFS files have their content, other filters are not run. The user's
configuration (`core.autocrlf`, filters, hooks) does not change them. They are read from a bare repository in the cache;
only files with such an attribute are checked out.
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
from ..runner.util.atomic_files import locked, sha256_of
from .base import BaseSource, Pin, check_url, public_url, remove
from .lockfile import GitEntry, Lock, is_commit, is_tag
from .program import SILENCE, ProgramError, StalledError, run

if TYPE_CHECKING:  # imported when a tree is written: declaring a source is to cost nothing
    from . import deterministic_tar

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
    "GIT_CONFIG",
    "GIT_ATTR_SOURCE",
    "GIT_LITERAL_PATHSPECS",
    "GIT_GLOB_PATHSPECS",
    "GIT_NOGLOB_PATHSPECS",
    "GIT_ICASE_PATHSPECS",
)
"""Variables that would point git to another repository (doit may be run by a hook), or change what it reads there."""

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
"""Settings of every git: nothing of the user's runs or changes files, and a silent server is given up."""

ATTRIBUTES = ("filter", "eol", "ident", "working-tree-encoding")
"""The attributes by which a checked out file may differ from what was committed, see gitattributes(5)."""

PATHS_AT_ONCE = 50_000
"""Paths whose attributes are asked for at once: the answer has some hundred bytes for each."""

POINTER_LIMIT = 1024
"""Bytes below which a Git LFS file may be a pointer, as git-lfs has it."""

POINTER_START = re.compile(rb"version (https?://git-media\.io/v/2|https://(git-lfs|hawser)\.github\.com/spec/v1)\n")
POINTER = re.compile(POINTER_START.pattern + rb"oid sha256:(?P<oid>[0-9a-f]{64})\nsize (?P<size>[0-9]{1,18})\s*")
"""A pointer, see git-lfs's docs/spec.md; one with extensions is not supported."""

SETTINGS_LIMIT = 1 << 20
"""Bytes that a `.gitmodules` or `.lfsconfig` may have."""

SUBMODULES = 300
"""How many submodules a tree may have in all; a hostile one could have itself, twice, at an older commit."""


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
        """`git-<commit>`, or `git-<commit>-alone` without submodules."""
        return f"git-{self.commit}{'' if self.submodules else '-alone'}"


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
        entry = lock.git.get(self.key) if self.floating else GitEntry(self.rev)
        return GitPin(entry.commit, self.submodules) if entry else None

    def _metadata(self, pin: GitPin, lock: Lock) -> dict[str, str]:
        # Upstream may move or add a tag, so only one in the lock file is the same for everybody.
        tag = lock.git[self.key].tag if self.floating else ""
        return {"url": public_url(self.url), "commit": pin.commit, "tag": tag}

    def resolve(self) -> GitEntry:
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
    """Return the tag that a ref is, or a tag of its commit: annotated before lightweight, then the highest version.

    Args:
        ref: one of `found`.
        found: what `git ls-remote` lists: hashes by ref, the commits of annotated tags at `<ref>^{}`.
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
    """Reads a commit and its submodules as entries of one tree.

    Args:
        source: what errors are about.
        cache: the folder with the repositories.
        scratch: a folder for temporary files.
        stack: closed when all entries are read.
    """

    def __init__(self, source: Git, cache: Path, scratch: Path, stack: contextlib.ExitStack) -> None:
        self.source = source
        self.cache = cache
        self.scratch = scratch
        self.stack = stack
        self.count = 0

    def entries(self, repository: _Repository, commit: str, prefix: str) -> Iterator[deterministic_tar.Entry]:
        """Give what is in a commit and, below its path, in each submodule.

        Args:
            repository: has the commit.
            commit: its hash.
            prefix: the path of the submodule, with a slash at the end; empty for the source itself.

        Raises:
            SourceError: something cannot be fetched or is refused.
            TreeError: a name or a link is unsafe.
            _DamagedError: the repository lacks an object.
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

    # attributes

    def _replaced(
        self, repository: _Repository, commit: str, files: dict[str, _Listed], blobs: _BlobReader
    ) -> dict[str, Path]:
        """Return the files that a checkout changes, each with a file that has its content."""
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
            with _listing(converted) as paths:
                _git(*settings, *options, "checkout-index", "--quiet", "-z", "--stdin", variables=index, stdin=paths)
        if pointers:
            self._fetch_lfs(repository, commit, pointers, files.get(".lfsconfig"))
        return {
            **{path: folder / "tree" / os.fsdecode(_encoded(path)) for path in converted},
            **{path: repository.lfs_object(oid) for path, (oid, _) in pointers.items()},
        }

    def _attributes(
        self, settings: list[str], index: dict[str, str], files: Iterable[str]
    ) -> dict[str, tuple[str, str, str, str]]:
        """Return the `ATTRIBUTES` of each path that has one."""
        from . import deterministic_tar

        found = {}
        paths = list(files)
        for first in range(0, len(paths), PATHS_AT_ONCE):
            with _listing(paths[first : first + PATHS_AT_ONCE]) as listing:
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
        """Return the SHA-256 and size of the content of those files that are Git LFS pointers.

        A file with the attribute that was committed without git-lfs is no pointer; a checkout leaves it as it is.
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
        """Have the content of pointers in the repository; see git-lfs-fetch(1)."""
        missing = repository.missing_lfs_objects(pointers)
        if not missing:
            return
        if not shutil.which("git-lfs"):
            raise self.source.error(
                f"needs git-lfs, which is not installed here: its file {missing[0]} is stored with Git LFS",
                "Install it (Debian: `apt install git-lfs`; macOS: `brew install git-lfs`).",
            )
        settings = [f"remote.origin.url={_location(repository.url)}"]
        # git-lfs itself would follow the includes of a .lfsconfig, also to our own files.
        declared = self._settings(repository, config, r"^(lfs\.url|remote\.origin\.lfsurl)$")
        own = {key for key in declared if _setting(key)}
        settings += [
            f"{key}={self._upstream_url(repository.url, url, 'Git LFS server')}"
            for key, url in declared.items()
            if key not in own
        ]
        storage = repository.folder / "lfs"
        try:
            # In the repository's own settings and without GIT_DIR: where the server is a path, git-lfs reads that
            # repository with our command line and our environment.
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

    # submodules

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
        """Return the URL of each submodule by its path; an empty one where it is not to be fetched."""
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
        """Return the settings of a file such as `.gitmodules` whose names match a pattern; none where it is missing."""
        from . import deterministic_tar

        if item is None:
            return {}
        if int(item.size) > SETTINGS_LIMIT:
            raise self.source.error(f"is refused: its {item.path} has {item.size} bytes", "Tell its authors.")
        try:
            # An include would be followed to our own files, and wait for ever for a FIFO.
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
            if error.status == 1 and not error.said:  # none matches
                return {}
            raise self.source.error(f"is refused: its {item.path}: {error.reason}", "Tell its authors.") from error
        return {
            key: value
            for key, _, value in (line.partition("\n") for line in deterministic_tar.decoded(text).split("\0"))
            if key
        }

    def _upstream_url(self, parent: str, declared: str, what: str = "submodule") -> str:
        """Return a URL that upstream has written in its repository, made whole; refuse one that leads to our files."""
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
        except StalledError:
            raise
        except ProgramError as error:
            raise _DamagedError(error.reason) from error

    def lfs_object(self, oid: str) -> Path:
        """Return where git-lfs keeps the content with a SHA-256."""
        return self.folder / "lfs" / "objects" / oid[:2] / oid[2:4] / oid

    def missing_lfs_objects(self, pointers: dict[str, tuple[str, int]]) -> list[str]:
        """Return the files whose content is not here; what is damaged is removed."""
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
                _git(
                    "init", "--quiet", "--bare", "--template=", f"--object-format={self.format}", "--", self.folder
                )  # fmt: skip
            # Left by a git that was killed; nobody else is here.
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
    """Give what reads blobs, one after the other, from one `git cat-file`."""
    process = subprocess.Popen(
        ["git", *CONFIGURATION, f"--git-dir={repository.folder}", "cat-file", "--batch"],
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


def _git(
    *arguments: str | Path,
    variables: dict[str, str] | None = None,
    stdin: BinaryIO | None = None,
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
    """Return a setting of the user's git; empty where there is none."""
    with contextlib.suppress(ProgramError):
        return _git("config", "--get", name)
    return b""


@contextlib.contextmanager
def _listing(paths: Iterable[str]) -> Iterator[BinaryIO]:
    """Give a temporary file with paths for git's `-z --stdin`."""
    with tempfile.TemporaryFile() as file:
        for path in paths:
            file.write(_encoded(path) + b"\0")
        file.seek(0)
        yield file


def _encoded(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _grouped(values: list[bytes]) -> Iterator[tuple[str, str, str, str]]:
    """Give the values of `ATTRIBUTES` of each path, from those of all."""
    each = iter(value.decode("utf-8", "replace") for value in values)
    return zip(each, each, each, each, strict=True)


def _environment() -> dict[str, str]:
    """Return the variables for git: the user's, except those that would change what is read."""
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
    """Say, as git does, whether a URL is a path of this machine."""
    return url.startswith("file://") or ("://" not in url and ":" not in url.partition("/")[0])


def _location(url: str) -> str:
    """Return the URL with a path made absolute, since git is not run where we are."""
    return url if "://" in url or not _is_local(url) else os.path.abspath(url)


def relative_url(parent: str, url: str) -> str:
    """Resolve a submodule's `./…` or `../…` against its parent's URL, as git-submodule(1) says.

    Returns:
        The URL; an empty text where it leads out of the parent's host.
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
