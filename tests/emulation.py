"""Run programs of another architecture on this machine, also in containers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def emulate_armhf() -> None:
    """Enable armhf programs on this machine. Requires root."""
    handlers = Path("/proc/sys/fs/binfmt_misc")
    if not (handlers / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(handlers)], check=True)
    if not (handlers / "qemu-arm").exists():
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        subprocess.run(["update-binfmts", "--enable", "qemu-arm"], check=True, env={**os.environ, "PATH": path})
