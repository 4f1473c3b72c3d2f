"""Materials of a job: its images and the Debian packages in them, for provenance.

A build records everything that it knows at no cost. The rest (an image's origin, the packages installed in a base) is
determined at the first request, while the image exists, and stored with the result::

    materials.json  {"complete": true, "by": {"python": "3.11.2", "buildah": "1.28.2", "isolation": "rootless"},
                     "images": {"<id>": {
                        "name": "debian:bookworm", "notes": {"<annotation>": "<value>"}, "used": true, "gone": false,
                        "names": ["localhost/gamebear-base:…"], "manifest": "sha256:…",
                        "packages": [["gcc", "4:12.2.0-3", "armhf"], …]}}}

`used`: containers were made from it. The other images are bases of used ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..host.buildah import Buildah, BuildahError, remove_containers
from ..host.capabilities import environment, namespace
from ..host.probe import facts
from ..host.rootfs import Rootfs
from ..host.subprocesses import captured
from ..images.package_images import NAME, Installed, installed
from ..protocol.wire import INVALID_REQUEST, MAX_HEADER
from ..script.context import MATERIALS, programs
from ..store.store import Store, StoredJob, runner_folder, stamp
from ..util.atomic_files import is_sha256, read_json, write_json
from ..util.errors import RunnerError

if TYPE_CHECKING:
    from ..protocol.replies import MaterialsReply, Programs

IMAGES = 20
"""Maximum number of images reported per job."""

PACKAGES = 20_000
"""Maximum number of packages reported per job."""

SECONDS = 50.0
"""Time limit in seconds for determining missing materials. Shorter than the client's reply timeout."""

NOTES = ("gamebear.base", "gamebear.base-id", "gamebear.created", "gamebear.date", "gamebear.mirror", "gamebear.suite")
"""Annotations that are reported."""


def materials(store: Store, digest: str, attempt: str) -> MaterialsReply:
    """Return the materials of a result.

    Returns:
        `images`: `id`, `name`, `used`, `gone` (it was removed before the first request), `names`, `manifest`, `notes`
            and `packages` of each, as far as known. `begun` and `ended`, in seconds since 1970 by this builder's clock.
            `host`, `machine`, `python`, `buildah` and `isolation`: the environment of the build.

    Raises:
        RunnerError: the result is not in the store, or its materials cannot be determined.
    """
    stored = store.job(digest)
    state = stored.written_state()
    if state["state"] != "done" or state["attempt"] != attempt:
        raise RunnerError(
            f"The result of job {digest[:12]} is no longer on the builder.",
            "Build it again: doit clean TASK, then doit TASK.",
        )
    known = facts(store.root)
    images = _images(stored)
    if images is None:
        command = [*namespace(known), sys.executable, "-I", "-S", str(runner_folder()), "materials", digest]
        status, _, _ = captured(command, environment(store.root, known), timeout=SECONDS)
        if status < 0:
            remove_containers(store.root, known, _prefix(stored))
        images = _images(stored)
    if images is None:
        raise RunnerError(
            f"The images of job {digest[:12]} cannot be listed on the builder.",
            "Check that `buildah images` works there, then try again.",
        )
    listed = [{"id": identity, **image} for identity, image in list(images.items())[:IMAGES]]
    if len(json.dumps(listed)) > MAX_HEADER // 2:
        raise RunnerError(f"The record of the images of job {digest[:12]} is too large.", INVALID_REQUEST)
    return {
        "images": listed,
        "begun": stamp(stored.folder / "order.json"),
        "ended": state.get("since"),
        "host": platform.node(),
        "machine": platform.machine(),
        **programs(known),
        **_recorded_programs(stored),
    }


def _recorded_programs(stored: StoredJob) -> Programs:
    """Return the `programs` recorded for a job; empty if it was built by a release that did not record them."""
    known = read_json(stored.folder / MATERIALS)
    recorded: Programs | None = known.get("by") if isinstance(known, dict) else None
    return recorded if isinstance(recorded, dict) else {}


def _images(stored: StoredJob) -> dict[str, Any] | None:
    """Return the recorded images of a job; None if the record is incomplete."""
    known = read_json(stored.folder / MATERIALS)
    if not isinstance(known, dict) or known.get("complete") is not True or not isinstance(known.get("images"), dict):
        return None
    return {identity: image for identity, image in known["images"].items() if isinstance(image, dict)}


