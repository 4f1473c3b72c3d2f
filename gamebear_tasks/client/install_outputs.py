"""Installation of outputs as targets: complete, verified by SHA-256, all or none.

Each output is downloaded to a temporary file in its target's folder, then installed by atomic rename.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from ..builders.base import Output, Sink
from ..errors import JobError
from ..runner.util.atomic_files import content, sha256_of, sync_folder, zeros
from ..runner.util.folder_archive import FolderError, sha256_of_folder
from ..runner.util.free_space import FULL
from ..runner.util.locks import opened_alone, seized
from ..util.process import file_mode
from ..util.text import size
from . import installed_folders

Fetch: TypeAlias = Callable[[str, int, Sink, int], None]
"""Download an output: (name, offset, sink, limit), offset and limit in bytes. Raises BuilderError."""


NO_SPACE = "Free disk space, then run doit again: it downloads and does not build."
"""Suggested fix for a full disk."""


class Mismatch(JobError):
    """The received content does not match the size or SHA-256 that the builder reported."""


@dataclass(frozen=True)
class _Part:
    """Partial download of a target.

    Attributes:
        target: path of the target.
        path: path of the temporary file.
        output: size and SHA-256 that the builder reported.
        is_folder: whether the output is the archive of a folder, which is unpacked to `tree`.
    """

    target: Path
    path: Path
    output: Output
    is_folder: bool = False

    @property
    def tree(self) -> Path:
        """Path of the unpacked folder, before it is installed."""
        return self.path.with_suffix(".tree")

    @property
    def old(self) -> Path:
        """Path of the previous folder, before it is removed."""
        return self.path.with_suffix(".old")


STATEMENT = ".intoto.json"
"""File name suffix of the provenance statement next to a target. A target's own name may not have it."""


def statement_of(target: Path) -> Path:
    """Return the path of a target's provenance statement, whether it exists or not."""
    return target.with_name(f"{target.name}{STATEMENT}")


def part_pattern(target: Path, suffix: str = "part") -> str:
    """Return the glob that matches partial downloads of a target, relative to the target's folder."""
    return f".{_glob_escaped(_stem(target))}.{'[0-9a-f]' * 16}.{suffix}"


def leftovers(target: Path) -> Iterator[Path]:
    """Yield the partial downloads of a target, and the temporary folders of a folder output."""
    for suffix in ("part", "tree", "old"):
        yield from target.parent.glob(part_pattern(target, suffix))


def _part(target: Path, output: Output) -> Path:
    """Return the path of a target's partial download, unique to the target's name and the output's SHA-256."""
    both = hashlib.sha256(os.fsencode(target.name) + b"/" + output.sha256.encode()).hexdigest()
    return target.parent / f".{_stem(target)}.{both[:16]}.part"


def _stem(target: Path) -> str:
    """Return the stem of a partial download's name: the target's name, or a prefix of it and a hash.

    The partial download's name is UTF-8 and has at most 255 bytes. Different targets in a folder have different stems.
    """
    name = os.fsencode(target.name)
    text = name[:60].decode(errors="ignore")
    return text if text == target.name else f"{text}~{hashlib.sha256(name).hexdigest()[:16]}"


