"""Names of architectures: Debian's, the kernel's and OCI's."""

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
"""Kernel's name of a machine (`uname -m`), mapped to Debian's name of its architecture."""

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
"""Debian's name of an architecture, mapped to architecture and variant in the OCI image format."""

ARCHITECTURE_ANNOTATION = "gamebear.arch"
"""Annotation with the architecture of the job that made an image; needed to find a script's own tags again."""
