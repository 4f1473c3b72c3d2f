"""Canonical JSON: the encoding of jobs, of which digests are computed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

FORMAT = 4
"""Version of the canonical form of jobs. Increment it when the form, or its interpretation by builders, changes."""

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


def canonical_json(value: Json) -> bytes:
    """Encode a value as canonical JSON: keys sorted, no spaces, ASCII only.

    Equal values yield equal bytes on every machine and every Python. Numbers are written in the shortest form that
    parses back to the same value (as RFC 8785 requires). Characters outside ASCII are escaped.

    Raises:
        TypeError: the value or a part of it is not JSON, or a key is not a string.
        ValueError: a number is infinite or NaN.
    """
    _check(value)
    return _ENCODER.encode(value).encode("ascii")


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _check(value: Json) -> None:
    if type(value) in _SCALARS:
        return
    if isinstance(value, list | tuple):
        for item in value:
            _check(item)
    elif isinstance(value, dict | Mapping):  # checking for dict first is faster
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a key is {key!r}, not a string")
            _check(item)
    elif not isinstance(value, int | float | str):
        raise TypeError(f"{value!r} is not JSON")


_SCALARS = (str, int, bool, float, type(None))