def _prefix(stored: StoredJob) -> str:
    return f"{stored.container_prefix}materials-"


def main(digest: str) -> int:
    """Determine the missing materials of a job's images. Runs inside the namespace; returns the exit status."""
    store = Store()
    stored = store.job(digest)
    known = read_json(stored.folder / MATERIALS)
    recorded = known.get("images") if isinstance(known, dict) else None
    images: dict[str, Any] = dict(recorded) if isinstance(recorded, dict) else {}
    if not images:  # built by a release that did not record them
        with contextlib.suppress(OSError):
            images = {line: {"used": True} for line in (stored.folder / "images").read_text().splitlines()}
    buildah = Buildah(store.root, facts(store.root), _prefix(stored))
    found: dict[str, Any] = {}
    waiting = list(images.items())
    left = PACKAGES
    with buildah.looking_for_image():
        while waiting and len(found) < IMAGES:
            identity, image = waiting.pop(0)
            if identity in found or not is_sha256(identity):
                continue
            found[identity] = image = _completed(buildah, identity, image)
            del image["packages"][left:]
            left -= len(image["packages"])
            base = image["notes"].get("gamebear.base-id")
            if base is not None:
                waiting.append((base, {"name": image["notes"].get("gamebear.base", "")}))
    write_json(stored.folder / MATERIALS, {"complete": True, "images": found, "by": _recorded_programs(stored)})
    return 0


def _completed(buildah: Buildah, identity: str, image: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded description of an image, completed from the image store."""
    notes = image.get("notes") or {}
    described: dict[str, Any] = {"name": image.get("name", ""), "used": bool(image.get("used")), "gone": False}
    try:
        inspected = json.loads(buildah("inspect", "--type", "image", identity))
        names = [entry["names"] for entry in buildah.images(True) if entry["id"] == identity]
        described["names"] = [str(name)[:500] for name in (names[0] if names else [])][:IMAGES]
        described["manifest"] = str(inspected.get("FromImageDigest") or "")[:100]
        if not notes and _is_package_image(described["names"]):
            notes = inspected.get("ImageAnnotations") or {}
        packages = _annotated_packages(notes) or (_packages_in(buildah, identity) if image.get("used") else [])
        origin = {**(inspected.get("ImageAnnotations") or {}), **notes}
    except (BuildahError, OSError, ValueError):
        described["gone"] = True
        packages = _annotated_packages(notes)
        origin = notes
    is_package_image = _is_package_image(described.get("names", ())) or bool(notes)
    # A script's image inherits the annotations of its base, of which the first two are wrong for it.
    valid = NOTES if is_package_image else NOTES[2:]
    described["notes"] = {name: str(origin[name])[:500] for name in valid if name in origin}
    described["packages"] = [[word[:500] for word in package] for package in packages]
    return described


def _is_package_image(names: Collection[str]) -> bool:
    """Return whether an image is a package image, by its names."""
    return any(name.startswith(f"localhost/{NAME}:") for name in names)


def _annotated_packages(notes: Mapping[str, str]) -> list[list[str]]:
    """Return the packages that a package image's annotations list: name, version, architecture (empty: unknown)."""
    every = set(str(notes.get("gamebear.all", "")).split())
    arch = str(notes.get("gamebear.arch", "")) if "gamebear.all" in notes else ""
    packages = []
    for word in str(notes.get("gamebear.installed", "")).split():
        called, _, version = word.partition("=")
        name, _, own = called.partition(":")
        packages.append([name, version, own or ("all" if name in every else arch)])
    return packages


def _packages_in(buildah: Buildah, identity: str) -> list[list[str]]:
    """Return the packages that dpkg in an image lists as installed: name, version, architecture.

    Raises:
        BuildahError: a container of the image cannot be made.
    """
    container = f"{buildah.prefix}{os.urandom(4).hex()}"
    folder = Path(tempfile.mkdtemp(prefix="materials-", dir=buildah.environment["TMPDIR"]))
    try:
        buildah("from", "--name", container, identity)
        rootfs = Rootfs(buildah("mount", container).rstrip("\n"))
        try:
            return [_described(package) for package in installed(rootfs, folder)]
        finally:
            rootfs.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(BuildahError):
            buildah("rm", container)


def _described(package: Installed) -> list[str]:
    return [package.name, package.version, package.arch]
