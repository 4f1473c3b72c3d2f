"""A container's file system seen from outside: paths resolved inside its root, files copied in and out.

Nothing here follows a path of the container by name. Each component is opened relative to the folder before it and
without following links; a link is read and walked by hand, from the container's root where it is absolute. So no link
in a container leads to the host's files, whatever a process in it does meanwhile.
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
"""Links followed on one path, as in the kernel (path_resolution(7))."""

FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

READ_FOLDER = os.O_RDONLY | os.O_DIRECTORY

XATTRS = ("security.capability", "security.ima", "user.")
"""The extended attributes that a copy keeps (a dot at the end: all of that namespace), as `buildah copy` does."""

NO_LINK = (errno.EMLINK, errno.ENOENT, errno.ENOTSUP, errno.EPERM, errno.EXDEV)
"""Errors of link(2) after which the content is copied once more."""


class Place:
    """A place below a container's root: an open folder and a name in it, which may be there or not.

    Args:
        folder: file descriptor of the folder that holds it.
        name: its name there; `.` for the folder itself.
        path: what it was asked for as, for messages.
    """

    def __init__(self, folder: int, name: str, path: str) -> None:
        self.folder = folder
        self.name = name
        self.path = path

    @property
    def info(self) -> os.stat_result | None:
        """What is there now, a link not followed; None when nothing is."""
        return _look(self.name, self.folder)

    def is_folder(self) -> bool:
        """Say whether it is a folder, not a link to one."""
        info = self.info
        return info is not None and stat.S_ISDIR(info.st_mode)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """Open the folder that it is."""
        with _opened(self.name, READ_FOLDER | os.O_NOFOLLOW, self) as fd:
            yield fd


class Rootfs:
    """The root of a container's file system.

    Args:
        path: where it is mounted.
    """

    def __init__(self, path: os.PathLike[str] | str) -> None:
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go of the file system."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @contextlib.contextmanager
    def place(self, path: str, *, follow: bool = True, parents: bool = False) -> Iterator[Place]:
        """Find a path inside the container.

        `..` stops at the root, an absolute link starts from the root.

        Args:
            path: relative to the root, a leading slash or not.
            follow: follow the link that the last component may be.
            parents: make the folders that are missing on the way, mode 0755.

        Raises:
            FileNotFoundError: a folder on the way is missing.
            NotADirectoryError: something on the way is no folder.
            OSError: too many links (ELOOP).
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
        """Open a folder inside the container, and no other folder with it for as long; raises as `place` does."""
        with self.place(path) as place:
            fd = _open(place.name, READ_FOLDER | os.O_NOFOLLOW, place.folder, path)
        try:
            yield fd
        finally:
            os.close(fd)

    def _walk(self, folders: list[int], path: str, follow: bool, parents: bool) -> str:
        """Open the folders on a path one after the other; return the name of the last component."""
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
                if not parents:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                with contextlib.suppress(FileExistsError):
                    _make_folder(name, folders[-1], path)
            folders.append(_open(name, FOLDER, folders[-1], path))
        return "."

    def is_folder(self, path: str) -> bool:
        """Say whether a path, links followed, is a folder."""
        try:
            with self.place(path) as place:
                return place.is_folder()
        except OSError:
            return False

    def listing(self, path: str, depth: int = 100) -> list[tuple[str, int, int, str]]:
        """Return what is below a folder, sorted: path from the folder, size, time (ns), where a link leads to.

        Args:
            path: the folder; nothing is below one that is not there.
            depth: how many levels.
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
        """Return the SHA-256 of a file; empty where there is none."""
        with contextlib.suppress(OSError), self.place(path) as place, _source(place.name, place) as fd:
            return sha256(open(fd, "rb", closefd=False))
        return ""

    def remove_empty(self, path: str) -> None:
        """Remove a folder if there is nothing in it."""
        with contextlib.suppress(OSError), self.place(path, follow=False) as place:
            os.rmdir(place.name, dir_fd=place.folder)

    def copy_in(self, source: Path, path: str) -> None:
        """Copy a file or a folder's contents into the container; what is new belongs to its root.

        A file's copy goes into a `path` that is a folder or ends in a slash, under its own name. Folders are merged,
        files and links replaced. Missing folders are made. Modes, times, `XATTRS`, hard links and holes are kept; a
        folder that is already there keeps its own mode, times and attributes.

        Raises:
            OSError: something is missing or of the wrong kind, or an attribute cannot be set.
        """
        if source.is_dir():
            new = self._make_folder(path)
            self._fill(source, path, _HardLinks(self))
            if new:
                with self.opened(path) as folder, _opened(str(source), READ_FOLDER, None) as original:
                    _set_top(folder, original)
            return
        if path.endswith("/") or self.is_folder(path):
            path = f"{path}/{source.name}"
        with _source(os.path.realpath(source), None) as file:
            self.put(file, path)

    def put(self, file: int, path: str) -> None:
        """Copy an open file, from its beginning, to a path in the container, with its mode and times.

        Raises:
            OSError: the path is a folder, or something on the way to it is none.
        """
        os.lseek(file, 0, os.SEEK_SET)
        with self.place(path, follow=False, parents=True) as place:
            if place.is_folder():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            _write(file, place.folder, place.name)

    def _make_folder(self, path: str) -> bool:
        """Make a folder and its parents; return whether it was missing, so that `_set` has to follow."""
        with self.place(path, parents=True) as place:
            if place.info is None:
                os.mkdir(place.name, 0o700, dir_fd=place.folder)
                return True
            if not place.is_folder():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            return False

    def _fill(self, source: Path, path: str, links: _HardLinks) -> None:
        """Copy what is in a folder outside to a folder of the container."""
        with self.opened(path) as folder:
            for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
                place = Place(folder, entry.name, f"{path}/{entry.name}")
                if entry.is_dir(follow_symlinks=False):
                    self._fill_folder(entry, place, links)
                elif place.is_folder():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), place.path)
                elif entry.is_symlink():
                    _link(os.readlink(entry.path), entry.stat(follow_symlinks=False), folder, entry.name)
                else:
                    with _source(entry.path, None) as file:
                        links.write(file, place)

    def _fill_folder(self, entry: os.DirEntry[str], place: Place, links: _HardLinks) -> None:
        new = self._make_folder(place.path)  # by its path: `/lib` may be a link to a folder, and stays one
        self._fill(Path(entry.path), place.path, links)
        if new:
            original = _opened(entry.path, READ_FOLDER | os.O_NOFOLLOW, None)
            with self.opened(place.path) as folder, original as fd:
                _set(folder, fd)

    def copy_out(self, path: str, target: Path) -> None:
        """Copy a file or a folder's contents out of the container, to files that belong to us.

        A file's copy goes into a `target` that is a folder, under its own name. Folders are merged, files and links
        replaced. Modes (of files without set-user-ID and set-group-ID), times, `XATTRS`, hard links and holes are
        kept. A link inside a folder stays a link where it leads to something in that folder; any other is followed,
        inside the container, so that no copy leads from the container to the host's files.

        Raises:
            OSError: something is missing or of the wrong kind, or an attribute cannot be set.
        """
        with self.place(path) as place:
            if place.is_folder():
                new = _make_folders(target)
                with contextlib.closing(Rootfs(target)) as out, out.opened("/") as copy, place.opened() as folder:
                    self._drain(folder, path, copy, "", _HardLinks(out, keep=0o777), ())
                    if new:
                        _set_top(copy, folder)
                    else:
                        os.utime(copy, ns=_times(os.fstat(folder)))
                return
            if target.is_dir():
                target = target / (_parts(path) or [place.name])[-1]
            _make_folders(target.parent)
            with _source(place.name, place) as file:
                _write(file, None, str(target), keep=0o777)

    def _drain(
        self, folder: int, path: str, copy: int, inside: str, links: _HardLinks, above: tuple[tuple[int, int], ...]
    ) -> None:
        """Copy what is in an open folder of the container to an open folder outside.

        Args:
            folder: file descriptor of the one in the container.
            path: its path there.
            copy: file descriptor of the one outside.
            inside: its path below the folder that all is copied to, with a slash at the end; empty for that folder.
            links: what has been copied so far.
            above: device and inode of the folders in the container that hold this one.
        """
        info = os.fstat(folder)
        if (info.st_dev, info.st_ino) in above:
            raise OSError(errno.ELOOP, "A link leads back to a folder that holds it", path)
        above = (*above, (info.st_dev, info.st_ino))
        for name in sorted(os.listdir(folder)):
            place, there = Place(folder, name, f"{path}/{name}"), Place(copy, name, inside + name)
            entry = place.info
            if entry is None or not stat.S_ISLNK(entry.st_mode):
                self._drain_entry(place, there, links, above)
                continue
            leads_to = os.readlink(name, dir_fd=folder)
            if _stays_below(leads_to, inside.count("/")):
                _link(leads_to, entry, copy, name)
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
            _set(copy, folder)


class _HardLinks:
    """What one copy of a folder has made of files with several names: their further names become links to it.

    Args:
        root: the file system that the copies are in.
        keep: the bits of their modes that files keep.
    """

    def __init__(self, root: Rootfs, keep: int = 0o7777) -> None:
        self._root = root
        self._keep = keep
        self._copies: dict[tuple[int, int], tuple[str, os.stat_result]] = {}
        """By device and inode of the original: path and status of the copy."""

    def write(self, source: int, place: Place) -> None:
        """Copy an open file to a place, or link the place to the copy that there is."""
        info = os.fstat(source)
        if info.st_nlink == 1:
            _write(source, place.folder, place.name, self._keep)
        elif not self._link(info, place):
            copy = _write(source, place.folder, place.name, self._keep)
            self._copies[info.st_dev, info.st_ino] = place.path, copy

    def _link(self, original: os.stat_result, place: Place) -> bool:
        """Link a place to the copy of a file; return False where there is none, or none that can be linked to."""
        path, copy = self._copies.get((original.st_dev, original.st_ino), ("", None))
        if copy is None:
            return False
        aside = _aside(place.name)
        try:
            with self._root.place(path, follow=False) as first:
                # Another file may have replaced it: `/lib/x` and `/usr/lib/x` may be two files of one place.
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
            with contextlib.suppress(FileNotFoundError):  # rename(2) does nothing where both are one file already
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
    """Open a regular file to read; without waiting, should it be a pipe."""
    with _opened(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, place) as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "neither a file, a folder nor a link", place.path if place else name)
        yield fd


def _aside(name: str) -> str:
    """Return a name for a file that is to be renamed to `name`, in the same folder."""
    parent, slash, _ = name.rpartition("/")
    return f"{parent}{slash}.{os.urandom(8).hex()}.tmp"


def _write(source: int, folder: int | None, name: str, keep: int = 0o7777) -> os.stat_result:
    """Copy an open file to a name, aside and renamed; return the status of the copy.

    Args:
        source: what is copied, with its holes, `XATTRS`, mode and times.
        folder: descriptor of the folder that `name` is relative to; None for the working directory.
        name: where to.
        keep: the bits of the mode that are kept.
    """
    aside = _aside(name)
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        _copy_content(source, fd)
        _set(fd, source, keep)
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
    if info.st_blocks * 512 >= info.st_size:  # none; and what /proc calls empty has to be read to its end
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
        size = max(size, end) if start == end else start  # files of /sys are shorter than they say
    os.ftruncate(target, size)


def _data(file: int, start: int) -> int:
    """Return where the next data of an open file begins, -1 where only a hole is left."""
    try:
        return os.lseek(file, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return -1
        raise


def _set(fd: int, source: int, keep: int = 0o7777) -> None:
    """Give an open file or folder our user and group, and the mode, `XATTRS` and times of another."""
    info = os.fstat(source)
    _own(fd)  # before the rest: a change of owner takes capabilities away
    _copy_xattrs(source, fd)
    os.fchmod(fd, info.st_mode & keep)
    os.utime(fd, ns=_times(info))


def _set_top(fd: int, source: int) -> None:
    """Give an open folder that was missing what it takes of the one whose contents are copied to it.

    Its mode is 755 at the least, as `buildah copy` makes it: the contents of private temporary folders are copied too.
    """
    _set(fd, source)
    os.fchmod(fd, stat.S_IMODE(os.fstat(source).st_mode) | 0o755)


def _own(fd: int) -> None:
    """Give an open file or folder our group; in a folder with set-group-ID, it has that folder's."""
    if os.fstat(fd).st_gid != os.getegid():
        os.fchown(fd, -1, os.getegid())


