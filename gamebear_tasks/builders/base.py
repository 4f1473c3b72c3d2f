"""Interface of a builder: the methods and the data types of the builder API.

`Builder` is required. The runtime-checkable protocols `Keeper`, `Terminal`, `Listed`, `Forgetful`, `Examined`,
`Several` and `Traced` are optional capabilities. Builders are opened by the scheme of their URL (see `registry`); other
packages register schemes as entry points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..jobspec.spec import Job
from ..records.task_record import Phase


@dataclass(frozen=True)
class Order:
    """A job, and the local files that it consists of.

    Attributes:
        job: the job to build.
        files: local path of each file that the job names by SHA-256 (script, modules, inputs).
        fetch_trees: returns SHA-256 and local path of the tar of each source, by source name, and of the parts of a
            pickled function (`/function.lines`, `/cloudpickle.zip`). Call it only if the job must be built, because it
            may download the sources. Raises SourceError.
        time_limit: seconds after which the builder stops the job; 0 for no limit.
        base: origin of Debian's base images: `auto`, `registry` or `bootstrap`.
        python: `major.minor` version of the Python that a pickled function needs; None for a buildscript.
        keep_failed: whether to retain the job's containers if it fails (see `Keeper`).
        fresh: token (alphanumeric, at most 64 characters) of a run that forces a rebuild; empty if it does not. A
            result counts only if it was built for the same token: a retry with it does not build twice. A running job
            is joined.
    """

    job: Job
    files: Mapping[str, Path]
    fetch_trees: Callable[[], Mapping[str, tuple[str, Path]]]
    time_limit: float = 0.0
    base: str = "auto"
    python: str | None = None
    keep_failed: bool = False
    fresh: str = ""


@dataclass(frozen=True)
class Output:
    """A builder's untrusted description of an artifact; the client verifies it.

    Attributes:
        size: bytes of the content.
        sha256: SHA-256 of the content, in hexadecimal.
        executable: whether the program left the file executable.
        data: bytes outside the holes of a sparse file; None if the builder does not report it.
    """

    size: int
    sha256: str
    executable: bool
    data: int | None = None

    @property
    def room(self) -> int:
        """Bytes that the file occupies on disk."""
        return self.size if self.data is None else self.data


@dataclass(frozen=True)
class Failure:
    """The reason why a job failed.

    Attributes:
        kind: category of the failure: `script`, `command`, `output`, `image`, `arch`, `time`, `blob`, `store`,
            `killed`, … The client submits the job again after `blob` (a blob was missing or damaged).
        message: the cause, a phrase or sentence in one line, shown after "TASK failed on BUILDER: ".
        command: words of the command that failed, if one did.
        status: exit status of that command, negative for a signal.
        where: the container or image concerned.
        containers: whether the job had containers.
        kept: whether these containers are retained (see `Keeper`).
        hint: the command or edit that fixes it; empty if the builder suggests none.
    """

    kind: str
    message: str
    command: tuple[str, ...] = ()
    status: int | None = None
    where: str = ""
    containers: bool = False
    kept: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Status:
    """State of a job.

    Attributes:
        state: `queued`, `running`, `done`, `failed`, `cancelled`, or `lost` (its supervisor died, or the builder does
            not know the job).
        attempt: identifier of one run of the job. Log offsets count within one attempt.
        joined: whether the job existed already when it was submitted.
        outputs: the outputs by name; set if the state is `done`.
        failure: the reason; set if the state is `failed`.
        phases: time spent in each phase on the builder; starts count from the moment at which the builder received the
            job.
        valid: seconds from now until the result expires; None if it never expires.
        expired: reason why an earlier result was not used when the job was submitted; empty if there was none.
        notices: performance problems of the builder, each with its fix, phrased to follow "on this builder"; set with a
            final state.
        phase: current phase, one of `task_record.BUILDER`, while the job runs; empty if the builder does not report it.
        ahead: number of jobs before this one in the queue for a slot; None if unknown.
    """

    state: str
    attempt: str
    joined: bool = False
    outputs: Mapping[str, Output] = field(default_factory=dict)
    failure: Failure | None = None
    phases: tuple[Phase, ...] = ()
    valid: float | None = None
    expired: str = ""
    notices: tuple[str, ...] = ()
    phase: str = ""
    ahead: int | None = None

    @property
    def is_final(self) -> bool:
        """Whether this attempt has ended; nothing of it runs any more."""
        return self.state in ("done", "failed", "cancelled", "lost")


@dataclass(frozen=True)
class Pruned:
    """The entries that a prune removed.

    Attributes:
        jobs: number of jobs, with their outputs and logs.
        blobs: number of inputs and incomplete uploads.
        images: number of images.
        others: number of old runners, virtual environments and temporary files.
        freed: bytes freed.
        left: reasons why entries were not removed, one sentence each.
    """

    jobs: int = 0
    blobs: int = 0
    images: int = 0
    others: int = 0
    freed: int = 0
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobEntry:
    """One entry of a builder's job list.

    Attributes:
        digest: the job's digest.
        digits: length of the shortest prefix of the digest that is unique on the builder.
        state: see `Status`.
        attempt: identifier of the run.
        program: name of the script or function; empty if the builder cannot determine it any more.
        outputs: names of the outputs; only the first ones if there are many.
        more: number of outputs that are not named.
        arch: architecture, by Debian's name.
        place: position in the queue for a slot, from 1; None if the job is not queued or the position is unknown.
        age: seconds since the job entered its state.
        took: seconds from start to end; None if unknown.
        used: seconds since a client last requested the job.
        kept: whether the job failed and its containers are retained.
        size: bytes of its outputs.
        log: bytes of its log.
        by: client that started the build, as `user@host`; empty if unknown.
        waiting: clients that wait for the job now.
        where: the machine that has the job, if the builder consists of several.
    """

    digest: str
    digits: int
    state: str
    attempt: str
    program: str = ""
    outputs: tuple[str, ...] = ()
    more: int = 0
    arch: str = ""
    place: int | None = None
    age: float = 0.0
    took: float | None = None
    used: float = 0.0
    kept: bool = False
    size: int = 0
    log: int = 0
    by: str = ""
    waiting: tuple[str, ...] = ()
    where: str = ""

    @property
    def is_final(self) -> bool:
        """Whether the job has ended; nothing of it runs any more."""
        return self.state not in ("queued", "running")


class Sink(Protocol):
    """Destination of an output's content."""

    def write(self, data: bytes, /) -> object:
        """Append all of `data`, the next bytes of the content."""
        ...

    def skip(self, count: int, /) -> object:
        """Append a hole: the next `count` bytes of the content are zeros."""
        ...


