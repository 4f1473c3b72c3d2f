"""Partition tables: read with sfdisk, identified by file system; the last partition can be grown."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import ImageError
from .program import run

ALIGNED = 4 << 20
"""Bytes that the size of a grown image is a multiple of: the erase block of an SD card, as in Raspberry Pi OS."""

GPT_ENTRIES = 128
"""Default number of entries of a GPT."""

GPT_ENTRY = 128
"""Bytes of a GPT entry. A backup of the table is at the end of the disk (UEFI specification, 5.3)."""

LOGICAL = 5
"""Number of the first logical partition of an MBR."""


@dataclass(frozen=True)
class Partition:
    """A partition of an image.

    Attributes:
        number: Partition number of sfdisk.
        start: Offset of the first byte.
        size: Bytes.
    """

    number: int
    start: int
    size: int


@dataclass(frozen=True)
class Disk:
    """Partition layout of an image.

    Attributes:
        label: `dos` (MBR) or `gpt`.
        sector: Bytes of a sector.
        tail: Bytes at the end of the image that the backup table occupies.
        boot: The FAT partition, or None.
        root: The ext4 partition.
        fixed: Reason why the root partition cannot grow; empty if it can.
    """

    label: str
    sector: int
    tail: int
    boot: Partition | None
    root: Partition
    fixed: str


def read(image: Path, name: str) -> Disk:
    """Read the partition layout of an image.

    Args:
        image: The image file.
        name: Display name.

    Raises:
        ImageError: It has no partition table, or does not have exactly one ext4 and at most one FAT file system.
    """
    output = run(
        ["sfdisk", "--json", image.name],
        folder=image.parent,
        now=0,
        what=f"{name} has no partition table",
        hint="Use the image of a whole card, plain or compressed with xz, zstd, gzip or zip.",
    )
    table = json.JSONDecoder().raw_decode(output, output.index("{"))[0]["partitiontable"]  # may be among warnings
    sector = int(table.get("sectorsize", 512))
    size = image.stat().st_size
    fats: list[Partition] = []
    roots: list[Partition] = []
    ends = []
    with image.open("rb") as file:
        for entry in table.get("partitions", ()):
            number = int(entry["node"].removeprefix(image.name).removeprefix("p"))
            part = Partition(number, int(entry["start"]) * sector, int(entry["size"]) * sector)
            if part.start + part.size > size:
                raise ImageError(f"{name} is truncated: partition {number} exceeds it.", "Download or copy it again.")
            ends.append(part.start + part.size)
            file.seek(part.start)
            start = file.read(2048)
            if start[1080:1082] == b"\x53\xef":
                roots.append(part)
            elif start[510:512] == b"\x55\xaa" and (start[54:57] == b"FAT" or start[82:87] == b"FAT32"):
                fats.append(part)
    if len(roots) != 1 or len(fats) > 1:
        raise ImageError(
            f"{name} has {len(roots)} ext4 and {len(fats)} FAT file systems.",
            "Use a base with one ext4 file system and at most one FAT, like Raspberry Pi OS.",
        )
    root = roots[0]
    label = table["label"]
    fixed = "its root partition is not the last one" if root.start + root.size < max(ends) else ""
    if label == "dos" and root.number >= LOGICAL:
        fixed = "its root partition is a logical partition"
    tail = 0
    if label == "gpt":
        entries = int(table.get("table-length", GPT_ENTRIES)) * GPT_ENTRY
        tail = sector + -(-entries // sector) * sector
    return Disk(label, sector, tail, fats[0] if fats else None, root, fixed)


def grown(disk: Disk, image_size: int) -> Disk:
    """Return the layout of an image of the specified bytes whose root partition, the last one, extends to the end."""
    size = (image_size - disk.tail - disk.root.start) // disk.sector * disk.sector
    return replace(disk, root=replace(disk.root, size=size))


def size_for(disk: Disk, root_size: int) -> int:
    """Return the bytes of an image whose root partition has at least the specified bytes."""
    return -(-(disk.root.start + root_size + disk.tail) // ALIGNED) * ALIGNED


def write(image: Path, disk: Disk, now: int) -> None:
    """Write the size of the root partition into the image's partition table.

    Args:
        image: The image file.
        disk: The new layout.
        now: Time that sfdisk assumes, in seconds since 1970.
    """
    what = "The root partition cannot be grown"
    sfdisk = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel"]
    if disk.label == "gpt":
        run([*sfdisk, "--relocate", "gpt-bak-std", image.name], folder=image.parent, now=now, what=what)
    run(
        [*sfdisk, f"--partno={disk.root.number}", image.name],
        folder=image.parent,
        now=now,
        what=what,
        stdin=f",{disk.root.size // disk.sector}\n".encode(),
    )
