"""The program's folder: a fresh one that holds the script, its modules, every input and every source.

Modes are set and never left to the umask, which is 077 here: a container's users and an artifact see them. Folders are
755. The folder itself is, too, because scripts mount and copy it; that other users of the builder cannot enter it is
due to the job's folder, which is 700.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..store.store import StoredJob
from ..util.atomic_files import CHUNK, is_file_name, is_relative_path, is_sha256, sha256_of, write_all
from ..util.errors import RunnerError

if TYPE_CHECKING:  # slow to load, and many jobs have no source
    import tarfile

BROKEN_SOURCE = "No source of ours has one: remove it from gamebear-tasks/sources of your cache, then run doit again."
"""What to do about a tar that our sources do not make."""


class JobFailed(RunnerError):
    """The job cannot be built; `failure` is what the state says of it."""

    def __init__(self, kind: str, message: str, hint: str = "", **details: Any) -> None:
        super().__init__(message, hint)
        self.failure = {"kind": kind, "message": str(self), **details}


def fill(stored: StoredJob, job: dict[str, Any], trees: dict[str, str], check_stop: Callable[[], None]) -> None:
    """Lay out a job's folder; every blob is checked on the way.

    Args:
        stored: the job.
        job: its description.
        trees: SHA-256 of the tar of each source, by the source's name; of `/function.lines` and `/cloudpickle.zip`
            where the job is a function.
        check_stop: called now and then; raises what ends it.

    Raises:
        JobFailed: a blob is missing or damaged, or the description names something that it must not.
        OSError: no space, for example.
    """
    try:
        _fill(stored, job, trees, check_stop)
    except JobFailed as error:
        if error.failure["kind"] == "blob":
            _remove_damaged(stored, job, trees, check_stop)
        raise


def _remove_damaged(
    stored: StoredJob, job: dict[str, Any], trees: dict[str, str], check_stop: Callable[[], None]
) -> None:
    """Remove all damaged blobs of a job, so that all are sent at once: after a power cut it is seldom one."""
    files = [*job["modules"].values(), *job["inputs"].values(), job.get("script") or job["function"]]
    for sha256 in {*(file["sha256"] for file in files), *filter(is_sha256, trees.values())}:
        check_stop()
        blob = stored.store.blob(sha256)
        with contextlib.suppress(OSError):
            if sha256_of(blob) != sha256:
                blob.unlink()


def _fill(stored: StoredJob, job: dict[str, Any], trees: dict[str, str], check_stop: Callable[[], None]) -> None:
    _make_folder(stored.work)
    if "script" in job:
        _lay(stored, check_stop, job["script"]["sha256"], stored.work, job["script"]["name"], True)
    else:
        _lay(stored, check_stop, job["function"]["sha256"], stored.folder, "function.pickle", False)
        for name in ("function.lines", "cloudpickle.zip"):
            _lay(stored, check_stop, _tree(trees, f"/{name}"), stored.folder, name, False)
    for path, file in job["modules"].items():
        _lay(stored, check_stop, file["sha256"], stored.work, path, False)
    for name, file in job["inputs"].items():
        _lay(stored, check_stop, file["sha256"], stored.work, name, bool(file.get("executable")))
    for name in job["sources"]:
        if not is_file_name(name):
            raise JobFailed("job", f"{name!r} cannot be the name of a source.")
        _lay(stored, check_stop, _tree(trees, name), stored.folder, "source.tar", False)
        _unpack_source(stored.folder / "source.tar", stored.work / name, name, check_stop)


def _unpack_source(path: Path, folder: Path, name: str, check_stop: Callable[[], None]) -> None:
    import tarfile

    _make_folder(folder)
    try:
        with tarfile.open(path) as tar:
            unpack(tar, folder, check_stop)
    except (tarfile.TarError, EOFError) as error:
        raise JobFailed(
            "source",
            f"The archive of the source {name} cannot be unpacked: {error}.",
            "Fetch the source anew on the machine that runs doit, then run doit again.",
        ) from error
    path.unlink()


def _tree(trees: dict[str, str], name: str) -> str:
    if not is_sha256(trees.get(name)):
        raise JobFailed("blob", f"The order does not say which file {name} is.", "Run doit again.")
    return trees[name]


def _lay(
    stored: StoredJob, check_stop: Callable[[], None], sha256: str, folder: Path, name: str, executable: bool
) -> None:
    """Copy a blob to its place, and check on the way that it still is what its name says."""
    if not is_relative_path(name):
        raise JobFailed("job", f"{name!r} cannot be the name of a file of the job.")
    path = folder / name
    _make_folders(path.parent, folder)
    digest = hashlib.sha256()
    blob = stored.store.blob(sha256)
    try:
        with blob.open("rb", buffering=0) as source, path.open("wb", buffering=0) as target:
            size = os.fstat(source.fileno()).st_size
            while data := source.read(min(CHUNK, size + 1)):
                check_stop()
                digest.update(data)
                write_all(target.fileno(), data)
            os.utime(source.fileno())
            os.fchmod(target.fileno(), 0o755 if executable else 0o644)
    except FileNotFoundError:
        raise JobFailed("blob", f"The builder no longer has the content of {name}.", "Run doit again.") from None
    if digest.hexdigest() != sha256:
        with contextlib.suppress(OSError):
            blob.unlink()
        raise JobFailed("blob", f"The builder's copy of {name} was damaged; it is removed.", "Run doit again.")


def _make_folder(path: Path) -> None:
    path.mkdir()
    path.chmod(0o755)


def _make_folders(path: Path, top: Path) -> None:
    """Make a folder below `top`, and those between, where they are missing; raises OSError."""
    if path != top and not path.is_dir():
        _make_folders(path.parent, top)
        _make_folder(path)


def unpack(tar: tarfile.TarFile, folder: Path, check_stop: Callable[[], None] = lambda: None) -> None:
    """Unpack a source tree: folders, files and links below the folder, nothing else.

    Links are made as they are in the tree, wherever they point to; nothing is written through them, because every
    member's folder must be a real one.

    Raises:
        RunnerError: a member would be written elsewhere, or is neither folder, file nor link.
    """
    folders: list[tuple[Path, float]] = []
    for member in tar:
        check_stop()
        name = member.name[2:] if member.name.startswith("./") else member.name
        if name in (".", ""):
            continue
        if not is_relative_path(name):
            raise RunnerError(
                f"The source's archive has a member that leads out of it: {member.name!r}.", BROKEN_SOURCE
            )
        path = folder / name
        if path.parent.resolve() != folder.resolve() / Path(name).parent:
            raise RunnerError(f"The source's archive writes through a link: {member.name!r}.", BROKEN_SOURCE)
        if member.isdir():
            _make_folders(path, folder)
            folders.append((path, member.mtime))
            continue
        _make_folders(path.parent, folder)
        if member.issym():
            path.symlink_to(member.linkname)
            os.utime(path, (member.mtime, member.mtime), follow_symlinks=False)
        elif member.isreg():
            data = tar.extractfile(member)
            assert data is not None
            with path.open("xb") as file:
                shutil.copyfileobj(data, file, CHUNK)
            path.chmod(0o755 if member.mode & 0o100 else 0o644)
            os.utime(path, (member.mtime, member.mtime))
        else:
            raise RunnerError(
                f"The source's archive has a member of a kind that sources do not have: {member.name!r}.", BROKEN_SOURCE
            )
    for path, mtime in reversed(folders):  # what is written into a folder changes its time
        os.utime(path, (mtime, mtime))
