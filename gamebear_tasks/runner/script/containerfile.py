"""Containerfiles: build an image with buildah, from base images that are resolved as in the rest of a script.

Format: containerfile(5), https://docs.docker.com/reference/dockerfile/.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..host.arch import ARCHITECTURE_ANNOTATION, ARCHITECTURES, PLATFORMS
from ..host.buildah import BUILD_MARKER, ImageError
from ..host.subprocesses import last_lines, streamed
from ..images import base_images
from .container import BUILDAHS_OWN
from .context import LONG_ID, LONGEST, CommandError, Job, current

DOCKER_ONLY = ("HEALTHCHECK", "ONBUILD", "SHELL")
"""Instructions whose effect only images in Docker's format can record."""

STEP = re.compile(r"^(?:\[\d+/\d+\] )?STEP \d+(?:/\d+)?: (.+)$", re.MULTILINE)
"""Line in which buildah announces a step; only error messages depend on it."""

LAYER = re.compile(r"^(?:--> (?:Using cache )?([0-9a-f]{11,64})|([0-9a-f]{64}))$", re.MULTILINE)
"""Line in which buildah names an intermediate image or, at the end, the image."""

_DIRECTIVE = re.compile(r"#\s*(\w+)\s*=\s*(\S+)\s*")

_FROM = re.compile(r"(?:--platform=(\S+)\s+)?(\S+)(?:\s+as\s+(\S+))?", re.IGNORECASE)

_FLAGS = re.compile(r"\s*\w+(?:\s|[\\`]\r?\n)+(?:--\S+(?:\s|[\\`]\r?\n)+)*")
"""Start of an instruction: its name and flags."""

_COPIED_FROM = re.compile(r"(?<=--from=)[^\s,]+|(?<=[,=]from=)[^\s,]+")
"""Image or stage in the flags `--from=…` of `COPY` and `--mount=…,from=…` of `RUN`."""

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::([-+])([^}]*))?\})")

_HEREDOC = re.compile(r"<<-?([\"']?)([A-Za-z_]\w*)\1")


class BuildError(CommandError):
    """A step of a Containerfile failed."""

    def __init__(self, status: int, step: str, containerfile: Path, said: str) -> None:
        super().__init__(status, step.split(), str(containerfile), stderr=said)
        self.hint = f"Fix the step in {containerfile}; the log has its output."

    def __str__(self) -> str:
        return self.cause

    @property
    def cause(self) -> str:
        """The failure in a short line."""
        said = LONG_ID.sub("…", last_lines(self.stderr, 1).rstrip("."))
        step, said = (
            text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…" for text in (" ".join(self.cmd), said)
        )
        return f"{self.where}: `{step}` failed: {said}"


class Instruction(NamedTuple):  # NamedTuple, not a dataclass: see `capabilities.Facts`
    """An instruction, or a line without one.

    Attributes:
        name: In upper case; empty for an empty line or a comment.
        value: Arguments, with continuation lines joined.
        text: Original lines.
    """

    name: str
    value: str
    text: str


class Stage(NamedTuple):
    """A stage: the instructions from one `FROM` to the next.

    Attributes:
        name: Name in lower case; its number if it has none.
        base: Name of the base image or of an earlier stage, with variables replaced.
        platform: OCI platform of the base, with variables replaced; empty for the image's own.
        copied: Names of images or stages that files are copied from.
    """

    name: str
    base: str
    platform: str
    copied: tuple[str, ...]


def instructions(text: str) -> Iterator[Instruction]:
    """Yield the instructions of a Containerfile, and its other lines."""
    lines = text.splitlines(keepends=True)
    escape, number = "\\", 0
    for line in lines:
        directive = _DIRECTIVE.fullmatch(line.rstrip("\n"))
        if not directive:
            break
        if directive.group(1).lower() == "escape":
            escape = directive.group(2)
    while number < len(lines):
        start = number
        number += 1
        if _is_empty(lines[start]):
            yield Instruction("", "", lines[start])
            continue
        joined = lines[start].strip()
        while joined.endswith(escape) and number < len(lines):
            joined = joined[: -len(escape)]
            if not _is_empty(lines[number]):
                joined += lines[number].strip()
            else:
                joined += escape  # comments and empty lines do not end an instruction
            number += 1
        name, *rest = joined.split(None, 1)
        value = rest[0] if rest else ""
        if name.upper() in ("ADD", "COPY", "RUN"):
            for _, word in _HEREDOC.findall(value):
                ends = [n for n in range(number, len(lines)) if lines[n].strip() == word]
                number = ends[0] + 1 if ends else number
        yield Instruction(name.upper(), value.strip(), "".join(lines[start:number]))


