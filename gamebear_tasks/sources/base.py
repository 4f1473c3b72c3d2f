"""Base class of all sources: pin, identity, cached tar file."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import os
import re
import shlex
import shutil
import tempfile
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from ..errors import SettingsError, SourceError
from ..runner.util.atomic_files import sha256_of, sync_folder
from ..runner.util.locks import locked
from ..util.subprocesses import ProgramError
from .declare import LOCK_FILE
from .lockfile import Lock

REPORT = "Use another version, or report it upstream."
"""Hint for a source that is invalid itself."""

TREES = 2
"""Version of the tree that a pin produces. Increase it together with `spec.FORMAT`."""


class Pin(ABC):
    """Exact identification of a source. Equal pins yield equal files on every machine."""

    @abstractmethod
    def identity(self) -> dict[str, str | int | bool]:
        """Return the source's part of a job's digest. It depends on the content only, not on the location."""

    @property
    @abstractmethod
    def file_name(self) -> str:
        """Name of the cached tar file, without its extensions."""


PinT = TypeVar("PinT", bound=Pin)


@dataclasses.dataclass(frozen=True)
class BaseSource(ABC, Generic[PinT]):
    """An upstream tree that a job uses under a name.

    Attributes:
        alternatives: Names of the sources that `sources=…` would select instead, for error messages.
    """

    alternatives: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False, kw_only=True)

    @abstractmethod
    def __str__(self) -> str:
        """Return the display name."""

    @abstractmethod
    def pin(self, lock: Lock) -> PinT | None:
        """Return the pin, or None if it cannot be determined without network access."""

    def pinned(self, lock: Lock) -> PinT:
        """Return the pin.

        Raises:
            SourceError: The source is not pinned: the lock file has no entry for it.
        """
        if pin := self.pin(lock):
            return pin
        raise SourceError(
            f"{self} is not pinned: it has no entry in {LOCK_FILE}.",
            f"Run `gamebear lock` and commit {LOCK_FILE}.",
        )

    def identity(self, lock: Lock) -> dict[str, str | int | bool]:
        """Return the source's part of a job's digest. Uses no network and runs no program.

        Raises:
            SourceError: The source is not pinned.
        """
        return self.pinned(lock).identity()

    def metadata(self, lock: Lock) -> dict[str, str]:
        """Return the metadata that buildscripts see as `__sources__`. Uses no network and runs no program.

        It excludes the source's date, which is stored in the tree.

        Raises:
            SourceError: The source is not pinned.
        """
        return self._metadata(self.pinned(lock), lock)

    @abstractmethod
    def _metadata(self, pin: PinT, lock: Lock) -> dict[str, str]:
        """Return the metadata of a pin."""

    def files(self) -> Mapping[str, Path]:
        """Return the local files that the identity names by SHA-256; empty for a tree that is sent as a tar file."""
        return {}

    def warning(self, lock: Lock) -> str:
        """Return a warning to show before a build, in one line; empty if there is none."""
        return ""

    def without(self, targets: Iterable[str]) -> BaseSource[PinT]:
        """Return the source of a task with these targets, which a local folder excludes."""
        return self

    def error(self, what: str, hint: str = "") -> SourceError:
        """Return an error about this source.

        Args:
            what: Failure and cause, without the source's name and a full stop.
            hint: Suggested fix. The alternatives are appended.
        """
        hint = hint or "Check the network, then run doit again."
        others = " or ".join(f"`doit sources={name}`" for name in self.alternatives)
        return SourceError(f"{self} {what}.", f"{hint} Or use another source: {others}." if others else hint)


class FetchedSource(BaseSource[PinT]):
    """An upstream tree that is fetched into the cache, as a tar file."""

    @abstractmethod
    def _write_tar(self, out: BinaryIO, pin: PinT, cache: Path, scratch: Path) -> None:
        """Fetch the tree and write it with `deterministic_tar.write`.

        Args:
            out: The tar file.
            pin: Pin of the tree.
            cache: Folder for downloads that are reused.
            scratch: Empty folder, removed afterwards.
        """

    def fetch(self, cache: Path, lock: Lock) -> Path:
        """Return the tree as a tar file (see `deterministic_tar`) in the cache; fetch it if it is missing or damaged.

        The file's name ends with its SHA-256, so a damaged file is detected and fetched again.
        Concurrent threads and processes fetch a tree once; the others wait.

        Args:
            cache: Cache folder, private to the user; created if missing.
            lock: Content of the lock file.

        Raises:
            SourceError: Fetching failed, or the content does not match the pin.
        """
        pin = self.pinned(lock)
        name = f"{pin.file_name}.{TREES}"
        try:
            if found := _cached(cache, name):
                return found
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(cache / f".{name}.lock"):
                return _cached(cache, name) or self._fetch(pin, cache, name)
        except OSError as error:
            raise storage_error(cache, error) from error

    def _fetch(self, pin: PinT, cache: Path, name: str) -> Path:
        for stale in cache.glob(f".{glob.escape(name)}.*"):  # left by a process that was killed
            if stale.suffix != ".lock":
                remove(stale)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=cache))
        try:
            tree = scratch / "tree.tar"
            (scratch / "parts").mkdir()
            with tree.open("wb") as out:
                self._write_tar(out, pin, cache, scratch / "parts")
                out.flush()
                os.fsync(out.fileno())
            target = cache / f"{name}.{sha256_of(tree)}.tar"
            tree.rename(target)
            sync_folder(cache)
            return target
        except ProgramError as error:
            from ..util.disk_space import room_hint

            raise self.error(f"cannot be fetched: {error.reason}", error.hint or room_hint(cache)) from error
        finally:
            remove(scratch)


def storage_error(path: Path, error: OSError) -> SourceError:
    """Return the error for a file or folder of this machine that cannot be read or written."""
    from ..runner.util.free_space import FULL

    if error.errno in FULL:
        hint = f"Make room in {path}, then run doit again."
    elif error.errno in (errno.EACCES, errno.EPERM):
        hint = f'Make it yours: `sudo chown -R "$USER" {shlex.quote(str(path))}`.'
    else:
        hint = f"Check {path}."
    return SourceError(f"{path} cannot be used: {error.strerror or error}.", hint)


def _cached(cache: Path, name: str) -> Path | None:
    """Return the tar of a tree in the cache; remove a damaged one. None if there is none."""
    for path in sorted(cache.glob(f"{glob.escape(name)}.*.tar")):
        with contextlib.suppress(OSError):
            os.utime(path)  # garbage collection uses the time of last use
        if path.is_file() and sha256_of(path) == sha256_of_tree(path):
            return path
        remove(path)
    return None


def sha256_of_tree(path: Path) -> str:
    """Return the SHA-256 in the file name of a fetched tree, which `fetch` has verified."""
    return path.name.split(".")[-2]


def remove(path: Path) -> None:
    """Remove a file or a folder recursively; best effort for a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_url(url: object, what: str, upstream: bool = False) -> None:
    """Validate a URL.

    Args:
        url: The URL.
        what: Beginning of the error message.
        upstream: The URL is from an upstream repository, so that a user name in it is public.

    Raises:
        SettingsError: The URL is empty, looks like an option, or contains control characters, a password or a token.
    """
    if isinstance(url, str) and (host := _host_after_secret(url, upstream)) is not None:
        raise SettingsError(
            f"{what}: the URL of {host} contains a password or token.",
            "Remove it; git takes it from its credential helper or ~/.netrc.",
        )
    if not isinstance(url, str) or not url or url.startswith("-") or re.search(r"[\x00-\x1f\x7f]", url):
        raise SettingsError(f"{what}: {url!r} is not a URL.", "Use a full URL such as https://host/path.")


