"""Apt's sources in both formats, according to sources.list(5) and apt's own parser (`sourcelist.cc`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".list", ".sources")
"""Suffixes of source files: the one-line format, the deb822 format."""

_NAME = re.compile(r"[\w.-]+", re.ASCII)
"""Apt ignores files with other names."""

_WORD = r'(?:"[^"]*"|\[[^\]]*\]|[^\s"\[])+'
"""A word of a line: brackets and quotes may contain spaces (`ParseQuoteWord`)."""

_LINE = re.compile(rf"\s*(deb|deb-src)\s+(?:\[([^\]]*)\]\s+)?({_WORD})\s+({_WORD})(.*)")

_COMMENT = re.compile(r"((?:\[[^\]]*\]|[^#])*)")
"""The part of a line before its comment; a `#` in brackets does not start a comment."""


class Source(NamedTuple):  # NamedTuple, not a dataclass: see `capabilities.Facts`
    """An enabled source: a line or a stanza.

    Attributes:
        types: `deb`, `deb-src` or both.
        uris: URIs of the archives.
        suites: For example `bookworm`; exact paths end with a slash.
        components: For example `main`; empty with an exact path.
        options: The other options or fields, with lower-case names as in its format: `signed-by`, `arch` or
            `architectures`, …; a multi-line value keeps its line breaks and indentation.
        deb822: Whether it is a stanza.
    """

    types: tuple[str, ...]
    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: Mapping[str, str]
    deb822: bool

    @property
    def keys(self) -> tuple[str, ...]:
        """Files and fingerprints of `signed-by`; empty if the text contains the key itself."""
        value = self.options.get("signed-by", "")
        if "-----BEGIN" in value:
            return ()
        return tuple(value.split() if self.deb822 else filter(None, value.split(",")))

    def text(self) -> str:
        """Return the source as text: one line for each type, or a stanza."""
        if not self.deb822:
            options = " ".join(f"{name}={value}" for name, value in self.options.items())
            words = [f"[{options}]"] * bool(options) + [*self.uris, *self.suites, *self.components]
            return "".join(" ".join([kind, *words]) + "\n" for kind in self.types)
        fields = {"types": " ".join(self.types), "uris": " ".join(self.uris), "suites": " ".join(self.suites)}
        if self.components:
            fields["components"] = " ".join(self.components)
        lines = (f"{_NAMES.get(name) or name.title()}: {value}" for name, value in {**fields, **self.options}.items())
        return "\n".join(lines) + "\n"


_NAMES = {"uris": "URIs"}


def is_file_of_sources(path: Path) -> bool:
    """Return whether apt reads a file of its sources folder."""
    return path.suffix in SUFFIXES and _NAME.fullmatch(path.name) is not None and path.is_file()


def parse(text: str, suffix: str) -> list[Source]:
    """Return the enabled sources in the text of a file.

    Args:
        text: Content of the file.
        suffix: Suffix of the file's name. `.sources` selects deb822, every other suffix the one-line format.
    """
    return list(_stanzas(text) if suffix == SUFFIXES[1] else _lines(text))


def text_of(sources: Iterable[Source]) -> str:
    """Return the text of a file with some sources of one format, without duplicates."""
    found = list(sources)
    between = "\n" if any(source.deb822 for source in found) else ""
    return between.join(dict.fromkeys(source.text() for source in found))


def is_off(value: str) -> bool:
    """Return whether a boolean value is false, as apt's `StringToBool` parses it; an unknown word is not."""
    return re.fullmatch(r"\s*(?:no|false|without|off|disable|[+-]?0(?:x?0+)?)\s*", value, re.IGNORECASE) is not None


def _lines(text: str) -> Iterator[Source]:
    for line in re.split(r"\r?\n", text):
        comment = _COMMENT.match(line)
        match = _LINE.fullmatch(comment[1]) if comment else None
        if match is None:
            continue
        kind, given, uri, suite, components = match.groups()
        options = dict(option.partition("=")[::2] for option in (given or "").split())
        options = {name.lower(): value for name, value in options.items()}
        yield Source((kind,), (uri,), (suite,), tuple(components.split()), options, False)


def _stanzas(text: str) -> Iterator[Source]:
    plain = "\n".join(line for line in re.split(r"\r?\n", text) if not line.startswith("#"))
    for stanza in re.split(r"\n{2,}", plain):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.split("\n"):
            if line[:1] in (" ", "\t"):
                if name:
                    fields[name] += f"\n{line}"
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        types, uris, suites, components = (
            tuple(fields.pop(field, "").split()) for field in ("types", "uris", "suites", "components")
        )
        if types and uris and suites and not is_off(fields.pop("enabled", "yes")):
            yield Source(types, uris, suites, components, fields, True)
