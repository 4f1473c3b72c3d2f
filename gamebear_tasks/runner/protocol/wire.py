"""How client and runner talk: requests and replies, each a JSON header and a body of bytes.

A message is the header's length as four bytes, most significant first; the header, a JSON object in UTF-8; and the
body, whose length in bytes is the header's `body` (none: no body). The client asks, the runner answers, one after the
other.
Before the first message the runner writes one line, `PREAMBLE` and a word: whatever a login shell prints is before it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

PREAMBLE = b"gamebear-runner:"
"""What the line begins with that ends everything a login shell may have printed."""

MAX_HEADER = 4 << 20
"""The longest header that is read, in bytes."""

MAX_BODY = 1 << 62
"""More bytes than any body has; what claims more is not a message."""

NOT_OURS = "Run doit again; if it stays so, upgrade gamebear-tasks where doit runs."
"""What to do about requests that our client does not send."""

MAX_NUMBER = 1 << 63
"""A larger number of a header, and infinity, is read as this one: it never overflows, and is no valid size or time."""

MAX_DEPTH = 32
"""How deep objects and arrays of a header may be nested."""

_LENGTH = struct.Struct(">I")

Header = dict[str, Any]

Reply = Header
"""The header of an answer."""


class WireError(Exception):
    """What came is not a message."""


class CutOff(WireError):
    """The stream ends within a message."""


def encode(header: Header, body: int = 0) -> bytes:
    """Return the bytes of a message up to its body.

    Args:
        header: the JSON object.
        body: how many bytes of body will follow.

    Raises:
        WireError: the header is longer than the other side would read.
    """
    text = json.dumps({**header, "body": body} if body else header, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER:
        raise WireError(f"a header has {len(text)} bytes, and {MAX_HEADER} are the most")
    return _LENGTH.pack(len(text)) + text


def decode(read: Callable[[int], bytes]) -> tuple[Header, int] | None:
    """Read the next message up to its body.

    Args:
        read: returns exactly as many bytes as it is asked for; fewer only at the end of the stream.

    Returns:
        The header and the length of the body that follows, in bytes; None at the end of the stream.

    Raises:
        WireError: this is not a message; CutOff: not all of one.
    """
    start = read(_LENGTH.size)
    if not start:
        return None
    if len(start) < _LENGTH.size:
        raise CutOff("the stream ends within a message")
    (length,) = _LENGTH.unpack(start)
    if length > MAX_HEADER:
        raise WireError(f"a header claims {length} bytes")
    text = read(length)
    if len(text) < length:
        raise CutOff("the stream ends within a message")
    try:
        header = json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=_float)
    except (ValueError, RecursionError) as error:  # the latter: a million brackets
        raise WireError("a header is not JSON") from error
    if not isinstance(header, dict):
        raise WireError("a header is not a JSON object")
    _check_depth(header, MAX_DEPTH)
    body = header.get("body", 0)
    if type(body) is not int or not 0 <= body <= MAX_BODY:
        raise WireError("a body has no proper length")
    return header, body


def _integer(text: str) -> int:
    """Return an integer of a header, bounded; a long text is not converted, which could take minutes."""
    if len(text) > len(str(-MAX_NUMBER)):
        return -MAX_NUMBER if text.startswith("-") else MAX_NUMBER
    return max(-MAX_NUMBER, min(int(text), MAX_NUMBER))


def _float(text: str) -> float:
    """Return another number of a header, bounded; NaN stays, which no comparison lets pass."""
    return max(min(float(text), float(MAX_NUMBER)), -float(MAX_NUMBER))


def _check_depth(value: Any, left: int) -> None:
    if not left:
        raise WireError(f"a header is nested deeper than {MAX_DEPTH} levels")
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (dict, list)):
            _check_depth(item, left - 1)
