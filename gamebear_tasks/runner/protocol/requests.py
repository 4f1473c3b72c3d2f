"""Requests of the wire protocol: one class per operation, validated on receipt.

The annotations of a class are its fields, all of them required. Each annotation is one of the aliases below, which
names the check of the value in `_CHECKS`. These are plain classes, because dataclasses and named tuples multiply the
start-up time of a session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..util.atomic_files import is_file_name, is_sha256
from ..util.errors import RunnerError
from .wire import INVALID_REQUEST, MAX_BODY, MAX_NUMBER

LINE = 4096
"""Maximum length of a `Line`, in characters."""

TOKEN = 64
"""Maximum length of a `Token`, in characters."""

WINDOW = 0xFFFF
"""Maximum number of rows and of columns of a terminal, see ioctl_tty(2)."""

if TYPE_CHECKING:
    from typing import TypedDict

    from typing_extensions import dataclass_transform

    Sha256 = str
    FileName = str
    Attempt = str
    Client = str
    Token = str
    Ascii = str
    Line = str
    Flag = bool
    Size = int
    Seconds = float
    Words = Sequence[str]
    Hashes = Sequence[str]
    Blobs = Sequence[tuple[str, int]]
    Trees = Mapping[str, str]
    Progress = Sequence[str | int | None]

    class Terminal(TypedDict):
        """A client's terminal: the value of `TERM`, and the size of the window in characters."""

        term: str
        rows: int
        columns: int
else:

    def dataclass_transform(**_):
        """Return a decorator without effect."""
        return lambda decorated: decorated


class RequestError(RunnerError):
    """A request is not valid."""

    kind = "request"


@dataclass_transform(kw_only_default=True)
class Request:
    """A request; the values of its fields are keyword arguments.

    Attributes:
        op: name of the operation.
    """

    op = ""

    def __init__(self, **fields: object) -> None:
        self.__dict__.update(fields)

    @property
    def header(self) -> dict[str, object]:
        """Header of the message."""
        return {"op": self.op, **self.__dict__}


class Hello(Request):
    """Describe the builder."""

    op = "hello"


class Submit(Request):
    """Accept a job: start it, attach to it if it is running, or report the blobs that are missing.

    Attributes:
        digest: digest of the job.
        job: canonical JSON of the job.
        client: identifier of the client, the same in all of its sessions.
        blobs: SHA-256 and size in bytes of each blob in the body.
        trees: SHA-256 of the blob of each source, by source name; None if the client has not resolved the sources yet.
        needs: SHA-256 of every other blob that the job needs.
        time_limit: seconds after which the job is stopped; 0 for no limit.
        base: policy that selects the origin of Debian's base images.
        python: Python version (major.minor) that a pickled function needs.
        again: start a new attempt even if the last one failed or was cancelled and no client has acknowledged that.
        fresh: token of the run that forces a rebuild; empty for no rebuild. Only an attempt with this token answers the
            request, so that a retry of the request does not build twice.
        who: display name of the client's user.
        keep: retain the containers for inspection if the job fails.
        wait: seconds to wait for the end of a job that has just been started.
    """

    op = "submit"
    digest: Sha256
    job: Ascii
    client: Client
    blobs: Blobs
    trees: Trees | None
    needs: Hashes
    time_limit: Seconds
    base: Line
    python: Line | None
    again: Flag
    fresh: Token
    who: Line
    keep: Flag
    wait: Seconds


class Put(Request):
    """Receive the rest of a blob that may be partially stored.

    Attributes:
        sha256: SHA-256 of the blob.
        size: bytes of the whole blob.
        offset: offset of the body in it.
    """

    op = "put"
    sha256: Sha256
    size: Size
    offset: Size


class PutSmall(Request):
    """Receive several blobs in full.

    Attributes:
        blobs: SHA-256 and size in bytes of each blob in the body.
    """

    op = "put_small"
    blobs: Blobs


class Have(Request):
    """Return how many bytes of a blob are stored."""

    op = "have"
    sha256: Sha256


class Follow(Request):
    """Wait for more log or for another state of a job.

    Attributes:
        digest: digest of the job.
        attempt: the attempt that the client knows.
        client: client that waits for the job; empty for an observer.
        offset: offset of the first byte of log to return.
        wait: maximum seconds to wait.
        now: phase and place in the queue that the client knows; None if it knows neither.
    """

    op = "follow"
    digest: Sha256
    attempt: Attempt
    client: Client
    offset: Size
    wait: Seconds
    now: Progress | None


class Fetch(Request):
    """Send an output from an offset to its end."""

    op = "fetch"
    digest: Sha256
    attempt: FileName
    name: FileName
    offset: Size


class Cancel(Request):
    """Stop an attempt unless another client waits for the same job.

    Attributes:
        digest: digest of the job.
        attempt: attempt to stop; empty for the one that is queued or running.
        client: client that cancels.
        force: stop it even if other clients wait. They are still notified.
        who: display name of the user if the client does not wait for the job itself, otherwise empty. The user who
            began the job is then notified.
    """

    op = "cancel"
    digest: Sha256
    attempt: Attempt
    client: Client
    force: Flag
    who: Line


class Discard(Request):
    """Verify a result's outputs, and invalidate the result if they are corrupted."""

    op = "discard"
    digest: Sha256
    attempt: Attempt


