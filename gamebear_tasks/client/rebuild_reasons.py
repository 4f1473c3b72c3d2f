"""Rebuild reasons: the differences between a task's job and the job of its last record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..jobspec.canonical_json import Json
from ..jobspec.plan import Plan
from ..jobspec.spec import Job
from ..records.task_record import Record
from ..util.text import in_line

MOST = 8
"""Maximum number of reasons of a kind that are listed individually."""

NEVER = "not built here before"

ASKED = "forced (doit -a, doit forget or its own uptodate); the job is unchanged"

FRESH = "fresh=yes"

ENDS = {
    "failed": "its last build failed",
    "cancelled": "its last build was cancelled",
    "interrupted": "its last build was interrupted",
    "error": "its last build ended with an error",
}
"""Reason by the last record's state, if that is not `done`."""


def reasons(plan: Plan, job: Job, last: Record | None, missing: Iterable[str]) -> tuple[str, ...]:
    """Return the reasons for building a task, a phrase each.

    Args:
        plan: the task's declaration.
        job: the task's job.
        last: the record of the task's last run; None without one.
        missing: the targets that did not exist.
    """
    return _against(last, missing, lambda before: _differences(plan, job.document(), before))


def reasons_to_bake(job: Mapping[str, Json], last: Record | None, missing: Iterable[str]) -> tuple[str, ...]:
    """Return the reasons for baking an SD-card image, a phrase each.

    Args:
        job: the image's document.
        last: the record of the task's last run; None without one.
        missing: the targets that did not exist.
    """

    def differences(before: Mapping[str, Json]) -> Iterator[str]:
        if job["image"] != before.get("image"):
            yield "its declaration changed: settings, names or modes"
        files, others = _mapping(job["files"]), _mapping(before.get("files"))
        yield from _bounded(
            [f"{name} changed" for name in sorted(files) if name in others and files[name] != others[name]]
        )

    return _against(last, missing, differences)


def _against(
    last: Record | None, missing: Iterable[str], differences: Callable[[Mapping[str, Json]], Iterable[str]]
) -> tuple[str, ...]:
    if last is None:
        return (NEVER,)
    found = [f"{target} was missing" for target in missing]
    if last.state in ENDS:
        found.append(ENDS[last.state])
    if last.job:
        found += differences(last.job)
    if last.state == "done" and too_old(last):
        found.append("the package images of its last build expired")
    if not found:
        found.append(ASKED if last.job else "the record of its last build has no job to compare with")
    return tuple(in_line(reason)[:400] for reason in _bounded(found))


def forced(found: Iterable[str]) -> tuple[str, ...]:
    """Return the reasons for a task that the setting `fresh` rebuilds.

    Args:
        found: the reasons without that setting.
    """
    return (FRESH, *(reason for reason in found if reason != ASKED))


def missing(paths: Iterable[str]) -> list[str]:
    """Return those paths that do not exist."""
    return [path for path in paths if not Path(path).exists()]


def too_old(last: Record) -> bool:
    """Return whether the last result has expired, by this machine's clock."""
    return last.valid is not None and time.time() - last.valid["since"] >= last.valid["seconds"]


def _differences(plan: Plan, now: Mapping[str, Json], before: Mapping[str, Json]) -> Iterator[str]:
    program = f"the function {plan.name}" if "function" in now else str(plan.program)
    if now.get("script") != before.get("script") or now.get("function") != before.get("function"):
        yield f"{program} changed"
    kinds = {"modules": "module", "inputs": "input", "sources": "source", "args": "argument"}
    for key, what in {**kinds, "metadata": "metadata of source"}.items():
        yield from _bounded(list(_of_each(plan, what, _mapping(now.get(key)), _mapping(before.get(key)))))
    if now.get("arch") != before.get("arch"):
        yield f"the architecture changed from {before.get('arch')} to {now.get('arch')}"
    if now.get("outputs") != before.get("outputs"):
        yield "the names of its outputs changed"
    if now.get("gamebear") != before.get("gamebear"):
        yield "the format of jobs changed"


def _of_each(plan: Plan, what: str, now: Mapping[str, Json], before: Mapping[str, Json]) -> Iterator[str]:
    """Yield what was added, changed or removed among a job's modules, inputs, sources or arguments.

    The values of arguments are never included.
    """
    for name in sorted({*now, *before}):
        shown = plan.inputs.get(name, name) if what == "input" else name
        if name not in before:
            yield f"the {what} {shown} was added"
        elif name not in now:
            yield f"the {what} {shown} was removed"
        elif now[name] != before[name]:
            yield f"the {what} {shown} changed"


def _mapping(value: Any) -> Mapping[str, Json]:
    return value if isinstance(value, Mapping) else {}


def _bounded(found: list[str]) -> list[str]:
    more = len(found) - MOST
    return found if more < 2 else [*found[:MOST], f"and {more} more"]
