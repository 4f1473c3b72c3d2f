"""Runner bundle and bootstrap: one content-addressed file, and the command that starts it on a builder.

The bundle is a zip of the package `gamebear_runner` and a `__main__.py`. The command is a short program for the
builder's `python3`. It unpacks the bundle under `<cache>/gamebear/v1/runner/<sha256>/` if it is not there yet, and runs
it from there. Nothing else is installed. The model is Mitogen's bootstrap: the builder only needs Python, and the size
of the upload is measured (`docs/architecture.md`).

The client does not wait to learn whether the bundle is there: the first request follows the command at once. If the
bundle is missing, the command prints `send` and discards the request. The client then sends the length of the
compressed bundle (four bytes, most significant first), the compressed bundle, and the request again.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from ...runner.protocol.wire import PREAMBLE
from ...runner.store.store import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.abc import Traversable

_MAIN = b"import sys\n\nfrom gamebear_runner.__main__ import main\n\nsys.exit(main(sys.argv[1:]))\n"

_PARTS = ("json", "lzma", "symtable", "tarfile")
"""Modules of the standard library that the runner or its jobs need and a builder may lack.

Debian's python3-minimal lacks some of them, and a Python built without liblzma lacks lzma. The command checks for them
before the client sends the bundle.
"""

# Runs on any version of python3, so the syntax is old. `-I` ignores the user's environment; `-S` skips the search for
# site-packages, which saves time. Base64 prevents expansion by any login shell. Only the holder of the folder's file
# lock unpacks, so an incomplete folder is the remainder of a killed process.
_START = """\
import os, sys
def say(text):
    os.write(1, {preamble!r} + text + b"\\n")
if sys.version_info < (3, 9):
    say(b" python " + ".".join(map(str, sys.version_info[:3])).encode())
    sys.exit(1)
home = os.environ.get("XDG_CACHE_HOME", "")
if not home.startswith("/"):
    home = os.path.expanduser("~/.cache")
top = os.path.join(home, "gamebear", {version!r}, "runner")
place = os.path.join(top, {sha256!r})
if not os.path.isdir(place):
    try:
        for name in {parts!r}:
            __import__(name)
        import fcntl, hashlib, io, json, shutil, tempfile, zipfile, zlib
    except ImportError as error:
        say(b" lacks " + str(error.name or error).encode())
        sys.exit(1)
    umask = os.umask(0o077)
    try:
        os.makedirs(top, exist_ok=True)
        lock = os.open(top, os.O_RDONLY)
    except OSError as error:
        say(b" failed " + str(error).encode())
        sys.exit(1)
    say(b" send")
    def take(size):
        parts = []
        while size:
            parts.append(os.read(0, min(size, 1 << 20)))
            if not parts[-1]:
                raise EOFError("the stream ends")
            size -= len(parts[-1])
        return b"".join(parts)
    aside = None
    try:
        take(json.loads(take(int.from_bytes(take(4), "big"))).get("body", 0))
        data = zlib.decompress(take(int.from_bytes(take(4), "big")))
        if hashlib.sha256(data).hexdigest() != {sha256!r}:
            raise ValueError("damaged")
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in os.listdir(top):
            if name.startswith("tmp"):
                shutil.rmtree(os.path.join(top, name), ignore_errors=True)
        aside = tempfile.mkdtemp(dir=top)
        zipfile.ZipFile(io.BytesIO(data)).extractall(aside)
        os.sync()
        try:
            os.rename(aside, place)
        except OSError:
            if not os.path.isdir(place):
                raise
            shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)
        os.umask(umask)
    except Exception as error:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
        say(b" failed " + str(error).encode())
        sys.exit(1)
sys.path.insert(0, place)
from gamebear_runner.__main__ import main
sys.exit(main(["serve"]))
"""


@dataclass(frozen=True)
class Bundle:
    """The packed runner.

    Attributes:
        sha256: the runner's version: SHA-256 of the zip.
        data: the zip, uncompressed.
        command: command line that starts a session on a builder, for any login shell.
    """

    sha256: str
    data: bytes
    command: str

    @property
    def packed(self) -> bytes:
        """Bytes to send to a builder that lacks the bundle: length prefix and the zip, compressed as a whole (zlib)."""
        packed = zlib.compress(self.data, 9)
        return len(packed).to_bytes(4, "big") + packed


def _modules(folder: Traversable, path: str) -> Iterator[tuple[str, bytes]]:
    """Yield path in the zip and content of each module in a folder, recursively."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _modules(entry, f"{path}/{entry.name}")
        elif entry.name.endswith(".py"):
            yield f"{path}/{entry.name}", entry.read_bytes()


@cache
def bundle() -> Bundle:
    """Pack the runner reproducibly: equal files give an equal version on every machine."""
    files = {"__main__.py": _MAIN}
    files.update(_modules(resources.files("gamebear_tasks.runner"), "gamebear_runner"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), files[name])
    data = buffer.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()
    start = _START.format(preamble=PREAMBLE, version=VERSION, sha256=sha256, parts=_PARTS)
    code = base64.b64encode(zlib.compress(start.encode(), 9)).decode()
    return Bundle(
        sha256,
        data,
        f"exec python3 -I -S -c 'import base64,zlib;exec(zlib.decompress(base64.b64decode(\"{code}\")))'",
    )
