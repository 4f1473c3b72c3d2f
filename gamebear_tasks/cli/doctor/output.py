"""Output of a diagnosis: text for a person, JSON for a script."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from ...util.text import in_line
from .builder_checks import NOTE, OK, TROUBLE, Finding
from .fixes import Done

VERSION = 1
"""Of the JSON: another number where a field goes or means something else; new fields come without."""

READY, TROUBLED, UNREACHED = 0, 1, 2
"""The exit statuses."""

SIGNS = {OK: "✓", NOTE: "!", TROUBLE: "✗"}
PLAIN_SIGNS = {OK: "+", NOTE: "!", TROUBLE: "x"}
COLOURS = {OK: "32", NOTE: "33", TROUBLE: "31"}
"""Of ECMA-48's SGR."""

NARROWEST = 40
WIDEST = 120
"""Columns."""


@dataclass(frozen=True)
class Place:
    """What was found at one place.

    Attributes:
        name: `here`, a builder's URL, or that and one of its workers.
        reached: whether it could be asked.
        findings: what was found.
        facts: what they were judged by.
        mended: what was done to mend it.
        unmended: why it could not be mended.
    """

    name: str
    reached: bool
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    mended: tuple[Done, ...] = ()
    unmended: str = ""

    @property
    def troubles(self) -> int:
        """How many troubles there are."""
        return sum(finding.state == TROUBLE for finding in self.findings)


def status_of(places: Sequence[Place]) -> int:
    """Return the exit status that says how it is with all of them: the worst."""
    if not all(place.reached for place in places):
        return UNREACHED
    return TROUBLED if any(place.troubles for place in places) else READY


def as_json(places: Sequence[Place]) -> str:
    """Return all of it for a script; the fields are described in docs/how-to/fresh-pi.md."""
    return json.dumps(
        {
            "version": VERSION,
            "status": status_of(places),
            "places": [
                {
                    "place": place.name,
                    "reached": place.reached,
                    "ready": place.reached and not place.troubles,
                    "findings": [asdict(finding) for finding in place.findings],
                    "facts": place.facts,
                    "mended": [
                        {"command": each.step.command, "why": each.step.why, "done": each.done} for each in place.mended
                    ],
                    "unmended": place.unmended,
                }
                for place in places
            ],
        },
        indent=2,
    )


class Sheet:
    """Prints what was found, for the width, the letters and the colours that a stream has.

    Args:
        stream: where it goes.
        is_mending: whether troubles were mended already, where that was possible.
    """

    def __init__(self, stream: TextIO, is_mending: bool) -> None:
        self._stream = stream
        self._is_mending = is_mending
        self._encoding = stream.encoding or "ascii"
        self._is_colourful = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._width = max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns))
        try:
            "✓✗→…".encode(self._encoding)
            self._signs, self._arrow = SIGNS, "→"
        except UnicodeEncodeError:
            self._signs, self._arrow = PLAIN_SIGNS, "->"

    def line(self, text: str) -> None:
        """Print a line; what the stream has no letters for becomes a question mark."""
        print(text.encode(self._encoding, "replace").decode(self._encoding), file=self._stream, flush=True)

    def show(self, places: Sequence[Place]) -> None:
        """Print all that was found."""
        column = max((len(finding.name) for place in places for finding in place.findings), default=0)
        for place in places:
            self.line(self._coloured("1", in_line(place.name)))
            for finding in place.findings:
                for line in self._finding(finding, min(column, self._width // 3)):
                    self.line(line)
            if place.unmended:
                self._paragraph(place.unmended, "  ")
            self.line("")
        self._paragraph(" ".join(self._sum(places)), "")

    def _finding(self, finding: Finding, column: int) -> Iterator[str]:
        sign = self._coloured(COLOURS[finding.state], self._signs[finding.state])
        indent = " " * (column + 6)
        what = self._wrapped(finding.what, indent)
        yield f"  {sign} {in_line(finding.name):{column}}  {what[0].strip()}"
        yield from what[1:]
        if finding.remedy:
            first, *rest = self._wrapped(finding.remedy, f"{indent}{' ' * len(self._arrow)} ")
            yield f"{indent}{self._arrow} {first.strip()}"
            yield from rest

    def _wrapped(self, text: str, indent: str) -> list[str]:
        return textwrap.wrap(
            in_line(text),
            self._width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]

    def _paragraph(self, text: str, indent: str) -> None:
        for line in self._wrapped(text, indent):
            self.line(line)

    def _sum(self, places: Sequence[Place]) -> Iterator[str]:
        for place in places:
            if not place.reached:
                yield f"{place.name} cannot be asked."
            elif place.troubles:
                yield f"{place.name}: {place.troubles} {'trouble' if place.troubles == 1 else 'troubles'}."
            elif place.name != "here":
                yield f"{place.name} is ready."
        mendable = any(finding.is_mendable for place in places for finding in place.findings)
        if mendable and not self._is_mending:
            yield "gamebear doctor --fix mends what it can, as root, and says each step."

    def _coloured(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._is_colourful else text
