"""`gamebear init`: detect the build system of a project, and write the files that build it."""

from __future__ import annotations

import os
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from doit import get_var
from doit.cmdparse import CmdOption

from ...config import settings
from ...errors import SettingsError
from ...util.urls import shown
from ..command import ProjectCommand
from . import project_files
from .detection import DEPTH, KINDS, LIMIT, RESERVED, Tree, detect


class Init(ProjectCommand):
    """Writes the files of a new project."""

    doc_purpose = "detect the build system of a project, and write the files that build it"
    doc_usage = "[FOLDER|URL] [builder=URL] [arch=ARCH]"
    doc_description = f"""Uses the first of these kinds of projects that the files belong to:
{", ".join(kind.name for kind in KINDS)}.

Writes dodo.py, buildscripts/NAME.py, the table [tool.gamebear] of
pyproject.toml, and lines of .gitignore. Existing files are never
overwritten: missing lines are appended, and everything else stays.

FOLDER is the project, by default the current folder. With the URL of
a git repository, the files are written to the current folder, and
dodo.py pins the current commit of the repository's default branch."""
    cmd_options = ()

    def get_options(self) -> list[CmdOption]:
        """Return no options: those of the other commands find a `dodo.py`."""
        return []

    def _enter_project(self, options: Mapping[str, Any]) -> None:
        """Stay here: `dodo.py` does not exist yet."""

    def run(self, options: Mapping[str, Any], args: Sequence[str]) -> int:
        """Write the files."""
        if len(args) > 1:
            raise SettingsError(
                f"{self.bin_name} init takes one folder or URL, got {args[1]!r} too.",
                f"Run {self.bin_name} init once in each folder.",
            )
        self.print_lines(_created(args[0] if args else "."))
        return 0


def _created(place: str) -> Iterator[str]:
    url = place if not os.path.isdir(place) and re.match(r"[A-Za-z0-9+.-]+://|[^/:]+:(?!/)", place) else ""
    if not url:
        _enter(place)
    dodo = Path("dodo.py")
    if os.path.lexists(dodo):
        raise SettingsError(
            "dodo.py cannot be created: it exists.",
            "Add an artifact() to it, or run gamebear init in another folder.",
        )
    given = settings()
    commit = ""
    with tempfile.TemporaryDirectory() as scratch:
        if url:
            commit = _fetched(url, Path(scratch))
        tree = Tree(Path(scratch) if url else Path())
        kinds = detect(tree)
        if not kinds:
            raise SettingsError(
                f"{Path.cwd() if place == '.' else place} cannot be set up: no build system was found"
                f" ({', '.join(kind.name for kind in KINDS)}).",
                "Change to the folder with its Makefile or similar, or write dodo.py yourself.",
            )
        name = project_files.task_name(_base_name(url) if url else Path.cwd().name, _taken())
        (kind, found), *others = kinds
        recipe = kind.recipe(tree, name, given.arch)
    more = f"; not used: {', '.join(f'{other.name} ({file})' for other, file in others)}" if others else ""
    yield f"{kind.name} found ({found}){more}"
    title = f"Build {name} with {kind.name}." if kind.page in TOOLS else f"Build the {kind.name} {name}."
    yield project_files.add_settings(Path("pyproject.toml"), _chosen(given.builder))
    yield project_files.create(Path("buildscripts", f"{name}.py"), recipe.script(title))
    yield project_files.ignore(Path(".gitignore"))
    yield project_files.create(dodo, project_files.dodo(name, title, recipe.outputs, url, commit))
    yield f"Next: run doit. If the build lacks a package, add it to buildscripts/{name}.py"


TOOLS = {"cmake", "meson", "autotools", "make", "cargo", "go"}
"""Kinds that are named by their tool."""


def _enter(place: str) -> None:
    """Change to the project's folder.

    Raises:
        SettingsError: It is not a folder.
    """
    try:
        os.chdir(place)
    except OSError as error:
        raise SettingsError(
            f"{place!r} cannot be set up: {error.strerror}.",
            "Name a folder, or the URL of a git repository.",
        ) from error


def _fetched(url: str, folder: Path) -> str:
    """Write the files of a repository that detection reads into a folder. Return the commit.

    Raises:
        SourceError: The repository cannot be fetched.
    """
    from ...sources.cache import sources_folder
    from ...sources.declare import git
    from ...sources.lockfile import Lock

    commit = git(url, "HEAD").resolve().commit
    tree = git(url, commit).fetch(sources_folder(), Lock())
    with tarfile.open(tree) as tar:
        for member in tar:
            if member.isfile() and member.size <= LIMIT and member.name.count("/") <= DEPTH:
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                path.write_bytes(content.read() if content else b"")
    return commit


def _base_name(url: str) -> str:
    return re.split(r"[/:]", url.rstrip("/"))[-1].removesuffix(".git")


def _taken() -> set[str]:
    """Return the names that `doit` or `gamebear` would take for a command, and those that outputs cannot have."""
    from doit.doit_cmd import DoitMain

    from ..main import COMMANDS

    return {*(command.get_name() for command in DoitMain.DOIT_CMDS), *COMMANDS, *RESERVED}


def _chosen(builder: str) -> dict[str, str]:
    """Return the settings of the new project: the builder, and the architecture if one is set."""
    arch = get_var("arch", "") or os.environ.get("GAMEBEAR_ARCH", "")
    chosen = {"builder": builder} if shown(builder) == builder else {}  # no passwords
    return {**chosen, "arch": arch} if arch else chosen
