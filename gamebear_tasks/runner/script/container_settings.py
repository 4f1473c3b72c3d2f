"""Attributes of containers for their settings: lazily read, validated on assignment, applied when needed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Generic, Protocol, TypeVar, cast, overload

T = TypeVar("T")


class Configured(Protocol):
    """An object with settings: a container without the attributes that scripts use."""

    _now: dict[str, Any]

    def _read(self, name: str) -> Any: ...


class Setting(Generic[T]):
    """A setting of a container: read from its image on first access, applied when a command needs it.

    Args:
        check: Converts the assigned value, or raises TypeError or ValueError.
    """

    def __init__(self, check: Callable[[Any], T]) -> None:
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, container: None, owner: type) -> Setting[T]: ...

    @overload
    def __get__(self, container: Configured, owner: type) -> T: ...

    def __get__(self, container: Configured | None, owner: type) -> Setting[T] | T:
        if container is None:
            return self
        return cast(T, container._read(self.name))

    def __set__(self, container: Configured, value: Any) -> None:
        container._now[self.name] = self.check(value)


class Table(MutableMapping[str, str]):
    """Environment variables or labels: those of the image, overlaid with the script's changes.

    Args:
        applied: Returns the values that buildah already has.

    Attributes:
        changes: Values that buildah does not have yet; None for a deleted key.
    """

    def __init__(self, applied: Callable[[], dict[str, str]]) -> None:
        self._applied = applied
        self.changes: dict[str, str | None] = {}

    def _all(self) -> dict[str, str]:
        merged: dict[str, str | None] = {**self._applied(), **self.changes}
        return {key: value for key, value in merged.items() if value is not None}

    def __getitem__(self, key: str) -> str:
        value = self.changes[key] if key in self.changes else self._applied()[key]
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: object) -> None:
        if not key or "=" in key:
            raise ValueError(f"invalid name of an environment variable or label: {key!r}")
        self.changes[key] = str(value)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self.changes[key] = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return repr(self._all())

    def __or__(self, other: Mapping[str, object]) -> dict[str, str]:
        return {**self._all(), **{key: str(value) for key, value in other.items()}}

    def __ior__(self, other: Mapping[str, object]) -> Table:
        for key, value in other.items():
            self[key] = value
        return self

    def replace(self, values: Mapping[str, object]) -> None:
        """Make the table equal to `values`."""
        if values is self:
            return
        values = dict(values)
        for key in set(self) - set(values):
            del self[key]
        self |= values

    def applied(self) -> None:
        """Record that buildah has the changes now."""
        known = self._all()
        self.changes.clear()
        base = self._applied()
        base.clear()
        base.update(known)


def as_words(value: Any) -> list[str]:
    """Return a list of words, empty for None."""
    if isinstance(value, (str, bytes)):
        raise TypeError(f"expected a list of words such as {shlex.split(os.fsdecode(value))}, got the string {value!r}")
    return [str(word) for word in value or ()]


def as_health_check(value: Any) -> list[str] | None:
    """Return a health check in the form that images have: CMD and words, or CMD-SHELL and a command line."""
    if not value:
        return None
    if isinstance(value, str):
        return ["CMD-SHELL", value]
    test = as_words(value)
    return test if test[0] in ("CMD", "CMD-SHELL", "NONE") else ["CMD", *test]


def as_duration(value: Any) -> str:
    """Return a duration in Go's notation (`5m`, `1.5s`); a number is seconds."""
    return value if isinstance(value, str) else f"{value:g}s"


def as_paths(value: Any) -> set[str]:
    """Return a set of paths."""
    if isinstance(value, str):
        raise TypeError(f"expected a set of paths such as {{{value!r}}}, got the string {value!r}")
    return {str(path) for path in value}
