"""The apt archives of the builder: Debian's main archive, its keys, and checks of additional archives."""

from __future__ import annotations

import contextlib
import hashlib
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..host.buildah import ImageError
from . import sources_list

RELEASES = {"11": "bullseye", "12": "bookworm", "13": "trixie", "14": "forky"}
STABLE = "bookworm"
"""Release that `debian` refers to on a builder that does not run Debian itself."""

UNPACKED_LIMIT = 1 << 30
"""Bytes after which decompression of an index stops; Debian's largest index has less than a tenth of it."""

UNPACKED_MEMORY = 256 << 20
"""Bytes of memory that decompression of an index may use."""

MIRROR_SECONDS = 20.0
"""Seconds that a mirror may be silent while an additional suite's index is checked."""


class Archive(NamedTuple):  # NamedTuple, not a dataclass: see `capabilities.Facts`
    """One suite of an apt archive.

    Attributes:
        uri: URI without credentials and without a trailing slash.
        suite: For example `bookworm` or `bookworm-security`.
        components: For example `("main",)`.
        keyring: File with the keys that may sign the archive; empty if the sources do not specify it.
    """

    uri: str
    suite: str
    components: tuple[str, ...]
    keyring: str = ""

    def line(self) -> str:
        """Return the line for sources.list; it relies on the system's keys."""
        return f"deb {self.uri} {self.suite} {' '.join(self.components)}"


def own_release() -> tuple[str, str]:
    """Return the builder's distribution (`debian`, `raspbian` or empty) and its release's code name."""
    values: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/etc/os-release").read_text(errors="replace").splitlines():
            key, _, value = line.partition("=")
            values[key] = value.strip("\"'")
    distribution = values.get("ID", "")
    if distribution not in ("debian", "raspbian"):
        return "", ""
    return distribution, values.get("VERSION_CODENAME") or RELEASES.get(values.get("VERSION_ID", ""), STABLE)


def distribution_for(arch: str) -> str:
    """Return the distribution of a base.

    Raspbian's packages run on every Pi's 32-bit CPU, Debian's armhf needs an ARMv7.
    """
    return "raspbian" if arch == "armhf" and own_release()[0] == "raspbian" else "debian"


KEYRINGS = {
    "debian": "/usr/share/keyrings/debian-archive-keyring.gpg",
    "raspbian": "/usr/share/keyrings/raspbian-archive-keyring.gpg",
}


def archives(text: str, deb822: bool) -> list[Archive]:
    """Return the binary archives (http, https) in the text of an apt sources file.

    Args:
        text: Content of the file; the formats are described in sources.list(5).
        deb822: Whether it is a `.sources` file instead of a `.list` file.
    """
    return [
        archive
        for source in sources_list.parse(text, ".sources" if deb822 else ".list")
        if "deb" in source.types
        for uri in source.uris
        for suite in source.suites
        for archive in _archive(uri, suite, source.components, source.keys)
    ]


def _archive(uri: str, suite: str, components: tuple[str, ...], keys: tuple[str, ...]) -> Iterator[Archive]:
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname and components:
        host = parts.netloc.rpartition("@")[2]
        clean = f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
        yield Archive(clean, suite, components, next((key for key in keys if key.startswith("/")), ""))


def own_sources() -> list[Archive]:
    """Return the archives of the builder's own apt."""
    found: list[Archive] = []
    folder = Path("/etc/apt")
    for path in [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]:
        with contextlib.suppress(OSError):
            if sources_list.is_file_of_sources(path):
                text = path.read_text(encoding="utf-8", errors="replace")
                found += archives(text, path.suffix == ".sources")
    return found


def _is_official(archive: Archive, distribution: str) -> bool:
    """Return whether an archive is the distribution's main one, by apt's copy of its Release file, or by its URI."""
    host = urllib.parse.urlsplit(archive.uri).hostname or ""
    if host.startswith("archive.raspberrypi.") or "security" in archive.suite or "security" in archive.uri:
        return False
    escaped = re.sub(r"[/:]+", "_", archive.uri.partition("://")[2])
    for name in ("InRelease", "Release"):
        path = Path("/var/lib/apt/lists", f"{escaped}_dists_{archive.suite.replace('/', '_')}_{name}")
        with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
            origin = re.search(r"^Origin: *(.*)$", file.read(4096), re.MULTILINE)
            if origin:
                return origin.group(1).strip().lower() == distribution
    return archive.uri.rpartition("/")[2] == distribution


