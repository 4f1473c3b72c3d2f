"""The kinds of sources there are, and the choice between those that will do as well as each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeAlias

from ..errors import SettingsError
from .base import BaseSource

Source: TypeAlias = BaseSource[Any]


@dataclasses.dataclass(frozen=True)
class Either:
    """Sources that will do as well as each other, by name.

    Attributes:
        options: name and source, in the order given; the first is taken unless `sources=<name>` is set.
    """

    options: tuple[tuple[str, Source], ...]

    def __post_init__(self) -> None:
        """Refuse a choice of nothing, and of what is no source."""
        if not self.options:
            raise SettingsError("either() has no sources.", "Say either(git=git(…), debian=debian(…)).")
        for name, source in self.options:
            if not isinstance(source, BaseSource):
                raise SettingsError(f"either({name}=…): {source!r} is no source.", "See git(), archive(), debian().")


Declared: TypeAlias = Source | Either
"""What an author may write where a source is wanted."""


def choose(declared: Declared, preference: str | None) -> Source:
    """Return the source to use.

    Args:
        declared: what an author wrote.
        preference: the setting `sources`; where no alternative has that name, the first is taken.
    """
    if not isinstance(declared, Either):
        return declared
    options = dict(declared.options)
    name = preference if preference in options else declared.options[0][0]
    return dataclasses.replace(options[name], alternatives=tuple(other for other in options if other != name))


def check_preference(preference: str | None, declared: Iterable[Declared]) -> None:
    """Refuse a setting `sources` that no alternative of any source is called by.

    Raises:
        SettingsError: it is misspelt.
    """
    names = {name for item in declared if isinstance(item, Either) for name, _ in item.options}
    if preference and preference not in names:
        raise SettingsError(
            f"The setting sources={preference} names no alternative of any source.",
            f"There are: {', '.join(sorted(names)) or 'none'}.",
        )
