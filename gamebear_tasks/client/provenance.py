"""Provenance statements of artifacts, in the in-toto and SLSA formats.

Each target has one at `<target>.intoto.json`: an in-toto Statement v1 with a predicate SLSA Provenance v1.
docs/reference/provenance.md documents the fields. A statement combines the task's record, the declaration of its
`artifact()`, and the builder's report on the images it used. The report is cached next to the task's log, so that the
builder is queried once.
Formats: https://in-toto.io/Statement/v1, https://slsa.dev/provenance/v1, https://github.com/package-url/purl-spec.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..builders.base import Builder, Traced
from ..builders.protocol.materials import Materials, UsedImage
from ..errors import BuilderError, JobError
from ..jobspec.plan import Plan
from ..records import task_log
from ..records.task_record import Made, Record
from ..runner.util.atomic_files import read_json, sha256_of, write_bytes
from ..runner.util.folder_archive import FolderError, sha256_of_folder
from ..sources.base import public_url
from ..util.messages import notice
from ..util.process import file_mode
from .install_outputs import statement_of

BUILD_TYPE = "urn:x-gamebear-tasks:job:v1"
"""`buildType` of a job's statement. It defines the meaning of the fields: docs/reference/provenance.md."""

Json = dict[str, Any]

IMAGE_TYPE = "urn:x-gamebear-tasks:image:v1"
"""`buildType` of the statement of an SD-card image that `sd_image()` bakes."""

CLOCK = 2.0
"""Seconds of tolerance for a file's timestamp: some file systems have a resolution of two seconds."""


def write(task: str, plan: Plan, record: Record, builder: Builder) -> list[Path]:
    """Write the statement of each target of a built task.

    Args:
        task: the task's name.
        plan: the task's declaration.
        record: the record of the successful build.
        builder: the builder that built it; queried for its images unless the cached report is current.

    Returns:
        The paths of the statements.

    Raises:
        JobError: a statement cannot be written.
        BuilderError: the builder cannot report what it used.
    """
    materials = _materials(task, record, builder)
    for image in materials.images:
        if image.gone and not image.packages:
            notice(f"{task}: the packages of {image.name or 'an image'} are unknown: the builder has removed the image")
    definition = _definition(plan, record, materials)
    run = details(record, materials)
    return [write_statement(made.path, made.sha256, definition, run) for made in record.outputs]


def write_statement(target: str, sha256: str, definition: Json, details: Json) -> Path:
    """Write the statement of a target and return the statement's path.

    Args:
        target: path of the target.
        sha256: SHA-256 of the target.
        definition: the predicate's `buildDefinition`.
        details: the predicate's `runDetails`.

    Raises:
        JobError: the statement cannot be written.
    """
    path = statement_of(Path(target))
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": Path(target).name, "digest": {"sha256": sha256}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {"buildDefinition": definition, "runDetails": details},
    }
    try:
        write_bytes(path, json.dumps(statement, indent=1).encode() + b"\n", mode=file_mode())
    except OSError as error:
        hint = "Free disk space, or check the owner of its folder."
        raise JobError(f"{path} cannot be written: {error.strerror}.", hint) from error
    return path


def check(record: Record) -> None:
    """Check that the targets have the SHA-256 of the record; raises JobError."""
    for made in record.outputs:
        if _sha256(made) != made.sha256:
            raise changed(record, made)


def changed(record: Record, made: Made) -> JobError:
    """Return the error for an artifact that does not match its record."""
    return JobError(
        f"{made.path} does not match the record of {record.task}: it was changed or removed.",
        f"Rebuild it: doit clean {record.task} && doit {record.task}",
    )


def _sha256(made: Made) -> str:
    try:
        return sha256_of_folder(made.path) if os.path.isdir(made.path) else sha256_of(made.path)
    except (OSError, FolderError):
        return ""


def _materials(task: str, record: Record, builder: Builder) -> Materials:
    """Return the images and packages that a job was built in, from the cache or from the builder.

    Raises:
        BuilderError: the builder cannot report them.
    """
    path = task_log.materials_of(task)
    run = {"task": task, "digest": record.digest, "attempt": record.attempt}
    known = read_json(path)
    if isinstance(known, dict) and known.get("run") == run and isinstance(known.get("report"), dict):
        return Materials.of_document(known["report"])
    if not isinstance(builder, Traced):
        raise BuilderError(
            f"{builder.url} does not support provenance.",
            "Set provenance=no, or use another builder.",
        )
    report = builder.materials(record.digest, record.attempt)
    with contextlib.suppress(OSError):  # without the cache, the builder is queried again
        write_bytes(path, json.dumps({"run": run, "report": report}).encode())
    return Materials.of_document(report)


def _definition(plan: Plan, record: Record, materials: Materials) -> Json:
    job = record.job
    kind = "function" if "function" in job else "script"
    return {
        "buildType": BUILD_TYPE,
        "externalParameters": {
            "program": {"kind": kind, "name": _mapping(job.get(kind)).get("name", "")},
            "args": job.get("args") or {},
            "arch": job.get("arch", ""),
            "inputs": {name: str(path) for name, path in plan.inputs.items()},
            "sources": {name: _declared(source) for name, source in plan.sources.items()},
            "outputs": sorted(plan.targets),
        },
        "internalParameters": {
            "job": record.digest,
            "attempt": record.attempt,
            "machine": materials.machine,
            "isolation": materials.isolation,
        },
        "resolvedDependencies": [
            *_files(plan, job, kind),
            *_sources(plan, job),
            *map(_image, materials.images),
            *_packages(materials),
        ],
    }


