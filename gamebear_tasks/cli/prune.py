"""`gamebear prune`: remove unused results, inputs and images from the builders, and old sources from this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from ..config import settings
from ..errors import SettingsError
from ..util.text import size, size_in
from .command import ProjectCommand

DAY = 86400.0
"""Seconds."""


class Prune(ProjectCommand):
    """Removes what is no longer used."""

    doc_purpose = "remove from the builder what is no longer used"
    doc_usage = "[--older DAYS] [--size 5G] [--keep N] [--images]"
    doc_description = """Removes results, inputs and images from each builder that is set
(builder=URL for another); running jobs and what they need stay.
Options add up: what one of them names, goes. At least one is
needed: only you know what is still wanted."""
    cmd_options: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "name": "older",
            "long": "older",
            "type": str,
            "default": "",
            "metavar": "DAYS",
            "help": "what was not used for so many days, also of the sources that this machine keeps",
        },
        {
            "name": "limit",
            "long": "size",
            "type": str,
            "default": "",
            "metavar": "BYTES",
            "help": "the least recently used, until results and inputs take no more than this, such as 5G",
        },
        {
            "name": "keep",
            "long": "keep",
            "type": str,
            "default": "",
            "metavar": "N",
            "help": "all but the last so many results of each target",
        },
        {
            "name": "images",
            "long": "images",
            "type": bool,
            "default": False,
            "help": "also images that no job which stays has used, and nobody for the days of --older",
        },
    )

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Remove it."""
        self.refuse(args)
        self.print_lines(_pruned(options["older"], options["limit"], options["keep"], options["images"]))
        return 0


def _pruned(older: str, limit: str, keep: str, images: bool) -> Iterator[str]:
    from ..client.build import builder_of_this_run
    from ..sources import cache

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
            "gamebear prune does not say what may go.",
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


def _number(option: str, text: str, what: str, pattern: str) -> float | None:
    """Return the number that an option gives; None where it is not given."""
    if not text:
        return None
    if not re.fullmatch(pattern, text, re.ASCII):
        raise SettingsError(f"{option} is {text!r}.", f"Give it {what}.")
    return float(text)
