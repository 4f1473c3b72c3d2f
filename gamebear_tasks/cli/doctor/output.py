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
from .builder_checks import FAILED, OK, WARNING, Finding
from .fixes import StepResult

VERSION = 2
"""Version of the JSON format. It changes when a field is removed or changes its meaning, not for new fields."""

READY, NOT_READY, UNREACHABLE = 0, 1, 2
"""Exit statuses."""

SIGNS = {OK: "✓", WARNING: "!", FAILED: "✗"}
ASCII_SIGNS = {OK: "+", WARNING: "!", FAILED: "x"}
COLOURS = {OK: "32", WARNING: "33", FAILED: "31"}
"""Parameters of SGR (ECMA-48)."""

MINIMUM_WIDTH = 40
MAXIMUM_WIDTH = 120
"""Width of the output in columns."""


@dataclass(frozen=True)
class Place:
    """Findings about one machine.

    Attributes:
        name: `here`, a builder's URL, or a URL with the name of a worker.
        reached: Whether the machine was reached.
        findings: Results of the checks.
        facts: Data from the builder that the checks used.
        fixed: Results of the fixes that were applied.
        fix_error: Reason why fixes could not be applied, or empty.
    """

    name: str
    reached: bool
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    fixed: tuple[StepResult, ...] = ()
    fix_error: str = ""

    @property
    def failures(self) -> int:
        """Number of failed checks."""
        return sum(finding.state == FAILED for finding in self.findings)


def status_of(places: Sequence[Place]) -> int:
    """Return the exit status: that of the worst place."""
    if not all(place.reached for place in places):
        return UNREACHABLE
    return NOT_READY if any(place.failures for place in places) else READY


def as_json(places: Sequence[Place]) -> str:
    """Return the diagnosis as JSON. docs/how-to/fresh-pi.md describes the fields."""
    return json.dumps(
        {
            "version": VERSION,
            "status": status_of(places),
            "places": [
                {
                    "place": place.name,
                    "reached": place.reached,
                    "ready": place.reached and not place.failures,
                    "findings": [asdict(finding) for finding in place.findings],
                    "facts": place.facts,
                    "fixed": [
                        {"command": each.step.command, "purpose": each.step.purpose, "succeeded": each.succeeded}
                        for each in place.fixed
                    ],
                    "fix_error": place.fix_error,
                }
                for place in places
            ],
        },
        indent=2,
    )


class TextOutput:
    """Prints a diagnosis for a person, in the width, encoding and colours of a stream.

    Args:
        stream: The stream.
        has_fixed: Whether fixes were applied already.
    """

    def __init__(self, stream: TextIO, has_fixed: bool) -> None:
        self._stream = stream
        self._has_fixed = has_fixed
        self._encoding = stream.encoding or "ascii"
        self._has_colours = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._width = max(MINIMUM_WIDTH, min(MAXIMUM_WIDTH, shutil.get_terminal_size().columns))
        try:
            "✓✗→…".encode(self._encoding)
            self._signs, self._arrow = SIGNS, "→"
        except UnicodeEncodeError:
            self._signs, self._arrow = ASCII_SIGNS, "->"

    def line(self, text: str) -> None:
        """Print a line. Characters that the stream cannot encode become question marks."""
        print(text.encode(self._encoding, "replace").decode(self._encoding), file=self._stream, flush=True)

    def show(self, places: Sequence[Place]) -> None:
        """Print all findings and a summary."""
        column = max((len(finding.name) for place in places for finding in place.findings), default=0)
        for place in places:
            self.line(self._coloured("1", in_line(place.name)))
            for finding in place.findings:
                for line in self._finding(finding, min(column, self._width // 3)):
                    self.line(line)
            for line in place.fix_error.splitlines():
                self._paragraph(line, "  ")
            self.line("")
        self._paragraph(" ".join(self._summary(places)), "")

    def _finding(self, finding: Finding, column: int) -> Iterator[str]:
        sign = self._coloured(COLOURS[finding.state], self._signs[finding.state])
        indent = " " * (column + 6)
        message = self._wrapped(finding.message, indent)
        yield f"  {sign} {in_line(finding.name):{column}}  {message[0].strip()}"
        yield from message[1:]
        if finding.fix:
            first, *rest = self._wrapped(finding.fix, f"{indent}{' ' * len(self._arrow)} ")
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

    def _summary(self, places: Sequence[Place]) -> Iterator[str]:
        for place in places:
            if not place.reached:
                yield f"{place.name} cannot be reached."
            elif place.failures:
                yield f"{place.name}: {place.failures} {'problem' if place.failures == 1 else 'problems'}."
            elif place.name != "here":
                yield f"{place.name} is ready."
        fixable = any(finding.is_fixable for place in places for finding in place.findings)
        if fixable and not self._has_fixed:
            yield "To apply fixes as root, run: gamebear doctor --fix"

    def _coloured(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._has_colours else text
