"""Builders: where jobs run. Each is opened by the scheme of its URL; others come by entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..jobspec.spec import Job
from ..records.task_record import Phase


@dataclass(frozen=True)
class Order:
    """A job, and where its parts are on this machine.

    Attributes:
        job: what to build.
        files: the local file of each SHA-256 that the job names (script, modules, inputs).
        fetch_trees: gives the tar of each of the job's sources, by name, and the pickle of a function; called only if
            the job must be built, because it may have to download them. Raises SourceError.
        time_limit: seconds after which the builder ends the job; 0 for none.
        base: where Debian's base images come from: `auto`, `registry` or `bootstrap`.
        python: `major.minor` of the Python that a pickled function needs, None for a buildscript.
        keep_failed: if it fails, have its containers kept (see `Keeper`).
    """

    job: Job
    files: Mapping[str, Path]
    fetch_trees: Callable[[], Mapping[str, Path]]
    time_limit: float = 0.0
    base: str = "auto"
    python: str | None = None
    keep_failed: bool = False


@dataclass(frozen=True)
class Output:
    """What a builder says of an artifact: to be checked, not believed.

    Attributes:
        size: in bytes.
        sha256: of its content.
        executable: whether the program left it executable.
        data: how many of its bytes are not holes of a sparse file; None where the builder does not say.
    """

    size: int
    sha256: str
    executable: bool
    data: int | None = None

    @property
    def room(self) -> int:
        """Bytes that it takes on a disk."""
        return self.size if self.data is None else self.data


@dataclass(frozen=True)
class Failure:
    """Why a job failed.

    Attributes:
        kind: what failed: `script`, `command`, `output`, `image`, `arch`, `time`, `blob`, `store`, `killed`, …
        message: a paragraph for a person, the way out included.
        command: words of the command that failed, where one did.
        status: its exit status, negative for a signal.
        where: the container or image that it was about.
        containers: whether the job had containers.
        kept: whether they are kept (see `Keeper`).
    """

    kind: str
    message: str
    command: tuple[str, ...] = ()
    status: int | None = None
    where: str = ""
    containers: bool = False
    kept: bool = False


@dataclass(frozen=True)
class Status:
    """Where a job is.

    Attributes:
        state: `queued`, `running`, `done`, `failed`, `cancelled`, or `lost` (its supervisor died, or nobody knows it).
        attempt: tells one run of the job from the next; the log's offsets count within one attempt.
        joined: it was there already when it was submitted.
        outputs: by name, when done.
        failure: when failed.
        phases: where the time went on the builder, counted from when it was told of the job.
        valid: for how many seconds from now a result holds; None: for ever.
        expired: why an earlier result did not count when the job was submitted; empty where there was none.
        notices: what costs the builder much, each with its remedy and as what may follow "on this builder"; with a
            final state.
        phase: which of `task_record.BUILDER` it is in, as long as it runs; empty where the builder does not say.
        ahead: how many jobs are before it where it waits for a slot; None where that is not known.
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
        """Nothing of this attempt runs any more."""
        return self.state in ("done", "failed", "cancelled", "lost")


@dataclass(frozen=True)
class Pruned:
    """What a prune has removed.

    Attributes:
        jobs: how many jobs, with their outputs and logs.
        blobs: how many inputs and broken-off uploads.
        images: how many images.
        others: how many old runners, virtual environments and temporary files.
        freed: in bytes.
        left: why something was left, a sentence each.
    """

    jobs: int = 0
    blobs: int = 0
    images: int = 0
    others: int = 0
    freed: int = 0
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobEntry:
    """A job as a builder lists it.

    Attributes:
        digest: its name.
        digits: how many digits of it no other job of the builder begins with.
        state: see `Status`.
        attempt: which run of it.
        program: what the program is called; empty where the builder can no longer tell.
        outputs: the names of its outputs, of the first ones where there are many.
        more: how many outputs are not named.
        arch: Debian's name of the architecture.
        place: its place in the line for a slot, from 1, while it is queued and that is known.
        age: seconds since it came to its state.
        took: seconds from its begin to its end.
        used: seconds since somebody asked for it.
        kept: it failed, and its containers are kept.
        size: bytes of its outputs.
        log: bytes of its log.
        by: who had it built, as `user@host`; empty where that is not known.
        waiting: who waits for it now.
        where: which of several machines has it.
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
        """Nothing of it runs any more."""
        return self.state not in ("queued", "running")


class Sink(Protocol):
    """Where an output's content goes."""

    def write(self, data: bytes, /) -> object:
        """Take all of `data`, the next bytes of the content."""
        ...

    def skip(self, count: int, /) -> object:
        """Take a hole: the next `count` bytes of the content are zeros."""
        ...


