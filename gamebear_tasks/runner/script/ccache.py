"""Compilers cached across builds with ccache, for the containers of scripts that ask for it.

    ccache/<key>/       in the store; held (flock, shared) by every job that uses it; mounted while a command runs
        bin/<compiler>  what the container's commands find first under the compiler's name: a link to
        compiler        which runs the compiler of that name with ccache, or without
        preprocess      what ccache runs the preprocessor with
        cache/          ccache's own

The key stands for the image, the architecture and every file that a compiler of the container is made of, so that no
other compiler's results are ever looked at. ccache is used where it is known to be right, and kept away from the rest:

- Only the preprocessor's output decides. The direct mode, which looks at the files that were included the last time,
  does not notice a new one that would now be found before them.
- What the assembler reads by itself (`.include`, `.incbin`), ccache does not see, or only in its plainest form. So what
  is assembled is not cached, nor what has such a word in the preprocessor's output; see `COMPILER` and `PREPROCESS`.
- Entries have a checksum since ccache 4; one that was damaged counts as none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..host.rootfs import Rootfs
from ..util.atomic_files import write_bytes
from ..util.errors import RunnerError

FORMAT = 1
"""Version of the key, the scripts and the settings; another number begins every cache anew."""

PLACE = "/run/gamebear-ccache"
"""Where the folder is mounted in a container."""

SIZE = "1G"
"""How much one cache holds; ccache removes what was not used for longest."""

OLDEST = (4, 0)
"""The first release of ccache that notices damage."""

BINARIES = ("bin", "usr/bin", "usr/local/bin")
"""Where a container's compilers, assemblers and ccache are."""

PARTS = ("usr/lib/gcc", "usr/lib/gcc-cross", "usr/libexec/gcc", "usr/local/lib", "usr/local/libexec")
"""Where the parts of a compiler are that its program starts or loads; Debian's own are known by their packages."""

PACKAGES = "var/lib/dpkg/status"
"""Which packages are installed, with their versions."""

COMPILER_NAME = re.compile(r"([\w+.]+-)*(cc|c\+\+|gcc|g\+\+|clang|clang\+\+)(-\d+(\.\d+)*)?", re.ASCII)

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""What buildah takes where an image has no PATH."""

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
    "CCACHE_CONFIGPATH": "/dev/null",  # no settings but these, neither the image's nor the folder's
    "CCACHE_DIR": f"{PLACE}/cache",
    "CCACHE_HASHDIR": "1",  # debug information has the working directory
    "CCACHE_IGNOREOPTIONS": "",
    "CCACHE_MAXSIZE": SIZE,
    "CCACHE_NODEPEND": "1",
    "CCACHE_NODIRECT": "1",
    "CCACHE_NOHARDLINK": "1",  # or what changes an object file later on would change the cache
    "CCACHE_PREFIX_CPP": f"{PLACE}/preprocess",
    "CCACHE_SLOPPINESS": "",
}


class CacheError(RunnerError):
    """A container's compilers cannot be cached."""

    kind = "script"


class Cache:
    """The cache of one container's compilers, held until it is closed.

    Args:
        root: the versioned store folder.
        files: the container's.
        image: the id of the container's image.
        arch: Debian's name of its architecture.

    Raises:
        CacheError: the container has no ccache, no compiler, or no grep.
    """

    def __init__(self, root: Path, files: Rootfs, image: str, arch: str) -> None:
        binaries = [entry for folder in BINARIES for entry in files.listing(folder, depth=1)]
        names = {entry[0].rpartition("/")[2] for entry in binaries}
        for needed in ("ccache", "grep"):  # without grep nothing would ever be cached
            if needed not in names:
                raise CacheError(
                    f"There is no {needed} in the container.", f'Install it: packages_image(…, ["{needed}", "gcc", …])'
                )
        self.compilers = sorted(name for name in names if COMPILER_NAME.fullmatch(name))
        if not self.compilers:
            raise CacheError("There is no compiler in the container.", "Say c.ccache = True when it is installed.")
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
        """Whether this ccache has been found to be good enough."""
        return (self.folder / "checked").exists()

    def check(self, version: str) -> None:
        """Note that this ccache is good enough.

        Args:
            version: what `ccache --version` says.

        Raises:
            CacheError: it is too old.
        """
        numbers = re.search(r"(\d+)\.(\d+)", version)
        if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST:
            said = numbers[0] if numbers else "unknown"
            raise CacheError(
                f"The container's ccache (version {said}) is too old: it would not notice a damaged entry.",
                "Leave c.ccache out, or take an image with ccache 4 (Debian 11 or later has it).",
            )
        (self.folder / "checked").touch()

    def environment(self, path: str) -> Mapping[str, str]:
        """Return the variables for a command whose PATH would be `path`."""
        path = path or DEFAULT_PATH
        return {**SETTINGS, "PATH": f"{PLACE}/bin:{path}", "CCACHE_PATH": path}

    def close(self) -> None:
        """Let go of the folder."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1


def _held(folder: Path) -> int:
    """Return the open folder, made if need be; it stays as long as it is open, and counts as used now."""
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            os.utime(fd)
            if folder.is_dir() and os.path.samestat(os.fstat(fd), folder.stat()):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # a prune has taken it away in this moment
