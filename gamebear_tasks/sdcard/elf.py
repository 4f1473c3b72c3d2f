"""Which architecture a program is for, by its ELF header (System V ABI, chapter 4; ARM's supplement for its flags)."""

from __future__ import annotations

import struct

HEADER = 52
"""Bytes of the shorter header, a 32-bit program's."""

BIG, LITTLE = 2, 1
ARM = 40
ARM_SOFT_FLOAT = 0x200
ARM_HARD_FLOAT = 0x400

MACHINES = {
    (1, LITTLE, 3): "i386",
    (1, LITTLE, ARM): "armhf",
    (1, LITTLE, 62): "x32",
    (2, LITTLE, 62): "amd64",
    (2, LITTLE, 183): "arm64",
    (2, LITTLE, 243): "riscv64",
    (2, LITTLE, 21): "ppc64el",
    (2, BIG, 22): "s390x",
    (2, LITTLE, 258): "loong64",
}
"""Debian's names by class, byte order and machine."""


def architecture(header: bytes) -> str:
    """Return Debian's name of what a file's first bytes are a program or library for.

    Empty for what is no ELF file, and for one of a processor that runs no Debian: firmware and the like is for devices.
    """
    if len(header) < HEADER or not header.startswith(b"\x7fELF"):
        return ""
    order = ">" if header[5] == BIG else "<"
    (machine,) = struct.unpack_from(f"{order}H", header, 18)
    name = MACHINES.get((header[4], header[5], machine), "")
    if name == "armhf":
        (flags,) = struct.unpack_from("<I", header, 36)
        return "armel" if flags & ARM_SOFT_FLOAT and not flags & ARM_HARD_FLOAT else "armhf"
    return name
