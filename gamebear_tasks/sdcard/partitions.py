"""The partitions of an image: found with sfdisk, told by what is in them, the last one grown."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ImageError
from .program import run

ALIGNED = 4 << 20
"""Bytes that a grown image is a multiple of: an SD card erases that much at once, and Raspberry Pi OS does it so."""

GPT_ENTRIES = 128
"""How many partitions a GPT has room for where nobody said otherwise."""

GPT_ENTRY = 128
"""Bytes that it keeps of each; it is kept twice, the second time at the end (UEFI specification, 5.3)."""

LOGICAL = 5
"""The number of an MBR's first partition that is inside another one."""


@dataclass(frozen=True)
class Partition:
    """A part of an image.

    Attributes:
        number: as sfdisk counts.
        start: its first byte.
        size: its bytes.
    """

    number: int
    start: int
    size: int


@dataclass(frozen=True)
class Disk:
    """What is in an image.

    Attributes:
        label: `dos` (MBR) or `gpt`.
        sector: bytes of a sector.
        tail: bytes that the table takes at the end of the image.
        boot: the FAT partition; None where there is none.
        root: the ext4 partition.
        fixed: why the root partition cannot grow; empty where it can.
    """

    label: str
    sector: int
    tail: int
    boot: Partition | None
    root: Partition
    fixed: str


def read(image: Path, name: str) -> Disk:
    """Return what is in an image.

    Args:
        image: the file.
        name: what a person calls it.

    Raises:
        ImageError: it has no partition table, or not one ext4 file system and at most one FAT.
    """
    said = run(
        ["sfdisk", "--json", image.name],
        folder=image.parent,
        now=0,
        what=f"{name} has no partition table",
        hint="It must be the image of a whole card, plain or compressed with xz, zstd, gzip or zip.",
    )
    table = json.JSONDecoder().raw_decode(said, said.index("{"))[0]["partitiontable"]  # warnings may be around it
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
                raise ImageError(f"{name} ends before its partition {number} does.", "Download or copy it again.")
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
            "It must have one ext4, the root, and one FAT to boot from, as Raspberry Pi OS has.",
        )
    root = roots[0]
    label = table["label"]
    fixed = "another one comes after it" if root.start + root.size < max(ends) else ""
    if label == "dos" and root.number >= LOGICAL:
        fixed = "it is a logical one, inside an extended one"
    tail = 0
    if label == "gpt":
        entries = int(table.get("table-length", GPT_ENTRIES)) * GPT_ENTRY
        tail = sector + -(-entries // sector) * sector
    return Disk(label, sector, tail, fats[0] if fats else None, root, fixed)


def grown(disk: Disk, image_size: int) -> Disk:
    """Return what is in an image of so many bytes whose root partition, the last, goes on to its end."""
    size = (image_size - disk.tail - disk.root.start) // disk.sector * disk.sector
    return replace(disk, root=replace(disk.root, size=size))


def size_for(disk: Disk, root_size: int) -> int:
    """Return the bytes of an image whose root partition has so many at least."""
    return -(-(disk.root.start + root_size + disk.tail) // ALIGNED) * ALIGNED


def write(image: Path, disk: Disk, now: int) -> None:
    """Write into an image's table how large its root partition is, at the end of the image.

    Args:
        image: the file.
        disk: what is in it.
        now: what is taken for the time.
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
