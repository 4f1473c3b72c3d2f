"""Tasks that a `dodo.py` imports beside its own: pins, sources, the builder's store."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from doit.dependency import UptodateCalculator
from doit.exceptions import TaskError
from doit.task import DelayedLoader

from ..client.cancellation import begin_run
from ..config import settings
from ..errors import GamebearError, SettingsError
from ..jobspec.plan import declared, read_lock
from ..util.text import in_line, size, size_in
from .artifact import LOCK, Task

if TYPE_CHECKING:
    from ..sources.alternatives import Declared

DAY = 86400.0
"""Seconds."""


def only_when_named(task: Any, values: Mapping[str, Any]) -> bool:
    """Keep a bare `doit` from running a task: an `uptodate` check that is false only where the task is asked for.

    doit gives options to the tasks that are named on its command line before it asks, and to others after.
    """
    if task.options is None:
        return True
    begin_run()
    return False


class OnlyWhenNamed(UptodateCalculator):  # type: ignore[misc]  # doit has no types
    """Does what `only_when_named` does, and gives the task's action all sources of the dodo.py.

    Those of `@create_after` tasks are among them: a run does not create tasks that it does not need, so their creators
    are called here, as `doit list` calls them. It happens in doit's main process; options travel to the others.
    """

    def __call__(self, task: Any, values: Mapping[str, Any]) -> bool:
        """Say whether the task was not named; if it was, set its options `sources` and `unknown`."""
        if only_when_named(task, values):
            return True
        task.options["unknown"] = list(_create_delayed(self.tasks_dict))
        task.options["sources"] = list(declared)
        return False


def _create_delayed(tasks: Mapping[str, Any]) -> Iterator[str]:
    """Have the creators that doit has not called yet declare their sources; say of each that fails why."""
    seen: list[Any] = []
    for name, task in list(tasks.items()):
        loader = task.loader
        if not isinstance(loader, DelayedLoader) or loader.created or loader.creator in seen:
            continue
        seen.append(loader.creator)
        try:
            _exhaust(loader.creator(**(loader.kwargs or {})))
        except Exception as error:  # noqa: BLE001 - an author's code, which may need what another task makes
            why = error.message if isinstance(error, GamebearError) else f"{type(error).__name__}: {error}"
            hint = f"run: doit {loader.task_dep} lock" if loader.task_dep else "mend it in dodo.py"
            yield f"not all sources of the task {name} are known, as it cannot be created yet: {why} ({hint})"


def _exhaust(tasks: Any) -> None:
    """Run a creator to its end; generators may give generators."""
    if inspect.isgenerator(tasks):
        for each in tasks:
            _exhaust(each)


def task_lock() -> Task:
    """pin branches, tags and Debian packages in gamebear.lock (-u: again, all of them; --prune: drop unused pins)"""
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
            },
            {
                "name": "prune",
                "long": "prune",
                "type": bool,
                "default": False,
                "help": "drop the pins that no task of this dodo.py declares",
            },
        ],
        "uptodate": [OnlyWhenNamed()],
        "verbosity": 2,
    }


def _lock(update: bool, prune: bool, sources: list[Declared], unknown: list[str]) -> TaskError | None:
    from ..sources.cache import sources_folder
    from ..sources.resolver import resolve

    def lock() -> Iterator[str]:
        yield from resolve(sources, LOCK, sources_folder(), update=update, prune=prune and not unknown)
        yield from unknown
        if prune and unknown:
            yield "no pin was dropped, as not all sources are known"

    return _told(lock)


def task_sources() -> Task:
    """fetch every pinned source into this machine's cache, to build without a network"""
    return {"actions": [(_fetch_sources,)], "uptodate": [OnlyWhenNamed()], "verbosity": 2}


def _fetch_sources(sources: list[Declared], unknown: list[str]) -> TaskError | None:
    from ..sources.alternatives import check_preference, choose
    from ..sources.cache import sources_folder

    preference = settings().sources

    def fetch() -> Iterator[str]:
        check_preference(preference, sources)
        lock = read_lock(LOCK)
        for source in [choose(source, preference) for source in sources]:
            yield f"{source}: {size(source.fetch(sources_folder(), lock).stat().st_size)}"
        yield from unknown

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
    from ..client.build import builder_of_this_run
    from ..sources import cache

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
