"""`Image` and `packages_image`, as a buildscript sees them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..host.arch import ARCHITECTURE_ANNOTATION, PLATFORMS
from ..host.buildah import BuildahError, ImageError
from ..images import base_images, package_images
from ..store.expiry import policy_of
from .context import CommandError, current, run_buildah


class ImageNotFoundError(Exception):
    """There is no such image, or it cannot be had."""


def resolve(name: str) -> str:
    """Return the id of the image that a container is to be made of."""
    job = current()
    try:
        with job.phases.phase("packages"):
            return base_images.resolve(job.buildah, job.facts, name, job.arch)
    except ImageError as error:
        raise ImageNotFoundError(str(error)) from None


def _find(name: str) -> str:
    """Return the id of a local image, empty where there is none for this architecture; asks no network.

    An image that a job has committed is found again by jobs for the same architecture, whatever it holds.
    """
    job = current()
    hexadecimal = re.fullmatch(r"(?:sha256:)?([0-9a-f]{12,64})", name)
    if hexadecimal:
        found = _inspect_image(hexadecimal[1])
        if found and found["FromImageID"].startswith(hexadecimal[1]):
            return str(found["FromImageID"])
    if not re.fullmatch(r"[A-Za-z0-9][\w.:/@+-]{0,499}", name, re.ASCII):
        return ""
    qualified = base_images.qualified(name)
    places = [qualified]
    if not _names_registry(name):
        last = name.rpartition("/")[2]
        places.insert(0, f"localhost/{name}" + ("" if ":" in last or "@" in last else ":latest"))
    for place in places:
        found = _inspect_image(place)
        if not found:
            continue
        made_for = (found.get("ImageAnnotations") or {}).get(ARCHITECTURE_ANNOTATION)
        fits = base_images.architecture(found)[0] == PLATFORMS.get(job.arch, (job.arch, ""))[0]
        named = qualified.split("/")[1] in base_images.REGISTRY_FOLDERS
        if made_for == job.arch or (made_for is None and (fits or named)):
            return str(found["FromImageID"])
    return ""


def _inspect_image(name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(current().buildah("inspect", "--type", "image", name))
    except BuildahError as error:
        if "not known" in error.stderr or "no such image" in error.stderr.lower():
            return {}
        raise CommandError(error.status, ["buildah", *error.command], stderr=error.stderr) from None
    return found


def _names_registry(name: str) -> bool:
    host, slash, _ = name.partition("/")
    return bool(slash) and ("." in host or ":" in host or host == "localhost")


class Image:
    """An image on the builder.

    With `with`, it is removed when the block ends, unless it has a name by then.

    Args:
        ident: its id (12 digits or more), or a name. Only a name with a registry's host in it
            (`docker.io/library/debian`) is asked for there; any other is one on the builder, or none.

    Raises:
        ImageNotFoundError: it is not there.
    """

    id: str
    _called = ""

    def __init__(self, ident: str | Image) -> None:
        if isinstance(ident, Image):
            self.id = ident.id
            self._called = ident._called
            return
        buildah = current().buildah
        with buildah.looking_for_image():
            found = _find(ident)
            if found:
                buildah.note_use(found)
        if not found and _names_registry(ident) and not ident.startswith("localhost/"):
            found = resolve(ident)
        if not found:
            raise ImageNotFoundError(
                f"No image {ident} for {current().arch} is on the builder; Image.pull() gets one from a registry."
            )
        self.id = found
        self._called = ident

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"<Image {self.id}>"

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Image) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __enter__(self) -> Image:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.tags():
            return
        job = current()
        if job.notes is not None and error is not None:
            return  # what is kept may have been made from it; it goes as any that nobody uses
        try:
            job.remove_finished()
            run_buildah(f"image {self.id[:12]}", "rmi", self.id)
        except CommandError as failed:
            if error is None:
                raise
            print(f"gamebear: {failed}", file=sys.stderr)  # what went wrong first matters more

    @classmethod
    def pull(cls, name: str) -> Image:
        """Return the image of a name, fetched where it is not on the builder.

        Raises:
            ImageNotFoundError: it cannot be had.
        """
        return image_of(resolve(name), name)

    @classmethod
    def list(cls, name: str | None = None, *, all: bool = False) -> Iterator[dict[str, Any]]:
        """Give the images on the builder as `buildah images --json` describes them, with full ids.

        Args:
            name: only those of this name, any tag where it has none.
            all: intermediate images too.
        """
        wanted = set()
        if name is not None:
            wanted = {base_images.qualified(name), base_images.qualified(f"localhost/{name}")}
            has_tag = ":" in name.rpartition("/")[2] or "@" in name
        try:
            listed = current().buildah.images(all)
        except BuildahError as error:
            raise CommandError(error.status, ["buildah", *error.command], stderr=error.stderr) from None
        for entry in listed:
            names = entry["names"] if name is None or has_tag else [_with_tag(each) for each in entry["names"]]
            if name is None or wanted & set(names):
                yield entry

    def tags(self) -> Sequence[str]:
        """Return the image's names, registry and tag in each."""
        try:
            listed = current().buildah.images(True)
        except BuildahError as error:
            raise CommandError(error.status, ["buildah", *error.command], stderr=error.stderr) from None
        return next((entry["names"] for entry in listed if entry["id"] == self.id), ())

    def add_tag(self, tag: str) -> None:
        """Give the image a further name, `:latest` where it has no tag; one without a registry is `localhost/…`."""
        run_buildah(f"image {self.id[:12]}", "tag", self.id, tag)

    def inspect(self) -> dict[str, Any]:
        """Return what `buildah inspect` says about the image."""
        found: dict[str, Any] = json.loads(run_buildah(f"image {self.id[:12]}", "inspect", "--type", "image", self.id))
        return found