def public_url(url: str) -> str:
    """Return a URL without potential secrets: user and password (except SSH's user), query and fragment."""
    if "://" not in url:
        return url
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # invalid address in brackets
        return url.partition("://")[0] + "://"
    place = parts.netloc.rpartition("@")[2]
    if parts.scheme in ("ssh", "git+ssh", "ssh+git") and "@" in parts.netloc:
        place = f"{parts.netloc.rpartition('@')[0].partition(':')[0]}@{place}"
    return urllib.parse.urlunsplit((parts.scheme, place, parts.path, "", ""))


def _host_after_secret(url: str, names_allowed: bool) -> str | None:
    """Return the host of a URL that contains a password or token, otherwise None.

    A user name in a URL may be a token, except with SSH.
    """
    if match := re.match(r"([A-Za-z0-9+.-]+)://([^/?#]*)@([^/?#]*)", url):
        scheme, user, host = match.groups()
        named = names_allowed or scheme.lower() in ("ssh", "git+ssh", "ssh+git")
        return None if named and ":" not in urllib.parse.unquote(user) else host
    # A password with an unescaped `/`: the text after the colon is not a port.
    match = re.match(r"[A-Za-z0-9+.-]+://[^/?#@:\[\]]*:(?![0-9]*(?:[/?#]|\Z)).*@([^/?#]*)", url, re.DOTALL)
    return match[1] if match else None
