"""Choice between interchangeable sources, declared by `either()`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeAlias

from ..config import origin
from ..errors import SettingsError
from .base import BaseSource

Source: TypeAlias = BaseSource[Any]


@dataclasses.dataclass(frozen=True)
class Either:
    """Interchangeable sources by name.

    Attributes:
        options: Name and source, in the specified order. The first is the default unless `sources=<name>` is set.
    """

    options: tuple[tuple[str, Source], ...]

    def __post_init__(self) -> None:
        """Validate the options.

        Raises:
            SettingsError: There are none, or one of them is not a source.
        """
        if not self.options:
            raise SettingsError("either() has no sources.", "Use either(git=git(…), debian=debian(…)).")
        for name, source in self.options:
            if not isinstance(source, BaseSource):
                raise SettingsError(
                    f"either({name}=…): {source!r} is not a source.", "Use git(), archive() or debian()."
                )


Declared: TypeAlias = Source | Either
"""Values that a dodo.py may specify as a source."""


def choose(declared: Declared, preference: str | None) -> Source:
    """Return the source to use.

    Args:
        declared: Declared source or alternatives.
        preference: Value of the setting `sources`. If no alternative has that name, the first one is used.
    """
    if not isinstance(declared, Either):
        return declared
    options = dict(declared.options)
    name = preference if preference in options else declared.options[0][0]
    return dataclasses.replace(options[name], alternatives=tuple(other for other in options if other != name))


def check_preference(preference: str | None, declared: Iterable[Declared]) -> None:
    """Validate the setting `sources` against the names of all alternatives.

    Raises:
        SettingsError: No alternative of any source has that name.
    """
    names = {name for item in declared if isinstance(item, Either) for name, _ in item.options}
    if preference and preference not in names:
        raise SettingsError(
            f"sources must be an alternative of a source, got {preference!r} (from {origin('sources')}).",
            f"Use one of {', '.join(sorted(names))}." if names else "Remove the setting: no source has alternatives.",
        )
