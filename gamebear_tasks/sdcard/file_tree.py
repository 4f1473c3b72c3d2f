"""What the image will hold: its base's files, and over them what goes in. Names are looked up in it and nowhere else.

A name leads where it would lead in the running image: links are followed with the image's root as `/`, those of the
base and those that are put in. So nothing can lead outside, whatever a tar holds.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import ImageError
from .base_image import read_bounded
from .ext4 import LINKS, Inode, Reader

ROOT_INODE = 2
"""The root folder's, in every ext4 file system."""


@dataclass(frozen=True, eq=False)
class Entry:
    """Something that goes into the image. One that has several names is a file with hard links.

    Attributes:
        mode: type and permissions, as in stat(2).
        origin: what brings it, for people.
        uid: owner.
        gid: group.
        mtime: time of modification, in nanoseconds since 1970.
        atime: time of access, likewise.
        size: bytes of a file.
        staged: the name of the file's content in the folder that we work in.
        target: where a symbolic link leads.
        device: major and minor number.
        xattrs: extended attributes.
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
        """It is a folder."""
        return stat.S_ISDIR(self.mode)


class Tree:
    """The files of an image to be.

    Args:
        base: what is there already.
        staging: the folder where contents are kept until they are put in.
        now: the time of what has no other, in seconds since 1970.

    Attributes:
        added: what goes in, by its name from the root, without the first slash.
    """

    def __init__(self, base: Reader, staging: Path, now: int) -> None:
        self.added: dict[str, Entry] = {}
        self.now = now * 10**9
        self._base = base
        self.staging = staging
        self._inodes: dict[str, Inode | None] = {"": Inode(ROOT_INODE, stat.S_IFDIR | 0o755, 0, 0, 0)}
        self._targets: dict[int, str] = {}
        self._implied: set[str] = set()  # folders that go in because something in them does
        self._staged = 0
        self._mount = ""
        self._add_there: Callable[[str, Entry], None]
        self._is_folder_there: Callable[[str], bool]

    def mount(self, path: str, add: Callable[[str, Entry], None], is_folder: Callable[[str], bool]) -> None:
        """Have what goes below a folder go to another file system.

        Args:
            path: the folder.
            add: puts in what goes there, by its name from there.
            is_folder: says whether there is a folder of such a name.
        """
        self._mount = self.resolve(path, path)
        self._add_there = add
        self._is_folder_there = is_folder

    def _is_mounted(self, name: str) -> bool:
        """Say whether a name is below the other file system's folder."""
        return bool(self._mount) and name.startswith(f"{self._mount}/")

    def inode(self, name: str) -> Inode | None:
        """Return what the base has under a name; no link is followed."""
        if name not in self._inodes:
            folder, _, last = name.rpartition("/")
            above = self.inode(folder)
            if above is None or not stat.S_ISDIR(above.mode):
                self._inodes[name] = None
            else:
                self._inodes[name] = self._base.listing(above.number).get(last)
        return self._inodes[name]

    def mode(self, name: str) -> int:
        """Return the mode of what will have a name, 0 if nothing will; no link is followed."""
        if name in self.added:
            return self.added[name].mode
        inode = self.inode(name)
        return inode.mode if inode else 0

    def link(self, name: str) -> str:
        """Return where the link of a name leads."""
        if name in self.added:
            return self.added[name].target
        inode = self.inode(name)
        assert inode
        if inode.number not in self._targets:
            self._targets[inode.number] = self._base.target(inode)
        return self._targets[inode.number]

    def resolve(self, path: str, origin: str, *, last: bool = True) -> str:
        """Return the name that a path has when all links on the way are followed.

        Args:
            path: from the root.
            origin: who asks, for the error.
            last: follow a link at its end, too.

        Raises:
            ImageError: it goes through a file, or through links without end.
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
                        f"{origin}: /{path.strip('/')} leads through links without end.",
                        "See the symbolic links on the way to it, in the base and in what goes in.",
                    )
                target = self.link(here)
                if target.startswith("/"):
                    name = ""
                parts += [part for part in reversed(target.split("/")) if part not in ("", ".")]
                continue
            if parts and mode and not stat.S_ISDIR(mode):
                raise ImageError(
                    f"{origin}: /{path.strip('/')} cannot be in the image, where /{here} is no folder.",
                    "Give it another destination.",
                )
            name = here
        return name

    def add(self, path: str, entry: Entry) -> str:
        """Put something in, with the folders above it, and return its name.

        A file, link or device takes the place of another. A folder that is there, or a link to one, stays, and gets the
        owner, mode and times.

        Raises:
            ImageError: a folder would take the place of something else, or something else a folder's.
        """
        name = self.resolve(path, entry.origin, last=entry.is_folder)
        if self._is_mounted(name):
            self._add_there(name[len(self._mount) + 1 :], entry)
            return name
        if self._mount and name == self._mount and entry.is_folder:
            return name  # the root of the other one stays as it is
        for above in _above(name):
            if not self.mode(above):
                self.added[above] = Entry(stat.S_IFDIR | 0o755, entry.origin, mtime=self.now, atime=self.now)
                self._implied.add(above)
        mode = self.mode(name)
        if mode and entry.is_folder != stat.S_ISDIR(mode):
            kinds = ("a folder", "something else") if entry.is_folder else ("no folder", "a folder")
            raise ImageError(
                f"{entry.origin}: /{name} is {kinds[0]}, and {kinds[1]} in the image.",
                "Give it another destination, or leave it out.",
            )
        self.added.pop(name, None)
        self.added[name] = entry
        self._implied.discard(name)
        return name

    def entry(self, data: bytes, origin: str, mode: int, owner: tuple[int, int] = (0, 0)) -> Entry:
        """Return a file to be put in."""
        staged = self.new_staged()
        (self.staging / staged).write_bytes(data)
        return Entry(stat.S_IFREG | mode, origin, *owner, mtime=self.now, atime=self.now, size=len(data), staged=staged)

    def new_staged(self) -> str:
        """Return a name for a content that the caller writes."""
        self._staged += 1
        return f"content-{self._staged}"

    # What the image says itself, and is told: text files, changed in place.

    def exists(self, path: str) -> bool:
        """Say whether there is something of a name, at the end of its links."""
        return bool(self.mode(self.resolve(path, path)))

    def is_folder(self, path: str) -> bool:
        """Say whether there is a folder of a name, at the end of its links."""
        name = self.resolve(path, path)
        if self._is_mounted(name):
            return self._is_folder_there(name[len(self._mount) + 1 :])
        return stat.S_ISDIR(self.mode(name))

    def read(self, path: str) -> bytes | None:
        """Return what is in a file, None where there is none; raises ImageError where it is too long to be read."""
        name = self.resolve(path, path)
        if not stat.S_ISREG(self.mode(name)):
            return None
        if name in self.added:
            return read_bounded(self.staging / self.added[name].staged, self.added[name].origin)
        inode = self.inode(name)
        assert inode
        return self._base.content(inode, f"/{name} of the base")

    def write(self, path: str, data: bytes, origin: str, mode: int = 0o644, owner: tuple[int, int] = (0, 0)) -> None:
        """Put a file in; one that is there keeps its owner and mode. No change where it says that already.

        Raises:
            ImageError: what is there is no file.
        """
        if self.read(path) == data:
            return
        name = self.resolve(path, origin)
        if self.mode(name) and not stat.S_ISREG(self.mode(name)):
            raise ImageError(f"{origin}: /{name} should be a file, and is none in the image.", "Mend it in the base.")
        entry = self.entry(data, origin, mode, owner)
        there = self.added.get(name) or self.inode(name)
        if there is not None:
            entry = replace(entry, mode=there.mode, uid=there.uid, gid=there.gid)
        self.add(name, entry)

    def folder(self, path: str, origin: str, mode: int, owner: tuple[int, int]) -> None:
        """Make a folder; one that is there stays as it is."""
        if not self.is_folder(path):
            self.add(path, Entry(stat.S_IFDIR | mode, origin, *owner, mtime=self.now, atime=self.now))

    def give(self, path: str, owner: tuple[int, int], mode: int) -> bool:
        """Give somebody a folder and those below it, but for what the base or contents describe.

        Args:
            path: the folder.
            owner: user and group.
            mode: of the folder itself.

        Returns:
            Whether that was for us to say, too.
        """
        top = self.resolve(path, path)
        for name in self._implied:
            if name == top or name.startswith(f"{top}/"):
                there = self.added[name]
                kept = stat.S_IFDIR | mode if name == top else there.mode
                self.added[name] = replace(there, mode=kept, uid=owner[0], gid=owner[1])
        return top in self._implied

    def symlink(self, path: str, target: str, origin: str, owner: tuple[int, int] = (0, 0)) -> None:
        """Make a symbolic link; no change where there is that link already."""
        name = self.resolve(path, origin, last=False)
        if stat.S_ISLNK(self.mode(name)) and self.link(name) == target:
            return
        self.add(name, Entry(stat.S_IFLNK | 0o777, origin, *owner, mtime=self.now, atime=self.now, target=target))

    def names(self, path: str) -> Iterator[str]:
        """Yield what is in a folder, sorted."""
        folder = self.resolve(path, path)
        inode = self.inode(folder)
        found = set(self._base.listing(inode.number)) if inode and stat.S_ISDIR(inode.mode) else set()
        found |= {name.rpartition("/")[2] for name in self.added if name.rpartition("/")[0] == folder}
        yield from sorted(found - {""})


def _above(name: str) -> Iterator[str]:
    """Yield the folders above a name, the outermost first."""
    parts = name.split("/")[:-1]
    for count in range(1, len(parts) + 1):
        yield "/".join(parts[:count])
