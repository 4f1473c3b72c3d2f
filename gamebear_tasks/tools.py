"""Tasks that a `dodo.py` imports beside its own: pins, sources, the builder's store."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from doit.exceptions import TaskError

from .config import settings
from .errors import GamebearError, SettingsError
from .plan import declared, read_lock
from .tasks import LOCK, Task
from .wording import in_line, size, size_in

DAY = 86400.0
"""Seconds."""


def only_when_named(task: Any, values: Mapping[str, Any]) -> bool:
    """Keep a bare `doit` from running a task: an `uptodate` check that is false only where the task is asked for.

    doit gives options to the tasks that are named on its command line before it asks, and to others after.
    """
    return task.options is None


def task_lock() -> Task:
    """pin branches, tags and Debian packages in gamebear.lock (-u: again, all of them)"""
    return {
        "actions": [(_lock,)],
        "params": [
            {
                "name": "update",
                "short": "u",
                "long": "update",
                "type": bool,
                "default": False,
                "help": "look again for what is pinned already",
            }
        ],
        "uptodate": [only_when_named],
        "verbosity": 2,
    }


def _lock(update: bool) -> TaskError | None:
    from .cache import sources_folder
    from .sources.lookup import resolve

    return _told(lambda: resolve(declared, LOCK, sources_folder(), update=update))


def task_sources() -> Task:
    """fetch every pinned source into this machine's cache, to build without a network"""
    return {"actions": [(_fetch_sources,)], "uptodate": [only_when_named], "verbosity": 2}


def _fetch_sources() -> TaskError | None:
    from .cache import sources_folder
    from .sources.choice import check_preference, choose

    preference = settings().sources

    def fetch() -> Iterator[str]:
        check_preference(preference, declared)
        lock = read_lock(LOCK)
        for source in [choose(source, preference) for source in declared]:
            yield f"{source}: {size(source.fetch(sources_folder(), lock).stat().st_size)}"

    return _told(fetch)


def task_prune() -> Task:
    """remove from the builder what is no longer used (--older DAYS, --size 5G, --keep N, --images)"""
    return {
        "actions": [(_prune,)],
        "params": [
            {
                "name": "older",
                "long": "older",
                "type": str,
                "default": "",
                "help": "what was not used for so many days, also of the sources that this machine keeps",
            },
            {
                "name": "limit",
                "long": "size",
                "type": str,
                "default": "",
                "help": "the least recently used, until results and inputs take no more than this, such as 5G",
            },
            {
                "name": "keep",
                "long": "keep",
                "type": str,
                "default": "",
                "help": "all but the last so many results of each target",
            },
            {
                "name": "images",
                "long": "images",
                "type": bool,
                "default": False,
                "help": "also images that no job which stays has used, and nobody for the days of --older",
            },
        ],
        "uptodate": [only_when_named],
        "verbosity": 2,
    }


def _prune(older: str, limit: str, keep: str, images: bool) -> TaskError | None:
    from . import cache
    from .building import builder_of_this_run

    def prune() -> Iterator[str]:
        days = _number("--older", older, "a number of days, such as 30", r"\d{1,9}(\.\d{1,9})?")
        count = _number("--keep", keep, "a number of results, such as 3", r"\d{1,9}")
        most = size_in(limit) if limit else None
        if limit and most is None:
            if limit.isdecimal():
                raise SettingsError(
                    f"--size is {limit!r}, without a unit.", f"Say {limit}G, {limit}M, {limit}K or {limit}B."
                )
            raise SettingsError(f"--size is {limit!r}.", "Give it a number of bytes, such as 500M or 5G.")
        if days is None and count is None and most is None and not images:
            raise SettingsError(
                "doit prune does not say what may go.",
                "Say one or more of --older DAYS, --size BYTES (such as 5G), --keep RESULTS and --images.",
            )
        if days is not None:
            removed, freed = cache.prune(days * DAY)
            if removed:
                yield f"On this machine {removed} {'sources' if removed > 1 else 'source'} removed, {size(freed)} freed"
        for url in settings().builders:
            pruned = builder_of_this_run(url).prune(
                None if days is None else days * DAY,
                most,
                None if count is None else int(count),
                images,
            )
            counts = (
                (pruned.jobs, "job"),
                (pruned.blobs, "input"),
                (pruned.images, "image"),
                (pruned.others, "other thing"),
            )
            went = ", ".join(f"{count} {name}{'s' if count != 1 else ''}" for count, name in counts if count)
            yield f"On {url} {went or 'nothing'} removed, {size(pruned.freed)} freed"
            for reason in pruned.left:
                yield f"  {reason}"

    return _told(prune)


def _number(option: str, text: str, what: str, pattern: str) -> float | None:
    """Return the number that an option gives; None where it is not given."""
    if not text:
        return None
    if not re.fullmatch(pattern, text, re.ASCII):
        raise SettingsError(f"{option} is {text!r}.", f"Give it {what}.")
    return float(text)


def _told(work: Callable[[], Iterable[str]]) -> TaskError | None:
    """Print the lines that some work gives; where it fails, return the paragraph that says why."""
    try:
        for line in work():
            with contextlib.suppress(OSError):  # whoever read it has enough; what is done is done whole
                print(in_line(line))
    except GamebearError as error:
        return TaskError(str(error))
    return None
