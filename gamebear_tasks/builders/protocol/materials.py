"""What a result was built in, as a builder says it: to be checked, not believed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...runner.util.atomic_files import is_sha256
from .session import words_of

IMAGES = 20
"""The most images that are believed."""

PACKAGES = 20_000
"""The most packages of an image that are believed."""

CENTURIES = 1e10
"""Seconds since 1970 beyond which no time is believed."""


@dataclass(frozen=True)
class Package:
    """A Debian package that was installed.

    Attributes:
        name: its name.
        version: its version.
        arch: its own architecture, `all` for one that has none; empty where that is not known.
    """

    name: str
    version: str
    arch: str = ""


@dataclass(frozen=True)
class UsedImage:
    """An image that a job used.

    Attributes:
        id: SHA-256 of its configuration, its name in the image store.
        name: what the script, or the image made of it, called it.
        used: containers were made of it; else images that were used were made of it.
        gone: it was removed before anybody asked, and what is known is what the build noted.
        names: what it is called in the store.
        manifest: the digest that a registry knows it by, as `sha256:…`; empty where there is none.
        notes: what it says of itself: `base`, `base-id`, `created`, `mirror`, `suite`, …
        packages: what is installed in it.
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
    """What a result was built in.

    Attributes:
        images: the images.
        begun: when the job was begun, in seconds since 1970 by the builder's clock; 0 where that is not known.
        ended: when it ended.
        host: the machine's name.
        machine: its kind, as `uname -m` has it.
        python: the version of the Python that the runner has.
        buildah: the version of buildah.
        isolation: how buildah ran commands.
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
    def of_document(cls, said: Mapping[str, Any]) -> Materials:
        """Read what a builder says; what makes no sense is left out."""
        images = [_image(item) for item in _items(said.get("images"), IMAGES)]
        return cls(
            images=tuple(image for image in images if image is not None),
            begun=_time(said.get("begun")),
            ended=_time(said.get("ended")),
            host=_text(said.get("host")),
            machine=_text(said.get("machine")),
            python=_text(said.get("python")),
            buildah=_text(said.get("buildah")),
            isolation=_text(said.get("isolation")),
        )


def _image(item: object) -> UsedImage | None:
    said = item if isinstance(item, dict) else {}
    identity, notes = said.get("id"), said.get("notes")
    if not isinstance(identity, str) or not is_sha256(identity):
        return None
    packages = [
        Package(*map(_text, words))
        for words in _items(said.get("packages"), PACKAGES)
        if isinstance(words, list | tuple) and len(words) == 3 and words[0] and words[1]
    ]
    return UsedImage(
        id=identity,
        name=_text(said.get("name")),
        used=said.get("used") is True,
        gone=said.get("gone") is True,
        names=tuple(map(_text, _items(said.get("names"), IMAGES))),
        manifest=_text(said.get("manifest")),
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
    if type(value) in (int, float) and 0 <= value < CENTURIES:  # and so no NaN
        return float(value)
    return 0.0
