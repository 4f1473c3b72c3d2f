"""A container's file system accessed from outside: resolve paths inside its root, copy files in and out.

The container is untrusted, so no path of it is followed by name. Each component is opened relative to the folder before
it, without following links. A link is read and resolved by hand, from the container's root if it is absolute. So a link
in a container never leads to the host's files, whatever its processes do meanwhile (no race).
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..util.atomic_files import CHUNK, sha256, write_all

MAX_LINKS = 40
"""Maximum of links followed on one path, as in the kernel (path_resolution(7))."""

FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

READ_FOLDER = os.O_RDONLY | os.O_DIRECTORY

XATTRS = ("security.capability", "security.ima", "user.")
"""Extended attributes that a copy preserves, as `buildah copy` does; a trailing dot means the whole namespace."""

TEXT_SIZE = 1 << 24
"""Maximum bytes of a text file of a container that is read."""

Owner = tuple[int, int]
"""User id and group id."""

NO_LINK = (errno.EMLINK, errno.ENOENT, errno.ENOTSUP, errno.EPERM, errno.EXDEV)
"""Errors of link(2) after which the content is copied again instead."""


class Place:
    """A place below a container's root: an open folder and a name in it, which may not exist.

    Args:
        folder: File descriptor of the folder that holds it.
        name: Its name there; `.` for the folder itself.
        path: The requested path, for messages.
    """

    def __init__(self, folder: int, name: str, path: str) -> None:
        self.folder = folder
        self.name = name
        self.path = path

    @property
    def info(self) -> os.stat_result | None:
        """Current status without following a link; None if nothing exists there."""
        return _look(self.name, self.folder)

    def is_folder(self) -> bool:
        """Return whether it is a folder, as opposed to a link to one."""
        info = self.info
        return info is not None and stat.S_ISDIR(info.st_mode)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """Open it as a folder and yield the file descriptor."""
        with _opened(self.name, READ_FOLDER | os.O_NOFOLLOW, self) as fd:
            yield fd


class Rootfs:
    """The root of a container's file system.

    Args:
        path: Its mount point.
    """

    def __init__(self, path: os.PathLike[str] | str) -> None:
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the file descriptor of the root."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @contextlib.contextmanager
    def place(self, path: str, *, follow: bool = True, parents: Owner | None = None) -> Iterator[Place]:
        """Resolve a path inside the container.

        `..` stops at the root, an absolute link starts from the root.

        Args:
            path: Path relative to the root, with or without a leading slash.
            follow: Follow a link in the last component.
            parents: Create missing folders of the path, with mode 0755 and this owner; None: do not create them.

        Raises:
            FileNotFoundError: A folder of the path does not exist.
            NotADirectoryError: A part of the path is not a folder.
            OSError: There are too many links (ELOOP).
        """
        folders = [os.dup(self.fd)]
        try:
            name = self._walk(folders, path, follow, parents)
            yield Place(folders[-1], name, path)
        finally:
            for fd in folders:
                os.close(fd)

    @contextlib.contextmanager
    def opened(self, path: str) -> Iterator[int]:
        """Open a folder inside the container and yield its file descriptor; the folders above it are closed again.

        Raises:
            OSError: As for `place`, or the path is not a folder.
        """
        with self.place(path) as place:
            fd = _open(place.name, READ_FOLDER | os.O_NOFOLLOW, place.folder, path)
        try:
            yield fd
        finally:
            os.close(fd)

    def _walk(self, folders: list[int], path: str, follow: bool, parents: Owner | None) -> str:
        """Open the folders of a path one after the other; return the name of the last component."""
        ahead = collections.deque(_parts(path))
        links = 0
        while ahead:
            name = ahead.popleft()
            if name == "..":
                if len(folders) > 1:
                    os.close(folders.pop())
                continue
            info = _look(name, folders[-1])
            if info is not None and stat.S_ISLNK(info.st_mode) and (ahead or follow):
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                target = os.readlink(name, dir_fd=folders[-1])
                if target.startswith("/"):
                    while len(folders) > 1:
                        os.close(folders.pop())
                ahead.extendleft(reversed(_parts(target)))
                continue
            if not ahead:
                return name
            if info is None:
                if parents is None:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                with contextlib.suppress(FileExistsError):
                    _make_folder(name, folders[-1], path, parents)
            folders.append(_open(name, FOLDER, folders[-1], path))
        return "."

    def is_folder(self, path: str) -> bool:
        """Return whether a path, with links followed, is a folder."""
        try:
            with self.place(path) as place:
                return place.is_folder()
        except OSError:
            return False

    def listing(self, path: str, depth: int = 100) -> list[tuple[str, int, int, str]]:
        """Return the entries below a folder, sorted: path from the folder, size, modification time (ns), link target.

        Args:
            path: The folder; the list is empty if it does not exist.
            depth: Number of levels.
        """
        found: list[tuple[str, int, int, str]] = []
        with contextlib.suppress(OSError), self.place(path) as place, place.opened() as top:
            for folder, folders, names, fd in os.fwalk(".", dir_fd=top):
                for name in (*folders, *names):
                    info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    leads_to = os.readlink(name, dir_fd=fd) if stat.S_ISLNK(info.st_mode) else ""
                    size = info.st_size if stat.S_ISREG(info.st_mode) else 0
                    found.append((f"{folder[2:]}/{name}".lstrip("/"), size, info.st_mtime_ns, leads_to))
                if folder.count("/") >= depth - 1:
                    folders.clear()
        return sorted(found)

    def sha256_of(self, path: str) -> str:
        """Return the SHA-256 of a file, or an empty string if there is none."""
        with contextlib.suppress(OSError), self.place(path) as place, _source(place.name, place) as fd:
            return sha256(open(fd, "rb", closefd=False))
        return ""

    def text(self, path: str) -> str:
        """Return the text of a file such as /etc/passwd, or an empty string if there is none.

        Raises:
            OSError: The file cannot be read, or is larger than `TEXT_SIZE` (EFBIG).
        """
        try:
            with self.place(path) as place, _source(place.name, place) as fd, open(fd, "rb", closefd=False) as file:
                data = file.read(TEXT_SIZE + 1)
        except FileNotFoundError:
            return ""
        if len(data) > TEXT_SIZE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
        return data.decode("utf-8", "surrogateescape")

    def mount_point(self, path: str) -> tuple[str, list[str]]:
        """Create a folder for a mount, with its parents; return its path without links, and the paths that were new.

        Raises:
            NotADirectoryError: A part of the path is not a folder.
            OSError: There are too many links (ELOOP).
        """
        new = []
        parts = _parts(path)
        for count in range(1, len(parts) + 1):
            each = "/" + "/".join(parts[:count])
            if self._make_folder(each, _own_ids()):
                new.append(each)
                with self.opened(each) as fd:
                    os.fchmod(fd, 0o755)
        with self.opened(path) as fd:
            found = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), os.readlink(f"/proc/self/fd/{self.fd}"))
        return f"/{found}", new

    def remove(self, path: str) -> None:
        """Remove a file or link; a missing one is not an error."""
        with contextlib.suppress(FileNotFoundError), self.place(path, follow=False) as place:
            os.unlink(place.name, dir_fd=place.folder)

    def remove_empty(self, path: str) -> None:
        """Remove a folder if it is empty."""
        with contextlib.suppress(OSError), self.place(path, follow=False) as place:
            os.rmdir(place.name, dir_fd=place.folder)

    def copy_in(self, source: Path, path: str, owner: Owner | None = None) -> None:
        """Copy a file or the contents of a folder into the container.

        `owner` owns everything that is created; by default it is the container's root.

        If `path` is a folder or ends in a slash, a file is copied into it under its own name. Folders are merged, files
        and links replaced. Missing folders are created. Modes, times, `XATTRS`, hard links and holes are preserved. An
        existing folder keeps its own mode, times and attributes.

        Raises:
            OSError: A file is missing or has the wrong type, or an attribute cannot be set.
        """
        owner = owner or _own_ids()
        if source.is_dir():
            new = self._make_folder(path, owner)
            self._fill(source, path, _HardLinks(self, owner))
            if new:
                with self.opened(path) as folder, _opened(str(source), READ_FOLDER, None) as original:
                    _set_top(folder, original, owner)
            return
        if path.endswith("/") or self.is_folder(path):
            path = f"{path}/{source.name}"
        with _source(os.path.realpath(source), None) as file:
            self.put(file, path, owner)

    def put(self, file: int, path: str, owner: Owner | None = None) -> None:
        """Copy an open file, from its beginning, to a path in the container, with its mode and times.

        Raises:
            OSError: The path is a folder, or a part of it is not.
        """
        os.lseek(file, 0, os.SEEK_SET)
        owner = owner or _own_ids()
        with self.place(path, follow=False, parents=owner) as place:
            if place.is_folder():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            _write(file, place.folder, place.name, owner)

    def _make_folder(self, path: str, owner: Owner) -> bool:
        """Create a folder and its parents; return whether it was missing, in which case `_set` must follow."""
        with self.place(path, parents=owner) as place:
            if place.info is None:
                os.mkdir(place.name, 0o700, dir_fd=place.folder)
                return True
            if not place.is_folder():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            return False

    def _fill(self, source: Path, path: str, links: _HardLinks) -> None:
        """Copy the entries of a folder outside to a folder of the container."""
        with self.opened(path) as folder:
            for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
                place = Place(folder, entry.name, f"{path}/{entry.name}")
                if entry.is_dir(follow_symlinks=False):
                    self._fill_folder(entry, place, links)
                elif place.is_folder():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), place.path)
                elif entry.is_symlink():
                    _link(os.readlink(entry.path), entry.stat(follow_symlinks=False), folder, entry.name, links.owner)
                else:
                    with _source(entry.path, None) as file:
                        links.write(file, place)

    def _fill_folder(self, entry: os.DirEntry[str], place: Place, links: _HardLinks) -> None:
        # Resolves the path: `/lib` may be a link to a folder, and stays one.
        new = self._make_folder(place.path, links.owner)
        self._fill(Path(entry.path), place.path, links)
        if new:
            original = _opened(entry.path, READ_FOLDER | os.O_NOFOLLOW, None)
            with self.opened(place.path) as folder, original as fd:
                _set(folder, fd, links.owner)

    def copy_out(self, path: str, target: Path) -> None:
        """Copy a file or the contents of a folder out of the container; the current user owns the copies.

        If `target` is a folder, a file is copied into it under its own name. Folders are merged, files and links
        replaced. Modes (of files without set-user-ID and set-group-ID), times, `XATTRS`, hard links and holes are
        preserved. A link inside a folder stays a link if it leads to something in that folder. Any other link is
        followed inside the container, so that no copied link leads to the host's files.

        Raises:
            OSError: A file is missing or has the wrong type, or an attribute cannot be set.
        """
        with self.place(path) as place:
            if place.is_folder():
                new = _make_folders(target)
                with contextlib.closing(Rootfs(target)) as out, out.opened("/") as copy, place.opened() as folder:
                    self._drain(folder, path, copy, "", _HardLinks(out, _own_ids(), keep=0o777), ())
                    if new:
                        _set_top(copy, folder, _own_ids())
                    else:
                        os.utime(copy, ns=_times(os.fstat(folder)))
                return
            if target.is_dir():
                target = target / (_parts(path) or [place.name])[-1]
            _make_folders(target.parent)
            with _source(place.name, place) as file:
                _write(file, None, str(target), _own_ids(), keep=0o777)

    def _drain(
        self, folder: int, path: str, copy: int, inside: str, links: _HardLinks, above: tuple[tuple[int, int], ...]
    ) -> None:
        """Copy the entries of an open folder of the container to an open folder outside.

        Args:
            folder: File descriptor of the one in the container.
            path: Its path there.
            copy: File descriptor of the one outside.
            inside: Its path below the folder that everything is copied to, with a trailing slash; empty for that
                folder.
            links: Files copied so far.
            above: Device and inode of the folders in the container that hold this one.

        Raises:
            OSError: A link forms a loop (ELOOP), or an entry cannot be copied.
        """
        info = os.fstat(folder)
        if (info.st_dev, info.st_ino) in above:
            raise OSError(errno.ELOOP, "A link leads to a parent folder of itself", path)
        above = (*above, (info.st_dev, info.st_ino))
        for name in sorted(os.listdir(folder)):
            place, there = Place(folder, name, f"{path}/{name}"), Place(copy, name, inside + name)
            entry = place.info
            if entry is None or not stat.S_ISLNK(entry.st_mode):
                self._drain_entry(place, there, links, above)
                continue
            leads_to = os.readlink(name, dir_fd=folder)
            if _stays_below(leads_to, inside.count("/")):
                _link(leads_to, entry, copy, name, links.owner)
                continue
            with self.place(place.path) as followed:
                self._drain_entry(followed, there, links, above)

    def _drain_entry(self, place: Place, there: Place, links: _HardLinks, above: tuple[tuple[int, int], ...]) -> None:
        if not place.is_folder():
            with _source(place.name, place) as file:
                links.write(file, there)
            return
        if there.info is not None and not there.is_folder():
            os.unlink(there.name, dir_fd=there.folder)
        if there.info is None:
            os.mkdir(there.name, 0o700, dir_fd=there.folder)
        with place.opened() as folder, there.opened() as copy:
            self._drain(folder, place.path, copy, f"{there.path}/", links, above)
            _set(copy, folder, links.owner)


class _HardLinks:
    """Files with several names that one copy of a folder has met: further names become links to the first copy.

    Args:
        root: The file system of the copies.
        owner: Owner of the copies.
        keep: Mask of the mode bits that files keep.
    """

    def __init__(self, root: Rootfs, owner: Owner, keep: int = 0o7777) -> None:
        self._root = root
        self.owner = owner
        self._keep = keep
        self._copies: dict[tuple[int, int], tuple[str, os.stat_result]] = {}
        """Path and status of the copy, by device and inode of the original."""

    def write(self, source: int, place: Place) -> None:
        """Copy an open file to a place, or link the place to an existing copy."""
        info = os.fstat(source)
        if info.st_nlink == 1:
            _write(source, place.folder, place.name, self.owner, self._keep)
        elif not self._link(info, place):
            copy = _write(source, place.folder, place.name, self.owner, self._keep)
            self._copies[info.st_dev, info.st_ino] = place.path, copy

    def _link(self, original: os.stat_result, place: Place) -> bool:
        """Link a place to the copy of a file; return False if there is none, or none that can be linked to."""
        path, copy = self._copies.get((original.st_dev, original.st_ino), ("", None))
        if copy is None:
            return False
        aside = _aside(place.name)
        try:
            with self._root.place(path, follow=False) as first:
                # Another file may have replaced it: `/lib/x` and `/usr/lib/x` may be the same place.
                if first.info is None or not os.path.samestat(first.info, copy):
                    return False
                os.link(first.name, aside, src_dir_fd=first.folder, dst_dir_fd=place.folder, follow_symlinks=False)
        except OSError as error:
            if error.errno in NO_LINK:
                return False
            raise
        try:
            os.replace(aside, place.name, src_dir_fd=place.folder, dst_dir_fd=place.folder)
        finally:
            with contextlib.suppress(FileNotFoundError):  # rename(2) does nothing if both are links to one file
                os.unlink(aside, dir_fd=place.folder)
        return True


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _look(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _open(name: str, flags: int, folder: int | None, path: str) -> int:
    try:
        return os.open(name, flags | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


@contextlib.contextmanager
def _opened(name: str, flags: int, place: Place | None) -> Iterator[int]:
    fd = _open(name, flags, place.folder if place else None, place.path if place else name)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _source(name: str, place: Place | None) -> Iterator[int]:
    """Open a regular file for reading, without blocking if it is a FIFO.

    Raises:
        OSError: It is not a regular file (EINVAL), or cannot be opened.
    """
    with _opened(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, place) as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "neither a file, a folder nor a link", place.path if place else name)
        yield fd


def _aside(name: str) -> str:
    """Return the name of a temporary file in the same folder as `name`, for an atomic rename."""
    parent, slash, _ = name.rpartition("/")
    return f"{parent}{slash}.{os.urandom(8).hex()}.tmp"


def _write(source: int, folder: int | None, name: str, owner: Owner, keep: int = 0o7777) -> os.stat_result:
    """Copy an open file to a name with an atomic rename; return the status of the copy.

    Args:
        source: File to copy, with its holes, `XATTRS`, mode and times.
        folder: Descriptor of the folder that `name` is relative to; None for the working directory.
        name: Name of the copy.
        owner: Owner of the copy.
        keep: Mask of the mode bits that are kept.
    """
    aside = _aside(name)
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        _copy_content(source, fd)
        _set(fd, source, owner, keep)
        info = os.fstat(fd)
        os.replace(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside, dir_fd=folder)
        raise
    finally:
        os.close(fd)
    return info


def _copy_content(source: int, target: int) -> None:
    """Copy the content of an open file to an empty one; holes stay holes."""
    info = os.fstat(source)
    if info.st_blocks * 512 >= info.st_size:  # no holes; files of /proc report size 0 and must be read to the end
        while data := os.read(source, CHUNK):
            write_all(target, data)
        return
    size = info.st_size
    start = end = 0
    while start == end and (start := _data(source, end)) >= 0:
        end = os.lseek(source, start, os.SEEK_HOLE)
        os.lseek(source, start, os.SEEK_SET)
        os.lseek(target, start, os.SEEK_SET)
        while start < end and (data := os.read(source, min(CHUNK, end - start))):
            write_all(target, data)
            start += len(data)
        size = max(size, end) if start == end else start  # files of /sys are shorter than reported
    os.ftruncate(target, size)


def _data(file: int, start: int) -> int:
    """Return the offset of the next data of an open file, -1 if only a hole is left."""
    try:
        return os.lseek(file, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return -1
        raise


def _own_ids() -> Owner:
    """Return the process's ids: root's in the container, the script's user's outside."""
    return os.geteuid(), os.getegid()


def _set(fd: int, source: int, owner: Owner, keep: int = 0o7777) -> None:
    """Set the owner of an open file or folder, and copy mode, `XATTRS` and times from another."""
    info = os.fstat(source)
    _own(fd, owner)  # first, because a change of owner removes capabilities
    _copy_xattrs(source, fd)
    os.fchmod(fd, info.st_mode & keep)
    os.utime(fd, ns=_times(info))


def _set_top(fd: int, source: int, owner: Owner) -> None:
    """Set the metadata of a new folder from the folder whose contents are copied to it.

    Its mode is at least 755, as with `buildah copy`, because private temporary folders are copied too.
    """
    _set(fd, source, owner)
    os.fchmod(fd, stat.S_IMODE(os.fstat(source).st_mode) | 0o755)


def _own(fd: int, owner: Owner) -> None:
    """Set the owner of a new open file or folder; in a set-group-ID folder its group is not the process's."""
    info = os.fstat(fd)
    if (info.st_uid, info.st_gid) != owner:
        os.fchown(fd, *owner)


