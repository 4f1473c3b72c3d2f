"""Files of a small image: programs of this machine with their libraries, and two users."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path


def fill(tree: Path, programs: Iterable[str]) -> None:
    """Write the files of an image with some of this machine's programs in `/bin`."""
    found = [str(shutil.which(program)) for program in programs]
    for path in (*found, *_libraries(found)):
        place = f"bin/{Path(path).name}" if path in found else path[1:]
        (tree / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, tree / place)
    (tree / "etc").mkdir()
    (tree / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\npi:x:1000:1000::/:/bin/sh\n")
    (tree / "tmp").mkdir()


def _libraries(programs: list[str]) -> set[str]:
    listed = subprocess.run(["ldd", *programs], check=True, capture_output=True, text=True).stdout
    return {word for word in listed.split() if word.startswith("/") and not word.endswith(":")}
