"""URLs for display, without passwords."""

from __future__ import annotations

import re
import urllib.parse


def shown(url: str) -> str:
    """Return a builder's URL for display: user information that may contain a password is replaced by `…`."""
    match = re.match(r"([^:]*:(?://)?)(.*)@(.*)\Z", url, re.DOTALL)
    if match is None:
        return url
    head, user, place = match.groups()
    if head.endswith("://") and not re.search("[:/?#]", urllib.parse.unquote(user)):
        return url
    return f"{head}…@{place}"
