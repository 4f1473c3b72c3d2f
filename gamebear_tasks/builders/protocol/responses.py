"""Parsers for a builder's replies, which are untrusted: validate, bound and sanitize them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeGuard

from ...errors import INVALID_REPLY, BuilderError
from ...records.task_record import BUILDER, Phase
from ...runner.protocol import wire
from ...runner.store.phases import LIMIT as SPANS
from ...runner.util.atomic_files import is_file_name, is_sha256
from ..base import Failure, JobEntry, Kept, KeptContainer, Output, Pruned, Status
from .session import words_of

CROWD = 9999
"""Maximum number of jobs accepted as waiting ahead of a job."""

WORDS = 1000
"""Maximum number of words of a failed command."""

NOTICES = 10
"""Maximum number of notices in one reply."""

VALID = 10 * 365 * 86400.0
"""Maximum validity of a result in seconds."""

CENTURY = 100 * 366 * 86400.0
"""Seconds; ages of a century or more are rejected."""

STATES = ("queued", "running", "done", "failed", "cancelled", "lost")
"""States of a job."""

MAX_CONTAINERS = 100
"""Maximum number of containers accepted in the list of a job's retained containers."""

MAX_LEFTOVERS = 1000
"""Maximum number of reasons accepted for what a prune has left."""

WAITING = 20
"""Maximum number of clients listed as waiting for a job, and of outputs listed for it."""

YEAR = 366 * 86400.0
"""Seconds; phases that start after a year or last that long are rejected."""

MOST_FACTS = 100
"""Maximum number of entries in each object and array of the diagnostics."""


@dataclass(frozen=True)
class Lacks:
    """What a builder needs to start a job.

    Attributes:
        blobs: SHA-256 of each missing file, and the bytes of it that the builder has already.
        trees: whether the sources have to be resolved.
    """

    blobs: tuple[tuple[str, int], ...]
    trees: bool


@dataclass(frozen=True)
class Parts:
    """Parts of a reply's body: the log, and then outputs.

    Attributes:
        log: bytes of log; None if that is the whole body.
        log_size: bytes of log that the builder has; None if it does not report it.
        contents: name and size in bytes of each output.
    """

    log: int | None
    log_size: int | None
    contents: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Cancelled:
    """Result of a cancellation.

    Attributes:
        state: state of the job; empty if the builder reports no valid one.
        others: display names of other clients that wait for the job.
        has_others: whether others wait for the job.
    """

    state: str
    others: tuple[str, ...]
    has_others: bool


def lacks(place: str, reply: Mapping[str, object]) -> Lacks:
    """Return what a builder lacks of a job.

    Raises:
        BuilderError: the reply is invalid.
    """
    missing = reply.get("missing")
    if not isinstance(missing, list):
        raise BuilderError(f"{place} sends an invalid reply: no list of missing files.", INVALID_REPLY)
    blobs = []
    for item in missing:
        sha256, have = item if isinstance(item, list) and len(item) == 2 else (None, 0)
        if not _is_digest(sha256) or type(have) is not int:
            raise BuilderError(
                f"{place} sends an invalid reply: it requests a file that is not part of the job.", INVALID_REPLY
            )
        blobs.append((sha256, max(have, 0)))
    return Lacks(tuple(blobs), bool(reply.get("trees_wanted")))


def parts(reply: Mapping[str, object]) -> Parts:
    """Return the parts of the body of a job's state; outputs from the first invalid one on are left out."""
    log, log_size, given = reply.get("log"), reply.get("log_size"), reply.get("contents")
    contents = []
    for item in given if isinstance(given, list) else ():
        name, length = item if isinstance(item, list) and len(item) == 2 else (None, None)
        if not isinstance(name, str) or type(length) is not int or length < 0:
            break
        contents.append((name, length))
    return Parts(
        log if type(log) is int and log >= 0 else None,
        log_size if type(log_size) is int else None,
        tuple(contents),
    )


def cancelled(reply: Mapping[str, object]) -> Cancelled:
    """Return the result of a cancellation."""
    state, others = reply.get("state"), reply.get("others")
    return Cancelled(
        state if _is_state(state) else "",
        tuple(map(line, others[:WAITING])) if isinstance(others, list) else (),
        bool(others),
    )


def forgotten(reply: Mapping[str, object]) -> int | None:
    """Return the bytes freed by the removal of a job; None if there was no such job."""
    return count(reply.get("freed")) if reply.get("removed") is True else None