class Builder(Protocol):
    """A place where jobs run: accepts jobs and answers requests about them by digest.

    Several threads, and several processes after a fork, may call the methods at once. Each method raises `BuilderError`
    if the builder cannot do what is requested. It raises `BuilderLost` if the builder stays unreachable; jobs on the
    builder continue nevertheless.
    """

    url: str
    patience: float
    """Seconds for which to retry a lost connection; set by the code that opens the builder."""

    def submit(self, order: Order, again: bool = False) -> Status:
        """Start a job, unless it is running or done already.

        Args:
            order: the job and its files.
            again: build the job even if its last attempt failed and no client has seen that failure. Otherwise such a
                failure is returned as the job's status.
        """
        ...

    def follow(self, digest: str, attempt: str, offset: int) -> tuple[Status, bytes]:
        """Wait a bounded time for a change of a job's state or for more log.

        Returns:
            The job's status, and the log from `offset` on. A final status is returned together with the end of the log.
        """
        ...

    def fetch(self, digest: str, attempt: str, name: str, offset: int, target: Sink, limit: int) -> None:
        """Write an output's content from `offset` on to a sink; write each byte exactly once, even across reconnects.

        Args:
            digest: the job.
            attempt: the attempt that produced the output.
            name: the output.
            offset: offset of the first byte to write.
            target: the destination.
            limit: maximum number of bytes to write.
        """
        ...

    def cancel(self, digest: str, attempt: str) -> bool:
        """Cancel a job, unless another client waits for it; return whether it was cancelled."""
        ...

    def discard(self, digest: str, attempt: str) -> None:
        """Verify a result on the builder after a digest mismatch; drop the result if it is damaged."""
        ...

    def prune(
        self, older: float | None = None, size: int | None = None, keep: int | None = None, images: bool = False
    ) -> Pruned:
        """Remove unused entries of the builder's store; running jobs are not affected.

        Args:
            older: remove entries that were not used for this many seconds.
            size: remove the least recently used entries until jobs and inputs occupy at most this many bytes.
            keep: number of latest results to retain of each target (architecture, program and outputs).
            images: also remove images that no remaining job has used and that were not used for `older` seconds.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """Return properties of the builder by name: Python version, machine, host name, free bytes, …"""
        ...

    def close(self) -> None:
        """Close the connections; jobs on the builder are not affected. Never raises."""
        ...


@dataclass(frozen=True)
class KeptContainer:
    """A retained container of a failed job.

    Attributes:
        image: the image from which it was created.
        command: words of the last command that ran in it; empty if none did.
        status: exit status of that command; None if it was stopped together with the job.
    """

    image: str
    command: tuple[str, ...]
    status: int | None


@dataclass(frozen=True)
class Kept:
    """The retained containers of a failed job.

    Attributes:
        containers: the containers, in order of creation.
        last: index, from 0, of the container that was active last.
        age: seconds since the job failed.
    """

    containers: tuple[KeptContainer, ...]
    last: int
    age: float


@runtime_checkable
class Keeper(Protocol):
    """Optional capability: retains the containers of failed jobs for which `Order.keep_failed` is set."""

    def kept(self, digest: str) -> Kept | None:
        """Return the retained containers of a job's last attempt; None if there are none."""
        ...

    def enter(self, digest: str, container: int, words: Sequence[str]) -> int:
        """Run a command in a retained container, with the terminal of the caller as in `Terminal.run_program`.

        The command runs with the working directory, user, mounts and variables of the container's last command. The
        container is not removed while it runs.

        Args:
            digest: the job.
            container: index of the container, from 0.
            words: the command; empty for a shell.
        """
        ...


