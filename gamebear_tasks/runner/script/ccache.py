"""Compiler cache: ccache across builds, for the containers of scripts that enable it.

    ccache/<key>/       in the store; locked (flock, shared) by every job that uses it; mounted while a command runs
        bin/<compiler>  found first in the container's PATH under the compiler's name: a link to
        compiler        script that runs the compiler of that name with ccache, or without
        preprocess      script that ccache runs the preprocessor with
        cache/          ccache's own folder

The key is a hash of the image, the architecture and every file that belongs to a compiler of the container. So results
of another compiler are never used. ccache is used only where it is known to be correct:

- Only the preprocessor's output decides. ccache's direct mode checks the files that were included last time. It misses
  a new file that would now be found before them.
- ccache does not see files that the assembler itself reads (`.include`, `.incbin`), or only in their plainest form. So
  assembly is not cached, nor is code with such a word in the preprocessor's output; see `COMPILER` and `PREPROCESS`.
- Entries have a checksum since ccache 4; a damaged entry counts as a miss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..host.rootfs import Rootfs
from ..util.atomic_files import write_bytes
from ..util.errors import RunnerError
from ..util.locks import hold

FORMAT = 1
"""Version of the key, the scripts and the settings; a new number invalidates every cache."""

PLACE = "/run/gamebear-ccache"
"""Mount point of the folder in a container."""

SIZE = "1G"
"""Size limit of one cache; ccache evicts the least recently used entries."""

OLDEST = (4, 0)
"""First release of ccache that detects damaged entries."""

BINARIES = ("bin", "usr/bin", "usr/local/bin")
"""Folders of a container's compilers, assemblers and ccache."""

PARTS = ("usr/lib/gcc", "usr/lib/gcc-cross", "usr/libexec/gcc", "usr/local/lib", "usr/local/libexec")
"""Folders of files that a compiler runs or loads; those from Debian are covered by the package versions."""

PACKAGES = "var/lib/dpkg/status"
"""List of the installed packages with their versions."""

COMPILER_NAME = re.compile(r"([\w+.]+-)*(cc|c\+\+|gcc|g\+\+|clang|clang\+\+)(-\d+(\.\d+)*)?", re.ASCII)

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH that buildah sets if an image has none."""

COMPILER = b"""\
#!/bin/sh
# An assembler reads files that ccache does not see, and so may a compiler whose parts are elsewhere.
[ -z "$COMPILER_PATH$GCC_EXEC_PREFIX" ] || export CCACHE_DISABLE=1
for word; do
    case $word in
        *.[sSi] | *.sx | *.ii | -xassembler* | assembler* | *cpp-output | -B* | -wrapper | @*)
            export CCACHE_DISABLE=1
            break
            ;;
    esac
done
exec ccache "${0##*/}" "$@"
"""

PREPROCESS = b"""\
#!/bin/sh
# Fails where inline assembly may read a file that ccache does not see; then the compiler is run without ccache.
last= made=
for word; do
    [ "$last" != -o ] || made=$word
    last=$word
done
"$@" || exit
LC_ALL=C grep -qiE 'incbin|[.]include([^[:alnum:]_]|$)' "${made:-/proc/$$/fd/1}"
[ $? = 1 ]
"""

SETTINGS = {
    "CCACHE_BASEDIR": "",
    "CCACHE_COMPILERCHECK": "content",
    "CCACHE_CONFIGPATH": "/dev/null",  # ignore settings of the image and of the folder
    "CCACHE_DIR": f"{PLACE}/cache",
    "CCACHE_HASHDIR": "1",  # debug information contains the working directory
    "CCACHE_IGNOREOPTIONS": "",
    "CCACHE_MAXSIZE": SIZE,
    "CCACHE_NODEPEND": "1",
    "CCACHE_NODIRECT": "1",
    "CCACHE_NOHARDLINK": "1",  # otherwise a later change of an object file would change the cache
    "CCACHE_PREFIX_CPP": f"{PLACE}/preprocess",
    "CCACHE_SLOPPINESS": "",
}


class CacheError(RunnerError):
    """The compilers of a container cannot be cached."""

    kind = "script"


class Cache:
    """The cache of one container's compilers, locked until it is closed.

    Args:
        root: The versioned store folder.
        files: The container's file system.
        image: Id of the container's image.
        arch: Debian's name of its architecture.

    Raises:
        CacheError: The container has no ccache, no compiler, or no grep.

    Attributes:
        folder: The cache's folder in the store.
        compilers: Names of the container's compilers.
    """

    def __init__(self, root: Path, files: Rootfs, image: str, arch: str) -> None:
        binaries = [entry for folder in BINARIES for entry in files.listing(folder, depth=1)]
        names = {entry[0].rpartition("/")[2] for entry in binaries}
        for needed in ("ccache", "grep"):  # without grep, nothing would ever be cached
            if needed not in names:
                raise CacheError(
                    f"ccache cannot be used: {needed} is not installed in the container.",
                    f'Install it: packages_image(…, ["{needed}", "gcc", …])',
                )
        self.compilers = sorted(name for name in names if COMPILER_NAME.fullmatch(name))
        if not self.compilers:
            raise CacheError(
                "ccache cannot be used: no compiler is installed in the container.",
                "Set c.ccache = True after its installation.",
            )
        parts = [entry for folder in PARTS for entry in files.listing(folder)]
        key = json.dumps([FORMAT, image, arch, binaries, parts, files.sha256_of(PACKAGES)]).encode()
        self.folder = root / "ccache" / hashlib.sha256(key).hexdigest()
        self._held = _held(self.folder)
        for name, text in (("compiler", COMPILER), ("preprocess", PREPROCESS)):
            if not (self.folder / name).exists():
                write_bytes(self.folder / name, text, 0o755)
        (self.folder / "bin").mkdir(exist_ok=True)
        for name in self.compilers:
            with contextlib.suppress(FileExistsError):
                (self.folder / "bin" / name).symlink_to("../compiler")

    @property
    def is_checked(self) -> bool:
        """Whether this ccache is known to be recent enough."""
        return (self.folder / "checked").exists()

    def check(self, version: str) -> None:
        """Verify that this ccache is recent enough, and record it.

        Args:
            version: Output of `ccache --version`.

        Raises:
            CacheError: The release is too old.
        """
        numbers = re.search(r"(\d+)\.(\d+)", version)
        if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST:
            said = numbers[0] if numbers else "unknown"
            raise CacheError(
                f"ccache {said} in the container is too old: it does not detect damaged entries.",
                "Remove c.ccache, or use an image with ccache 4 (Debian 11 or later).",
            )
        (self.folder / "checked").touch()

    def environment(self, path: str) -> Mapping[str, str]:
        """Return the variables for a command whose PATH would be `path`."""
        path = path or DEFAULT_PATH
        return {**SETTINGS, "PATH": f"{PLACE}/bin:{path}", "CCACHE_PATH": path}

    def close(self) -> None:
        """Release the folder's lock."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1


def _held(folder: Path) -> int:
    """Return a descriptor of the folder, created if missing, that holds a shared lock; update its time of last use."""
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # race: garbage collection removed it
            fd = hold(folder, shared=True)
            os.utime(fd)
            return fd
