"""Read and write the FAT boot file system with mtools, in a separate file that is copied back into the image."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from ...errors import ImageError
from .file_tree import Entry
from .program import run
from .sparse_files import read_bounded

YEAR_1980 = 315532800
"""Seconds since 1970 of the earliest time on FAT."""

YEAR_2108 = 4354819200
"""Seconds since 1970 of the end of FAT's time range."""

FORBIDDEN = re.compile(
    r"""[^ -~]|["*:<>?\\|\[\]]|[. ](/|$)|~[0-9]|[^/]{256}|(^|/)(con|prn|aux|nul|com[1-4]|lpt[1-4])(/|$)""",
    re.ASCII | re.IGNORECASE,
)
"""Names that FAT does not allow (Microsoft, FAT specification, section 7), or that mtools would change."""


class Fat:
    """A FAT file system and the entries to be added to it.

    Args:
        path: File that contains the file system.
        now: Time of new entries, in seconds since 1970.
        name: Display name of the image.

    Raises:
        ImageError: The file system is damaged.
    """

    def __init__(self, path: Path, now: int, name: str) -> None:
        self.path = path
        self._now = now
        self._added: dict[str, Entry] = {}
        output = self._run(["fsck.fat", "-a", "-v", path.name], f"The boot file system of {name} is damaged", (0, 1))
        self._cluster = int(_found(r"(\d+) bytes per cluster", output))
        used, clusters = _found(r"(\d+/\d+) clusters", output).split("/")
        self._free = int(clusters) - int(used)
        listed = self._run(
            ["mdir", "-i", path.name, "-b", "-/", "-a", "::"], "The boot file system cannot be read", (0, 1)
        )
        self._there: dict[str, str] = {}
        for line in listed.splitlines():
            if line.startswith("::/"):
                self._there[line[3:].rstrip("/").lower()] = line[3:]

    def _run(self, argv: list[str], what: str, allowed: tuple[int, ...] = (0,), hint: str = "") -> str:
        return run(argv, folder=self.path.parent, now=self._now, what=what, allowed=allowed, hint=hint)

    def add(self, name: str, entry: Entry) -> None:
        """Add a file or a folder. FAT does not store owner, mode or attributes.

        Raises:
            ImageError: FAT does not support its type or its name, or a folder would replace a file or vice versa.
        """
        if not (entry.is_folder or stat.S_ISREG(entry.mode)):
            raise ImageError(
                f"{entry.origin} cannot be stored on the boot file system: FAT has no links or devices.",
                "Use another destination.",
            )
        if FORBIDDEN.search(name):
            raise ImageError(
                f"{entry.origin}: {name!r} is not a valid name on the boot file system (FAT).",
                'Use ASCII without \\ : * ? " < > | ~1, no dots or spaces at the end, and no device name.',
            )
        there = self._there.get(name.lower())
        if there is not None and there.endswith("/") != entry.is_folder:
            raise ImageError(
                f"{entry.origin}: {name} is a file in one place and a folder on the boot file system or vice versa.",
                "Rename one of them.",
            )
        parts = name.split("/")
        for count in range(1, len(parts)):
            above = "/".join(parts[:count])
            if above.lower() not in self._there:
                self.add(above, Entry(stat.S_IFDIR | 0o755, entry.origin))
        self._there[name.lower()] = f"{name}/" if entry.is_folder else name
        for other in [other for other in self._added if other.lower() == name.lower()]:
            name = other if entry.is_folder else name
            del self._added[other]
        self._added[name] = entry

    def is_folder(self, name: str) -> bool:
        """Return whether a name is a folder."""
        return self._there.get(name.lower(), "").endswith("/")

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""
        for other, entry in self._added.items():
            if other.lower() == name.lower():
                return read_bounded(self.path.parent / entry.staged, entry.origin)
        if name.lower() not in self._there:
            return None
        read = self.path.parent / "read"
        read.unlink(missing_ok=True)
        self._run(["mcopy", "-i", self.path.name, f"::/{name}", read.name], f"{name} cannot be read")
        return read_bounded(read, f"{name} on the boot file system")

    def check_room(self, name: str) -> None:
        """Ensure that the new entries fit.

        Raises:
            ImageError: They do not.
        """
        needed = sum(-(-max(entry.size, 1) // self._cluster) + 1 for entry in self._added.values())
        if self._added and needed > self._free:
            needed -= self._replaced()
        if self._added and needed > self._free:
            raise ImageError(
                f"The boot file system of {name} is too small: {needed * self._cluster} bytes needed,"
                f" {self._free * self._cluster} free.",
                "Add less to it: it cannot grow.",
            )

    def _replaced(self) -> int:
        """Return the number of clusters of the files to be replaced, which mcopy frees first."""
        output = self._run(["mdu", "-i", self.path.name, "-a", "::"], "The boot file system cannot be read")
        added = {name.lower() for name, entry in self._added.items() if not entry.is_folder}
        taken = (line.removeprefix("::/").rpartition(" ") for line in output.splitlines())
        return sum(int(clusters) for name, _, clusters in taken if name.lower() in added)

    def write(self) -> None:
        """Write the new entries, then check the file system.

        Raises:
            ImageError: A program failed, or the check found an error.
        """
        what = "The boot file system cannot be written"
        before = set(
            self._run(["mdir", "-i", self.path.name, "-b", "-/", "-a", "::"], what, (0, 1)).lower().splitlines()
        )
        for name, entry in sorted(self._added.items()):
            if entry.is_folder:
                if f"::/{name.lower()}/" not in before:
                    self._run(["mmd", "-i", self.path.name, f"::/{name}"], what)
                continue
            staged = self.path.parent / entry.staged
            time = min(max(entry.mtime // 10**9, YEAR_1980), YEAR_2108 - 2)
            os.utime(staged, (time, time))
            hint = "Add fewer files: the root folder of FAT16 holds a few hundred names."
            self._run(["mcopy", "-i", self.path.name, "-o", "-m", staged.name, f"::/{name}"], what, hint=hint)
        self._run(
            ["fsck.fat", "-n", self.path.name],
            "The boot file system of the image is damaged, which is a bug in gamebear-tasks",
        )


def _found(pattern: str, output: str) -> str:
    match = re.search(pattern, output)
    if not match:
        raise ImageError(f"fsck.fat has an unknown output: {output.strip()[-300:]}.", "Upgrade dosfstools.")
    return match[1]
