"""File names that hold any text: one for each text, valid on every file system."""

from __future__ import annotations

import hashlib
import re

LONGEST = 200
"""The most bytes of a name: 55 are left for prefixes and suffixes, where a file system allows 255."""

_ESCAPED = re.compile(rb"\A\.|\.\Z|[^A-Za-z0-9_.+-]")

_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|\Z)", re.IGNORECASE)
"""Names that Windows reserves, whatever extension follows (Microsoft, "Naming Files, Paths, and Namespaces")."""


def file_name(text: str) -> str:
    """Return a file name for a text; different texts have different names, also where case is ignored.

    Lower-case letters, digits and `_.+-` stay, so an ordinary name stays what it is. Every other byte of the UTF-8
    form becomes `%` and two hex digits. A bit mask of the capital letters follows the name: `Gx` becomes `Gx=1`.
    A longer name than `LONGEST` is cut, and ends with its SHA-256.

    The name consists of letters, digits and `_.+-%=`. It neither begins nor ends with a dot.
    """
    data = text.encode("utf-8", "surrogatepass")
    name = _ESCAPED.sub(lambda byte: b"%%%02x" % byte[0][0], data).decode() or "%"
    if _DEVICE.match(name):
        name = f"%{ord(name[0]):02x}{name[1:]}"
    capitals = sum(1 << place for place, char in enumerate(name) if char.isupper())
    whole = f"{name}={capitals:x}" if capitals else name
    if len(whole) > LONGEST:
        return f"{name[:100]}=={hashlib.sha256(data).hexdigest()}"
    return whole