def check_place(path: Path, *, is_folder: bool = False) -> None:
    """Check that a file, or a folder output, can be created at a path, before hours are spent on building it.

    Raises:
        JobError: the path is a folder, one of its parents is not a folder, or permission is missing.
    """
    if is_folder:
        installed_folders.check_replaceable(path)
    elif path.is_dir():
        raise JobError(
            f"{path} cannot be written: it is a folder, not a file.", "Move the folder away, or change the target."
        )
    folder = next(folder for folder in path.parents if os.path.lexists(folder))
    if not folder.is_dir():
        raise JobError(
            f"{path} cannot be written: {folder} is a file, not a folder.", "Move the file away, or change the target."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise JobError(
            f"{path} cannot be written: you have no write permission for {folder}.",
            f"Check its owner and mode: ls -ld {folder}",
        )


def place(
    targets: Mapping[str, Path], outputs: Mapping[str, Output], fetch: Fetch, folders: Collection[str] = ()
) -> int:
    """Download a job's outputs and install them as its targets, all or none.

    Each output is written to a temporary file in its target's folder, which resumes an interrupted download. It is
    checked against its SHA-256 and synced. Once all are complete, each is renamed atomically. A target that has the
    content already is neither downloaded nor replaced.

    Args:
        targets: path of each target, by the output's name.
        outputs: size and SHA-256 that the builder reported, by the output's name. They are untrusted.
        fetch: downloads the content.
        folders: names of the outputs that are archives of folders (see `folder_archive`), which are unpacked.

    Returns:
        The number of bytes downloaded.

    Raises:
        JobError: a target cannot be written: no space, no permission, a folder at its path.
        Mismatch: an output does not match what the builder reported. Nothing is installed.
        BuilderError: an output cannot be downloaded.
    """
    parts: list[_Part] = []
    kept: list[Path] = []
    fetched = 0
    try:
        with contextlib.ExitStack() as open_parts:
            for name, target in targets.items():
                output = outputs[name]
                is_folder = name in folders
                check_place(target, is_folder=is_folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                if _is_already(target, output, is_folder):
                    if not is_folder:
                        _set_mode(target, output)
                    kept.append(target)
                    continue
                part = _Part(target, _part(target, output), output, is_folder)
                parts.append(part)
                file = open_parts.enter_context(_opened(part))
                fetched += _complete(name, part, file, fetch)
                if is_folder:
                    _unpack(part)
            _rename(parts, kept)
    except OSError as error:
        for part in parts:
            with contextlib.suppress(OSError):
                part.path.unlink()
        raise JobError(f"The artifact cannot be written: {_reason(error)}.", _remedy(error)) from error
    return fetched


@contextlib.contextmanager
def _opened(part: _Part) -> Iterator[BinaryIO]:
    """Open a partial download under an exclusive file lock and keep its content; raises OSError."""
    with opened_alone(part.path) as fd, open(fd, "r+b", buffering=0, closefd=False) as file:
        try:
            yield file
        except BaseException:
            with contextlib.suppress(OSError):
                if not os.fstat(fd).st_size and os.path.samestat(os.fstat(fd), os.stat(part.path)):
                    part.path.unlink()  # an empty file is of no use for a resume
            raise


def _complete(name: str, part: _Part, file: BinaryIO, fetch: Fetch) -> int:
    """Download the missing rest of a part, verify the whole and sync it; return the number of bytes downloaded."""
    output = part.output
    have = os.fstat(file.fileno()).st_size
    if have > output.size:
        file.truncate(0)
        have = 0
    missing = output.size - have
    free = shutil.disk_usage(part.path.parent).free
    if min(missing, output.room) > free:
        part.path.unlink()
        raise JobError(
            f"{part.target} does not fit on the disk: it needs {size(output.room)}, and {size(free)} are free.",
            NO_SPACE,
        )
    checked = _Checked(file, have)
    fetch(name, have, checked, missing)
    if checked.size == output.size and checked.sha256() == output.sha256:
        os.fchmod(file.fileno(), _mode(output))
        os.fsync(file.fileno())
        return missing
    part.path.unlink()
    if have:
        raise Mismatch(
            f"{part.target}: the partial download of an earlier run was damaged and is removed.", "Run doit again."
        )
    raise Mismatch(
        f"{part.target} did not arrive intact: "
        + (f"{checked.size} of {output.size} bytes." if checked.size != output.size else "its SHA-256 does not match."),
        "Run doit again; if it fails again, check `dmesg` on the builder for disk or memory errors.",
    )


class _Checked:
    """A sink that writes to a file and hashes its content, including the `have` bytes that it already contains."""

    def __init__(self, file: BinaryIO, have: int) -> None:
        self._digest = hashlib.sha256()
        self._file = file
        self.size = have
        for data in content(file.fileno()):
            self._digest.update(data)
        file.seek(have)

    def write(self, data: bytes, /) -> int:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def skip(self, count: int, /) -> None:
        self.size += count
        self._file.truncate(self.size)  # before hashing: the file system rejects an absurd size at once
        self._file.seek(self.size)
        for data in zeros(count):
            self._digest.update(data)

    def sha256(self) -> str:
        return self._digest.hexdigest()


def _rename(parts: list[_Part], kept: list[Path]) -> None:
    """Rename complete parts to their targets.

    If there are several targets, the old ones are removed first, so that old and new ones never coexist. If one cannot
    be renamed, no target remains.

    Args:
        parts: the complete parts.
        kept: the targets that have their new content already.
    """
    several = len(parts) + len(kept) > 1
    if several:
        for part in parts:
            _remove(part.target)
    placed = [*kept]
    try:
        for part in parts:
            if part.is_folder:
                installed_folders.swap_in(part.tree, part.target, part.old)
            else:
                os.replace(part.path, part.target)
            placed.append(part.target)
    except BaseException:
        for target in placed:
            with contextlib.suppress(OSError):
                _remove(target)
        raise
    for part in parts:
        part.path.unlink(missing_ok=True)  # a folder's archive
        with contextlib.suppress(OSError):
            statement_of(part.target).unlink()  # it describes the previous content
    for folder in {part.target.parent for part in parts}:
        sync_folder(folder)
    for part in parts:
        for other in leftovers(part.target):
            _remove_unused(other)


def _unpack(part: _Part) -> None:
    """Unpack the archive of a folder beside its target; raises Mismatch or OSError."""
    from .unpacking import ArchiveError, unpack  # here, because most outputs are files

    for stale in (part.tree, part.old):  # left by a process that was killed
        installed_folders.remove_tree(stale)
    try:
        unpack(part.path, part.tree)
    except ArchiveError as error:
        part.path.unlink()
        installed_folders.remove_tree(part.tree)
        raise Mismatch(
            f"{part.target} was not installed: its archive from the builder has {error}.",
            "Run doit again; if it fails again, do not trust the builder.",
        ) from error
    except BaseException:
        installed_folders.remove_tree(part.tree)
        raise


def _remove(target: Path) -> None:
    """Remove a target that was installed, if there is one; raises OSError."""
    if target.is_dir() and not target.is_symlink():
        installed_folders.remove(target)
    else:
        target.unlink(missing_ok=True)


def _remove_unused(path: Path) -> None:
    """Remove a partial download or an unpacked folder of other content, unless another doit uses it."""
    with seized(path.with_suffix(".part")) as held, contextlib.suppress(OSError):
        if held or not os.path.lexists(path.with_suffix(".part")):
            remove_leftover(path)


def remove_leftover(path: Path) -> None:
    """Remove a partial download or a temporary folder; raises OSError."""
    if path.is_dir():
        installed_folders.remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def _is_already(target: Path, output: Output, is_folder: bool) -> bool:
    try:
        if is_folder:
            return target.is_dir() and sha256_of_folder(str(target)) == output.sha256
        about = os.lstat(target)
        return stat.S_ISREG(about.st_mode) and about.st_size == output.size and sha256_of(target) == output.sha256
    except (OSError, FolderError):
        return False


def _set_mode(target: Path, output: Output) -> None:
    with contextlib.suppress(OSError):
        target.chmod(_mode(output))


def _mode(output: Output) -> int:
    return file_mode(executable=output.executable)


def _reason(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror or error)


def _remedy(error: OSError) -> str:
    if error.errno in FULL:
        return NO_SPACE
    if error.errno == errno.EROFS:
        return "Mount the file system read-write, then run doit again: it downloads and does not build."
    return "Check its owner, mode and folder, then run doit again: it downloads and does not build."


def _glob_escaped(text: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in text)
