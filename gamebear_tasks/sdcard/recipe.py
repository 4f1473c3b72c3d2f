"""What an `sd_image()` declares: a base, what goes in, how large; data only."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from ..errors import ImageError, SettingsError
from ..jobspec.spec import Json, canonical_json
from ..util.file_hashes import opened_content_of
from ..util.text import size_in

if TYPE_CHECKING:
    from ..sources.archive import Archive

FORMAT = 1
"""The recipe's version: another one bakes every image again."""

SUFFIXES = {".img": "", ".xz": "xz", ".zst": "zstd"}
"""What compresses a target, by the end of its name."""

PROGRAMS = ("debugfs", "e2fsck", "resize2fs", "sfdisk", "fsck.fat", "mcopy", "mdir", "mmd")
"""What every image is baked with."""

LARGEST = 2**50
"""Bytes of no card that there will be."""

KEY = re.compile(r"(?<![^ \t])((?:ssh-|ecdsa-|sk-)[a-z0-9@.-]+)[ \t]+([A-Za-z0-9+/]{16,}={0,2})(?![^ \t])")
"""A public SSH key in a line of `authorized_keys`, between options and a comment, see sshd(8)."""

LENGTH = 4
"""Bytes of the length of a text in it."""

HASH = re.compile(r"\$[a-z0-9]{1,8}\$[A-Za-z0-9./$=,]{16,}|[!*]")
"""A password as shadow(5) has it, see crypt(5)."""

USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
"""A user's or a group's name, as Debian allows it."""


@dataclass(frozen=True)
class File:
    """A file that goes into an image; see `file()`."""

    path: Path
    destination: str
    mode: int | None
    owner: int
    group: int

    @property
    def permissions(self) -> int:
        """The mode that it gets: what was said, else as the file may be executed here."""
        if self.mode is not None:
            return self.mode
        try:
            return 0o755 if self.path.stat().st_mode & 0o100 else 0o644
        except OSError:
            return 0o644  # another task is to make it

    def identity(self) -> Json:
        """Return what it is, but for its content."""
        return ["file", str(self.path), self.destination, self.permissions, self.owner, self.group]


@dataclass(frozen=True)
class Tar:
    """A tar file whose members go into an image; see `tar()`."""

    path: Path
    destination: str

    def identity(self) -> Json:
        """Return what it is, but for its content."""
        return ["tar", str(self.path), self.destination]


@dataclass(frozen=True)
class User:
    """A user of an image; see `user()`."""

    name: str
    password: str | None = field(repr=False)
    authorized_keys: tuple[str | Path, ...]
    groups: tuple[str, ...]

    @property
    def key_files(self) -> list[Path]:
        """The files among the keys."""
        return [key for key in self.authorized_keys if isinstance(key, Path)]

    def identity(self) -> Json:
        """Return what it is, but for the key files' content."""
        return [self.name, self.password, [str(key) for key in self.authorized_keys], list(self.groups)]


@dataclass(frozen=True)
class Recipe:
    """What an `sd_image()` declares.

    Attributes:
        base: the image to begin with: a file, or an archive from the web.
        output: where the baked one goes; its suffix says how it is compressed.
        arch: Debian's name of the architecture.
        contents: what goes in; of two that have one name the later one stays.
        config: lines of config.txt, with headings among them.
        cmdline: words of cmdline.txt.
        enable: names of units.
        hostname: empty to keep the base's.
        user: None for none.
        size: bytes of the whole image; None for what is needed.
        free: bytes that the root file system has left at least.
    """

    base: Path | Archive
    output: Path
    arch: str
    contents: tuple[File | Tar, ...]
    config: tuple[str, ...]
    cmdline: tuple[str, ...]
    enable: tuple[str, ...]
    hostname: str
    user: User | None
    size: int | None
    free: int

    @property
    def files(self) -> list[Path]:
        """Every file of this machine that goes into the image, the base included."""
        base = [self.base] if isinstance(self.base, Path) else []
        return [*base, *(item.path for item in self.contents), *(self.user.key_files if self.user else ())]

    @property
    def programs(self) -> list[str]:
        """The programs that it is baked with; those that unpack the base as its suffix has it."""
        base = self.base if isinstance(self.base, Path) else Path(self.base.url)
        packing = (SUFFIXES.get(path.suffix, "") for path in (self.output, base))
        return [*PROGRAMS, *dict.fromkeys(filter(None, packing))]

    def identity(self) -> str:
        """Return a hash over all that is in it, but for the files' content; no secret can be read from it."""
        whole: dict[str, Json] = {
            "format": FORMAT,
            "base": str(self.base) if isinstance(self.base, Path) else self.base.sha256,
            "output": str(self.output),
            "arch": self.arch,
            "contents": [item.identity() for item in self.contents],
            "config": list(self.config),
            "cmdline": list(self.cmdline),
            "enable": list(self.enable),
            "hostname": self.hostname,
            "user": self.user.identity() if self.user else None,
            "size": self.size,
            "free": self.free,
        }
        return hashlib.sha256(canonical_json(whole)).hexdigest()

    def document(self, content: Callable[[str], tuple[str, bool]] = opened_content_of) -> dict[str, Json]:
        """Return what its image is baked from: its identity, and the SHA-256 of each file.

        Args:
            content: gives a file's SHA-256 and whether it is executable; raises OSError.

        Raises:
            ImageError: a file cannot be read.
        """
        hashes: dict[str, Json] = {}
        for path in map(str, self.files):
            try:
                hashes[path] = content(path)[0]
            except OSError as error:
                raise ImageError(
                    f"{path} cannot be read: {error.strerror}.", "Is it the target of another task, or misspelt?"
                ) from error
        return {"image": self.identity(), "files": hashes}


