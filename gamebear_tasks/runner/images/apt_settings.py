"""Additional apt settings of a package image: sources, keys, a dated Debian snapshot, build dependencies.

Formats: sources.list(5), apt_preferences(5), deb-src-control(5).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..host.buildah import ImageError
from ..host.rootfs import Rootfs
from . import sources_list
from .apt_sources import RELEASES
from .sources_list import Source

SNAPSHOTS = "http://snapshot.debian.org/archive"
"""Archive of Debian's archives, by time. Without TLS, because minimal images have no certificates; apt verifies the
signatures."""

KEYRINGS = "/etc/apt/keyrings"
"""Folder of the image for additional keys; see sources.list(5)."""

CONTROL = "/tmp/gamebear-build-dep"
"""Folder of the container for the `debian/control` that the image's own apt reads."""

SOURCE_INDEXES = "gamebear-deb-src"
"""Name, without suffix, of the temporary file in sources.list.d that lists the source packages."""

SNAPSHOT_PREFERENCES = "/etc/apt/preferences.d/gamebear-snapshot"
"""File of the image that prefers the snapshot's versions to newer installed ones."""

_SUITES = "|".join([*RELEASES.values(), "sid", "testing", "unstable", "stable", "(?:old)+stable", "experimental"])
_SECURITY = re.compile(rf"(?:{_SUITES})(?:-security|/updates)")
_MAIN = re.compile(rf"(?:{_SUITES})(?:-updates|-backports|-proposed-updates)?")
_COMPONENTS = {"main", "contrib", "non-free", "non-free-firmware"}

_BUILD_FIELD = re.compile(r"Build-(?:Depends|Conflicts)(?:-Arch|-Indep)?", re.IGNORECASE)

_PUBLIC_KEY = re.compile(rb"\s*-----BEGIN PGP PUBLIC KEY BLOCK-----|[\x98\x99\x9a\xc6]")
"""Start of a public key: armored, or a packet with tag 6 (RFC 9580)."""


class Settings(NamedTuple):  # NamedTuple, not a dataclass: see `capabilities.Facts`
    """Additional apt settings of a package image.

    Attributes:
        sources: Texts in one of apt's two formats.
        keys: Contents of the key files that verify the sources without their own `Signed-By`.
        snapshot: Time of the snapshot, such as `20261101T000000Z`; empty for the image's own sources.
        build_dep: Name of the source package whose build dependencies are installed; empty for none.
        control: The fields of `debian/control` that state the build dependencies, if they come from a folder.
    """

    sources: tuple[str, ...] = ()
    keys: tuple[bytes, ...] = ()
    snapshot: str = ""
    build_dep: str = ""
    control: str = ""

    def recipe(self) -> dict[str, Any]:
        """Return what identifies the settings, as JSON; without those that are not set."""
        return {name: value for name, value in self.notes().items() if value}

    def notes(self) -> dict[str, str]:
        """Return the annotations that record the settings, by their last part."""
        return {
            "sources": "\n".join(self.sources),
            "keys": " ".join(hashlib.sha256(key).hexdigest() for key in self.keys),
            "snapshot": self.snapshot,
            "build-dep": self.build_dep,
            "build-dep-control": self.control,
        }

    def check(self) -> None:
        """Raise ValueError if a setting is invalid."""
        for text in self.sources:
            parsed = sources_list.parse(text, _suffix(text))
            if len(parsed) != _count(text) or not parsed:
                raise ValueError(f"packages_image: {text!r} is not an apt source, such as 'deb URL SUITE main'")
            if any(urllib.parse.urlsplit(uri).password for source in parsed for uri in source.uris):
                raise ValueError("packages_image: an apt source contains a password, which others can read")
        for key in self.keys:
            if not _PUBLIC_KEY.match(key):
                raise ValueError("packages_image: a file of keys is not a public OpenPGP key: gpg --export KEY > FILE")
        if self.keys and not self.sources:
            raise ValueError("packages_image: keys without sources have no effect")
        if self.snapshot and not re.fullmatch(r"\d{8}T\d{6}Z", self.snapshot):
            raise ValueError(f"packages_image: snapshot is {self.snapshot!r}, expected a time like 20261101T000000Z")
        if self.build_dep and not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+(=[A-Za-z0-9.+:~-]+)?", self.build_dep):
            raise ValueError(f"packages_image: {self.build_dep!r} is not the name of a Debian source package")


NONE = Settings()
"""No additional settings."""


def build_dependencies(control: str) -> tuple[str, str]:
    """Return the source package's name, and the fields that state its build dependencies, from a debian/control.

    Raises:
        ValueError: The text has no source package.
    """
    fields: dict[str, str] = {}
    name = ""
    for line in control.splitlines():
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                break
            continue
        if line[0] in " \t":
            if name:
                fields[name] += " " + line.strip()
        else:
            name, _, value = line.partition(":")
            name = name.title()
            fields[name] = value.strip()
    if not fields.get("Source"):
        raise ValueError("packages_image: debian/control has no field Source")
    texts = (f"{name}: {value}\n" for name, value in sorted(fields.items()) if _BUILD_FIELD.fullmatch(name))
    return fields["Source"], "".join(texts)


def write_control(settings: Settings, folder: Path) -> None:
    """Write a debian/control with the build dependencies into a folder, for `apt-get build-dep FOLDER`."""
    (folder / "debian").mkdir(parents=True)
    text = f"Source: {settings.build_dep}\n{settings.control}\nPackage: {settings.build_dep}\nArchitecture: any\n"
    (folder / "debian/control").write_text(text, "utf-8", "surrogateescape")