def image_of(identity: str, name: str = "") -> Image:
    """Return the image of a full id, which is known to be there; `name` is what to call it in messages."""
    image = Image.__new__(Image)
    image.id = identity
    image._called = name
    return image


def called(image: Image) -> str:
    """Return what to call an image in messages: what the script called it by, else the beginning of its id."""
    return image._called or image.id[:12]


def _with_tag(name: str) -> str:
    """Return a name with the tag `latest` in place of its own."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('@')[0].partition(':')[0]}:latest"


def packages_image(
    base: str | Image,
    names: Iterable[str],
    *,
    recommends: bool = False,
    max_age_days: float | None = None,
    rebuild: str = "base",
) -> Image:
    """Return the image of a base with Debian packages installed, built where the builder has none yet.

    Args:
        base: the base image, or its name.
        names: the packages, in any order; `name=version` and `name:architecture` too.
        recommends: whether to install what they recommend as well.
        max_age_days: build it anew when it is older than this; None: however old it is.
        rebuild: `base`: build it anew when the base's name has come to mean another image; `never`: not even then.

    Raises:
        ImageNotFoundError: the base or a package cannot be had.
        CommandError: buildah failed.
    """
    job = current()
    wanted = names if isinstance(names, str) else list(names)
    try:
        with job.phases.phase("packages"):
            identity = package_images.packages_image(
                job.buildah,
                job.facts,
                str(base),
                wanted,
                arch=job.arch,
                recommends=recommends,
                max_age_days=max_age_days,
                rebuild=rebuild,
            )
    except ImageError as error:
        raise ImageNotFoundError(str(error)) from None
    except BuildahError as error:
        raise CommandError(error.status, ["buildah", *error.command], stderr=error.stderr) from None
    image = image_of(identity, f"{called(base) if isinstance(base, Image) else base} with {' '.join(wanted)}".rstrip())
    if rebuild != "never":
        notes = image.inspect().get("ImageAnnotations") or {}
        if wanted:
            job.note_image(identity, notes=notes)
        base_id = notes.get("gamebear.base-id", identity) if wanted else identity
        job.policies.append(policy_of(str(base), base_id, wanted, job.arch, notes, max_age_days))
    return image
