"""Declaration of an SD-card image: base, contents, size. Pure data."""

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
from ..jobspec.canonical_json import Json, canonical_json
from ..util.file_hashes import opened_content_of
from ..util.text import size_in

if TYPE_CHECKING:
    from ..sources.archive import Archive

FORMAT = 1
"""Version of the recipe. Changing it rebuilds every image."""

SUFFIXES = {".img": "", ".xz": "xz", ".zst": "zstd"}
"""Compression program by suffix of the target."""

PROGRAMS = ("debugfs", "e2fsck", "resize2fs", "sfdisk", "fsck.fat", "mcopy", "mdir", "mmd")
"""Programs that every image build needs."""

LARGEST = 2**50
"""Maximum bytes of an image."""

MISSING_INPUT = "Check the path, or build the file first."
"""Hint for an input file that cannot be read."""

KEY = re.compile(r"(?<![^ \t])((?:ssh-|ecdsa-|sk-)[a-z0-9@.-]+)[ \t]+([A-Za-z0-9+/]{16,}={0,2})(?![^ \t])")
"""Public SSH key in a line of `authorized_keys`, between options and a comment (sshd(8))."""

LENGTH = 4
"""Bytes of a length prefix in a public key."""

HASH = re.compile(r"\$[a-z0-9]{1,8}\$[A-Za-z0-9./$=,]{16,}|[!*]")
"""Password field of shadow(5), see crypt(5)."""

USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
"""User or group name, as Debian allows it."""


@dataclass(frozen=True)
class File:
    """A file of an image. See `file()`."""

    path: Path
    destination: str
    mode: int | None
    owner: int
    group: int

    @property
    def permissions(self) -> int:
        """Permissions in the image: the specified mode, or else 0o755 if the file is executable here, or 0o644."""
        if self.mode is not None:
            return self.mode
        try:
            return 0o755 if self.path.stat().st_mode & 0o100 else 0o644
        except OSError:
            return 0o644  # another task has yet to create it

    def identity(self) -> Json:
        """Return the identity of the item, without the file's content."""
        return ["file", str(self.path), self.destination, self.permissions, self.owner, self.group]


@dataclass(frozen=True)
class Tar:
    """A tar file whose members are added to an image. See `tar()`."""

    path: Path
    destination: str

    def identity(self) -> Json:
        """Return the identity of the item, without the tar's content."""
        return ["tar", str(self.path), self.destination]


@dataclass(frozen=True)
class User:
    """A user of an image. See `user()`."""

    name: str
    password: str | None = field(repr=False)
    authorized_keys: tuple[str | Path, ...]
    groups: tuple[str, ...]

    @property
    def key_files(self) -> list[Path]:
        """Keys that are specified as files."""
        return [key for key in self.authorized_keys if isinstance(key, Path)]

    def identity(self) -> Json:
        """Return the identity of the user, without the content of key files."""
        return [self.name, self.password, [str(key) for key in self.authorized_keys], list(self.groups)]


@dataclass(frozen=True)
class Recipe:
    """Declaration of an image by `sd_image()`.

    Attributes:
        base: Base image: a file, or an archive from the web.
        output: The image to create. Its suffix selects the compression.
        arch: Debian's name of the architecture.
        contents: Files and tars to add. Of two entries with the same name, the later one wins.
        config: Lines of config.txt, including filter headings.
        cmdline: Words of cmdline.txt.
        enable: Names of systemd units.
        hostname: Host name; empty keeps the base's.
        user: User to create, or None.
        size: Bytes of the whole image; None for as much as required.
        free: Minimum free bytes of the root file system.
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
        """All local input files, including the base."""
        base = [self.base] if isinstance(self.base, Path) else []
        return [*base, *(item.path for item in self.contents), *(self.user.key_files if self.user else ())]

    @property
    def programs(self) -> list[str]:
        """Required programs, including those that decompress the base according to its suffix."""
        base = self.base if isinstance(self.base, Path) else Path(self.base.url)
        packing = (SUFFIXES.get(path.suffix, "") for path in (self.output, base))
        return [*PROGRAMS, *dict.fromkeys(filter(None, packing))]

    def identity(self) -> str:
        """Return a SHA-256 over the declaration, without the files' content. It does not reveal secrets."""
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
        """Return the state that the image is baked from: the recipe's identity and the SHA-256 of each file.

        Args:
            content: Returns a file's SHA-256 and whether it is executable; raises OSError.

        Raises:
            ImageError: A file cannot be read.
        """
        hashes: dict[str, Json] = {}
        for path in map(str, self.files):
            try:
                hashes[path] = content(path)[0]
            except OSError as error:
                raise ImageError(f"{path} cannot be read: {error.strerror}.", MISSING_INPUT) from error
        return {"image": self.identity(), "files": hashes}


def state_of(document: Mapping[str, Json]) -> str:
    """Return a SHA-256 over the state that an image is baked from. doit saves and compares it."""
    return hashlib.sha256(canonical_json(document)).hexdigest()


