"""`Image` and `packages_image`: images, as buildscripts use them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..host.buildah import BuildahError, ImageError
from ..images import base_images, package_images
from ..images.apt_settings import NONE, Settings, build_dependencies
from ..store.expiry import policy_of
from ..util.atomic_files import written_aside
from .context import CommandError, current, run_buildah


class ImageNotFoundError(Exception):
    """The image, or a package of it, does not exist or cannot be fetched.

    Args:
        message: The failure.
        hint: Suggested fix.
    """

    def __init__(self, message: str = "", hint: str = "") -> None:
        super().__init__(f"{message} {hint}".rstrip())
        self.message = message
        self.hint = hint


def resolve(name: str) -> str:
    """Return the id of the image that a container is created from, after pulling or bootstrapping it if necessary."""
    job = current()
    try:
        with job.phases.phase("packages"):
            return base_images.resolve(job.buildah, job.facts, name, job.arch)
    except ImageError as error:
        raise ImageNotFoundError(error.message, error.hint) from None


def _local(name: str) -> str:
    """Return the id of a local image for the job's architecture, or an empty string.

    An image that a job committed matches every job for the same architecture, whatever the image contains.

    Raises:
        CommandError: buildah failed.
    """
    job = current()
    try:
        return base_images.local(job.buildah, name, job.arch)
    except BuildahError as error:
        raise CommandError(error.status, ["buildah", *error.command], stderr=error.stderr) from None


def _names_registry(name: str) -> bool:
    host, slash, _ = name.partition("/")
    return bool(slash) and ("." in host or ":" in host or host == "localhost")


class Image:
    """An image on the builder.

    `str(image)` is its id. Images are equal if their ids are. With `with image:`, the image is removed at the end of
    the block, unless it has a tag by then.

    Args:
        ident: Another `Image`, an id of 12 or more hexadecimal digits, or a name. Only a name with a registry's host
            (`docker.io/library/debian`) is looked up in a registry. Any other name must be on the builder.

    Raises:
        ImageNotFoundError: There is no such image for the job's architecture.

    Attributes:
        id: Id of the image, 64 hexadecimal digits.

    Example:
        ```python
        try:
            image = Image("gamebear-tools:1")
        except ImageNotFoundError:
            with Container("debian:bookworm") as c:
                c.run(["mkdir", "/tools"])
                image = c.commit()
            image.add_tag("gamebear-tools:1")
        ```
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
            found = _local(ident)
            if found:
                buildah.note_use(found)
        if not found and _names_registry(ident) and not ident.startswith("localhost/"):
            found = resolve(ident)
        if not found:
            raise ImageNotFoundError(
                f"image {ident} for {current().arch} is not on the builder.",
                f"Pull it from a registry: Image.pull({ident!r})",
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
            return  # a retained container may use it; garbage collection removes the image later
        try:
            job.remove_finished()
            run_buildah(f"image {self.id[:12]}", "rmi", self.id)
        except CommandError as failed:
            if error is None:
                raise
            print(f"gamebear: {failed}", file=sys.stderr)  # the first error is more important

    @classmethod
    def pull(cls, name: str) -> Image:
        """Return the image with a name; it is pulled or bootstrapped if the builder does not have it.

        An image that is already on the builder is not requested again.

        Args:
            name: Name of an image, as `Container` accepts it.

        Raises:
            ImageNotFoundError: The image does not exist or cannot be fetched.
        """
        return image_of(resolve(name), name)

    @classmethod
    def build(
        cls,
        containerfile: str | os.PathLike[str] = "Containerfile",
        *,
        context: str | os.PathLike[str] = ".",
        target: str | None = None,
        args: Mapping[str, object] | None = None,
    ) -> Image:
        """Build a Containerfile (or Dockerfile) and return the image.

        Base images are found as by `Container`: on the builder, in a registry, or by a bootstrap. The layers are cached
        on the builder, for all jobs. The image stays there, and `gamebear prune --images` removes it with its layers
        when no job uses it any longer. The format is OCI, or Docker if an instruction needs it.

        Args:
            containerfile: Path of the file; a relative path starts in the working directory.
            context: Folder that `COPY` and `ADD` copy from; a relative path starts in the working directory. Its
                `.containerignore` or `.dockerignore` applies.
            target: Name of the stage to build; None: the last one.
            args: Values of the build arguments (`ARG`), by name. The image's history records them: not for secrets.

        Raises:
            CommandError: A step failed; the message names it.
            ImageNotFoundError: A base image does not exist or cannot be fetched.
            FileNotFoundError: The Containerfile or the context does not exist.
            ValueError: The name of an argument is invalid.

        Example:
            ```python
            image = Image.build("source/Containerfile", context="source", args={"VERSION": "1.2"})
            ```
        """
        from . import containerfile as files  # deferred: needed by few scripts, and it imports `container`

        path, values = Path(containerfile), {name: str(value) for name, value in (args or {}).items()}
        try:
            return image_of(files.build(path, Path(context), target or "", values), str(path))
        except ImageError as error:
            raise ImageNotFoundError(error.message, error.hint) from None
        except BuildahError as error:
            raise CommandError(error.status, ["buildah", *error.command], stderr=error.stderr) from None

    @classmethod
    def list(cls, name: str | None = None, *, all: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the images on the builder, of every architecture.

        Args:
            name: Only images with this name. Without a tag, it matches every tag.
            all: Include intermediate images.

        Yields:
            A dict in the format of `buildah images --json`, with the full `id` and a list of `names`.

        Raises:
            CommandError: buildah failed.
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
            names = entry["names"]
            if name is not None and not has_tag:
                names = [f"{base_images.repository(each)}:latest" for each in names]
            if name is None or wanted & set(names):
                yield entry

    def tags(self) -> Sequence[str]:
        """Return the image's names, each with registry and tag (`localhost/hello:1`).

        Raises:
            CommandError: buildah failed.
        """
        try:
            listed = current().buildah.images(True)
        except BuildahError as error:
            raise CommandError(error.status, ["buildah", *error.command], stderr=error.stderr) from None
        return next((entry["names"] for entry in listed if entry["id"] == self.id), ())

    def add_tag(self, tag: str) -> None:
        """Add a name to the image.

        An image with a name stays on the builder until it is removed explicitly.

        Args:
            tag: The name. Without a registry it becomes `localhost/…`, without a tag `…:latest`.

        Raises:
            CommandError: buildah failed.
        """
        run_buildah(f"image {self.id[:12]}", "tag", self.id, tag)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the image to a file, an uncompressed tar in the OCI image layout, for `podman load` and others.

        The same image gives the same bytes on builders with the same release of buildah, which compresses the layers.
        An image that is built again differs in its creation times.

        Args:
            path: Path of the file; a relative path starts in the working directory. An existing file is replaced.

        Raises:
            CommandError: buildah failed.
            OSError: The file cannot be written.

        Example:
            ```python
            image.save("hello.tar")  # the output hello.tar
            ```
        """
        import tarfile  # deferred: slow to import, and few scripts save an image

        target = Path(path)
        folder = Path(tempfile.mkdtemp(prefix="save-", dir=current().buildah.environment["TMPDIR"]))
        try:
            run_buildah(f"image {self.id[:12]}", "push", "--quiet", "--format", "oci", self.id, f"oci:{folder}/layout")
            with written_aside(target, 0o644, sync=False) as file, tarfile.open(fileobj=file, mode="w") as tar:
                for found in sorted((folder / "layout").rglob("*")):
                    member = tarfile.TarInfo(str(found.relative_to(folder / "layout")))
                    if found.is_dir():
                        member.type, member.mode = tarfile.DIRTYPE, 0o755
                        tar.addfile(member)
                    else:
                        member.size = found.stat().st_size
                        with found.open("rb") as content:
                            tar.addfile(member, content)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def inspect(self) -> dict[str, Any]:
        """Return the output of `buildah inspect` for the image, as a dict.

        `["OCIv1"]["config"]` has the settings, `["ImageAnnotations"]` the annotations of a package image.

        Raises:
            CommandError: buildah failed.
        """
        found: dict[str, Any] = json.loads(run_buildah(f"image {self.id[:12]}", "inspect", "--type", "image", self.id))
        return found


def image_of(identity: str, name: str = "") -> Image:
    """Return an `Image` for the full id of an existing image; `name` is its name in messages."""
    image = Image.__new__(Image)
    image.id = identity
    image._called = name
    return image


def called(image: Image) -> str:
    """Return an image's name for messages: the name that the script used, or else the first digits of the id."""
    return image._called or image.id[:12]


def packages_image(
    base: str | Image,
    names: Iterable[str] = (),
    *,
    build_dep: str | os.PathLike[str] | None = None,
    sources: Iterable[str] = (),
    keys: Iterable[str | os.PathLike[str]] = (),
    snapshot: str | None = None,
    recommends: bool = False,
    max_age_days: float | None = None,
    rebuild: str = "base",
) -> Image:
    """Return an image with Debian packages installed into a base image; it is built if the builder does not have it.

    The image is cached on the builder, for all jobs. Its tag is a hash of the base, the architecture, the set of
    packages and the options. Jobs that need the same image at the same time share one installation.

    Args:
        base: Base image, or its name. It must contain `apt-get`.
        names: The packages, in any order; `name=version`, `name/suite` and `name:architecture` are possible. Without
            packages and the options below, the result is the base.
        build_dep: Also install the build dependencies of a Debian source package: its name, or a folder in the working
            directory with its `debian/control`.
        sources: Additional apt sources: lines (`deb URL SUITE main`) or deb822 stanzas.
        keys: Files in the working directory with the public keys that sign those of `sources` without `Signed-By`.
        snapshot: Install the versions that Debian had at a time, such as `20261101T000000Z`, from snapshot.debian.org.
            The base's packages are replaced by these versions, too.
        recommends: Also install the recommended packages.
        max_age_days: Days after which the image is rebuilt; None: never because of its age.
        rebuild: `"base"`: rebuild the image if the base's name refers to another image now. `"never"`: keep it even
            then.

    Raises:
        ImageNotFoundError: The base or a package does not exist or cannot be fetched.
        ValueError: An argument is invalid, or `rebuild="never"` is combined with `max_age_days`.
        OSError: A file of `keys` or a `debian/control` cannot be read.
        CommandError: buildah failed.

    Example:
        ```python
        image = packages_image("debian:bookworm", ["gcc", "libc6-dev", "make"], max_age_days=30)
        with Container(image) as c:
            c.run(["gcc", "--version"])
        ```
    """
    job = current()
    wanted = names if isinstance(names, str) else list(names)
    for name, value in (("sources", sources), ("keys", keys)):
        if isinstance(value, (str, bytes)):
            raise ValueError(f"packages_image: {name} is a string, expected a list of strings")
    package, control = _build_dependencies(build_dep)
    settings = Settings(tuple(sources), tuple(Path(key).read_bytes() for key in keys), snapshot or "", package, control)
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
                settings=settings,
            )
    except ImageError as error:
        raise ImageNotFoundError(error.message, error.hint) from None
    except BuildahError as error:
        raise CommandError(error.status, ["buildah", *error.command], stderr=error.stderr) from None
    contents = [*wanted, *([f"src:{package}"] if package else [])]
    image = image_of(
        identity, f"{called(base) if isinstance(base, Image) else base} with {' '.join(contents)}".rstrip()
    )
    if rebuild != "never":
        notes = image.inspect().get("ImageAnnotations") or {}
        is_base = not contents and settings == NONE
        if not is_base:
            job.note_image(identity, notes=notes)
        base_id = identity if is_base else notes.get("gamebear.base-id", identity)
        job.policies.append(policy_of(str(base), base_id, contents, job.arch, notes, max_age_days))
    return image


def _build_dependencies(build_dep: str | os.PathLike[str] | None) -> tuple[str, str]:
    """Return a source package's name, and its build dependencies as fields if they come from a folder.

    Raises:
        FileNotFoundError: The folder has no debian/control.
        ValueError: That file is invalid.
    """
    if build_dep is None:
        return "", ""
    folder = Path(build_dep)
    if folder.is_dir() or len(folder.parts) > 1 or not isinstance(build_dep, str):
        return build_dependencies((folder / "debian/control").read_text("utf-8", "surrogateescape"))
    if not build_dep:
        raise ValueError("packages_image: build_dep is empty, expected the name of a source package or a folder")
    return build_dep, ""