def state_of(document: Mapping[str, Json]) -> str:
    """Return a hash over what an image is baked from: what doit saves and compares."""
    return hashlib.sha256(canonical_json(document)).hexdigest()


def file(path: str | Path, destination: str, *, mode: int | None = None, owner: int = 0, group: int = 0) -> File:
    """Declare a file that goes into an image.

    Args:
        path: the file on this machine.
        destination: its absolute name in the image, or the folder there that it goes into under its own name: one that
            ends with a slash, or that is there.
        mode: permissions; by default 0o755 where its owner may execute the file here, else 0o644.
        owner: user id.
        group: group id.

    Raises:
        SettingsError: an argument makes no sense.
    """
    where = f"file({str(path)!r})"
    for name, number, most in (
        ("mode", 0 if mode is None else mode, "0o7777"),
        ("owner", owner, "4294967294"),
        ("group", group, "4294967294"),
    ):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= int(most, 0):
            raise SettingsError(f"{where}: {name}={number!r} is no such number.", f"It goes from 0 to {most}.")
    return File(_path(path, where), _destination(destination, where), mode, owner, group)


def tar(path: str | Path, destination: str = "/") -> Tar:
    """Declare a tar file (plain, gzip, bzip2, xz) whose members go into an image, with all that it says of them.

    Args:
        path: the tar file on this machine.
        destination: the folder in the image that its names begin from.

    Raises:
        SettingsError: an argument makes no sense.
    """
    where = f"tar({str(path)!r})"
    return Tar(_path(path, where), _destination(destination, where))


def user(
    name: str,
    *,
    password: str | None = None,
    authorized_keys: Iterable[str | Path] = (),
    groups: Iterable[str] = ("sudo",),
) -> User:
    """Declare a user of an image, who is made there or, where there is one of that name, changed.

    Args:
        name: a login name.
        password: its hash, as `openssl passwd -6` prints it, never the password; None for none to log in with,
            also where there is one.
        authorized_keys: public SSH keys, as texts or files.
        groups: those that the user is in besides the own one.

    Raises:
        SettingsError: an argument makes no sense.
    """
    if not isinstance(name, str) or not USER.fullmatch(name):
        raise SettingsError(f"user({name!r}): that cannot be a user's name.", "Use a-z, 0-9, - and _.")
    where = f"user({name!r})"
    if password is not None and not (isinstance(password, str) and HASH.fullmatch(password)):
        raise SettingsError(
            f"{where}: its password= is no hash of a password.",
            "Never write a password into dodo.py: `openssl passwd -6` asks for one and prints the hash to write there.",
        )
    if isinstance(authorized_keys, str | PurePath) or not isinstance(authorized_keys, Iterable):
        raise SettingsError(f"{where}: authorized_keys= is a list.", "Put the one key in brackets.")
    return User(name, password, tuple(_key(key, where) for key in authorized_keys), texts("groups", groups, where))


def _key(key: object, where: str) -> str | Path:
    if isinstance(key, str) and "\n" not in key.strip() and is_public_key(key.strip()):
        return key.strip()
    if isinstance(key, str) and ("PRIVATE KEY" in key or "\n" in key or KEY.search(key)):
        raise SettingsError(
            f"{where}: a key in authorized_keys= is no public SSH key.", "Give the line of a .pub file."
        )
    return _path(Path(os.path.expanduser(key)) if isinstance(key, str | PurePath) else key, f"{where}: authorized_keys")


def is_public_key(line: str) -> bool:
    """Say whether a line of `authorized_keys` has a public key, whole (RFC 4253, 6.6: texts, each after its length)."""
    for kind, text in KEY.findall(line):
        try:
            data = base64.b64decode(text)
        except ValueError:
            continue
        parts = []
        while len(data) >= LENGTH:
            length = int.from_bytes(data[:LENGTH], "big")
            parts.append(data[LENGTH : LENGTH + length])
            if len(parts[-1]) < length:
                break
            data = data[LENGTH + length :]
        if not data and len(parts) > 1 and parts[0] == kind.encode():
            return True
    return False


def _path(path: object, where: str) -> Path:
    if not isinstance(path, str | PurePath) or not str(path) or "\0" in str(path):
        raise SettingsError(f"{where}: {path!r} is no path.", "Give the name of a file, as a text or a Path.")
    return Path(path)


def _destination(destination: object, where: str) -> str:
    if (
        not isinstance(destination, str)
        or not destination.startswith("/")
        or ".." in destination.split("/")
        or re.search(r"[\0\r\n]", destination)
    ):
        raise SettingsError(
            f"{where}: {destination!r} is no place in an image.", 'Say it from the root, as in "/usr/local/bin/".'
        )
    return destination


def texts(name: str, given: object, where: str) -> tuple[str, ...]:
    """Return a list of one-line texts that somebody gave; raises SettingsError."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise SettingsError(f"{where}: {name}= is a list of texts, not {given!r}.", "Put it in brackets.")
    found = tuple(given)
    for text in found:
        if not isinstance(text, str) or not text.strip() or re.search(r"[\0\r\n]", text):
            raise SettingsError(
                f"{where}: {name}= is a list of lines, and {text!r} is none.",
                "Give each as one text, without a line break.",
            )
    return tuple(text.strip() for text in found)


def size_of(name: str, given: object, where: str) -> int:
    """Return a number of bytes that somebody gave, as a number or as `4G` (see `size_in`); raises SettingsError."""
    count = given if isinstance(given, int) and not isinstance(given, bool) else None
    if isinstance(given, str):
        count = size_in(given)
    if count is None or not 0 <= count <= LARGEST:
        raise SettingsError(
            f"{where}: {name}={given!r} is no size.", 'Say it in bytes, or as "512M" or "4G"; up to 1024T.'
        )
    return count
