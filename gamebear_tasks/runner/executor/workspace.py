"""A job's working directory: a fresh folder with the script, its modules, all inputs and all sources.

Modes are set explicitly and do not depend on the umask, which is 077 here, because a container's users and artifacts
depend on them. Folders have mode 755. So has the working directory itself, because scripts mount and copy it. Other
users of the builder cannot enter it, because the job's folder has mode 700.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..protocol import manifest
from ..store import folder_sources
from ..store.store import StoredJob, version
from ..util.atomic_files import (
    CHUNK,
    copy_content,
    is_file_name,
    is_relative_path,
    is_sha256,
    sha256_of,
    write_all,
)
from ..util.errors import RunnerError

if TYPE_CHECKING:  # slow to import, and many jobs have no source
    import tarfile

BROKEN_SOURCE = "Remove gamebear-tasks/sources from your cache folder, then run doit again."
"""Suggested fix for a tar file that none of the project's sources produces."""


LONGEST_MESSAGE = 4000
LONGEST_HINT = 1000
"""Maximum characters of the two texts of a failure."""


def failure(kind: str, message: str, hint: str, **details: Any) -> dict[str, Any]:
    """Return the record of a failure for the job's state; its texts are bounded and can be encoded as UTF-8.

    Args:
        kind: kind of failure.
        message: cause of the failure.
        hint: suggested fix.
        details: further fields.
    """
    texts = {"message": message[:LONGEST_MESSAGE], "hint": hint[:LONGEST_HINT]}
    return {
        "kind": kind,
        **{name: text.encode("utf-8", "backslashreplace").decode() for name, text in texts.items()},
        **details,
    }


class JobFailed(RunnerError):
    """The job cannot be built.

    Args:
        kind: kind of failure.
        message: cause of the failure.
        hint: suggested fix.
        details: further fields of the failure.

    Attributes:
        failure: the failure, as recorded in the job's state.
    """

    def __init__(self, kind: str, message: str, hint: str, **details: Any) -> None:
        super().__init__(message, hint)
        self.failure = failure(kind, message, hint, **details)


class Workspace:
    """A job's working directory while it is created.

    Args:
        stored: the job.
        job: the job's JSON.
        order: the order that started it, with `trees`: SHA-256 of the tar file of each source, by source name, and of
            `/function.lines` and `/cloudpickle.zip` if the job is a function; and `verified`: version (see
            `store.version`) by SHA-256 of each blob that the session has just received and verified.
        check_stop: called repeatedly; an exception that it raises ends the operation.
    """

    def __init__(
        self, stored: StoredJob, job: dict[str, Any], order: dict[str, Any], check_stop: Callable[[], None]
    ) -> None:
        self._stored = stored
        self._job = job
        self._trees: dict[str, str] = order.get("trees") or {}
        self._verified: dict[str, list[int]] = order.get("verified") or {}
        self._check_stop = check_stop

    def fill(self) -> None:
        """Create the working directory; the SHA-256 of every blob is verified while it is copied.

        Raises:
            JobFailed: a blob is missing or corrupted, or the job contains an invalid name.
            OSError: a file cannot be written, for example because the disk is full.
        """
        try:
            self._fill()
        except JobFailed as error:
            if error.failure["kind"] == "blob":
                self._remove_damaged()
            raise

    def _remove_damaged(self) -> None:
        """Remove all corrupted blobs of the job, so that the client sends them all at once.

        A power cut often corrupts several.
        """
        job, store = self._job, self._stored.store
        files = [*job["modules"].values(), *job["inputs"].values(), job.get("script") or job["function"]]
        used = {*(file["sha256"] for file in files), *filter(is_sha256, self._trees.values())}
        for sha256 in folder_sources.manifests(job).values():
            used.add(sha256)
            with contextlib.suppress(OSError, manifest.ManifestError):
                used.update(folder_sources.files(store, sha256))
        for sha256 in used:
            self._check_stop()
            blob = store.blob(sha256)
            with contextlib.suppress(OSError):
                if sha256_of(blob) != sha256:
                    blob.unlink()

    def _fill(self) -> None:
        job, stored = self._job, self._stored
        _make_folder(stored.work)
        if "script" in job:
            self._copy(job["script"]["sha256"], stored.work, job["script"]["name"], True)
        else:
            self._copy(job["function"]["sha256"], stored.folder, "function.pickle", False)
            for name in ("function.lines", "cloudpickle.zip"):
                self._copy(self._tree(f"/{name}"), stored.folder, name, False)
        for path, file in job["modules"].items():
            self._copy(file["sha256"], stored.work, path, False)
        for name, file in job["inputs"].items():
            self._copy(file["sha256"], stored.work, name, bool(file.get("executable")))
        for name, source in job["sources"].items():
            if not is_file_name(name):
                message = f"{name!r} is not a valid name of a source."
                raise JobFailed("job", message, "Rename it in sources= of artifact().")
            if "folder" in source:
                self._create_folder(str(source["folder"]), name)
                continue
            self._copy(self._tree(name), stored.folder, "source.tar", False)
            _unpack_source(stored.folder / "source.tar", stored.work / name, name, self._check_stop)

    def _create_folder(self, sha256: str, name: str) -> None:
        """Create a folder source from its manifest.

        Raises:
            JobFailed: the manifest or a file is missing or corrupted.
            OSError: a file cannot be written.
        """
        top = self._stored.work / name
        self._copy(sha256, self._stored.folder, "manifest", False)
        entries = manifest.decode((self._stored.folder / "manifest").read_bytes())
        (self._stored.folder / "manifest").unlink()
        _make_folder(top)
        made = {""}
        for kind, path, value in entries:
            parent = path if kind == "d" else path.rpartition("/")[0]
            if parent not in made:
                _make_folders(top / parent, top)
                made.add(parent)
            if kind == "l":
                os.symlink(value, top / path)
                os.utime(top / path, (manifest.MTIME, manifest.MTIME), follow_symlinks=False)
            elif kind != "d":
                self._copy(value, top, path, kind == "x", manifest.MTIME)
        for folder, _, _ in os.walk(top, topdown=False):
            os.utime(folder, (manifest.MTIME, manifest.MTIME))

    def _tree(self, name: str) -> str:
        if not is_sha256(self._trees.get(name)):
            raise JobFailed("blob", f"the order has no SHA-256 of {name}.", "Run doit again.")
        return self._trees[name]

    def _copy(self, sha256: str, folder: Path, name: str, executable: bool, mtime: float | None = None) -> None:
        """Copy a blob to its place, and verify its SHA-256 unless the session has just done so.

        It is a copy, and no hard link, because scripts may change their files.

        Raises:
            JobFailed: the name is invalid, or the blob is missing or corrupted.
            OSError: the file cannot be written.
        """
        if not is_relative_path(name):
            raise JobFailed("job", f"{name!r} is not a valid path of a file.", "Rename it in artifact().")
        path = f"{folder}/{name}"
        if "/" in name:
            _make_folders(Path(path).parent, folder)
        blob = self._stored.store.blob(sha256)
        try:
            with open(blob, "rb", buffering=0) as source, open(path, "wb", buffering=0) as target:
                about = os.fstat(source.fileno())
                if self._verified.get(sha256) == version(about):
                    copy_content(source.fileno(), target.fileno(), self._check_stop)
                    found = sha256
                else:
                    digest = hashlib.sha256()
                    while data := source.read(min(CHUNK, about.st_size + 1)):
                        self._check_stop()
                        digest.update(data)
                        write_all(target.fileno(), data)
                    found = digest.hexdigest()
                    os.utime(source.fileno())
                os.fchmod(target.fileno(), 0o755 if executable else 0o644)
                if mtime is not None:
                    os.utime(target.fileno(), (mtime, mtime))
        except FileNotFoundError:
            raise JobFailed("blob", f"the builder's copy of {name} is gone.", "Run doit again.") from None
        if found != sha256:
            with contextlib.suppress(OSError):
                blob.unlink()
            raise JobFailed("blob", f"the builder's copy of {name} was damaged and is removed.", "Run doit again.")


