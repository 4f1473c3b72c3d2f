"""What Debian calls the architectures, and what others call them."""

from __future__ import annotations

ARCHITECTURES = {
    "aarch64": "arm64",
    "amd64": "amd64",
    "arm64": "arm64",
    "armv5tel": "armel",
    "armv6l": "armhf",
    "armv7l": "armhf",
    "armv8l": "armhf",
    "i386": "i386",
    "i586": "i386",
    "i686": "i386",
    "loongarch64": "loong64",
    "ppc64le": "ppc64el",
    "riscv64": "riscv64",
    "s390x": "s390x",
    "x86_64": "amd64",
}
"""Debian's name of an architecture, by what `uname -m` calls the machine."""

PLATFORMS = {
    "amd64": ("amd64", ""),
    "arm64": ("arm64", ""),
    "armel": ("arm", "v5"),
    "armhf": ("arm", "v7"),
    "i386": ("386", ""),
    "loong64": ("loong64", ""),
    "mips64el": ("mips64le", ""),
    "ppc64el": ("ppc64le", ""),
    "riscv64": ("riscv64", ""),
    "s390x": ("s390x", ""),
}
"""Debian's name of an architecture to the OCI image format's architecture and variant."""

ARCHITECTURE_ANNOTATION = "gamebear.arch"
"""The architecture of the job that made an image; a script's own tags are found again by it."""
