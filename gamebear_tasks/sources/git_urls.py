"""URLs of git repositories, and validation of URLs that an upstream repository specifies."""

from __future__ import annotations

import os
import re
from typing import Any

from ..errors import SettingsError, SourceError
from .base import BaseSource, check_url

SUBMODULE_SCHEMES = ("https://", "http://", "ssh://", "git://", "git+ssh://", "ssh+git://")
"""Schemes that `.gitmodules` may use, besides `host:path` and relative URLs. `ext::` and local files are rejected."""


LEAVE_OUT = "Exclude submodules: git(…, submodules=False)."
"""Hint for submodules that cannot be fetched."""


def is_local(url: str) -> bool:
    """Return whether git treats a URL as a path of this machine."""
    return url.startswith("file://") or ("://" not in url and ":" not in url.partition("/")[0])


def location(url: str) -> str:
    """Make a path absolute, because git runs in another working folder. Other URLs are returned unchanged."""
    return url if "://" in url or not is_local(url) else os.path.abspath(url)


def relative_url(parent: str, url: str) -> str:
    """Resolve a submodule's `./…` or `../…` against its parent's URL (git-submodule(1)).

    Returns:
        The URL, or an empty string if it leads out of the parent's host.
    """
    base = (parent if "://" in parent or not is_local(parent) else location(parent)).rstrip("/")
    host = re.match(r"[A-Za-z0-9+.-]+://[^/]*|[^/:]+:|", base)
    root, path = (host[0], base[host.end() :]) if host else ("", base)
    parts = [part for part in path.split("/") if part]
    while url.startswith(("./", "../")):
        if url.startswith("../"):
            if not parts:
                return ""
            parts.pop()
        url = url.partition("/")[2].lstrip("/")
    separator = "" if root.endswith(":") and not path.startswith("/") else "/"
    return root + separator + "/".join([*parts, url.rstrip("/")])


def upstream_url(source: BaseSource[Any], parent: str, declared: str, what: str) -> str:
    """Return the absolute form of an untrusted URL from an upstream repository.

    Args:
        source: The source, for error messages.
        parent: URL of the repository.
        declared: The URL.
        what: Purpose of the URL, for error messages.

    Raises:
        SourceError: The URL leads to local files, or is invalid.
    """
    url = relative_url(parent, declared) if declared.startswith(("./", "../")) else declared
    is_path_or_host = is_local(parent) if is_local(url) else re.match(r"[^-/:][^/:]*:(?!:)", url)
    if not url or not (url.startswith(SUBMODULE_SCHEMES) or is_path_or_host):
        raise source.error(
            f"has a {what} with the unsafe URL {declared!r}",
            LEAVE_OUT,
        )
    try:
        check_url(url, f"{source}, {what}", upstream=True)
    except SettingsError as error:
        raise SourceError(error.message, error.hint) from error
    return url
