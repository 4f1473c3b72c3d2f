"""How others' text, sizes and times stand in a line that a person reads."""

from __future__ import annotations

import re

UNPRINTABLE = "\ufffd"
"""Stands for what a terminal would act on."""


def printable(text: str) -> str:
    """Return a text of several lines without what a terminal would act on."""
    return "".join(char if char.isprintable() or char in "\n\t" else UNPRINTABLE for char in text)


_SPACES = dict.fromkeys(map(ord, "\t\n\v\f\r"), " ")


def in_line(text: str) -> str:
    """Return a text as a part of a line: with a space for a line break, and without what a terminal would act on."""
    return text if text.isprintable() else printable(text.translate(_SPACES))


_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
"""What a terminal takes for a command (ECMA-48): control sequences, operating system commands, other escapes."""


def without_escapes(text: str) -> str:
    """Return a text without a terminal's commands: colours, positions, titles."""
    return _SEQUENCE.sub("", text) if "\x1b" in text else text


def line_of(text: str) -> str:
    """Return a line of a log as a terminal would show it in the end, without colours."""
    text = text.rstrip("\r")
    if "\r" in text:
        text = text.rpartition("\r")[2]
    text = without_escapes(text)
    return text if text.isprintable() else in_line(text.expandtabs())


def size(count: int) -> str:
    """Return a number of bytes for people to read, in binary units."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


_SIZE = re.compile(r"(\d{1,15})(?:\.(\d{1,15}))?\s*(B|([KMGT])(?:iB)?)?", re.ASCII | re.IGNORECASE)


def size_in(text: str) -> int | None:
    """Return the bytes of a size that a person gives, such as `1.5G`, `500 MiB` or `512B`; None if it is none.

    The units K, M, G and T are powers of 1024, and `iB` may follow them; B is bytes. A number alone is
    refused, because its unit would be a guess. Zero needs no unit.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    whole, part, unit, letter = match[1], match[2] or "", match[3], match[4] or " "
    count = int(whole + part) << 10 * " KMGT".index(letter.upper())
    return None if count and not unit else count // 10 ** len(part)


def duration(seconds: float) -> str:
    """Return how long something took, as a sentence or a table has it."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def clock(seconds: float) -> str:
    """Return how long something has taken, for a narrow column in which it goes on: like `duration`, shorter."""
    if seconds < 59.5:
        return duration(max(0.0, seconds))
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def age(seconds: float) -> str:
    """Return how long ago something was, for which its largest unit is enough: it may be months."""
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds // unit:.0f} {name}"
    return f"{seconds:.0f} s"
