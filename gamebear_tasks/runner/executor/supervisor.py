"""A job's supervisor: a detached process that waits for a slot, runs the job and stores the result.

It holds the job's file lock from before its start (the session that starts it passes the lock down) until it ends.
State `running` with a free lock therefore always means that the job is lost.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import select
import signal
import stat
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..host.buildah import remove_tree
from ..host.capabilities import Facts, environment, namespace, stay_with
from ..host.probe import facts
from ..maintenance import retained_containers
from ..maintenance.cleanup import clean_up, clean_up_after_lost_jobs, remove_leftovers
from ..maintenance.performance_warnings import keep_notices
from ..store import builder_config, slots
from ..store.phases import Phases, record_phase
from ..store.store import Store, StoredJob, StoreError, hold_runner, runner_folder, storage_failure
from ..util import folder_archive
from ..util.atomic_files import content, data_extents, read_json, sync_folder
from ..util.errors import OUT_OF_MEMORY, RunnerError, ended_by
from ..util.free_space import FULL, is_full
from . import outputs
from .workspace import JobFailed, Workspace, failure

LOG_LIMIT = 1 << 30
"""Bytes of log after which a build is stopped: it is in an endless loop and would fill the disks of both sides."""

GO = b"\n"
"""Sent to a build when its working directory is ready."""

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL to a build."""


POLL = 0.2
"""Seconds between two checks whether an attempt must stop."""


class Stopped(BaseException):
    """The attempt must stop.

    Raised at any point of a phase; a BaseException, so that no handler of ordinary errors catches it.
    """


class Cancelled(Stopped):
    """A client requested to stop the attempt."""


class TimeUp(Stopped):
    """The attempt has reached its time limit."""