def _copy_xattrs(source: int, target: int) -> None:
    """Copy those `XATTRS` that an open file or folder has.

    Raises:
        OSError: The target's file system cannot store one.
    """
    try:
        names = os.listxattr(source)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS):
            raise
        return
    for name in names:
        if not any(name == known or (known[-1] == "." and name.startswith(known)) for known in XATTRS):
            continue
        try:
            value = os.getxattr(source, name)
        except OSError as error:
            # EOVERFLOW: the capability belongs to the root of another user namespace and has no effect here
            # (capabilities(7)).
            if error.errno in (errno.ENODATA, errno.EOVERFLOW):
                continue
            raise
        try:
            os.setxattr(target, name, value)
        except OSError as error:
            path = os.readlink(f"/proc/self/fd/{source}")
            raise OSError(error.errno, f"its extended attribute {name} cannot be set: {error.strerror}", path) from None


def _make_folder(name: str, folder: int, path: str, owner: Owner) -> None:
    """Create a folder with mode 755, independent of umask and parent folder.

    Args:
        name: Its name.
        folder: File descriptor of the parent folder.
        path: The requested path, for messages.
        owner: Its owner.
    """
    os.mkdir(name, 0o700, dir_fd=folder)
    with Place(folder, name, path).opened() as fd:
        _own(fd, owner)
        os.fchmod(fd, 0o755)


def _make_folders(path: Path) -> bool:
    """Create a folder outside and its parents, with mode 755; return whether it was missing."""
    if path.is_dir():
        return False
    _make_folders(path.parent)
    path.mkdir()
    path.chmod(0o755)
    return True


def _link(leads_to: str, info: os.stat_result, folder: int, name: str, owner: Owner) -> None:
    """Create a symbolic link, replacing an existing file or link."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    os.symlink(leads_to, name, dir_fd=folder)
    made = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if (made.st_uid, made.st_gid) != owner:
        os.chown(name, *owner, dir_fd=folder, follow_symlinks=False)
    os.utime(name, ns=_times(info), dir_fd=folder, follow_symlinks=False)


def _times(info: os.stat_result) -> tuple[int, int]:
    return info.st_atime_ns, info.st_mtime_ns


def _stays_below(leads_to: str, depth: int) -> bool:
    """Return whether a link `depth` folders below a folder leads to something in that folder, judged by its text.

    `..` is allowed only at the beginning: after a name, which may be a link too, it could lead anywhere.
    """
    parts = _parts(leads_to)
    up = 0
    while up < len(parts) and parts[up] == "..":
        up += 1
    return not leads_to.startswith("/") and up <= depth and ".." not in parts[up:]
