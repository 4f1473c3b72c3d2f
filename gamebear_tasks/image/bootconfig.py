"""Lines of config.txt and words of cmdline.txt, as Raspberry Pi's firmware reads them.

See https://www.raspberrypi.com/documentation/computers/config_txt.html. Nothing is put in twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SECTION = re.compile(r"\[([^\]]*)\]")

ALL = "all"
"""The section that is for every machine; what stands before the first section is for every machine too."""


def with_lines(text: str, wanted: Sequence[str]) -> str:
    """Return a config.txt that has some lines, each in its section.

    Args:
        text: what is in it.
        wanted: the lines; a heading such as `[pi4]` among them begins a section, and those before it are for all.
    """
    there = {(section, line) for section, line in _in_sections(text.splitlines(), ALL)}
    new: list[str] = []
    end = ALL
    for section, _ in _in_sections(text.splitlines(), ALL, headings=True):
        end = section
    for section, line in _in_sections(wanted, ALL):
        if (section, line) in there:
            continue
        there.add((section, line))
        if section != end:
            new.append(f"[{section}]")
            end = section
        new.append(line)
    if not new:
        return text
    if end != ALL:
        new.append(f"[{ALL}]")  # what somebody adds later is for all, as they expect
    return f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}" + "".join(f"{line}\n" for line in new)


def _in_sections(lines: Sequence[str], section: str, *, headings: bool = False) -> list[tuple[str, str]]:
    """Return the lines with the section that each is in."""
    found = []
    for raw in lines:
        line = raw.strip()
        match = SECTION.fullmatch(line)
        if match:
            section = match[1].strip().lower()
        if headings or not match:
            found.append((section, line))
    return found


def with_words(text: str, wanted: Sequence[str]) -> str:
    """Return a cmdline.txt that has some words, at the end of its one line."""
    first, newline, rest = text.partition("\n")
    words = first.split()
    new = []
    for word in (word for item in wanted for word in item.split()):
        if word not in words and word not in new:
            new.append(word)
    if not new:
        return text
    return " ".join([first.rstrip(), *new]).lstrip() + (newline or "\n") + rest
