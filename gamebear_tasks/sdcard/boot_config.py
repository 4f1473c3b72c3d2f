"""Lines of config.txt and words of cmdline.txt, as Raspberry Pi's firmware reads them.

See https://www.raspberrypi.com/documentation/computers/config_txt.html. Nothing is put in twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

SECTION = re.compile(r"\[([^\]]*)\]")

ALL = "all"
"""The heading that ends every filter; what stands before the first heading is for every machine too."""

WORD = re.compile(r'(?:[^\s"]|"[^"]*"?)+')
"""A parameter of the kernel, which may have spaces in quotes (Linux, admin-guide/kernel-parameters)."""

Filters: TypeAlias = tuple[tuple[str, str], ...]
"""The headings that a line stands under, each with its kind: one replaces another of its kind, and joins the others."""


def with_lines(text: str, wanted: Sequence[str]) -> str:
    """Return a config.txt that has some lines, each under its headings.

    Args:
        text: what is in it.
        wanted: the lines; a heading such as `[pi4]` among them filters those after it, and those before it are for all.
    """
    lines, end = _filtered(text.splitlines())
    there = {(_key(filters), line) for filters, line in lines}
    new: list[str] = []
    for filters, line in _filtered(wanted)[0]:
        if (_key(filters), line) in there:
            continue
        there.add((_key(filters), line))
        if _key(filters) != _key(end):
            new += [f"[{ALL}]"] if end else []  # else those before would hold, too
            new += [f"[{heading}]" for _, heading in filters]
            end = filters
        new.append(line)
    if not new:
        return text
    if end:
        new.append(f"[{ALL}]")  # what somebody adds later is for all, as they expect
    return f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}" + "".join(f"{line}\n" for line in new)


def _filtered(lines: Sequence[str]) -> tuple[list[tuple[Filters, str]], Filters]:
    """Return the lines with what each stands under, and what another one at the end would."""
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
    """Return which kind of filter a heading is: of a serial number, a pin, a display, …, else of models."""
    if heading.startswith("0x"):
        return "serial"
    name, separator, _ = re.sub("[:=]", "=", heading, count=1).partition("=")
    return name if separator or name == "tryboot" else "model"


def _key(filters: Filters) -> frozenset[tuple[str, str]]:
    return frozenset((kind, heading.lower()) for kind, heading in filters)


def with_words(text: str, wanted: Sequence[str]) -> str:
    """Return a cmdline.txt that has some words, at the end of its one line."""
    first, newline, rest = text.partition("\n")
    words = WORD.findall(first)
    new = []
    for word in (word for item in wanted for word in WORD.findall(item)):
        if word not in words and word not in new:
            new.append(word)
    if not new:
        return text
    return " ".join([first.rstrip(), *new]).lstrip() + (newline or "\n") + rest
