"""Open builders by URL: the scheme selects an entry point."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from ..errors import SettingsError
from ..util.urls import shown
from .base import Builder

GROUP = "gamebear_tasks.builders"
"""Entry-point group of builders: an entry point is named after its scheme and maps a URL to a builder."""


def open_builder(url: str) -> Builder:
    """Open the builder of a URL; it connects on the first request.

    Raises:
        SettingsError: the URL is invalid, no installed package provides the scheme, several do, or its entry point
            cannot be loaded.
    """
    scheme, colon, _ = url.partition(":")
    if not colon or not scheme:
        raise SettingsError(
            f"The builder {shown(url)!r} is not a URL.", "Use builder=local: or builder=ssh://user@host."
        )
    found: dict[str, dict[str, EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, {})[entry.value] = entry
    if scheme not in found:
        raise SettingsError(
            f"The builder {shown(url)!r} has an unknown scheme: {scheme!r}.",
            f"Use one of {', '.join(sorted(found))}, or install the package that provides it.",
        )
    packages = sorted(entry.dist.name if entry.dist else entry.value for entry in found[scheme].values())
    if len(packages) > 1:
        raise SettingsError(
            f"The builder '{scheme}:' is ambiguous: {' and '.join(packages)} provide it.",
            "Uninstall one: pip uninstall NAME",
        )
    (entry,) = found[scheme].values()
    try:
        open_it: Callable[[str], Builder] = entry.load()
    except Exception as error:
        raise SettingsError(
            f"The builder '{scheme}:' of the package {packages[0]} cannot be loaded: {type(error).__name__}: {error}.",
            f"Upgrade it: pip install --upgrade {packages[0]}",
        ) from error
    return open_it(url)