def _unpack_source(path: Path, folder: Path, name: str, check_stop: Callable[[], None]) -> None:
    import tarfile

    _make_folder(folder)
    try:
        with tarfile.open(path) as tar:
            unpack(tar, folder, check_stop)
    except (tarfile.TarError, EOFError) as error:
        raise JobFailed("source", f"source {name} cannot be unpacked: {error}.", BROKEN_SOURCE) from error
    path.unlink()


def _make_folder(path: Path) -> None:
    path.mkdir()
    path.chmod(0o755)


def _make_folders(path: Path, top: Path) -> None:
    """Create a folder below `top` and its missing parents.

    Raises:
        OSError: a folder cannot be created.
    """
    if path != top and not path.is_dir():
        _make_folders(path.parent, top)
        _make_folder(path)


def unpack(tar: tarfile.TarFile, folder: Path, check_stop: Callable[[], None] = lambda: None) -> None:
    """Unpack a source tree, which is untrusted: only folders, regular files and symbolic links, only below the folder.

    Links are created as they are, wherever they point. Nothing is written through them, because the parent of every
    member must be a real folder.

    Args:
        tar: tar file of the source.
        folder: folder to unpack into.
        check_stop: called for every member; an exception that it raises ends the operation.

    Raises:
        RunnerError: a member leads out of the folder, or is neither a folder, a regular file nor a symbolic link.
    """
    folders: list[tuple[Path, float]] = []
    for member in tar:
        check_stop()
        name = member.name[2:] if member.name.startswith("./") else member.name
        if name in (".", ""):
            continue
        if not is_relative_path(name):
            raise RunnerError(
                f"the archive of a source has a member outside of its folder: {member.name!r}.", BROKEN_SOURCE
            )
        path = folder / name
        if path.parent.resolve() != folder.resolve() / Path(name).parent:
            raise RunnerError(f"the archive of a source writes through a link: {member.name!r}.", BROKEN_SOURCE)
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
                f"the archive of a source has a member that is not a file, folder or link: {member.name!r}.",
                BROKEN_SOURCE,
            )
    for path, mtime in reversed(folders):  # last, because writing into a folder changes its timestamp
        os.utime(path, (mtime, mtime))