def _copy_xattrs(source: int, target: int) -> None:
    """Copy those of `XATTRS` that an open file or folder has.

    Raises:
        OSError: the target's file system cannot keep one.
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
            # EOVERFLOW: capabilities(7), a capability of another user namespace's root, which counts for nothing here.
            if error.errno in (errno.ENODATA, errno.EOVERFLOW):
                continue
            raise
        try:
            os.setxattr(target, name, value)
        except OSError as error:
            path = os.readlink(f"/proc/self/fd/{source}")
            raise OSError(error.errno, f"its attribute {name} cannot be kept: {error.strerror}", path) from None


def _make_folder(name: str, folder: int, path: str) -> None:
    """Make a folder of mode 755 and of our group, whatever the umask and the folder above say.

    Args:
        name: its name.
        folder: file descriptor of the folder above.
        path: what it was asked for as, for messages.
    """
    os.mkdir(name, 0o700, dir_fd=folder)
    with Place(folder, name, path).opened() as fd:
        _own(fd)
        os.fchmod(fd, 0o755)


def _make_folders(path: Path) -> bool:
    """Make a folder outside and those that lead to it, of mode 755; return whether it was missing."""
    if path.is_dir():
        return False
    _make_folders(path.parent)
    path.mkdir()
    path.chmod(0o755)
    return True


def _link(leads_to: str, info: os.stat_result, folder: int, name: str) -> None:
    """Make a symbolic link in place of what may be there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    os.symlink(leads_to, name, dir_fd=folder)
    os.utime(name, ns=_times(info), dir_fd=folder, follow_symlinks=False)


def _times(info: os.stat_result) -> tuple[int, int]:
    return info.st_atime_ns, info.st_mtime_ns


def _stays_below(leads_to: str, depth: int) -> bool:
    """Say whether a link `depth` folders below a folder leads to something in that folder, by its text alone.

    `..` counts only at its beginning: after a name, which may be a link too, it could lead anywhere.
    """
    parts = _parts(leads_to)
    up = 0
    while up < len(parts) and parts[up] == "..":
        up += 1
    return not leads_to.startswith("/") and up <= depth and ".." not in parts[up:]
