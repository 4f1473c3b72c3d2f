"""Users and groups of a container, from its /etc/passwd and /etc/group."""

from __future__ import annotations

from pathlib import Path

from ..util.errors import RunnerError
from .rootfs import Owner, Rootfs

LARGEST_ID = (1 << 32) - 2
"""Largest user or group id; chown(2) takes the next one for "unchanged"."""


class OwnerError(RunnerError):
    """An owner does not exist in the container, or cannot exist on this builder."""

    kind = "script"


def owner(files: Rootfs, text: str) -> Owner:
    """Return the ids of `user[:group]`, each a name or a number, as buildah resolves them for `run --user`.

    Without a group it is the user's primary group; that of a number without an entry is 0.

    Raises:
        OwnerError: There is no such user or group, or its id is not mapped in this builder's user namespace.
        ValueError: The text has another form.
        OSError: The container's files cannot be read.
    """
    user, colon, group = text.partition(":")
    if not user or ":" in group or (colon and not group):
        raise ValueError(f"invalid owner {text!r}, expected user or user:group")
    users = _entries(files, "/etc/passwd", 4)
    found = next((fields for fields in users if user in (fields[0], fields[2])), None)
    if found is None and not _is_id(user):
        raise _missing("user", user, "useradd")
    uid, gid = int(found[2] if found else user), int(found[3] if found else 0)
    if group:
        groups = _entries(files, "/etc/group", 3)
        entry = next((fields for fields in groups if group == fields[0]), None)
        if entry is None and not _is_id(group):
            raise _missing("group", group, "groupadd")
        gid = int(entry[2] if entry else group)
    for kind, number in (("uid", uid), ("gid", gid)):
        if not _is_mapped(kind, number):
            raise OwnerError(
                f"copy_in failed: {kind} {number} is outside of the builder's user namespace.",
                "Use a smaller number, or add subordinate ids on the builder: sudo usermod --add-subuids, "
                "--add-subgids.",
            )
    return uid, gid


def _missing(what: str, name: str, program: str) -> OwnerError:
    return OwnerError(
        f"copy_in failed: the container has no {what} {name}.",
        f'Add it before: c.run(["{program}", "{name}"]), or use a number.',
    )


def _entries(files: Rootfs, path: str, count: int) -> list[list[str]]:
    """Return the fields of each valid line of a table of users or groups, at least `count`; ids are decimal."""
    lines = [line.split(":") for line in files.text(path).splitlines()]
    return [fields for fields in lines if len(fields) >= count and all(map(_is_id, fields[2:count]))]


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= LARGEST_ID


def _is_mapped(kind: str, number: int) -> bool:
    """Return whether an id exists in this process's user namespace; see user_namespaces(7)."""
    ranges = [line.split() for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
    return any(int(first) <= number < int(first) + int(count) for first, _, count in ranges)