def _is_empty(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def expanded(text: str, known: Mapping[str, str]) -> str:
    """Return a text with its variables replaced.

    Raises:
        ImageError: A variable has no value.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        default = match.group(4) or ""
        if match.group(3) == "+":
            return default if known.get(name) else ""
        if match.group(3) == "-":
            return known.get(name) or default
        if name not in known:
            raise ImageError(f"{text} is not an image: {name} has no value.", f"Set it: args={{{name!r}: …}}")
        return known[name]

    return _VARIABLE.sub(value, text)


def stages(parsed: Sequence[Instruction], args: Mapping[str, str], platforms: Mapping[str, str]) -> list[Stage]:
    """Return the stages of a Containerfile.

    Args:
        parsed: Its instructions.
        args: Values of its build arguments.
        platforms: The predefined arguments, such as `TARGETARCH`.

    Raises:
        ImageError: A `FROM` is invalid.
    """
    known = dict(platforms)
    found: list[Stage] = []
    for instruction in parsed:
        if instruction.name == "ARG" and not found:
            for word in _words(instruction.value):
                name, has_default, default = word.partition("=")
                if name in args:
                    known[name] = args[name]
                elif has_default:
                    known[name] = expanded(default, known)
        elif instruction.name == "FROM":
            match = _FROM.fullmatch(instruction.value)
            if not match:
                raise ImageError(f"`FROM {instruction.value}` is invalid.", "Write it as FROM image AS name.")
            platform, base, name = match.groups()
            known_base, known_platform = expanded(base, known), expanded(platform or "", known)
            found.append(Stage((name or str(len(found))).lower(), known_base, known_platform, ()))
        elif instruction.name in ("ADD", "COPY", "RUN") and found:
            copied = (*found[-1].copied, *_COPIED_FROM.findall(_flags(instruction)))
            found[-1] = found[-1]._replace(copied=copied)
    if not found:
        raise ImageError("the Containerfile has no FROM.", "Begin it with FROM image, or FROM scratch.")
    return found


def _flags(instruction: Instruction) -> str:
    match = _FLAGS.match(instruction.text)
    return match.group() if match else ""


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return []  # buildah reports the error


def needed(found: Sequence[Stage], target: str) -> list[int]:
    """Return the numbers of the stages that are built for a target; all of them if it does not exist."""
    wanted = number_of(found, target) if target else len(found) - 1
    waiting, taken = [wanted], set()
    while waiting:
        number = waiting.pop()
        if number < 0:
            return list(range(len(found)))
        if number not in taken:
            taken.add(number)
            earlier = found[:number]
            names = (found[number].base, *found[number].copied)
            waiting += [each for name in names if (each := number_of(earlier, name, is_base=name == names[0])) >= 0]
    return sorted(taken)


def number_of(found: Sequence[Stage], name: str, is_base: bool = False) -> int:
    """Return the number of the stage with a name or, except for a base, a number; -1 if there is none."""
    for number in range(len(found) - 1, -1, -1):
        if found[number].name == name.lower() and not (is_base and name.isdigit()):
            return number
    return int(name) if name.isdigit() and not is_base and int(name) < len(found) else -1


def rewritten(
    parsed: Sequence[Instruction], found: Sequence[Stage], wanted: Sequence[int], identity: Callable[[str, str], str]
) -> str:
    """Return a Containerfile with the ids of the images instead of their names.

    Args:
        parsed: Its instructions.
        found: Its stages.
        wanted: Numbers of the stages that are built.
        identity: Returns an image's id, from its name and its OCI platform; the platform is empty for the target's.
    """
    number = -1
    text = ""
    for instruction in parsed:
        number += instruction.name == "FROM"
        if number not in wanted or instruction.name not in ("ADD", "COPY", "FROM", "RUN"):
            text += instruction.text
            continue
        earlier = found[:number]
        if instruction.name == "FROM":
            stage = found[number]
            is_image = stage.base != "scratch" and number_of(earlier, stage.base, is_base=True) < 0
            base = identity(stage.base, stage.platform) if is_image else stage.base
            named = "" if stage.name == str(number) else f" AS {stage.name}"
            text += f"FROM {base}{named}\n"
        else:

            def image(match: re.Match[str], earlier: Sequence[Stage] = earlier) -> str:
                name = match.group()
                return name if number_of(earlier, name) >= 0 or "$" in name else identity(name, "")

            flags = _flags(instruction)
            text += _COPIED_FROM.sub(image, flags) + instruction.text[len(flags) :]
    return text


def predefined(target: str, builder: str) -> dict[str, str]:
    """Return the predefined build arguments, from Debian's names of two architectures."""
    known = {}
    for name, arch in (("TARGET", target), ("BUILD", builder)):
        architecture, variant = PLATFORMS[arch]
        known[f"{name}PLATFORM"] = "/".join(filter(None, ("linux", architecture, variant)))
        known |= {f"{name}OS": "linux", f"{name}ARCH": architecture, f"{name}VARIANT": variant}
    return known


def debian_architecture(platform: str) -> str:
    """Return Debian's name of an OCI platform's architecture.

    Raises:
        ImageError: It is unknown.
    """
    _, _, architecture = platform.partition("/")
    if architecture == "arm":
        return "armhf"
    for arch, (name, variant) in PLATFORMS.items():
        if architecture in (name, f"{name}/{variant}"):
            return arch
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    raise ImageError(f"platform {platform} is unknown.", "Write it as linux/arm64, for example.")


def build(containerfile: Path, context: Path, target: str, args: Mapping[str, str]) -> str:
    """Build an image and return its id; see `Image.build`.

    Raises:
        BuildError: A step failed.
        ImageError: A base image cannot be found or fetched, or the disk is full.
        OSError: The Containerfile cannot be read, or the context is not a folder.
        ValueError: An argument is invalid.
    """
    if containerfile.suffix == ".in":
        raise ValueError(f"Image.build: {containerfile} would need the C preprocessor; run it first")
    for name in args:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"Image.build: {name!r} is not the name of a build argument")
    parsed = list(instructions(containerfile.read_text("utf-8", "surrogateescape")))
    os.scandir(context).close()
    job = current()
    found = stages(parsed, args, predefined(job.arch, job.facts.arch))
    wanted = needed(found, target)
    last = found[wanted[-1]]
    arch = debian_architecture(last.platform) if last.platform else job.arch

    def identity(name: str, platform: str) -> str:
        with job.phases.phase("packages"):
            resolved = base_images.resolve(
                job.buildah, job.facts, name, debian_architecture(platform) if platform else job.arch
            )
        job.note_image(resolved, used=True, name=name)
        return resolved

    folder = Path(tempfile.mkdtemp(prefix="build-", dir=job.buildah.environment["TMPDIR"]))
    try:
        with job.buildah.looking_for_image():
            text = rewritten(parsed, found, wanted, identity)
            (folder / "Containerfile").write_text(text, "utf-8", "surrogateescape")
            return _build(job, folder, containerfile, context, target, args, arch, any_docker_only(parsed))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def any_docker_only(parsed: Sequence[Instruction]) -> bool:
    """Return whether an instruction needs an image in Docker's format."""
    return any(instruction.name in DOCKER_ONLY for instruction in parsed)