class Forget(Request):
    """Remove a job that does not run, with its outputs and log."""

    op = "forget"
    digest: Sha256


class Prune(Request):
    """Prune the store for a bounded time.

    Attributes:
        older: age limit in seconds.
        size: size limit in bytes.
        keep: number of results to retain per target.
        images: also remove images.
    """

    op = "prune"
    older: Seconds | None
    size: Size | None
    keep: Size | None
    images: Flag


class Examine(Request):
    """Describe the builder for `doctor`.

    Attributes:
        arches: requested architectures, by Debian's names.
        base: policy that selects the origin of Debian's base images.
        wait: maximum seconds to wait for the findings.
    """

    op = "examine"
    arches: Words
    base: Line
    wait: Seconds


class List(Request):
    """List the jobs in the store.

    Attributes:
        skip: number of jobs to skip.
        limit: maximum number of jobs to return.
        prefix: prefix of the digests.
    """

    op = "list"
    skip: Size
    limit: Size
    prefix: Line


class Materials(Request):
    """Return the images and packages that a result was built in."""

    op = "materials"
    digest: Sha256
    attempt: Attempt


class Kept(Request):
    """Return the retained containers of a job."""

    op = "kept"
    digest: Sha256


class Run(Request):
    """Start a program on the builder; from the reply on, the session carries its input and output.

    Attributes:
        words: the command line.
        terminal: the client's terminal; None to use pipes.
    """

    op = "run"
    words: Words
    terminal: Terminal | None


class Enter(Request):
    """Start a command in a retained container of a job; from the reply on, the session carries its input and output.

    Attributes:
        digest: digest of the job.
        container: index of the container, from 0.
        words: the command; empty for a shell.
        terminal: the client's terminal; None to use pipes.
    """

    op = "enter"
    digest: Sha256
    container: Size
    words: Words
    terminal: Terminal | None


OPERATIONS: dict[str, type[Request]] = {kind.op: kind for kind in Request.__subclasses__()}
"""The requests by operation."""


def received(header: Mapping[str, object]) -> Request:
    """Validate a received header and return it as the request that it is.

    Raises:
        RequestError: the operation is unknown, or a field is missing, unknown or invalid.
    """
    op = header.get("op")
    kind = OPERATIONS.get(op) if isinstance(op, str) else None
    if kind is None:
        raise RequestError(f"Unknown operation {_short(op)}.", INVALID_REQUEST)
    values = {name: value for name, value in header.items() if name not in ("op", "body")}
    fields = fields_of(kind)
    for name, annotation in fields.items():
        if name not in values:
            raise RequestError(f"Invalid request {kind.op}: the field {name} is missing.", INVALID_REQUEST)
        if not _is_valid(values[name], annotation):
            raise RequestError(f"Invalid request {kind.op}: {name} is not of type {annotation}.", INVALID_REQUEST)
    for name in values:
        if name not in fields:
            raise RequestError(f"Invalid request {kind.op}: unknown field {_short(name)}.", INVALID_REQUEST)
    return kind(**values)


def fields_of(kind: type[Request]) -> dict[str, str]:
    """Return the annotation of each field of a request, by name."""
    return getattr(kind, "__annotations__", {})  # Python 3.9: a class without annotations has no such attribute


def _short(value: object) -> str:
    return repr(value[:40] if isinstance(value, str) else type(value).__name__)


# checks of the values


def _is_valid(value: object, annotation: str) -> bool:
    alias, _, none = annotation.partition(" | ")
    return (value is None and bool(none)) or _CHECKS[alias](value)


def _is_empty_or_file_name(value: object) -> bool:
    return value == "" or is_file_name(value)


def _is_token(value: object) -> bool:
    return isinstance(value, str) and len(value) <= TOKEN and (value == "" or (value.isascii() and value.isalnum()))


def _is_ascii(value: object) -> bool:
    return isinstance(value, str) and value.isascii()


def _is_line(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LINE


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_int(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_size(value: object) -> bool:
    return _is_int(value, MAX_BODY)


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER  # rejects NaN


def _are_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _are_hashes(value: object) -> bool:
    return isinstance(value, list) and all(map(is_sha256, value))


def _are_blobs(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(blob, list) and len(blob) == 2 and is_sha256(blob[0]) and _is_size(blob[1]) for blob in value
    )


def _are_trees(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_line, value)) and all(map(is_sha256, value.values()))


def _is_progress(value: object) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and _is_line(value[0]) and (value[1] is None or _is_size(value[1]))
    )


def _is_terminal(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"term", "rows", "columns"}
        and _is_line(value["term"])
        and _is_int(value["rows"], WINDOW)
        and _is_int(value["columns"], WINDOW)
    )


_CHECKS: dict[str, Callable[[object], bool]] = {
    "Sha256": is_sha256,
    "FileName": is_file_name,
    "Attempt": _is_empty_or_file_name,
    "Client": _is_empty_or_file_name,
    "Token": _is_token,
    "Ascii": _is_ascii,
    "Line": _is_line,
    "Flag": _is_flag,
    "Size": _is_size,
    "Seconds": _is_seconds,
    "Words": _are_words,
    "Hashes": _are_hashes,
    "Blobs": _are_blobs,
    "Trees": _are_trees,
    "Progress": _is_progress,
    "Terminal": _is_terminal,
}
"""Per alias, the function that returns whether a received value is valid."""
