"""The virtual file tree of an image: the base's files, overlaid with the new entries.

Names are resolved as in the running image: symbolic links, of the base or new, are followed with the image's root as
`/`. Therefore no path can lead outside the image, whatever a tar contains.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...errors import ImageError
from .ext4 import LINKS, Inode, Reader
from .sparse_files import read_bounded

ROOT_INODE = 2
"""Inode of the root folder in every ext4 file system."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A new file, folder, link or device of the image. An entry with several names is a file with hard links.

    Attributes:
        mode: Type and permissions, as in stat(2).
        origin: Display name of the source of the entry.
        uid: User id of the owner.
        gid: Group id.
        mtime: Modification time, in nanoseconds since 1970.
        atime: Access time, in nanoseconds since 1970.
        size: Bytes of a file.
        staged: Name of the file's content in the staging folder.
        target: Target of a symbolic link.
        device: Major and minor device number.
        xattrs: Extended attributes.
    """

    mode: int
    origin: str
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    atime: int = 0
    size: int = 0
    staged: str = ""
    target: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        """Whether the entry is a folder."""
        return stat.S_ISDIR(self.mode)


class Tree:
    """The files of the image to be built.

    Args:
        base: Reader of the base's root file system.
        staging: Folder that stores contents until they are written.
        now: Default time of entries, in seconds since 1970.

    Attributes:
        added: The new entries, by name relative to the root, without a leading slash.
        now: Default time of entries, in nanoseconds since 1970.
        staging: Folder that stores contents until they are written.
    """

    def __init__(self, base: Reader, staging: Path, now: int) -> None:
        self.added: dict[str, Entry] = {}
        self.now = now * 10**9
        self._base = base
        self.staging = staging
        self._inodes: dict[str, Inode | None] = {"": Inode(ROOT_INODE, stat.S_IFDIR | 0o755, 0, 0, 0)}
        self._targets: dict[int, str] = {}
        self._implied: set[str] = set()  # parent folders that were created only for their content
        self._staged = 0
        self._mount = ""
        self._add_there: Callable[[str, Entry], None]
        self._is_folder_there: Callable[[str], bool]

    def mount(self, path: str, add: Callable[[str, Entry], None], is_folder: Callable[[str], bool]) -> None:
        """Redirect everything below a folder to another file system.

        Args:
            path: The folder.
            add: Adds an entry to the other file system, by its name relative to the folder.
            is_folder: Returns whether a relative name is a folder there.
        """
        self._mount = self.resolve(path, path)
        self._add_there = add
        self._is_folder_there = is_folder

    def _is_mounted(self, name: str) -> bool:
        """Return whether a name is below the mounted folder."""
        return bool(self._mount) and name.startswith(f"{self._mount}/")

    def inode(self, name: str) -> Inode | None:
        """Return the base's inode of a name, or None. Links are not followed."""
        if name not in self._inodes:
            folder, _, last = name.rpartition("/")
            above = self.inode(folder)
            if above is None or not stat.S_ISDIR(above.mode):
                self._inodes[name] = None
            else:
                self._inodes[name] = self._base.listing(above.number).get(last)
        return self._inodes[name]

    def mode(self, name: str) -> int:
        """Return the mode of a name, or 0 if it does not exist. Links are not followed."""
        if name in self.added:
            return self.added[name].mode
        inode = self.inode(name)
        return inode.mode if inode else 0

    def link(self, name: str) -> str:
        """Return the target of a symbolic link."""
        if name in self.added:
            return self.added[name].target
        inode = self.inode(name)
        assert inode
        if inode.number not in self._targets:
            self._targets[inode.number] = self._base.target(inode)
        return self._targets[inode.number]

    def resolve(self, path: str, origin: str, *, last: bool = True) -> str:
        """Return the name of a path after following all symbolic links.

        Args:
            path: Path from the root.
            origin: Display name of the requesting item, for errors.
            last: Follow a link in the last part of the path, too.

        Raises:
            ImageError: A file is in the middle of the path, or there is a loop of links.
        """
        parts = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        name = ""
        followed = 0
        while parts:
            part = parts.pop()
            if part == "..":
                name = name.rpartition("/")[0]
                continue
            here = f"{name}/{part}" if name else part
            mode = self.mode(here)
            if stat.S_ISLNK(mode) and (parts or last):
                followed += 1
                if followed > LINKS:
                    raise ImageError(
                        f"{origin}: /{path.strip('/')} has a loop of symbolic links.",
                        "Fix the links in the base or in the added files.",
                    )
                target = self.link(here)
                if target.startswith("/"):
                    name = ""
                parts += [part for part in reversed(target.split("/")) if part not in ("", ".")]
                continue
            if parts and mode and not stat.S_ISDIR(mode):
                raise ImageError(
                    f"{origin}: /{path.strip('/')} cannot be added: /{here} is not a folder in the image.",
                    "Use another destination.",
                )
            name = here
        return name

    def add(self, path: str, entry: Entry) -> str:
        """Add an entry and its missing parent folders, and return its name.

        A file, link or device replaces another one. An existing folder, or a link to one, remains; its owner, mode and
        times change.

        Raises:
            ImageError: A folder would replace something else or vice versa.
        """
        name = self.resolve(path, entry.origin, last=entry.is_folder)
        if self._is_mounted(name):
            self._add_there(name[len(self._mount) + 1 :], entry)
            return name
        if self._mount and name == self._mount and entry.is_folder:
            return name  # the root of the mounted file system does not change
        for above in _above(name):
            if not self.mode(above):
                self.added[above] = Entry(stat.S_IFDIR | 0o755, entry.origin, mtime=self.now, atime=self.now)
                self._implied.add(above)
        mode = self.mode(name)
        if mode and entry.is_folder != stat.S_ISDIR(mode):
            there = "a folder" if stat.S_ISDIR(mode) else "not a folder"
            raise ImageError(
                f"{entry.origin}: /{name} cannot be replaced: it is {there} in the image.",
                "Use another destination, or leave it out.",
            )
        self.added.pop(name, None)
        self.added[name] = entry
        self._implied.discard(name)
        return name

    def entry(self, data: bytes, origin: str, mode: int, owner: tuple[int, int] = (0, 0)) -> Entry:
        """Stage data and return an entry for a regular file."""
        staged = self.new_staged()
        (self.staging / staged).write_bytes(data)
        return Entry(stat.S_IFREG | mode, origin, *owner, mtime=self.now, atime=self.now, size=len(data), staged=staged)

    def new_staged(self) -> str:
        """Return a new name in the staging folder. The caller writes the content."""
        self._staged += 1
        return f"content-{self._staged}"

    # Access to the image's text files, which are changed in place.

    def exists(self, path: str) -> bool:
        """Return whether a path exists, following links."""
        return bool(self.mode(self.resolve(path, path)))

    def is_folder(self, path: str) -> bool:
        """Return whether a path is a folder, following links."""
        name = self.resolve(path, path)
        if self._is_mounted(name):
            return self._is_folder_there(name[len(self._mount) + 1 :])
        return stat.S_ISDIR(self.mode(name))

    def read(self, path: str) -> bytes | None:
        """Return the content of a file, or None if the path is not a regular file.

        Raises:
            ImageError: The file is too large.
        """
        name = self.resolve(path, path)
        if not stat.S_ISREG(self.mode(name)):
            return None
        if name in self.added:
            return read_bounded(self.staging / self.added[name].staged, self.added[name].origin)
        inode = self.inode(name)
        assert inode
        return self._base.content(inode, f"/{name} of the base")

    def write(self, path: str, data: bytes, origin: str, mode: int = 0o644, owner: tuple[int, int] = (0, 0)) -> None:
        """Write a file unless it already has that content. An existing file keeps its owner and mode.

        Raises:
            ImageError: The path exists and is not a regular file.
        """
        if self.read(path) == data:
            return
        name = self.resolve(path, origin)
        if self.mode(name) and not stat.S_ISREG(self.mode(name)):
            raise ImageError(f"{origin}: /{name} is not a regular file in the image.", "Fix it in the base.")
        entry = self.entry(data, origin, mode, owner)
        there = self.added.get(name) or self.inode(name)
        if there is not None:
            entry = replace(entry, mode=there.mode, uid=there.uid, gid=there.gid)
        self.add(name, entry)

    def folder(self, path: str, origin: str, mode: int, owner: tuple[int, int]) -> None:
        """Create a folder unless it exists."""
        if not self.is_folder(path):
            self.add(path, Entry(stat.S_IFDIR | mode, origin, *owner, mtime=self.now, atime=self.now))

    def set_owner(self, path: str, owner: tuple[int, int], mode: int) -> bool:
        """Set the owner of a folder and its subfolders, except those that the base or a tar describes.

        Args:
            path: The folder.
            owner: User and group id.
            mode: Mode of the folder itself.

        Returns:
            Whether the folder itself was changed.
        """
        top = self.resolve(path, path)
        for name in self._implied:
            if name == top or name.startswith(f"{top}/"):
                there = self.added[name]
                kept = stat.S_IFDIR | mode if name == top else there.mode
                self.added[name] = replace(there, mode=kept, uid=owner[0], gid=owner[1])
        return top in self._implied

    def symlink(self, path: str, target: str, origin: str, owner: tuple[int, int] = (0, 0)) -> None:
        """Create a symbolic link unless the same link exists."""
        name = self.resolve(path, origin, last=False)
        if stat.S_ISLNK(self.mode(name)) and self.link(name) == target:
            return
        self.add(name, Entry(stat.S_IFLNK | 0o777, origin, *owner, mtime=self.now, atime=self.now, target=target))

    def names(self, path: str) -> Iterator[str]:
        """Yield the names in a folder, sorted."""
        folder = self.resolve(path, path)
        inode = self.inode(folder)
        found = set(self._base.listing(inode.number)) if inode and stat.S_ISDIR(inode.mode) else set()
        found |= {name.rpartition("/")[2] for name in self.added if name.rpartition("/")[0] == folder}
        yield from sorted(found - {""})


def _above(name: str) -> Iterator[str]:
    """Yield the parent folders of a name, outermost first."""
    parts = name.split("/")[:-1]
    for count in range(1, len(parts) + 1):
        yield "/".join(parts[:count])
