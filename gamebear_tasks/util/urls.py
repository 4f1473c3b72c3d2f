"""URLs as messages may show them: without passwords."""

from __future__ import annotations

import re
import urllib.parse


def shown(url: str) -> str:
    """Return a builder's URL as messages may repeat it: with … for what may hold a password."""
    match = re.match(r"([^:]*:(?://)?)(.*)@(.*)\Z", url, re.DOTALL)
    if match is None:
        return url
    head, user, place = match.groups()
    if head.endswith("://") and not re.search("[:/?#]", urllib.parse.unquote(user)):
        return url
    return f"{head}…@{place}"