def file(path: str | Path, destination: str, *, mode: int | None = None, owner: int = 0, group: int = 0) -> File:
    """Declare a file that is added to an image.

    Args:
        path: The file on this machine.
        destination: Absolute path in the image. If it ends with a slash or is a folder there, the file is put into it
            under its own name.
        mode: Permissions. Default: 0o755 if the owner may execute the file here, otherwise 0o644.
        owner: User id.
        group: Group id.

    Raises:
        SettingsError: An argument is invalid.
    """
    where = f"file({str(path)!r})"
    for name, number, most in (
        ("mode", 0 if mode is None else mode, "0o7777"),
        ("owner", owner, "4294967294"),
        ("group", group, "4294967294"),
    ):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= int(most, 0):
            raise SettingsError(f"{where}: {name}={number!r} is out of range.", f"Use a number from 0 to {most}.")
    return File(_path(path, where), _destination(destination, where), mode, owner, group)


def tar(path: str | Path, destination: str = "/") -> Tar:
    """Declare a tar file (plain, gzip, bzip2, xz) whose members are added to an image, including their metadata.

    Args:
        path: The tar file on this machine.
        destination: Folder in the image that the members' names are relative to.

    Raises:
        SettingsError: An argument is invalid.
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
    """Declare a user of an image. The user is created, or changed if the base has a user of that name.

    Args:
        name: Login name.
        password: Password hash, as printed by `openssl passwd -6`; never the password itself. None disables password
            login, also for an existing user.
        authorized_keys: Public SSH keys, as strings or files.
        groups: Supplementary groups.

    Raises:
        SettingsError: An argument is invalid.
    """
    if not isinstance(name, str) or not USER.fullmatch(name):
        raise SettingsError(f"user({name!r}): the name is invalid.", "Use a-z, 0-9, - and _.")
    where = f"user({name!r})"
    if password is not None and not (isinstance(password, str) and HASH.fullmatch(password)):
        raise SettingsError(
            f"{where}: password= is not a password hash.",
            "Use the output of `openssl passwd -6`.",
        )
    if isinstance(authorized_keys, str | PurePath) or not isinstance(authorized_keys, Iterable):
        raise SettingsError(f"{where}: authorized_keys= is not a list.", "Put a single key in brackets.")
    return User(name, password, tuple(_key(key, where) for key in authorized_keys), texts("groups", groups, where))


def _key(key: object, where: str) -> str | Path:
    if isinstance(key, str) and "\n" not in key.strip() and is_public_key(key.strip()):
        return key.strip()
    if isinstance(key, str) and ("PRIVATE KEY" in key or "\n" in key or KEY.search(key)):
        raise SettingsError(
            f"{where}: authorized_keys= contains an invalid public SSH key.", "Use the line of a .pub file."
        )
    return _path(Path(os.path.expanduser(key)) if isinstance(key, str | PurePath) else key, f"{where}: authorized_keys")


def is_public_key(line: str) -> bool:
    """Return whether a line of `authorized_keys` contains a complete public key.

    A key is a sequence of length-prefixed strings, of which the first is its type (RFC 4253, 6.6).
    """
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
        raise SettingsError(f"{where}: {path!r} is not a path.", "Use a str or a Path.")
    return Path(path)


def _destination(destination: object, where: str) -> str:
    if (
        not isinstance(destination, str)
        or not destination.startswith("/")
        or ".." in destination.split("/")
        or re.search(r"[\0\r\n]", destination)
    ):
        raise SettingsError(
            f"{where}: {destination!r} is not an absolute path in the image.", 'Use a path such as "/usr/local/bin/".'
        )
    return destination


def texts(name: str, given: object, where: str) -> tuple[str, ...]:
    """Validate a list of one-line strings and return it, stripped.

    Raises:
        SettingsError: It is not such a list.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise SettingsError(f"{where}: {name}={given!r} is not a list.", "Put it in brackets.")
    found = tuple(given)
    for text in found:
        if not isinstance(text, str) or not text.strip() or re.search(r"[\0\r\n]", text):
            raise SettingsError(
                f"{where}: {name}= contains {text!r}, which is not a one-line string.",
                "Remove the line break, or use a list of strings.",
            )
    return tuple(text.strip() for text in found)


def size_of(name: str, given: object, where: str) -> int:
    """Return a size in bytes, specified as a number or a string such as `4G` (see `size_in`).

    Raises:
        SettingsError: It is not a size, or exceeds `LARGEST`.
    """
    count = given if isinstance(given, int) and not isinstance(given, bool) else None
    if isinstance(given, str):
        count = size_in(given)
    if count is None or not 0 <= count <= LARGEST:
        raise SettingsError(
            f"{where}: {name}={given!r} is not a size.", 'Use bytes, or a string such as "512M" or "4G"; up to 1024T.'
        )
    return count
