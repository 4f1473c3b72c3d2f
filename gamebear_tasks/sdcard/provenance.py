"""Provenance statement of a baked image. See `client.provenance`."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ..builders.protocol.materials import Materials
from ..client.provenance import CLOCK, IMAGE_TYPE, changed, details, resource, write_statement
from ..errors import JobError
from ..records.task_record import Record
from ..runner.util.atomic_files import sha256_of
from ..sources.base import public_url
from .recipe import Recipe


def write(recipe: Recipe, record: Record) -> Path:
    """Write the provenance statement of a baked image and return its path.

    Args:
        recipe: Declaration of the image.
        record: Record of the successful task.

    Raises:
        JobError: The image changed since it was baked, or cannot be read, or the statement cannot be written.
    """
    (made,) = record.outputs
    try:
        about = recipe.output.stat()
        if about.st_size != made.size or not -CLOCK < about.st_mtime - record.begun < record.seconds + CLOCK:
            raise changed(record, made)
        digest = sha256_of(recipe.output)
    except OSError as error:
        what = f"{error.filename} cannot be read: {error.strerror}."
        raise JobError(what, f"Run `doit {record.task}` again.") from error
    hashes = record.job["files"]
    assert isinstance(hashes, Mapping)
    files = [resource(str(path), sha256=hashes[str(path)], role=role) for path, role in _parts(recipe)]
    user = recipe.user
    if not isinstance(recipe.base, Path):
        known = resource(recipe.base.url.rpartition("/")[2], sha256=recipe.base.sha256, role="base")
        files.insert(0, {**known, "uri": public_url(recipe.base.url)})
    definition = {
        "buildType": IMAGE_TYPE,
        "externalParameters": {
            "base": str(recipe.base) if isinstance(recipe.base, Path) else public_url(recipe.base.url),
            "contents": [{"path": str(item.path), "destination": item.destination} for item in recipe.contents],
            "config": list(recipe.config),
            "cmdline": list(recipe.cmdline),
            "enable": list(recipe.enable),
            "hostname": recipe.hostname,
            "arch": recipe.arch,
            "user": user.name if user else "",
        },
        "internalParameters": {"recipe": record.digest},
        "resolvedDependencies": files,
    }
    here = Materials(
        begun=record.begun,
        ended=record.begun + record.seconds,
        host=platform.node(),
        python=platform.python_version(),
    )
    return write_statement(made.path, digest, definition, details(replace(record, builder="local:"), here))


def _parts(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Yield the input files of an image with their roles."""
    if isinstance(recipe.base, Path):
        yield recipe.base, "base"
    for item in recipe.contents:
        yield item.path, type(item).__name__.lower()
    for path in recipe.user.key_files if recipe.user else ():
        yield path, "key"
