"""The partitions of an image: found with sfdisk, told by what is in them, the last one grown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import ImageError
from .program import run

ALIGNED = 4 << 20
"""Bytes that a grown image is a multiple of: an SD card erases that much at once, and Raspberry Pi OS does it so."""

GPT_END = 33
"""Sectors that the second copy of a GPT takes at the end (UEFI specification, 5.3)."""


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
        boot: the FAT partition; None where there is none.
        root: the ext4 partition.
        is_root_last: nothing comes after the root partition, so it can grow.
    """

    label: str
    sector: int
    boot: Partition | None
    root: Partition
    is_root_last: bool


def read(image: Path, name: str) -> Disk:
    """Return what is in an image.

    Args:
        image: the file.
        name: what a person calls it.

    Raises:
        ImageError: it has no partition table, or not one ext4 file system and at most one FAT.
    """
    said = run(["sfdisk", "--json", image.name], folder=image.parent, now=0, what=f"{name} has no partition table")
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
    return Disk(table["label"], sector, fats[0] if fats else None, root, root.start + root.size == max(ends))


def grown(disk: Disk, image_size: int) -> Disk:
    """Return what is in an image of so many bytes whose root partition, the last, goes on to its end."""
    root = Partition(disk.root.number, disk.root.start, _root_size(disk, image_size))
    return Disk(disk.label, disk.sector, disk.boot, root, True)


def _root_size(disk: Disk, image_size: int) -> int:
    tail = GPT_END * disk.sector if disk.label == "gpt" else 0
    return (image_size - tail - disk.root.start) // disk.sector * disk.sector


def size_for(disk: Disk, root_size: int) -> int:
    """Return the bytes of an image whose root partition has so many at least."""
    tail = GPT_END * disk.sector if disk.label == "gpt" else 0
    return -(-(disk.root.start + root_size + tail) // ALIGNED) * ALIGNED


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
