"""`gamebear prune`: remove unused results, inputs and images from the builders, and old sources from this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from ..config import settings
from ..errors import SettingsError
from ..util.text import size, size_in
from ..util.urls import shown
from .command import ProjectCommand

DAY = 86400.0
"""Seconds per day."""


class Prune(ProjectCommand):
    """Removes unused results, inputs and images."""

    doc_purpose = "remove unused results, inputs and images from the builders"
    doc_usage = "[--older DAYS] [--size 5G] [--keep N] [--images]"
    doc_description = """Removes results, inputs and images from each configured builder
(builder=URL for another). Running jobs, and the files that they
need, are never removed. At least one option is required. Each
option selects entries on its own: --older 30 --keep 1 removes
results that are older than 30 days, and all but the newest result
of each target."""
    cmd_options: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "name": "older",
            "long": "older",
            "type": str,
            "default": "",
            "metavar": "DAYS",
            "help": "remove entries that were not used for DAYS days, also from this machine's cache of sources",
        },
        {
            "name": "limit",
            "long": "size",
            "type": str,
            "default": "",
            "metavar": "BYTES",
            "help": "remove the least recently used results and inputs until their size is at most BYTES, such as 5G",
        },
        {
            "name": "keep",
            "long": "keep",
            "type": str,
            "default": "",
            "metavar": "N",
            "help": "remove all but the N newest results of each target",
        },
        {
            "name": "images",
            "long": "images",
            "type": bool,
            "default": False,
            "help": "remove images that no remaining job uses; with --older, only those unused for DAYS days",
        },
    )

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Remove unused entries."""
        self.refuse(args)
        self.print_lines(_pruned(options["older"], options["limit"], options["keep"], options["images"]))
        return 0


def _pruned(older: str, limit: str, keep: str, images: bool) -> Iterator[str]:
    from ..client.build import builder_of_this_run
    from ..sources import cache

    days = _number("--older", older, "a number of days", "30", r"\d{1,9}(\.\d{1,9})?")
    count = _number("--keep", keep, "a number of results", "3", r"\d{1,9}")
    most = size_in(limit) if limit else None
    if limit and most is None:
        if limit.isdecimal():
            raise SettingsError(
                f"--size must have a unit, got {limit!r}.", f"Use {limit}G, {limit}M, {limit}K or {limit}B."
            )
        raise SettingsError(f"--size must be a size, got {limit!r}.", "Use a number and a unit, such as --size 5G.")
    if days is None and count is None and most is None and not images:
        raise SettingsError(
            "gamebear prune needs an option that selects what to remove.",
            "Add one or more of --older DAYS, --size BYTES (such as 5G), --keep N and --images.",
        )
    if days is not None:
        removed, freed = cache.prune(days * DAY)
        if removed:
            yield f"{removed} {'sources' if removed > 1 else 'source'} removed on this machine, {size(freed)} freed"
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
            (pruned.others, "other item"),
        )
        removed_there = ", ".join(f"{count} {name}{'s' if count != 1 else ''}" for count, name in counts if count)
        yield f"{removed_there or 'nothing'} removed on {shown(url)}, {size(pruned.freed)} freed"
        for reason in pruned.left:
            yield f"  {reason}"


def _number(option: str, text: str, what: str, example: str, pattern: str) -> float | None:
    """Return the number that an option specifies, or None without the option."""
    if not text:
        return None
    if not re.fullmatch(pattern, text, re.ASCII):
        raise SettingsError(f"{option} must be {what}, got {text!r}.", f"Use {what}, such as {option} {example}.")
    return float(text)
