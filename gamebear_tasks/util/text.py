"""Format sizes, durations and untrusted text for display."""

from __future__ import annotations

import re
import sys

UNPRINTABLE = "\ufffd"
"""Replacement for unprintable characters, such as control characters."""


def printable(text: str) -> str:
    """Sanitize a text of several lines: replace unprintable characters, except line feeds and tabs."""
    return "".join(char if char.isprintable() or char in "\n\t" else UNPRINTABLE for char in text)


_SPACES = dict.fromkeys(map(ord, "\t\n\v\f\r"), " ")


def in_line(text: str) -> str:
    """Sanitize a text for a single line: line breaks and tabs become spaces, unprintable characters are replaced."""
    return text if text.isprintable() else printable(text.translate(_SPACES))


_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
"""Terminal escape sequences (ECMA-48): control sequences, operating system commands, other escapes."""


def without_escapes(text: str) -> str:
    """Remove terminal escape sequences: colours, cursor movements, titles."""
    return _SEQUENCE.sub("", text) if "\x1b" in text else text


def line_of(text: str) -> str:
    """Sanitize a log line: the text after its last carriage return, without escape sequences."""
    text = text.rstrip("\r")
    if "\r" in text:
        text = text.rpartition("\r")[2]
    text = without_escapes(text)
    return text if text.isprintable() else in_line(text.expandtabs())


def size(count: int) -> str:
    """Format a number of bytes with a binary unit."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


_SIZE = re.compile(r"(\d{1,15})(?:\.(\d{1,15}))?\s*(B|([KMGT])(?:iB)?)?", re.ASCII | re.IGNORECASE)


def size_in(text: str) -> int | None:
    """Parse a size such as `1.5G`, `500 MiB` or `512B` to bytes; None if it is invalid.

    The units K, M, G and T are powers of 1024, and `iB` may follow them; B is bytes. A number without a unit is
    invalid, because the unit would be a guess. Zero does not need a unit.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    whole, part, unit, letter = match[1], match[2] or "", match[3], match[4] or " "
    count = int(whole + part) << 10 * " KMGT".index(letter.upper())
    return None if count and not unit else count // 10 ** len(part)


def duration(seconds: float) -> str:
    """Format a duration in seconds for a sentence or a table."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def clock(seconds: float) -> str:
    """Format a running duration in seconds for a narrow column: shorter than `duration`."""
    if seconds < 59.5:
        return duration(max(0.0, seconds))
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def age(seconds: float) -> str:
    """Format an age in seconds, rounded down to its largest suitable unit: days, hours, minutes or seconds."""
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds // unit:.0f} {name}"
    return f"{seconds:.0f} s"


def arrow() -> str:
    """Return the arrow that a fix begins with, in ASCII where standard output cannot encode it."""
    try:
        "→".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (LookupError, UnicodeError):
        return "->"
    return "→"
