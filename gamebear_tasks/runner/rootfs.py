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

from .files import CHUNK, sha256

MAX_LINKS = 40
"""Links followed on one path, as in the kernel (path_resolution(7))."""

FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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
        with _opened(self.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, self) as fd:
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
                    os.mkdir(name, 0o755, dir_fd=folders[-1])
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
        files and links replaced. Modes and times are kept. Missing folders are made.

        Raises:
            OSError: something is missing or of the wrong kind.
        """
        if source.is_dir():
            self._make_folder(path)
            self._fill(source, path)
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

    def _make_folder(self, path: str) -> None:
        with self.place(path, parents=True) as place:
            if place.info is None:
                os.mkdir(place.name, 0o755, dir_fd=place.folder)
            elif not place.is_folder():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)

    def _fill(self, source: Path, path: str) -> None:
        """Copy what is in a folder outside to a folder of the container."""
        with self.place(path) as here, here.opened() as folder:
            for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
                place = Place(folder, entry.name, f"{path}/{entry.name}")
                if entry.is_dir(follow_symlinks=False):
                    self._fill_folder(entry, place)
                elif place.is_folder():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), place.path)
                elif entry.is_symlink():
                    _link(os.readlink(entry.path), entry.stat(follow_symlinks=False), folder, entry.name)
                else:
                    with _source(entry.path, None) as file:
                        _write(file, folder, entry.name)

    def _fill_folder(self, entry: os.DirEntry[str], place: Place) -> None:
        new = place.info is None
        self._make_folder(place.path)  # by its path: `/lib` may be a link to a folder, and stays one
        self._fill(Path(entry.path), place.path)
        if new:
            with place.opened() as folder:
                _set(folder, entry.stat(follow_symlinks=False))

    def copy_out(self, path: str, target: Path) -> None:
        """Copy a file or a folder's contents out of the container, to files that belong to us.

        A file's copy goes into a `target` that is a folder, under its own name. Folders are merged, files and links
        replaced. Modes (without set-user-ID and the like) and times are kept. A link inside a folder stays a link
        where it leads to something in that folder; any other is followed, inside the container, so that no copy leads
        from the container to the host's files.

        Raises:
            OSError: something is missing or of the wrong kind.
        """
        with self.place(path) as place:
            if place.is_folder():
                target.mkdir(parents=True, exist_ok=True)
                with _opened(str(target), os.O_RDONLY | os.O_DIRECTORY, None) as folder:
                    self._drain(place, folder, 0, ())
                return
            if target.is_dir():
                target = target / (_parts(path) or [place.name])[-1]
            target.parent.mkdir(parents=True, exist_ok=True)
            with _source(place.name, place) as file:
                _write(file, None, str(target), keep=0o777)

    def _drain(self, here: Place, target: int, depth: int, above: tuple[tuple[int, int], ...]) -> None:
        """Copy what is in a folder of the container to an open folder outside."""
        with here.opened() as folder:
            info = os.fstat(folder)
            if (info.st_dev, info.st_ino) in above:
                raise OSError(errno.ELOOP, "A link leads back to a folder that holds it", here.path)
            above = (*above, (info.st_dev, info.st_ino))
            for name in sorted(os.listdir(folder)):
                place = Place(folder, name, f"{here.path}/{name}")
                entry = place.info
                if entry is None or not stat.S_ISLNK(entry.st_mode):
                    self._drain_entry(place, target, name, depth, above)
                    continue
                leads_to = os.readlink(name, dir_fd=folder)
                if _stays_below(leads_to, depth):
                    _link(leads_to, entry, target, name)
                    continue
                with self.place(place.path) as followed:
                    self._drain_entry(followed, target, name, depth, above)
            os.utime(target, ns=_times(info))

    def _drain_entry(
        self, place: Place, target: int, name: str, depth: int, above: tuple[tuple[int, int], ...]
    ) -> None:
        info = place.info
        if info is None or not stat.S_ISDIR(info.st_mode):
            with _source(place.name, place) as file:
                _write(file, target, name, keep=0o777)
            return
        there = _look(name, target)
        if there is not None and not stat.S_ISDIR(there.st_mode):
            os.unlink(name, dir_fd=target)
            there = None
        if there is None:
            os.mkdir(name, 0o700, dir_fd=target)
        with Place(target, name, place.path).opened() as inner:
            self._drain(place, inner, depth + 1, above)
            os.fchmod(inner, info.st_mode & 0o777 | 0o700)


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


def _write(source: int, folder: int | None, name: str, keep: int = 0o7777) -> None:
    """Copy an open file to a name, aside and renamed; with its mode, as far as `keep` goes, and its times."""
    parent, _, _ = name.rpartition("/")
    aside = f"{parent}/" * bool(parent or name.startswith("/")) + f".{os.urandom(8).hex()}.tmp"
    info = os.fstat(source)
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        with open(fd, "wb", buffering=0) as file:
            while data := os.read(source, CHUNK):
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
            _set(fd, info, keep)
        os.replace(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside, dir_fd=folder)
        raise


def _set(fd: int, info: os.stat_result, keep: int = 0o7777) -> None:
    """Give an open file our user and group, and the mode and times of another."""
    if os.fstat(fd).st_gid != os.getegid():
        os.fchown(fd, -1, os.getegid())  # it is in a folder that hands its group on
    os.fchmod(fd, info.st_mode & keep)
    os.utime(fd, ns=_times(info))


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