class Builder(Protocol):
    """Anything that can be told "this job, please", and be asked about it later by its digest.

    Its methods may be called from several threads at once. Each raises `BuilderError` when the builder cannot do what
    it is asked, and `BuilderLost` when it stays out of reach; what it runs goes on all the same.
    """

    url: str
    patience: float
    """Seconds for which a lost connection is tried again; set by whoever opens the builder."""

    def submit(self, order: Order, again: bool = False) -> Status:
        """Have a job built, unless it runs or is done already.

        Args:
            order: the job and its parts.
            again: build it even if its last attempt failed and nobody has seen that failure.
        """
        ...

    def follow(self, digest: str, attempt: str, offset: int) -> tuple[Status, bytes]:
        """Wait a while for news of a job.

        Returns:
            Where the job is, and the log from `offset` on; a final status comes with the last of the log.
        """
        ...

    def fetch(self, digest: str, attempt: str, name: str, offset: int, target: Sink, limit: int) -> None:
        """Give an output's content from `offset` on to a sink, each byte once whatever happens on the way.

        Args:
            digest: the job.
            attempt: the attempt which made the output.
            name: the output.
            offset: where to begin, in bytes.
            target: where it goes.
            limit: the most bytes to take.
        """
        ...

    def cancel(self, digest: str, attempt: str) -> bool:
        """End a job, unless somebody else waits for it too; say whether it was ended."""
        ...

    def discard(self, digest: str, attempt: str) -> None:
        """Have the builder check a result that did not match its digest, and forget it if it is damaged."""
        ...

    def prune(
        self, older: float | None = None, size: int | None = None, keep: int | None = None, images: bool = False
    ) -> Pruned:
        """Remove what is kept on the builder and no longer used; what runs goes on.

        Args:
            older: what was not used for so many seconds.
            size: the least recently used, until jobs and inputs take no more than so many bytes.
            keep: all but the last so many results of each target: architecture, program and outputs.
            images: also images which no job that stays has used, and nobody for `older` seconds.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """Say what the builder is: Python's version, machine, host name, free bytes, …"""
        ...

    def close(self) -> None:
        """Close connections; nothing that runs on the builder minds. Never raises."""
        ...


@dataclass(frozen=True)
class KeptContainer:
    """A container that is kept of a failed job.

    Attributes:
        image: what it was made from.
        command: words of the last command in it; empty where there was none.
        status: how that ended; None where it was ended with the job.
    """

    image: str
    command: tuple[str, ...]
    status: int | None


@dataclass(frozen=True)
class Kept:
    """What is kept of a failed job.

    Attributes:
        containers: in the order in which they were made.
        last: the number of the one in which something happened last, from 0.
        age: seconds since it failed.
    """

    containers: tuple[KeptContainer, ...]
    last: int
    age: float


@runtime_checkable
class Keeper(Protocol):
    """What a builder may have besides: it keeps the containers of failed jobs where `Order.keep_failed` asks for it."""

    def kept(self, digest: str) -> Kept | None:
        """Say what is kept of a job's last attempt; None where nothing is."""
        ...

    def enter(self, digest: str, container: int, words: Sequence[str]) -> int:
        """Run a command in a kept container as `Terminal.run_program` does on the builder.

        It runs where and as what the container's last command ran, with its mounts and variables; the container stays
        as long as it runs.

        Args:
            digest: the job.
            container: its number, from 0.
            words: the command; none for a shell.
        """
        ...


@runtime_checkable
class Terminal(Protocol):
    """What a builder may have besides: programs that run on it with the terminal of whoever sits here."""

    def run_program(self, words: Sequence[str]) -> int:
        """Run a program of the builder's own, as the account that builds; return its exit status.

        It has a terminal of our terminal's kind and size where our standard input and output are one, which is raw
        meanwhile, so that all keys are the program's. Otherwise they are its input and output, byte for byte. In both
        cases it ends when the connection does. To be called by the main thread.

        Args:
            words: the command line, such as `["sudo", "apt-get", "install", "buildah"]`.

        Returns:
            Its exit status; 128 and the number of the signal that ended it.

        Raises:
            BuilderError: it cannot be started, or the builder has no place for it.
            BuilderLost: the connection broke.
        """
        ...


@runtime_checkable
class Listed(Protocol):
    """A builder that can say which jobs it has, whoever asked for them; not every builder can."""

    def jobs(self, limit: int | None = None, prefix: str = "") -> tuple[list[JobEntry], int]:
        """Return the jobs, first those that run or wait, then the newest; and how many there are.

        Args:
            limit: the most to return; None: all.
            prefix: what their digests begin with.
        """
        ...

    def watch(self, digest: str, attempt: str, offset: int) -> tuple[Status, bytes]:
        """Wait a while for news of a job, as `follow` does, without counting as somebody who waits for it."""
        ...

    def end(self, digest: str, attempt: str, force: bool = False) -> tuple[str, ...]:
        """End a job, unless others wait for it; return who does, nobody where it was ended.

        Args:
            digest: the job.
            attempt: which run of it.
            force: end it all the same.
        """
        ...


@runtime_checkable
class Examined(Protocol):
    """What a builder may have besides: it says what it is and has, and can be mended, for `doit doctor`."""

    def examine(self, arches: Sequence[str], base: str) -> Mapping[str, Any]:
        """Say what the builder is and has, as `runner/server/diagnostics.py` does; nothing is changed by it.

        Args:
            arches: the architectures that are wanted of it, by Debian's names.
            base: where Debian's base images come from.

        Raises:
            BuilderError: it cannot be asked; which kind tells how far we got.
        """
        ...

    def execute(self, script: str, out: Callable[[bytes], object]) -> int:
        """Run a POSIX shell's script as the account that builds, without input; return its exit status.

        Args:
            script: the script.
            out: is given what it prints and complains of, as it comes.

        Raises:
            BuilderError: it cannot be run, or its end is not known.
        """
        ...


@runtime_checkable
class Several(Protocol):
    """What a builder may be: several behind one name."""

    def members(self) -> Mapping[str, Builder | str]:
        """Return each of them by its name, or why it cannot be used; raises BuilderError."""
        ...


@runtime_checkable
class Traced(Protocol):
    """What a builder may have besides: it tells what a result was built in."""

    def materials(self, digest: str, attempt: str) -> Mapping[str, Any]:
        """Return what a result was built in, as JSON to be read by `materials.Materials.of_document`.

        Args:
            digest: the job, which is done.
            attempt: which run of it.
        """
        ...
