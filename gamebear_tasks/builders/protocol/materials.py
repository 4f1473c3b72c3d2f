"""Materials of a result, as reported by a builder: untrusted, validated here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...runner.util.atomic_files import is_sha256
from .session import words_of

IMAGES = 20
"""Maximum number of images, and of names and notes of each."""

PACKAGES = 20_000
"""Maximum number of packages per image."""

CENTURIES = 1e10
"""Seconds since 1970; later timestamps are rejected."""


@dataclass(frozen=True)
class Package:
    """An installed Debian package.

    Attributes:
        name: name of the package.
        version: version of the package.
        arch: architecture of the package, `all` if it is independent of one; empty if unknown.
    """

    name: str
    version: str
    arch: str = ""


@dataclass(frozen=True)
class UsedImage:
    """An image that a job used.

    Attributes:
        id: SHA-256 of the image's configuration, its id in the image store.
        name: name by which the script, or the image built on it, refers to it.
        used: whether containers were created from it; False if only images that were used are built on it.
        gone: whether the image was removed before this request; its description then comes from the build's own notes.
        names: names in the image store.
        manifest: digest in a registry, as `sha256:…`; empty if there is none.
        notes: annotations: `base`, `base-id`, `created`, `mirror`, `suite`, …
        packages: installed packages.
    """

    id: str
    name: str
    used: bool
    gone: bool
    names: tuple[str, ...]
    manifest: str
    notes: Mapping[str, str]
    packages: tuple[Package, ...]


@dataclass(frozen=True)
class Materials:
    """The images and the machine with which a result was built.

    Attributes:
        images: the images.
        begun: start of the job in seconds since 1970, by the builder's clock; 0 if unknown.
        ended: end of the job, likewise.
        host: host name of the machine.
        machine: machine type, as in `uname -m`.
        python: version of the runner's Python.
        buildah: version of buildah.
        isolation: isolation with which buildah ran commands.
    """

    images: tuple[UsedImage, ...] = ()
    begun: float = 0.0
    ended: float = 0.0
    host: str = ""
    machine: str = ""
    python: str = ""
    buildah: str = ""
    isolation: str = ""

    @classmethod
    def of_document(cls, reply: Mapping[str, Any]) -> Materials:
        """Parse a builder's reply; invalid entries are left out."""
        images = [_image(item) for item in _items(reply.get("images"), IMAGES)]
        return cls(
            images=tuple(image for image in images if image is not None),
            begun=_time(reply.get("begun")),
            ended=_time(reply.get("ended")),
            host=_text(reply.get("host")),
            machine=_text(reply.get("machine")),
            python=_text(reply.get("python")),
            buildah=_text(reply.get("buildah")),
            isolation=_text(reply.get("isolation")),
        )


def _image(item: object) -> UsedImage | None:
    reply = item if isinstance(item, dict) else {}
    identity, notes = reply.get("id"), reply.get("notes")
    if not isinstance(identity, str) or not is_sha256(identity):
        return None
    packages = [
        Package(*map(_text, words))
        for words in _items(reply.get("packages"), PACKAGES)
        if isinstance(words, list | tuple) and len(words) == 3 and words[0] and words[1]
    ]
    return UsedImage(
        id=identity,
        name=_text(reply.get("name")),
        used=reply.get("used") is True,
        gone=reply.get("gone") is True,
        names=tuple(map(_text, _items(reply.get("names"), IMAGES))),
        manifest=_text(reply.get("manifest")),
        notes={
            _text(key).removeprefix("gamebear."): _text(value)
            for key, value in (list(notes.items())[:IMAGES] if isinstance(notes, dict) else ())
        },
        packages=tuple(packages),
    )


def _items(value: object, most: int) -> list[Any]:
    return value[:most] if isinstance(value, list) else []


def _text(value: object) -> str:
    return " ".join(words_of(value)[:500].split()) if isinstance(value, str) else ""


def _time(value: Any) -> float:
    if type(value) in (int, float) and 0 <= value < CENTURIES:  # rejects NaN
        return float(value)
    return 0.0
