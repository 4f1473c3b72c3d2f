"""Git attributes of the files of a commit, and a checkout of the files that they convert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from .deterministic_tar import decoded, encoded
from .git_repository import git

ATTRIBUTES = ("filter", "eol", "ident", "working-tree-encoding")
"""Attributes by which a checked-out file may differ from the committed one (gitattributes(5))."""

PATHS_AT_ONCE = 50_000
"""Number of paths whose attributes are queried at once. The answer has some hundred bytes per path."""


def converted(attributes: Mapping[str, tuple[str, str, str, str]]) -> list[str]:
    """Return the paths whose content a checkout converts."""
    return [
        path
        for path, (_, eol, ident, encoding) in attributes.items()
        if eol == "crlf" or ident == "set" or encoding not in ("unspecified", "unset", "set")
    ]


def check_out(
    settings: list[str], index: dict[str, str], attributes: Mapping[str, tuple[str, str, str, str]], paths: list[str]
) -> None:
    """Check out files into an empty work tree, with filters disabled.

    Args:
        settings: Options of git that specify the repository and the work tree.
        index: Environment variables that specify the index.
        attributes: The `ATTRIBUTES` of each path that has any.
        paths: Files to check out.

    Raises:
        ProgramError: git failed.
    """
    filters = {filter for filter, *_ in attributes.values()} - {"unspecified", "unset", "set"}
    switched_off = [
        f"filter.{name}.{setting}"
        for name in sorted(filters)
        for setting in ("smudge=", "clean=", "process=", "required=false")
    ]
    options = [word for setting in switched_off for word in ("-c", setting)]
    command = ("checkout-index", "--quiet", "-z", "--stdin")
    git(*settings, *options, *command, variables=index, stdin=_listing(paths))


def attributes_of(
    settings: list[str], index: dict[str, str], files: Iterable[str]
) -> dict[str, tuple[str, str, str, str]]:
    """Return the `ATTRIBUTES` of each path that has any."""
    found = {}
    paths = list(files)
    for first in range(0, len(paths), PATHS_AT_ONCE):
        listing = _listing(paths[first : first + PATHS_AT_ONCE])
        words = git(
            *settings, "check-attr", "--cached", "-z", "--stdin", *ATTRIBUTES, variables=index, stdin=listing
        ).split(b"\0")[:-1]
        for path, values in zip(words[:: 3 * len(ATTRIBUTES)], _grouped(words[2::3]), strict=True):
            if any(value != "unspecified" for value in values):
                found[decoded(path)] = values
    return found


def _listing(paths: Iterable[str]) -> bytes:
    """List paths for git's `-z --stdin`."""
    return b"".join(encoded(path) + b"\0" for path in paths)


def _grouped(values: list[bytes]) -> Iterator[tuple[str, str, str, str]]:
    """Group a flat list of values into the values of `ATTRIBUTES` of each path."""
    each = iter(value.decode("utf-8", "replace") for value in values)
    return zip(each, each, each, each, strict=True)
