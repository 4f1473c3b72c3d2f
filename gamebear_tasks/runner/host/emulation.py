"""Foreign architectures whose programs run on this machine, by emulation or by the CPU."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

HANDLERS = Path("/proc/sys/fs/binfmt_misc")
"""Folder in which the kernel lists its handlers of foreign programs (binfmt-misc.rst)."""

PROBE_SECONDS = 120.0
"""Seconds that one step of a probe may last; a Pi with a slow card needs a few."""

# Programs that only call exit(0), by architecture: bits, byte order, ELF machine, ELF flags, code.
PROGRAMS: dict[str, tuple[int, str, int, int, bytes]] = {
    "armhf": (32, "<", 40, 0x05000400, bytes.fromhex("0000a0e3 0170a0e3 000000ef")),
    "arm64": (64, "<", 183, 0, bytes.fromhex("000080d2 a80b80d2 010000d4")),
    "amd64": (64, "<", 62, 0, bytes.fromhex("b83c000000 31ff 0f05")),
    "i386": (32, "<", 3, 0, bytes.fromhex("b801000000 31db cd80")),
    "riscv64": (64, "<", 243, 5, bytes.fromhex("13050000 9308d005 73000000")),
    "ppc64el": (64, "<", 21, 2, bytes.fromhex("01000038 00006038 02000044")),
    "s390x": (64, ">", 22, 0, bytes.fromhex("a7290000 0a01")),
}


def emulated(arch: str) -> tuple[str, ...]:
    """Return Debian's names of the architectures, apart from `arch`, whose programs run here.

    The test runs a program of each architecture. This covers qemu through binfmt_misc as well as 32-bit ARM on a 64-bit
    kernel, which not every CPU supports. A handler without the flag F does not count, because it does not work in a
    container.
    """
    names = [name for name in PROGRAMS if name != arch and _runs(name) and _reaches_containers(name)]
    if "armhf" in (*names, arch):
        names.append("armel")
    return tuple(sorted(set(names) - {arch}))


def handlers() -> list[str] | None:
    """Return the kernel's handlers of foreign programs as text, or None if the kernel does not show them.

    The result of `emulated` is valid as long as they do not change; it otherwise depends only on the kernel and the
    CPU.
    """
    try:
        found = [path for path in HANDLERS.iterdir() if path.name != "register"]
        return sorted(f"{path.name}: {path.read_text('utf-8', 'replace')}" for path in found)
    except OSError:  # binfmt_misc is not mounted, as in some containers; the kernel may still have handlers
        return None


def _program(arch: str) -> bytes:
    """Return the smallest ELF file: one header, one segment, code (System V ABI, chapters 4 and 5)."""
    bits, order, machine, flags, code = PROGRAMS[arch]
    ident = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]) + bytes(9)
    base = 0x10000
    if bits == 32:
        start, header, segment = base + 84, 52, 32
        size = 84 + len(code)
        program = struct.pack(f"{order}8I", 1, 0, base, base, size, size, 5, 0x10000)
        layout = f"{order}HHIIIIIHHHHHH"
    else:
        start, header, segment = base + 120, 64, 56
        size = 120 + len(code)
        program = struct.pack(f"{order}IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x10000)
        layout = f"{order}HHIQQQIHHHHHH"
    rest = struct.pack(layout, 2, machine, 1, start, header, 0, flags, header, segment, 1, 0, 0, 0)
    return ident + rest + program + code


def _runs(arch: str) -> bool:
    fd = os.memfd_create(f"gamebear-{arch}", 0)
    try:
        os.write(fd, _program(arch))
        os.lseek(fd, 0, os.SEEK_SET)
        done = subprocess.run(
            [f"/proc/self/fd/{fd}"],
            check=False,
            pass_fds=[fd],
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_SECONDS,
        )
        return done.returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False
    finally:
        os.close(fd)


def _reaches_containers(arch: str) -> bool:
    handler = {"armhf": "arm", "arm64": "aarch64", "amd64": "x86_64", "ppc64el": "ppc64le"}.get(arch, arch)
    try:
        text = (HANDLERS / f"qemu-{handler}").read_text()
    except OSError:
        return True
    flags = re.search(r"^flags: *(\w*)$", text, re.MULTILINE)
    return not text.startswith("enabled") or (flags is not None and "F" in flags.group(1))