def main_archive(suite: str, distribution: str) -> Archive:
    """Return the archive to bootstrap from: the builder's own mirror.

    Raises:
        ImageError: The builder's apt has no mirror of the distribution.
    """
    own = [archive for archive in own_sources() if _is_official(archive, distribution) and "main" in archive.components]
    own.sort(key=lambda archive: archive.suite not in (suite, "stable", own_release()[1]))
    if not own:
        raise ImageError(
            f"{distribution.capitalize()} has no mirror in the builder's apt sources.",
            f"Add one there to /etc/apt/sources.list: deb MIRROR {suite} main",
        )
    uri, keyring = own[0].uri, own[0].keyring
    components = ("main",) if distribution == "debian" else ("main", "contrib", "non-free", "rpi")
    return Archive(uri, suite, components, keyring)


def keyrings_for(archive: Archive, distribution: str) -> list[str]:
    """Return the files or folders with the keys that may sign an archive.

    Raises:
        ImageError: There are none.
    """
    stated = [archive.keyring, KEYRINGS[distribution], KEYRINGS[distribution][: -len(".gpg")] + ".pgp"]
    for path in stated:
        if path and Path(path).is_file():
            return [path]
    trusted = [path for path in ("/etc/apt/trusted.gpg.d", "/etc/apt/trusted.gpg") if Path(path).exists()]
    if trusted and own_release()[0] == distribution:
        return trusted
    raise ImageError(
        f"{archive.uri} cannot be verified: the builder has no {KEYRINGS[distribution]}.",
        f"Run there: sudo apt install {distribution}-archive-keyring",
    )


def extra_archives(main: Archive, arch: str) -> list[Archive]:
    """Return the archives of security and other updates that the builder uses, if their indexes are intact."""
    wanted = (f"{main.suite}-security", f"{main.suite}-updates")
    extras: list[Archive] = []
    for archive in own_sources():
        if archive.suite in wanted and archive.suite not in [extra.suite for extra in extras]:
            extra = Archive(archive.uri, archive.suite, ("main",))
            reason = _index_failure(extra, arch)
            if reason:
                print(f"Skipping {extra.suite}: {reason}", flush=True)
            else:
                extras.append(extra)
    return extras


def _index_failure(archive: Archive, arch: str) -> str:
    """Return the reason why apt would fail on an archive's index, or an empty string.

    This check does not authenticate the index, which apt does. A mirror whose index differs from its own list of hashes
    would make every installation fail.
    """
    import lzma  # deferred: slow to import on a small machine, and most builds never need it
    import urllib.error
    import urllib.request

    base = f"{archive.uri}/dists/{archive.suite}"
    name = f"main/binary-{arch}/Packages.xz"
    try:
        with urllib.request.urlopen(f"{base}/InRelease", timeout=MIRROR_SECONDS) as answer:
            listed = answer.read(1 << 22).decode("utf-8", "replace")
        match = re.search(rf"^ ([0-9a-f]{{64}}) +\d+ {re.escape(name)}$", listed, re.MULTILINE)
        if not match:
            return f"{name} is missing"
        with urllib.request.urlopen(f"{base}/{name}", timeout=MIRROR_SECONDS) as answer:
            content = answer.read(1 << 26)
        if hashlib.sha256(content).hexdigest() != match.group(1):
            return f"{name} does not match its SHA-256 in InRelease"
        _check_xz(content)
    except (OSError, ValueError, lzma.LZMAError, urllib.error.URLError) as error:
        return f"{name}: {error}"
    return ""


def _check_xz(content: bytes) -> None:
    """Decompress xz data and discard the result.

    Raises:
        LZMAError: The data is truncated, damaged, or larger than any index.
    """
    import lzma

    unpacked = 0
    while content or not unpacked:
        stream = lzma.LZMADecompressor(memlimit=UNPACKED_MEMORY)
        while not stream.eof:
            if stream.needs_input and not content:
                raise lzma.LZMAError("the file is truncated")
            unpacked += len(stream.decompress(content, 1 << 20))
            content = b""
            if unpacked > UNPACKED_LIMIT:
                raise lzma.LZMAError(f"the file unpacks to more than {UNPACKED_LIMIT >> 20} MiB")
        content = stream.unused_data.lstrip(b"\0")
        if not unpacked and not content:
            return  # an index without packages