def _build(
    job: Job,
    folder: Path,
    containerfile: Path,
    context: Path,
    target: str,
    args: Mapping[str, str],
    arch: str,
    is_docker: bool,
) -> str:
    buildah = job.buildah
    usage = buildah("bud", "--help")
    architecture, variant = PLATFORMS[arch]
    # Without --iidfile, which hides the ids of the layers.
    words = ["--layers", "--force-rm", "--pull-never"]
    words += ["--file", str(folder / "Containerfile"), "--arch", architecture]
    if variant and "--variant" in usage:
        words += ["--variant", variant]
    if "--secret " in usage:
        # Marks the containers, whose names buildah chooses, so that they can be removed if buildah is killed.
        words += ["--secret", f"id={BUILD_MARKER}{buildah.prefix},src=/dev/null"]
    if job.facts.isolation != "chroot":
        words += ["--network", "host"]
    words += ["--format", "docker"] if is_docker else ["--annotation", f"{ARCHITECTURE_ANNOTATION}={job.arch}"]
    for suffix in (".containerignore", ".dockerignore"):
        ignored = containerfile.with_name(containerfile.name + suffix)
        if ignored.exists():
            words += ["--ignorefile", str(ignored.absolute())]
            break
    if target:
        words += ["--target", target]
    variables = {}
    for name, value in args.items():
        if value and name not in buildah.environment and not BUILDAHS_OWN.match(name):
            variables[name] = value  # not in the command line, which every user of the machine can read
            words += ["--build-arg", name]
        else:
            words += ["--build-arg", f"{name}={value}"]
    command = buildah.command("bud", *words, str(context.absolute()))
    with job.phases.phase("build"):
        status, said = streamed(command, {**variables, **buildah.environment}, kept=1 << 20)
    built = _note_images(job, said)
    if status:
        if buildah.is_disk_full():
            raise ImageError(f"the image of {containerfile} cannot be stored: the disk is full.", base_images.MAKE_ROOM)
        steps = STEP.findall(said)
        errors = [line for line in said.splitlines() if line.startswith("Error: ")] or said.splitlines()
        cause = re.sub(r"^Error: (?:building at STEP \".*?\": )?", "", errors[-1] if errors else "")
        cause = cause.partition(" &imagebuilder.")[0].replace(str(context.absolute()), str(context))
        raise BuildError(status, steps[-1] if steps else "buildah build", containerfile, cause)
    if not built:
        raise BuildError(status, "buildah build", containerfile, "the image is not in the store")
    return built


def _note_images(job: Job, said: str) -> str:
    """Record the use of the images that a build reports, and return the id of the last one, if it is the result.

    Garbage collection then removes them with the job.
    """
    ids: list[str] = [layer or image for layer, image in LAYER.findall(said)]
    if not ids:
        return ""
    listed = {entry["id"]: entry["names"] for entry in job.buildah.images(True)}
    for identity, names in listed.items():
        if not names and any(identity.startswith(each) for each in ids):
            job.buildah.note_use(identity)
    if ids[-1] not in listed:
        return ""
    job.buildah.note_use(ids[-1])
    return ids[-1]
