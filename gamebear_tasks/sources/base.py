"""What all kinds of sources have in common: a pin, an identity, a tar file in the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
import shutil
import tempfile
import urllib.parse
from abc import ABC, abstractmethod
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from ..errors import SettingsError, SourceError
from ..runner.util.atomic_files import locked, sha256_of, sync_folder
from .declare import LOCK_FILE
from .lockfile import Lock
from .program import ProgramError

TREES = 2
"""Version of what a tree holds for a pin. To change that, raise it together with `spec.FORMAT`."""


class Pin(ABC):
    """What exactly a source is; two machines that have the same pin have the same files."""

    @abstractmethod
    def identity(self) -> dict[str, str | int | bool]:
        """Return what goes into a job's digest: content only, never where it was found."""

    @property
    @abstractmethod
    def file_name(self) -> str:
        """The name of the tar file in the cache, without its extensions."""


PinT = TypeVar("PinT", bound=Pin)


@dataclasses.dataclass(frozen=True)
class BaseSource(ABC, Generic[PinT]):
    """An upstream tree that a job can have under a name.

    Attributes:
        alternatives: the names of the sources that `sources=…` would give instead (for error messages).
    """

    alternatives: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False, kw_only=True)

    @abstractmethod
    def __str__(self) -> str:
        """Return what a person calls it."""

    @abstractmethod
    def pin(self, lock: Lock) -> PinT | None:
        """Return what exactly it is, as far as that is known without a network; else None."""

    @abstractmethod
    def _write_tar(self, out: BinaryIO, pin: PinT, cache: Path, scratch: Path) -> None:
        """Fetch the tree and write it with `deterministic_tar.write`.

        Args:
            out: the tar file.
            pin: what is wanted.
            cache: the folder for what is worth keeping.
            scratch: an empty folder, removed afterwards.
        """

    def pinned(self, lock: Lock) -> PinT:
        """Return what exactly it is.

        Raises:
            SourceError: that is not known: it is not in the lock file.
        """
        if pin := self.pin(lock):
            return pin
        raise SourceError(
            f"{self} is not pinned: {LOCK_FILE} has no entry for it.",
            f"Run `doit lock` and commit {LOCK_FILE}.",
        )

    def identity(self, lock: Lock) -> dict[str, str | int | bool]:
        """Return what goes into a job's digest; reads no network and runs no program.

        Raises:
            SourceError: it is not pinned.
        """
        return self.pinned(lock).identity()

    def metadata(self, lock: Lock) -> dict[str, str]:
        """Return what a program may know of it (`__sources__`); reads no network and runs no program.

        Its date is not here: the tree has it.

        Raises:
            SourceError: it is not pinned.
        """
        return self._metadata(self.pinned(lock), lock)

    @abstractmethod
    def _metadata(self, pin: PinT, lock: Lock) -> dict[str, str]:
        """Return the metadata of a pin."""

    def fetch(self, cache: Path, lock: Lock) -> Path:
        """Return the tree as a tar file (see `deterministic_tar`) in the cache; fetch it if it is missing or damaged.

        The file's name ends with its SHA-256, so that a damaged file is noticed and fetched again.
        Threads and processes may ask for the same tree at the same time; one fetches, the others wait.

        Args:
            cache: a folder of the user's own; made if need be.
            lock: what `doit lock` wrote.

        Raises:
            SourceError: it cannot be had, or is not what its pin says.
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
            raise SourceError(
                f"{self} cannot be kept in {cache}: {error.strerror or error}.", "Is there space, and is it yours?"
            ) from error

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
            raise self.error(f"cannot be fetched: {error.reason}", error.hint) from error
        finally:
            remove(scratch)

    def error(self, what: str, hint: str = "") -> SourceError:
        """Return an error about this source.

        Args:
            what: goes on after the source's name; no full stop.
            hint: what to do now; the alternatives are added.
        """
        hint = hint or "It is not in the cache, so the network is needed this once."
        others = " or ".join(f"`doit sources={name}`" for name in self.alternatives)
        return SourceError(f"{self} {what}.", f"{hint} Another source for it: {others}." if others else hint)


def _cached(cache: Path, name: str) -> Path | None:
    """Return the tar of a tree in the cache; remove a damaged one. None where there is none."""
    for path in sorted(cache.glob(f"{glob.escape(name)}.*.tar")):
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of last use
        if path.is_file() and sha256_of(path) == path.name.split(".")[-2]:
            return path
        remove(path)
    return None


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_url(url: object, what: str, upstream: bool = False) -> None:
    """Refuse what cannot be a URL, or must not be one.

    Args:
        url: it.
        what: begins the error message.
        upstream: it is written in somebody's repository: a user name in it is nobody's secret.

    Raises:
        SettingsError: it is empty, an option, holds control characters, a password or a token.
    """
    if isinstance(url, str) and (host := _host_after_secret(url, upstream)) is not None:
        raise SettingsError(
            f"{what}: the URL of {host} holds a password, or a user name that may be a token, which would end up in "
            "dodo.py, logs and lock files.",
            "Leave it out; git takes it from its credential helper or ~/.netrc.",
        )
    if not isinstance(url, str) or not url or url.startswith("-") or re.search(r"[\x00-\x1f\x7f]", url):
        raise SettingsError(f"{what}: {url!r} is no URL.", "Write it in full, as https://host/path.")


def public_url(url: str) -> str:
    """Return a URL without what may be secret: user and password but for SSH's user, query and fragment."""
    if "://" not in url:
        return url
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # brackets around what is no address
        return url.partition("://")[0] + "://"
    place = parts.netloc.rpartition("@")[2]
    if parts.scheme in ("ssh", "git+ssh", "ssh+git") and "@" in parts.netloc:
        place = f"{parts.netloc.rpartition('@')[0].partition(':')[0]}@{place}"
    return urllib.parse.urlunsplit((parts.scheme, place, parts.path, "", ""))


def _host_after_secret(url: str, names_allowed: bool) -> str | None:
    """Return what stands after a password or token in a URL, None where it has neither.

    With SSH a user name is a user name; with all else it may be a token.
    """
    if match := re.match(r"([A-Za-z0-9+.-]+)://([^/?#]*)@([^/?#]*)", url):
        scheme, user, host = match.groups()
        named = names_allowed or scheme.lower() in ("ssh", "git+ssh", "ssh+git")
        return None if named and ":" not in urllib.parse.unquote(user) else host
    # A password with a `/` in it, that should have been escaped: what follows the colon is no port.
    match = re.match(r"[A-Za-z0-9+.-]+://[^/?#@:\[\]]*:(?![0-9]*(?:[/?#]|\Z)).*@([^/?#]*)", url, re.DOTALL)
    return match[1] if match else None