@runtime_checkable
class Terminal(Protocol):
    """Optional capability: runs programs on the builder with the terminal of the caller."""

    def run_program(self, words: Sequence[str]) -> int:
        """Run a program that is installed on the builder, as the build account; return its exit status.

        If standard input and output are a terminal, the program gets a terminal of the same type and size. The local
        terminal is in raw mode meanwhile, so that all keys reach the program. Otherwise standard input and output are
        passed on byte for byte. In both cases the program ends when the connection does. Call it from the main thread
        only.

        Args:
            words: the command line, such as `["sudo", "apt-get", "install", "buildah"]`.

        Returns:
            The exit status; 128 plus the signal number if a signal ended the program.

        Raises:
            BuilderError: the program cannot be started, or the builder offers no further session.
            BuilderLost: the connection broke.
        """
        ...


@runtime_checkable
class Listed(Protocol):
    """Optional capability: lists all jobs of the builder, whichever client submitted them."""

    def jobs(self, limit: int | None = None, prefix: str = "") -> tuple[list[JobEntry], int]:
        """Return the jobs, queued and running ones first, then the newest; and the total number of jobs.

        Args:
            limit: maximum number of jobs to return; None for all.
            prefix: prefix of the digests to select.
        """
        ...

    def watch(self, digest: str, attempt: str, offset: int) -> tuple[Status, bytes]:
        """Follow a job read-only: like `follow`, but the caller does not count as waiting for the job."""
        ...

    def end(self, digest: str, attempt: str, force: bool = False) -> tuple[str, ...]:
        """Cancel a job, unless others wait for it; return those who do, or an empty tuple if it was cancelled.

        Args:
            digest: the job.
            attempt: identifier of the run.
            force: cancel the job even if others wait for it.
        """
        ...


@runtime_checkable
class Forgetful(Protocol):
    """Optional capability: removes the result of one job, for `gamebear jobs forget`."""

    def forget(self, digest: str) -> int | None:
        """Remove a job that does not run, with its outputs and log; its inputs and images stay.

        Returns:
            The bytes freed; None if there is no such job.

        Raises:
            BuilderError: the job is running or in use.
        """
        ...


@runtime_checkable
class Examined(Protocol):
    """Optional capability: reports diagnostics and runs fixes, for `gamebear doctor`."""

    def examine(self, arches: Sequence[str], base: str) -> Mapping[str, Any]:
        """Return diagnostics as in `runner/server/diagnostics.py`; changes nothing.

        Args:
            arches: architectures that the builder shall support, by Debian's names.
            base: origin of Debian's base images.

        Raises:
            BuilderError: the builder cannot be examined. The subclass indicates which step failed: host key, log-in,
                Python or store.
        """
        ...

    def execute(self, script: str, out: Callable[[bytes], object]) -> int:
        """Run a POSIX shell script as the build account, without input; return its exit status.

        Args:
            script: the script.
            out: called with each piece of the script's standard output and standard error.

        Raises:
            BuilderError: the script cannot be run, or its exit status is unknown.
        """
        ...


@runtime_checkable
class Several(Protocol):
    """Optional capability: several builders behind one name."""

    def members(self) -> Mapping[str, Builder | str]:
        """Return each member by its name, or the reason why it cannot be used; raises BuilderError."""
        ...


@runtime_checkable
class Traced(Protocol):
    """Optional capability: reports the materials of a result, for `gamebear provenance`."""

    def materials(self, digest: str, attempt: str) -> Mapping[str, Any]:
        """Return the materials of a result (images, packages, machine) for `materials.Materials.of_document`.

        Args:
            digest: the job, whose state is `done`.
            attempt: identifier of the run.
        """
        ...