def pruned(reply: Mapping[str, object], before: Pruned) -> Pruned:
    """Add a reply's pruned amounts to the previous sum; the remaining amounts are those of the reply."""
    left = reply.get("left")
    return Pruned(
        before.jobs + count(reply.get("jobs")),
        before.blobs + count(reply.get("blobs")),
        before.images + count(reply.get("images")),
        before.others + count(reply.get("others")),
        before.freed + count(reply.get("freed")),
        tuple(map(words_of, left[:MAX_LEFTOVERS])) if isinstance(left, list) else (),
    )


def page(reply: Mapping[str, object], most: int) -> tuple[list[JobEntry | None], int]:
    """Return at most `most` entries of a builder's job list, None for invalid ones, and the number of all jobs."""
    listed = reply.get("jobs")
    return [entry(item) for item in listed[:most]] if isinstance(listed, list) else [], count(reply.get("total"))


def kept(place: str, reply: Mapping[str, object]) -> Kept | None:
    """Return the retained containers of a failed job; None if there are none.

    Raises:
        BuilderError: the reply is invalid.
    """
    found = reply.get("containers")
    containers = [_retained_container(about) for about in (found[:MAX_CONTAINERS] if isinstance(found, list) else ())]
    last, age = reply.get("last"), seconds(reply.get("age"))
    if not containers:
        return None
    if type(last) is not int or not 0 <= last < len(containers) or age is None:
        raise BuilderError(f"{place} sends an invalid reply: retained containers.", INVALID_REPLY)
    return Kept(tuple(containers), last, age)


def status(place: str, reply: Mapping[str, object], joined: bool = False) -> Status:
    """Return the state of a job.

    Args:
        place: the builder's name in error messages.
        reply: the builder's reply.
        joined: whether the job existed already.

    Raises:
        BuilderError: the reply is invalid.
    """
    state = reply.get("state")
    attempt = reply.get("attempt")
    if not _is_state(state) or not _is_name(attempt):
        raise BuilderError(f"{place} sends an invalid reply: state {words_of(state)}.", INVALID_REPLY)
    outputs = {}
    for name, about in mapping(reply.get("outputs")).items():
        about = mapping(about)
        length, sha256 = about.get("size"), about.get("sha256")
        if type(length) is not int or not 0 <= length <= wire.MAX_BODY or not _is_digest(sha256):
            raise BuilderError(f"{place} sends an invalid reply: output {name[:100]!r}.", INVALID_REPLY)
        data = about.get("data")
        data = data if type(data) is int and 0 <= data <= length else None
        outputs[name] = Output(length, sha256, about.get("executable") is True, data)
    failure = None
    if state == "failed":
        about = mapping(reply.get("failure"))
        failure = Failure(
            words_of(about.get("kind", "")),
            words_of(about.get("message", "")),
            _command_in(about.get("command")),
            _status_in(about.get("status")),
            words_of(about.get("where", ""))[:400],
            about.get("containers") is True,
            about.get("kept") is True,
            words_of(about.get("hint", ""))[:1000],
        )
    valid = reply.get("valid")
    if valid is not None and not (_is_number(valid) and valid >= 0):
        raise BuilderError(f"{place} sends an invalid reply: valid {words_of(valid)[:100]}.", INVALID_REPLY)
    return Status(
        state,
        attempt,
        joined,
        outputs,
        failure,
        tuple(_phases_in(reply)),
        None if valid is None else float(min(valid, VALID)),
        words_of(reply.get("expired", ""))[:400],
        _notices(reply.get("notices")),
        *_now(reply.get("now")),
    )


def holes(reply: Mapping[str, object], start: int, end: int, place: str) -> list[tuple[int, int]]:
    """Return offset and length of each hole of a file between two offsets, in order.

    Raises:
        BuilderError: the holes overlap, are not in order, or exceed the offsets.
    """
    given = reply.get("holes", [])
    found: list[tuple[int, int]] = []
    for hole in given if isinstance(given, list) else [given]:
        offset, length = hole if isinstance(hole, list) and len(hole) == 2 else (None, None)
        if type(offset) is not int or type(length) is not int or not (start <= offset < offset + length <= end):
            raise BuilderError(f"{place} sends an invalid reply: holes of a file.", INVALID_REPLY)
        found.append((offset, length))
        start = offset + length
    return found


def facts(value: Mapping[str, object], depth: int = 5) -> dict[str, object]:
    """Sanitize diagnostics: bound depth, counts, numbers and texts, and remove terminal control characters."""
    return {words_of(name)[:100]: _fact(item, depth - 1) for name, item in islice(value.items(), MOST_FACTS)}


