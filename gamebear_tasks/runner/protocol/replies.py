"""Replies of the wire protocol: the type that the runner sends per operation.

The types exist for the type checker only: import them under `TYPE_CHECKING`, which costs a session no time. A client
does not use them, because it trusts no reply (see `builders.protocol.responses`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

Reply = Mapping[str, object]
"""Any of the replies."""


class RefusalReply(TypedDict):
    """The request failed.

    Attributes:
        error: what failed.
        hint: suggested fix.
        kind: category of the failure.
    """

    error: str
    hint: str
    kind: str


class EmptyReply(TypedDict):
    """The request succeeded; there is nothing to add."""


class HelloReply(TypedDict, total=False):
    """The builder, as far as it is known without running buildah.

    Attributes:
        python: version of Python.
        machine: machine type, as in `uname -m`.
        host: host name.
        buildah: whether buildah is installed.
        store: path of the store.
        free: free bytes of the store's file system.
        driver: storage driver of buildah, as of the last job.
        isolation: isolation with which buildah runs commands, as of the last job.
        costs: performance problems, as of the last job.
    """

    python: str
    machine: str
    host: str
    buildah: bool
    store: str
    free: int
    driver: object
    isolation: object
    costs: str


class Output(TypedDict):
    """An output of a job: size in bytes, bytes outside the holes, SHA-256, and whether it is executable."""

    size: int
    data: int
    sha256: str
    executable: bool


class JobReply(TypedDict, total=False):
    """State of a job; see `store.State` for the fields that are stored.

    Attributes:
        state: `absent` or a state of the store.
        attempt: the attempt.
        valid: seconds from now until the result expires; absent if it never does.
        now: current phase, and number of jobs ahead in the queue.
        log: bytes of log in the body.
        log_size: bytes of log that there are.
        notices: performance problems of the builder, with the end of the job.
        contents: name and size in bytes of each output in the body, after the log.
        missing: SHA-256 of each missing blob, and the bytes already uploaded.
        trees_wanted: whether the client has to resolve the sources.
        started: whether the job was started.
        expired: why an earlier result expired.
    """

    state: str
    attempt: str
    since: float
    phases: object
    outputs: dict[str, Output]
    failure: dict[str, object]
    valid: float
    now: list[str | int | None]
    log: int
    log_size: int
    notices: object
    contents: list[tuple[str, int]]
    missing: list[tuple[str, int]]
    trees_wanted: bool
    started: bool
    expired: str


class HaveReply(TypedDict):
    """How many bytes of a blob are stored."""

    have: int


class PutReply(HaveReply, total=False):
    """How many bytes of a blob are stored now; `damaged` if its SHA-256 did not match and it has to be sent again."""

    damaged: bool


class FetchReply(TypedDict, total=False):
    """Size of an output in bytes, and offset and length of each zero-filled part that the body omits."""

    size: int
    holes: list[tuple[int, int]]


class CancelReply(TypedDict):
    """The state of the job, and the other clients that wait for it and prevent the cancellation."""

    state: str
    others: list[str]


class DiscardReply(TypedDict):
    """Whether the result was corrupted."""

    discarded: bool


class ForgetReply(TypedDict):
    """Whether there was a job, and the bytes freed."""

    removed: bool
    freed: int


class PruneReply(TypedDict):
    """What was removed; see `maintenance.garbage_collection.Pruned`."""

    jobs: int
    blobs: int
    images: int
    others: int
    freed: int
    left: list[str]
    more: bool


class ListedJob(TypedDict, total=False):
    """An entry of the list of jobs; see `server.job_list.listing`."""

    digest: str
    digits: int
    state: str
    attempt: str
    place: int
    age: float
    took: float
    used: float
    kept: bool
    size: int
    log: int
    by: str
    waiting: list[str]
    arch: str
    program: str
    outputs: list[str]
    more: int


class ListReply(TypedDict):
    """A page of the jobs, and the number of all jobs."""

    total: int
    jobs: list[ListedJob]


class KeptContainer(TypedDict):
    """A retained container: its image, its last command, and that command's exit status."""

    image: str | None
    command: list[str] | None
    status: int | None


class KeptReply(TypedDict, total=False):
    """The retained containers of a job; empty if there are none.

    Attributes:
        attempt: the attempt that failed.
        age: seconds since the failure.
        last: index of the last container used.
        containers: the containers.
    """

    attempt: str
    age: float
    last: int
    containers: list[KeptContainer]


class Programs(TypedDict, total=False):
    """The versions of Python and buildah that built a result, and the isolation of its containers."""

    python: str
    buildah: str
    isolation: str


class MaterialsReply(Programs, total=False):
    """The images and packages that a result was built in; see `server.materials`."""

    images: list[dict[str, object]]
    begun: float
    ended: float | None
    host: str
    machine: str