def apply(settings: Settings, rootfs: Rootfs, folder: Path, base: str) -> None:
    """Write the settings into a container.

    Args:
        settings: The settings.
        rootfs: The container's file system.
        folder: Folder for temporary files.
        base: Name of the base, for messages.

    Raises:
        ImageError: A source of the base has no snapshot.
    """
    if settings.snapshot:
        _use_snapshot(settings.snapshot, rootfs, folder, base)
    names = []
    for key in settings.keys:
        suffix = "asc" if key.lstrip().startswith(b"-----") else "gpg"
        names.append(f"{KEYRINGS}/gamebear-{hashlib.sha256(key).hexdigest()[:16]}.{suffix}")
        _put(rootfs, folder, key, names[-1])
    for text in settings.sources:
        suffix = _suffix(text)
        sources = [_signed_by(source, names) for source in sources_list.parse(text, suffix)]
        name = f"gamebear-{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}"
        _put(rootfs, folder, sources_list.text_of(sources).encode(), f"/etc/apt/sources.list.d/{name}")


def add_source_indexes(rootfs: Rootfs, folder: Path) -> None:
    """Add the source packages of all sources of a container to its sources, until `remove_source_indexes`."""
    found = [(path, source) for path, sources in _own_sources(rootfs, folder) for source in sources]
    for suffix in sources_list.SUFFIXES:
        added = [
            source._replace(types=("deb-src",))
            for path, source in found
            if source.deb822 == (suffix == ".sources") and "deb" in source.types
        ]
        known = {(source.uris, source.suites) for _, source in found if "deb-src" in source.types}
        added = [source for source in added if (source.uris, source.suites) not in known]
        if added:
            text = sources_list.text_of(added).encode()
            _put(rootfs, folder, text, f"/etc/apt/sources.list.d/{SOURCE_INDEXES}{suffix}")


def remove_source_indexes(rootfs: Rootfs) -> None:
    """Remove what `add_source_indexes` added."""
    for suffix in sources_list.SUFFIXES:
        rootfs.remove(f"/etc/apt/sources.list.d/{SOURCE_INDEXES}{suffix}")


def _suffix(text: str) -> str:
    return ".sources" if re.search(r"^Types\s*:", text, re.MULTILINE | re.IGNORECASE) else ".list"


def _count(text: str) -> int:
    """Return the number of lines or stanzas that a text should have."""
    lines = [line for line in text.split("\n") if not line.startswith("#")]
    if _suffix(text) == ".list":
        return len([line for line in lines if line.strip()])
    return len([stanza for stanza in re.split(r"\n\s*\n", "\n".join(lines)) if stanza.strip()])


def _signed_by(source: Source, names: Iterable[str]) -> Source:
    """Return a source that the keys verify, unless it states its own."""
    value = (" " if source.deb822 else ",").join(names)
    if not value or "signed-by" in source.options:
        return source
    return source._replace(options={**source.options, "signed-by": value})


def _own_sources(rootfs: Rootfs, folder: Path) -> Iterator[tuple[str, list[Source]]]:
    """Yield the path in the container and the enabled sources of each file."""
    copy = folder / "own-sources"
    (copy / "sources.list.d").mkdir(parents=True, exist_ok=True)
    for name in ("sources.list", "sources.list.d"):
        with contextlib.suppress(FileNotFoundError):
            rootfs.copy_out(f"etc/apt/{name}", copy / name)
    for path in [copy / "sources.list", *sorted((copy / "sources.list.d").iterdir())]:
        if sources_list.is_file_of_sources(path):
            text = path.read_text("utf-8", "replace")
            yield f"/etc/apt/{path.relative_to(copy)}", sources_list.parse(text, path.suffix)


def _use_snapshot(snapshot: str, rootfs: Rootfs, folder: Path, base: str) -> None:
    """Replace Debian's archives in a container's sources by their snapshots.

    Raises:
        ImageError: A source is not one of Debian's archives.
    """
    host = urllib.parse.urlsplit(SNAPSHOTS).hostname
    for path, sources in [found for found in _own_sources(rootfs, folder) if found[1]]:
        text = sources_list.text_of(_of_snapshot(source, snapshot, base) for source in sources)
        _put(rootfs, folder, text.encode(), path)
    # A priority above 1000 also replaces newer installed versions, as those of a base that is newer than the snapshot.
    preferences = f'Package: *\nPin: origin "{host}"\nPin-Priority: 1001\n'
    _put(rootfs, folder, preferences.encode(), SNAPSHOT_PREFERENCES)


def _of_snapshot(source: Source, snapshot: str, base: str) -> Source:
    archive = _archive(source)
    if not archive:
        raise ImageError(
            f"{base} has an apt source without snapshots: {' '.join((*source.uris, *source.suites))}.",
            "Use a base with only Debian's archives, and add other ones with sources=[…].",
        )
    options: Mapping[str, str] = {**source.options, "check-valid-until": "no"}
    return source._replace(uris=(f"{SNAPSHOTS}/{archive}/{snapshot}/",), options=options)


def _archive(source: Source) -> str:
    """Return the name of the Debian archive that a source mirrors; empty if it is another archive."""
    foreign = any("raspb" in uri.lower() for uri in source.uris)
    if not foreign and source.components and set(source.components) <= _COMPONENTS:
        for name, suites in (("debian", _MAIN), ("debian-security", _SECURITY)):
            if all(suites.fullmatch(suite) for suite in source.suites):
                return name
    return ""


def _put(rootfs: Rootfs, folder: Path, content: bytes, path: str) -> None:
    aside = folder / "aside"
    aside.write_bytes(content)
    aside.chmod(0o644)
    rootfs.copy_in(aside, path)