def _fact(value: object, depth: int) -> object:
    if isinstance(value, dict) and depth:
        return facts(value, depth)
    if isinstance(value, list) and depth:
        return [_fact(item, depth - 1) for item in value[:MOST_FACTS]]
    if isinstance(value, str):
        return words_of(value)
    if isinstance(value, float):
        return value if abs(value) < float(1 << 63) else None  # rejects NaN
    return value if value is None or is_size(value) else None


def _phases_in(reply: Mapping[str, object]) -> Iterator[Phase]:
    """Yield the valid phases that a builder reports."""
    spans = reply.get("phases")
    for span in spans[: 2 * SPANS] if isinstance(spans, list) else ():
        if not isinstance(span, list) or len(span) != 3 or span[0] not in BUILDER:
            continue
        if all(type(number) in (int, float) and 0 <= number < YEAR for number in span[1:]):  # rejects NaN
            yield Phase(span[0], float(span[1]), float(span[2]))


def _command_in(value: object) -> tuple[str, ...]:
    """Return the sanitized words of a command."""
    return tuple(words_of(word) for word in value[:WORDS]) if isinstance(value, list) else ()


def _status_in(value: object) -> int | None:
    return value if type(value) is int and abs(value) < 1 << 16 else None


def _retained_container(about: object) -> KeptContainer:
    about = mapping(about)
    return KeptContainer(
        words_of(about.get("image", ""))[:400], _command_in(about.get("command")), _status_in(about.get("status"))
    )


def _is_name(value: object) -> TypeGuard[str]:
    return is_file_name(value)


def _is_digest(value: object) -> TypeGuard[str]:
    return is_sha256(value)


def _is_state(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value in STATES


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def is_size(value: object) -> bool:
    """Return whether a value is a number of bytes or a boolean."""
    return isinstance(value, bool) or (isinstance(value, int) and 0 <= value < 1 << 63)


def _now(value: object) -> tuple[str, int | None]:
    """Return a job's phase, empty if not reported, and the number of jobs ahead of it."""
    phase, ahead = value if isinstance(value, list) and len(value) == 2 else ("", None)
    if phase not in BUILDER:
        return "", None
    return phase, ahead if type(ahead) is int and 0 <= ahead <= CROWD else None


def entry(item: object) -> JobEntry | None:
    """Return an entry of a builder's job list; None if it is invalid."""
    reply = mapping(item)
    digest, state, attempt = reply.get("digest"), reply.get("state"), reply.get("attempt")
    attempt = "" if attempt == "" else attempt if _is_name(attempt) else None
    if not _is_digest(digest) or not _is_state(state) or attempt is None:
        return None
    outputs, waiting = reply.get("outputs"), reply.get("waiting")
    return JobEntry(
        digest,
        min(max(count(reply.get("digits")), 8), len(digest)),
        state,
        attempt,
        program=line(reply.get("program", "")),
        outputs=tuple(map(line, outputs[:WAITING])) if isinstance(outputs, list) else (),
        more=count(reply.get("more")),
        arch=line(reply.get("arch", ""))[:20],
        place=count(reply.get("place")) or None,
        age=seconds(reply.get("age")) or 0.0,
        took=seconds(reply.get("took")),
        used=seconds(reply.get("used")) or 0.0,
        kept=reply.get("kept") is True,
        size=count(reply.get("size")),
        log=count(reply.get("log")),
        by=line(reply.get("by", "")),
        waiting=tuple(map(line, waiting[:WAITING])) if isinstance(waiting, list) else (),
    )


def line(value: object) -> str:
    """Return untrusted text as part of one line."""
    return " ".join(words_of(value)[:200].split())


def count(value: object) -> int:
    """Return a number of items or bytes; 0 if the value is invalid."""
    return value if type(value) is int and 0 <= value < 1 << 63 else 0


def seconds(value: object) -> float | None:
    """Return a duration in seconds; None if the value is invalid."""
    if _is_number(value) and 0 <= value < CENTURY:  # rejects NaN
        return float(value)
    return None


def _notices(value: object) -> tuple[str, ...]:
    """Return a builder's notices, one line each, limited in number and length."""
    given = value[:NOTICES] if isinstance(value, list) else []
    return tuple(" ".join(words_of(text)[:500].split()) for text in given if isinstance(text, str))


def mapping(value: object) -> dict[str, object]:
    """Return a JSON object; empty if the value is not one."""
    return value if isinstance(value, dict) else {}
