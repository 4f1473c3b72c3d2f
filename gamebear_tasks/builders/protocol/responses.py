"""What a builder answers, read: nothing in it is believed that does not have to be, or reaches a terminal as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, TypeGuard

from ...errors import NONSENSE, BuilderError
from ...records.task_record import BUILDER, Phase
from ...runner.protocol import wire
from ...runner.store.phases import LIMIT as SPANS
from ...runner.util.atomic_files import is_file_name, is_sha256
from ..base import Failure, JobEntry, KeptContainer, Output, Status
from .session import words_of

CROWD = 9999
"""The most jobs that are believed to wait for a builder."""

WORDS = 1000
"""The most words of a command that failed."""

NOTICES = 10
"""The most that a builder may say of itself at once."""

VALID = 10 * 365 * 86400.0
"""Seconds beyond which no result is believed to hold."""

CENTURY = 100 * 366 * 86400.0
"""Seconds; nothing on a builder is older."""

STATES = ("queued", "running", "done", "failed", "cancelled", "lost")
"""Of a job."""

WAITING = 20
"""The most who are said to wait for a job."""

YEAR = 366 * 86400.0
"""Seconds; no job takes longer."""

MOST_FACTS = 100
"""The most that a builder may say of itself of one kind."""


def status(place: str, reply: Mapping[str, Any], joined: bool = False) -> Status:
    """Return where a job is.

    Args:
        place: what to call the builder in messages.
        reply: what it said.
        joined: whether the job was there already.

    Raises:
        BuilderError: it makes no sense.
    """
    state = reply.get("state")
    attempt = reply.get("attempt")
    if state not in STATES or not _is_name(attempt):
        raise BuilderError(f"{place} answers something that makes no sense (state {words_of(state)}).", NONSENSE)
    outputs = {}
    for name, about in mapping(reply.get("outputs")).items():
        about = mapping(about)
        length, sha256 = about.get("size"), about.get("sha256")
        if type(length) is not int or not 0 <= length <= wire.MAX_BODY or not _is_digest(sha256):
            raise BuilderError(f"{place} describes the output {name[:100]!r} in a way that makes no sense.", NONSENSE)
        data = about.get("data")
        data = data if type(data) is int and 0 <= data <= length else None
        outputs[name] = Output(length, sha256, about.get("executable") is True, data)
    failure = None
    if state == "failed":
        about = mapping(reply.get("failure"))
        failure = Failure(
            words_of(about.get("kind", "")),
            words_of(about.get("message", "It failed.")),
            _command_in(about.get("command")),
            _status_in(about.get("status")),
            words_of(about.get("where", ""))[:400],
            about.get("containers") is True,
            about.get("kept") is True,
        )
    valid = reply.get("valid")
    if valid is not None and not (type(valid) in (int, float) and valid >= 0):
        raise BuilderError(f"{place} answers something that makes no sense (valid {words_of(valid)[:100]}).", NONSENSE)
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


def holes(reply: Mapping[str, Any], start: int, end: int, place: str) -> list[tuple[int, int]]:
    """Return offset and length of each hole of a file between two offsets, in order.

    Raises:
        BuilderError: they overlap, or are elsewhere.
    """
    given = reply.get("holes", [])
    found: list[tuple[int, int]] = []
    for hole in given if isinstance(given, list) else [given]:
        sound = isinstance(hole, list) and len(hole) == 2 and all(type(number) is int for number in hole)
        if not sound or not (start <= hole[0] < hole[0] + hole[1] <= end):
            raise BuilderError(f"{place} describes the holes of a file in a way that makes no sense.", NONSENSE)
        found.append((hole[0], hole[1]))
        start = hole[0] + hole[1]
    return found


def checked(value: Any, depth: int = 5) -> Any:
    """Return what a builder says of itself with nothing in it that is not bounded or that a terminal would act on."""
    if isinstance(value, dict) and depth:
        return {words_of(name)[:100]: checked(item, depth - 1) for name, item in islice(value.items(), MOST_FACTS)}
    if isinstance(value, list) and depth:
        return [checked(item, depth - 1) for item in value[:MOST_FACTS]]
    if isinstance(value, str):
        return words_of(value)
    if isinstance(value, float):
        return value if abs(value) < float(1 << 63) else None  # NaN is not less than anything
    return value if value is None or is_size(value) else None


def _phases_in(reply: Mapping[str, Any]) -> Iterator[Phase]:
    """Give what makes sense of where a builder says that the time went."""
    spans = reply.get("phases")
    for span in spans[: 2 * SPANS] if isinstance(spans, list) else ():
        if not isinstance(span, list) or len(span) != 3 or span[0] not in BUILDER:
            continue
        if all(type(number) in (int, float) and 0 <= number < YEAR for number in span[1:]):  # and so no NaN
            yield Phase(span[0], float(span[1]), float(span[2]))


def _command_in(value: object) -> tuple[str, ...]:
    """Return the words of a command, as they may be shown."""
    return tuple(words_of(word) for word in value[:WORDS]) if isinstance(value, list) else ()


def _status_in(value: object) -> int | None:
    return value if type(value) is int and abs(value) < 1 << 16 else None


def kept_container(about: object) -> KeptContainer:
    """Return a container that is kept."""
    about = mapping(about)
    return KeptContainer(
        words_of(about.get("image", ""))[:400], _command_in(about.get("command")), _status_in(about.get("status"))
    )


def _is_name(value: object) -> TypeGuard[str]:
    return is_file_name(value)


def _is_digest(value: object) -> TypeGuard[str]:
    return is_sha256(value)


def is_size(value: object) -> bool:
    """Say whether something is a number of bytes, or a truth value."""
    return isinstance(value, bool) or (isinstance(value, int) and 0 <= value < 1 << 63)


def _now(value: object) -> tuple[str, int | None]:
    """Return the phase that a job is in, empty where the builder says none, and how many jobs are before it."""
    phase, ahead = value if isinstance(value, list) and len(value) == 2 else ("", None)
    if phase not in BUILDER:
        return "", None
    return phase, ahead if type(ahead) is int and 0 <= ahead <= CROWD else None


def entry(item: object) -> JobEntry | None:
    """Return what a builder says of one of its jobs; None where it makes no sense."""
    said = mapping(item)
    digest, state, attempt = said.get("digest"), said.get("state"), said.get("attempt")
    if not _is_digest(digest) or state not in STATES or not (_is_name(attempt) or attempt == ""):
        return None
    outputs, waiting = said.get("outputs"), said.get("waiting")
    return JobEntry(
        digest,
        min(max(count(said.get("digits")), 8), len(digest)),
        state,
        attempt,
        program=line(said.get("program", "")),
        outputs=tuple(map(line, outputs[:WAITING])) if isinstance(outputs, list) else (),
        more=count(said.get("more")),
        arch=line(said.get("arch", ""))[:20],
        place=count(said.get("place")) or None,
        age=seconds(said.get("age")) or 0.0,
        took=seconds(said.get("took")),
        used=seconds(said.get("used")) or 0.0,
        kept=said.get("kept") is True,
        size=count(said.get("size")),
        log=count(said.get("log")),
        by=line(said.get("by", "")),
        waiting=tuple(map(line, waiting[:WAITING])) if isinstance(waiting, list) else (),
    )


def line(value: object) -> str:
    """Return a builder's words as a part of a line."""
    return " ".join(words_of(value)[:200].split())


def count(value: object) -> int:
    """Return a number of things, or of bytes; 0 for what is none."""
    return value if type(value) is int and 0 <= value < 1 << 63 else 0


def seconds(value: Any) -> float | None:
    """Return a span of time in seconds; None for what is none."""
    if type(value) in (int, float) and 0 <= value < CENTURY:  # and so no NaN
        return float(value)
    return None


def _notices(value: object) -> tuple[str, ...]:
    """Return what a builder has to say of itself, a line each and no more than a screen has."""
    given = value[:NOTICES] if isinstance(value, list) else []
    return tuple(" ".join(words_of(text)[:500].split()) for text in given if isinstance(text, str))


def mapping(value: object) -> dict[str, Any]:
    """Return an object of JSON, empty for what is none."""
    return value if isinstance(value, dict) else {}