def _files(plan: Plan, job: Mapping[str, Any], kind: str) -> Iterator[Json]:
    program = _mapping(job.get(kind))
    where = {} if kind == "function" else {"path": str(plan.program)}
    yield resource(str(program.get("name")), sha256=program.get("sha256"), role=kind, **where)
    for name, file in _mapping(job.get("modules")).items():
        yield resource(name, sha256=file["sha256"], role="module")
    for name, file in _mapping(job.get("inputs")).items():
        yield resource(name, sha256=file["sha256"], role="input", path=str(plan.inputs.get(name, "")))


def _declared(source: object) -> Json:
    """Return a source as dodo.py declares it, without credentials, query and fragment of its URL."""
    fields = {name: getattr(source, name, None) for name in ("url", "rev", "submodules", "sha256", "strip", "package")}
    fields |= {name: getattr(source, name, None) for name in ("version", "suite")}
    if fields["url"]:
        fields["url"] = public_url(str(fields["url"]))
    return {
        "kind": type(source).__name__.lower(),
        **{name: value for name, value in fields.items() if value is not None},
    }


def _sources(plan: Plan, job: Mapping[str, Any]) -> Iterator[Json]:
    for name, identity in _mapping(job.get("sources")).items():
        url = public_url(str(getattr(plan.sources.get(name), "url", "")))
        if "git" in identity:
            commit = str(identity["git"])
            described = {**resource(name, role="source"), "digest": {"gitCommit": commit}}
            yield {**described, "uri": f"{_git_uri(url)}@{commit}"}
        elif "archive" in identity:
            yield {**resource(name, sha256=identity["archive"], role="source"), "uri": url}
        elif "debian" in identity:
            purl = debian_purl(str(identity["debian"]), str(identity["version"]), "source")
            yield {**resource(name, sha256=identity["dsc"], role="source", digestOf="the .dsc"), "uri": purl}
        elif "folder" in identity:
            yield resource(name, sha256=identity["folder"], role="source", digestOf="the folder's manifest")


def _git_uri(url: str) -> str:
    """Convert a repository address as accepted by `git fetch` to a URI in SPDX form."""
    if "://" in url:
        return url if url.startswith("git") else f"git+{url}"
    host, colon, path = url.partition(":")
    return f"git+ssh://{host}/{path.lstrip('/')}" if colon and "/" not in host else f"git+file://{url}"


def _image(image: UsedImage) -> Json:
    about = {name: image.notes.get(name, "") for name in ("base", "base-id", "suite", "mirror")}
    about["created"] = image.notes.get("created") or image.notes.get("date") or ""
    about["mirror"] = public_url(about["mirror"])
    about["manifest"] = image.manifest
    about["origin"] = _origin(image)
    role = "package image" if about["base-id"] else "image" if image.used else "base image"
    return resource(image.name or image.id[:12], sha256=image.id, role=role, **about)


def _origin(image: UsedImage) -> str:
    """Return the origin of an image, judged by its annotations and names: `built`, `registry`, `bootstrap` or empty."""
    ours = [name.removeprefix("localhost/gamebear-base:") for name in image.names if "/gamebear-base:" in name]
    if image.notes.get("base-id"):
        return "built"
    if any(name.startswith("pulled-") for name in ours):
        return "registry"
    return "bootstrap" if ours else ""


def _packages(materials: Materials) -> Iterator[Json]:
    seen = set()
    for image in materials.images:
        vendor = re.search("ubuntu|raspbian", f"{image.name} {image.notes.get('base', '')}")
        for package in image.packages:
            purl = debian_purl(package.name, package.version, package.arch, vendor[0] if vendor else "debian")
            if purl not in seen:
                seen.add(purl)
                yield {**resource(package.name, role="package", image=image.id), "uri": purl}


def details(record: Record, materials: Materials) -> Json:
    """Return a statement's `runDetails`: the builder, the time and the log of the build."""
    builder = record.builder
    version = {"gamebear-tasks": _own_version(), "buildah": materials.buildah, "python": materials.python}
    times = {"startedOn": materials.begun, "finishedOn": materials.ended}
    logs = []
    if task_log.noted(record.task) == (record.digest, record.attempt):
        with contextlib.suppress(OSError):
            logs.append(resource("log", sha256=sha256_of(task_log.path_of(record.task))))
    return {
        "builder": {
            "id": f"local://{materials.host}" if builder == "local:" else builder,
            "version": {name: text for name, text in version.items() if text},
        },
        "metadata": {
            "invocationId": f"{record.digest}/{record.attempt}".rstrip("/"),
            **{name: _timestamp(seconds) for name, seconds in times.items() if seconds},
        },
        "byproducts": logs,
    }


def _own_version() -> str:
    try:
        return importlib.metadata.version("gamebear-tasks")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return ""


def resource(name: str, sha256: object = None, **annotations: str) -> Json:
    """Return an in-toto ResourceDescriptor; empty annotations are omitted."""
    about = {key: value for key, value in annotations.items() if value}
    return {
        "name": name,
        **({"digest": {"sha256": str(sha256)}} if sha256 else {}),
        **({"annotations": about} if about else {}),
    }


def debian_purl(name: str, version: str, arch: str, vendor: str = "debian") -> str:
    """Return the package URL of a Debian package (purl-spec, type `deb`); `arch` may be empty."""

    def encoded(text: str) -> str:
        return urllib.parse.quote(text, safe=":~")

    return f"pkg:deb/{vendor}/{encoded(name)}@{encoded(version)}" + (f"?arch={encoded(arch)}" if arch else "")


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
