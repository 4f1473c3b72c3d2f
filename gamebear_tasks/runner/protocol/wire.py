"""Wire format between client and runner: requests and responses, each a JSON header with an optional binary body.

A message consists of the header's length as a 4-byte big-endian integer; the header, a JSON object in UTF-8; and the
body, whose length in bytes is the header's `body` (absent: no body). The client sends a request and the runner
responds, strictly alternating. Before the first message the runner writes one line, `PREAMBLE` and a word. The client
discards everything before it, which a login shell may have printed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping

PREAMBLE = b"gamebear-runner:"
"""Start of the line that separates a login shell's output from the messages."""

MAX_HEADER = 4 << 20
"""Maximum length of a header that is accepted, in bytes."""

MAX_BODY = 1 << 62
"""Maximum length of a body, in bytes; a message that claims more is invalid."""

INVALID_REQUEST = "Run doit again. If the error persists, upgrade gamebear-tasks on the client."
"""Suggested fix for invalid requests, which the project's client does not send."""

MAX_NUMBER = 1 << 63
"""Limit to which larger numbers of a header, and infinity, are clamped. It never overflows, and is not a valid size or
time."""

MAX_DEPTH = 32
"""Maximum nesting depth of objects and arrays in a header."""

_LENGTH = struct.Struct(">I")

Header = dict[str, object]
"""A received header: a JSON object, of which only the depth, the numbers and `body` have been checked."""


class WireError(Exception):
    """The received data is not a valid message."""


class CutOff(WireError):
    """The stream ends within a message."""


def encode(header: Mapping[str, object], body: int = 0) -> bytes:
    """Encode a message up to its body.

    Args:
        header: the JSON object.
        body: length in bytes of the body that follows.

    Raises:
        WireError: the header is longer than `MAX_HEADER`.
    """
    text = json.dumps({**header, "body": body} if body else header, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER:
        raise WireError(f"a header has {len(text)} bytes, more than {MAX_HEADER}")
    return _LENGTH.pack(len(text)) + text


def decode(read: Callable[[int], bytes]) -> tuple[Header, int] | None:
    """Read the next message up to its body, and validate its header.

    Args:
        read: returns exactly the requested number of bytes; fewer only at the end of the stream.

    Returns:
        The header and the length in bytes of the body that follows; None at the end of the stream.

    Raises:
        CutOff: the stream ends within the message.
        WireError: the message is invalid.
    """
    start = read(_LENGTH.size)
    if not start:
        return None
    if len(start) < _LENGTH.size:
        raise CutOff("the stream ends within a message")
    (length,) = _LENGTH.unpack(start)
    if length > MAX_HEADER:
        raise WireError(f"a header declares {length} bytes")
    text = read(length)
    if len(text) < length:
        raise CutOff("the stream ends within a message")
    try:
        header = json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=_float)
    except (ValueError, RecursionError) as error:  # RecursionError: a million nested brackets
        raise WireError("a header is not JSON") from error
    if not isinstance(header, dict):
        raise WireError("a header is not a JSON object")
    _check_depth(header, MAX_DEPTH)
    body = header.get("body", 0)
    if type(body) is not int or not 0 <= body <= MAX_BODY:
        raise WireError("a body has an invalid length")
    return header, body


def _integer(text: str) -> int:
    """Parse an integer of a header, clamped. Long digit strings are not converted, which could last minutes."""
    if len(text) > len(str(-MAX_NUMBER)):
        return -MAX_NUMBER if text.startswith("-") else MAX_NUMBER
    return max(-MAX_NUMBER, min(int(text), MAX_NUMBER))


def _float(text: str) -> float:
    """Parse another number of a header, clamped. NaN is retained: it fails every comparison."""
    return max(min(float(text), float(MAX_NUMBER)), -float(MAX_NUMBER))


def _check_depth(value: dict[str, object] | list[object], left: int) -> None:
    if not left:
        raise WireError(f"a header is nested deeper than {MAX_DEPTH} levels")
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (dict, list)):
            _check_depth(item, left - 1)
