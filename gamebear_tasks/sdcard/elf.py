"""Architecture of a program, from its ELF header (System V ABI, chapter 4; flags in ARM's supplement)."""

from __future__ import annotations

import struct

HEADER = 52
"""Bytes of the header of a 32-bit program. The 64-bit header is longer."""

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
"""Debian's architecture names by ELF class, byte order and machine."""


def architecture(header: bytes) -> str:
    """Return Debian's architecture name for the program or library that starts with the specified bytes.

    Return an empty string for other files, and for architectures without a Debian port: they are firmware for devices.
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