class Supervisor:
    """Runs one attempt of one job.

    Args:
        stored: the job.
        attempt: name of the attempt.
    """

    def __init__(self, stored: StoredJob, attempt: str) -> None:
        self.stored = stored
        self.store = stored.store
        self.attempt = attempt
        self.log = os.open(stored.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.phases = Phases(on_switch=partial(record_phase, stored.folder))
        self.policies: list[dict[str, Any]] = []
        order = read_json(stored.folder / "order.json")
        order = order if isinstance(order, dict) else {}
        self.keeps = bool(order.get("keep"))
        """Whether to retain the containers of a failed build."""
        self.tidy = not order.get("after_lost")
        """Whether there are certainly no containers, neither of an earlier attempt nor of this one."""
        self.limit = 0.0
        """Time limit of the attempt in seconds, counted from when it has its slot; 0 for no limit."""
        self._deadline = math.inf
        self._disks = [str(self.store.root)]
        """Folders of the file systems that a build writes to."""
        self._was_full = False
        """Whether one of these was full while the build ran."""

    def run(self) -> None:
        """Build the job and write its final state. Failures of the job are recorded, not raised.

        Raises:
            OSError: the final state cannot be written.
        """
        os.environ["TMPDIR"] = str(self.stored.scratch)  # a program that is killed leaves its temporary files there
        try:
            config = builder_config.read()
            if config.wrong:
                self.log_line(f"on this builder {config.wrong}: {config.remedy}")
            with self._stopped_in_time():
                with self.phases.phase("queue"):
                    slot = slots.wait_for_one(self.store, self.attempt, self._check_stop, self.log_line)
                with slot:
                    self._write_state("running")
                    with self.phases.phase("prepare"):
                        clean_up_after_lost_jobs(self.store, but=self.stored.digest)
                        retained_containers.trim(self.store)
                    outputs = self._build()
            final: dict[str, Any] = {"state": "done", "outputs": outputs, "policies": self.policies}
        except Cancelled:
            self.log_line("cancelled")
            final = {"state": "cancelled"}
        except TimeUp:
            message = f"the time limit of {self.limit:g} s was exceeded."
            hint = "Raise time_limit= of artifact(), or fix the step that hangs: the log ends with it."
            final = {"state": "failed", "failure": failure("time", message, hint)}
        except JobFailed as error:
            final = {"state": "failed", "failure": error.failure}
        except RunnerError as error:
            final = {"state": "failed", "failure": failure(error.kind, error.message, error.hint)}
        except OSError as error:
            full = storage_failure(error)
            final = {"state": "failed", "failure": failure(full.kind, full.message, full.hint)}
        self._clean_up(final)
        self._write_final_state(**final)

    def log_line(self, text: str) -> None:
        """Write a message of the supervisor to the job's log. Best effort."""
        with contextlib.suppress(OSError):
            os.write(self.log, f"gamebear: {text}\n".encode("utf-8", "backslashreplace"))

    def _write_state(self, state: str, **more: Any) -> None:
        self.stored.write_state({"state": state, "attempt": self.attempt, "phases": self.phases.spans, **more})

    def _write_final_state(self, **final: Any) -> None:
        """Write the final state; on a full disk, first free space by removing the unneeded order.

        If it cannot be written at all, the attempt counts as lost.

        Raises:
            OSError: it cannot be written.
        """
        try:
            self._write_state(**final)
        except OSError:
            with contextlib.suppress(OSError):
                (self.stored.folder / "order.json").unlink()
            self._write_state(**final)

    @contextlib.contextmanager
    def _stopped_in_time(self) -> Iterator[None]:
        """Raise Stopped within the block as soon as the attempt must stop, whatever the block is doing.

        A timer signal interrupts the block, so no phase needs to poll: not while it waits for a program or a lock, nor
        while it hashes a large file. The exception is raised only once, so that unwinding is not interrupted.
        """
        active = True

        def look(number: int, frame: types.FrameType | None) -> None:
            nonlocal active
            if active:
                try:
                    self._check_stop()
                except Stopped:
                    active = False
                    raise

        before = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, POLL, POLL)
        try:
            yield
        finally:
            active = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _check_stop(self) -> None:
        if self.stored.is_asked_to_stop(self.attempt):
            raise Cancelled
        if time.monotonic() > self._deadline:
            raise TimeUp

    def _build(self) -> dict[str, Any]:
        job = self._document()
        order = self._order()
        self.limit = float(order.get("time_limit") or 0)
        if self.limit > 0:
            self._deadline = time.monotonic() + self.limit
        with self.phases.phase("prepare"):
            known = facts(self.store.root)
            stay_with(known)
            keep_notices(self.store, known)
            self._disks += [known.graph_root] if known.graph_root else []
        self._check_stop()
        arch = str(job["arch"])
        if arch != known.arch and arch not in known.emulated:
            raise JobFailed(
                "arch",
                f"the job is for {arch}; the builder runs {', '.join([known.arch, *known.emulated])}.",
                f"Set arch={known.arch}, use a builder for {arch}, or install emulation on this one:"
                " sudo apt install qemu-user-static",
            )
        with self.phases.phase("prepare"):
            if order.get("after_lost") and not remove_leftovers(self.stored):
                self.log_line(f"cannot remove {self.stored.folder} or the containers {self.stored.container_prefix}…")
                raise RunnerError(
                    "the containers and files of an earlier attempt cannot be removed.",
                    "Remove them on the builder: the log names them.",
                )
            self.tidy = True
            if self.stored.work.exists():
                remove_tree(self.store.root, known, self.stored.work)
            process = self._start_program(known, str(order.get("base", "auto")))
            try:
                Workspace(self.stored, job, order, self._check_stop).fill()
            except BaseException:
                stop(process)
                raise
        self._run_program(process)
        with self.phases.phase("keep"):
            return self._keep_outputs(job)

    @property
    def _result(self) -> Path:
        return self.stored.folder / "result.json"

    def _document(self) -> dict[str, Any]:
        try:
            return self.stored.document()
        except (OSError, ValueError) as error:
            raise JobFailed("blob", f"the stored job is damaged: {error}.", "Run doit again.") from error

    def _order(self) -> dict[str, Any]:
        order = read_json(self.stored.folder / "order.json")
        if not isinstance(order, dict) or not isinstance(order.get("trees"), dict):
            raise JobFailed("blob", "the stored order of the job is damaged.", "Run doit again.")
        return order

    # the build process

    def _start_program(self, known: Facts, base: str) -> subprocess.Popen[bytes]:
        """Start the build in its namespace. That is slow, so it overlaps with filling the working directory.

        The build waits for `GO` before it begins.
        """
        with contextlib.suppress(FileNotFoundError):
            self._result.unlink()
        runner = runner_folder()
        self.stored.scratch.mkdir(mode=0o700, exist_ok=True)
        return subprocess.Popen(
            [*namespace(known), sys.executable, "-u", str(runner), "build", self.stored.digest],
            stdin=subprocess.PIPE,  # the build reads end of file when the supervisor has died
            stdout=self.log,
            stderr=self.log,
            cwd=self.stored.folder,
            env={
                **environment(self.store.root, known),
                "TMPDIR": str(self.stored.scratch),
                "GAMEBEAR_BASE": base,
                "PYTHONHASHSEED": "0",  # makes the order of sets of strings reproducible
                retained_containers.KEEP_VARIABLE: self.attempt if self.keeps else "",
            },
            start_new_session=True,
        )

    def _run_program(self, process: subprocess.Popen[bytes]) -> None:
        """Start the prepared build and wait until it ends.

        Raises:
            JobFailed: the build failed.
            Stopped: the attempt must stop.
        """
        assert process.stdin is not None
        self.tidy = False
        started = time.monotonic()
        try:
            with contextlib.suppress(BrokenPipeError):  # it failed to start; its exit status is checked below
                process.stdin.write(GO)
                process.stdin.flush()
            status = self._wait(process)
        except BaseException:
            stop(process)
            self.phases.add("build", started, time.monotonic())
            raise
        result = read_json(self._result)
        self._note_phases(result, started)
        self.tidy = isinstance(result, dict) and not result.get("containers_left")
        if isinstance(result, dict) and result.get("ok") and status == 0:
            self.policies = result.get("policies") or []
            return
        if isinstance(result, dict) and not result.get("ok"):
            details = {key: result[key] for key in ("command", "status", "where", "containers") if key in result}
            message, hint = str(result.get("message", "")), str(result.get("hint", ""))
            self._check_room(message, details)
            raise JobFailed(str(result.get("kind", "script")), message, hint, **details)
        self._check_room("", {})
        how = ended_by(status)
        raise JobFailed(
            "killed",
            f"the build {how} before it reported a result.",
            f"{OUT_OF_MEMORY}." if how.endswith("SIGKILL") else "Read the log, then run doit again.",
        )

    def _note_phases(self, result: Any, started: float) -> None:
        """Record the phases that the build reports; the time before and after them counts as `build`."""
        now = time.monotonic()
        with contextlib.suppress(KeyError, TypeError, ValueError):  # it was killed, or the script changed its result
            began = float(result["began"])
            for name, start, seconds in sorted(result["phases"], key=lambda span: float(span[1])):
                begun = min(max(began + float(start), started), now)
                self.phases.add("build", started, begun)
                started = min(begun + float(seconds), now)
                self.phases.add(str(name)[:20], begun, started)
        self.phases.add("build", started, now)

    def _check_room(self, message: str, details: dict[str, Any]) -> None:
        """Raise JobFailed for a full disk if a disk is full or was full while the build ran.

        Args:
            message: error message of the build.
            details: details of the failure.
        """
        if self._was_full or is_full(*self._disks):
            error = storage_failure(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            full = f"{error.message.removesuffix('.')}: {message}" if message else error.message
            raise JobFailed(error.kind, full, error.hint, **details)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        pidfd = os.pidfd_open(process.pid)
        try:
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            while not ended.poll(200):
                self._check_stop()
                self._was_full = self._was_full or is_full(*self._disks)
                if os.fstat(self.log).st_size > LOG_LIMIT:
                    raise JobFailed(
                        "log",
                        f"the log exceeded {LOG_LIMIT >> 20} MiB.",
                        "Reduce the output of the build's programs, or redirect it to a file.",
                    )
            return process.wait()
        finally:
            os.close(pidfd)

    # outputs

    def _keep_outputs(self, job: dict[str, Any]) -> dict[str, Any]:
        """Move the outputs from the working directory into the store and sync them; folders as archives.

        Args:
            job: the job's JSON.

        Returns:
            By name: `size` in bytes, `data` (bytes that are not in holes), `sha256` and `executable`.

        Raises:
            JobFailed: an output cannot be read, or is not a regular file.
            OSError: an output cannot be stored.
        """
        folder = self.stored.outputs(self.attempt)
        folder.mkdir(mode=0o700)
        sync_folder(self.stored.folder)
        kept = {}
        for name in job["outputs"]:
            source = self._archived(job, name) if name in job.get("folders", ()) else self.stored.work / name
            try:
                fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                message = f"output {name} cannot be read: {error.strerror}."
                raise JobFailed("output", message, "Leave a readable regular file.") from error
            with open(fd, "rb", buffering=0):
                about = os.fstat(fd)
                if not stat.S_ISREG(about.st_mode):
                    raise JobFailed("output", f"output {name} is not a regular file.", "Leave a regular file.")
                os.fsync(fd)  # first: some file systems report holes reliably only in what is on the disk
                extents = list(data_extents(fd, 0, about.st_size))
                digest = hashlib.sha256()
                for data in content(fd):
                    self._check_stop()
                    digest.update(data)
            os.rename(source, folder / name)
            kept[name] = {
                "size": about.st_size,
                "data": sum(last - first for first, last in extents),
                "sha256": digest.hexdigest(),
                "executable": bool(about.st_mode & 0o100),
            }
        sync_folder(folder)
        return kept

    def _archived(self, job: dict[str, Any], name: str) -> Path:
        """Archive a folder, or the files that match a pattern; return the archive's path.

        Raises:
            JobFailed: an entry is neither a file, a folder nor a link within the folder; or it cannot be read.
        """
        archive = self.stored.scratch / "output.tar"
        work = self.stored.work
        try:
            top = str(work) if outputs.is_pattern(name) else str(work / name)
            paths = outputs.matching(work, job, name) if outputs.is_pattern(name) else folder_archive.entries(top)
            if os.path.islink(top):
                raise folder_archive.FolderError(name, "is a link")
            if outputs.is_pattern(name) and (folders := [path for path in paths if os.path.isdir(work / path)]):
                raise folder_archive.FolderError(folders[0], "is a folder")
            with archive.open("wb") as out:
                folder_archive.write(out, top, paths, self._check_stop)
        except folder_archive.FolderError as error:
            hint = "Remove it, or pack the folder into a tar file and make that the output."
            raise JobFailed("output", f"output {name}: {error.path} {error.reason}.", hint) from error
        except OSError as error:
            if error.errno in FULL:
                raise
            message = f"output {name} cannot be read: {error.strerror or error}."
            raise JobFailed("output", message, "Leave readable regular files.") from error
        return archive

    def _clean_up(self, final: dict[str, Any]) -> None:
        """Remove the attempt's leftovers, or retain its containers and record that in its failure."""
        os.environ.pop("TMPDIR", None)  # the scratch folder is removed
        failed = final.get("failure", {})
        names = retained_containers.noted(self.stored, self.attempt) if self.keeps and failed else {}
        if not names or failed["kind"] == StoreError.kind:  # a full disk needs the space
            clean_up(self.stored, containers=not self.tidy)
        elif remove_leftovers(self.stored, containers=not self.tidy, but=names):
            with contextlib.suppress(OSError):
                retained_containers.keep(self.stored)
                failed["kept"] = True
                retained_containers.trim(self.store)
        with contextlib.suppress(OSError):
            os.fsync(self.log)
        os.close(self.log)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a build and all of its processes: SIGTERM, wait, SIGKILL."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            return


def main(digest: str, attempt: str, lock_fd: int, alive_fd: int) -> int:
    """Supervise an attempt.

    Args:
        digest: digest of the job.
        attempt: name of the attempt.
        lock_fd: file descriptor of the job's lock, already held.
        alive_fd: write end of a pipe to the session that started this process. It is closed when the job has ended,
            which wakes the session.

    Returns:
        Exit status: 0, or 1 if the final state cannot be written.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.set_inheritable(lock_fd, False)
    os.set_inheritable(alive_fd, False)
    hold_runner()
    stored = Store().job(digest)
    try:
        Supervisor(stored, attempt).run()
        os.close(alive_fd)
    except OSError as error:
        print(f"The final state of job {digest} cannot be written: {storage_failure(error)}", file=sys.stderr)
        return 1
    return 0
