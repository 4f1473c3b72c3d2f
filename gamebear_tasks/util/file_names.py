"""File names that encode any text: unique for each text, and valid on every file system."""

from __future__ import annotations

import hashlib
import re

LONGEST = 200
"""Maximum bytes of a name. It leaves 55 of a file system's 255 bytes for prefixes and suffixes."""

_ESCAPED = re.compile(rb"\A\.|\.\Z|[^A-Za-z0-9_.+-]")

_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|\Z)", re.IGNORECASE)
"""Names that Windows reserves, with any extension (Microsoft, "Naming Files, Paths, and Namespaces")."""


def file_name(text: str) -> str:
    """Return a file name for a text. Different texts have different names, even on case-insensitive file systems.

    Letters, digits and `_.+-` stay, so that ordinary lower-case names are unchanged. Every other byte of the UTF-8 form
    becomes `%` and two hex digits, as do a dot at the beginning or end and the first letter of a name that Windows
    reserves. A hexadecimal bit mask of the capital letters follows the name: `Gx` becomes `Gx=1`. A result that is
    longer than `LONGEST` is replaced by its first 100 characters and the SHA-256 of the text.

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
