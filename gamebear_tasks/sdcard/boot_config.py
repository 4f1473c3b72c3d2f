"""Add lines to config.txt and words to cmdline.txt, as Raspberry Pi's firmware reads them. Both edits are idempotent.

See https://www.raspberrypi.com/documentation/computers/config_txt.html.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

SECTION = re.compile(r"\[([^\]]*)\]")

ALL = "all"
"""Heading that resets all filters. Lines before the first heading also apply to every machine."""

WORD = re.compile(r'(?:[^\s"]|"[^"]*"?)+')
"""A kernel parameter, which may contain quoted spaces (Linux, admin-guide/kernel-parameters)."""

Filters: TypeAlias = tuple[tuple[str, str], ...]
"""Kind and text of each filter heading that applies to a line.

A heading replaces an earlier one of the same kind. Headings of different kinds are combined.
"""


def with_lines(text: str, wanted: Sequence[str]) -> str:
    """Return a config.txt that contains the specified lines, each under its filter headings.

    Args:
        text: Current content.
        wanted: Lines to add. A heading such as `[pi4]` filters the lines after it; those before any apply to all.
    """
    lines, end = _filtered(text.splitlines())
    there = {(_key(filters), line) for filters, line in lines}
    new: list[str] = []
    for filters, line in _filtered(wanted)[0]:
        if (_key(filters), line) in there:
            continue
        there.add((_key(filters), line))
        if _key(filters) != _key(end):
            new += [f"[{ALL}]"] if end else []  # the new headings alone would be combined with the active filters
            new += [f"[{heading}]" for _, heading in filters]
            end = filters
        new.append(line)
    if not new:
        return text
    if end:
        new.append(f"[{ALL}]")  # so that lines appended later apply to every machine
    return f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}" + "".join(f"{line}\n" for line in new)


def _filtered(lines: Sequence[str]) -> tuple[list[tuple[Filters, str]], Filters]:
    """Return each line with the filters that apply to it, and the filters that apply at the end."""
    found = []
    filters: dict[str, str] = {}
    for raw in lines:
        line = raw.strip()
        match = SECTION.fullmatch(line)
        if match is None:
            found.append((tuple(filters.items()), line))
        elif match[1].strip().lower() == ALL:
            filters = {}
        else:
            filters[_kind(match[1].strip().lower())] = match[1].strip()
    return found, tuple(filters.items())


def _kind(heading: str) -> str:
    """Return the kind of a filter heading: serial number, GPIO pin, display and so on, or by default the model."""
    if heading.startswith("0x"):
        return "serial"
    name, separator, _ = re.sub("[:=]", "=", heading, count=1).partition("=")
    return name if separator or name == "tryboot" else "model"


def _key(filters: Filters) -> frozenset[tuple[str, str]]:
    return frozenset((kind, heading.lower()) for kind, heading in filters)


def with_words(text: str, wanted: Sequence[str]) -> str:
    """Return a cmdline.txt with the specified words appended to its only line."""
    first, newline, rest = text.partition("\n")
    words = WORD.findall(first)
    new = []
    for word in (word for item in wanted for word in WORD.findall(item)):
        if word not in words and word not in new:
            new.append(word)
    if not new:
        return text
    return " ".join([first.rstrip(), *new]).lstrip() + (newline or "\n") + rest
