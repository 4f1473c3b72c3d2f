"""The files of a new project: `dodo.py`, a buildscript, settings, ignored files. Existing lines are never changed."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import SettingsError
from .detection import parse_toml

IGNORED = ("build/", ".doit.db*")
"""Lines of `.gitignore`."""

FOLDER = 'folder(exclude=["/dodo.py", "/buildscripts/"])'
"""The project's folder without the files that build it: setuptools, for example, would take them for packages."""

DODO = '''"""Build {name}. Run `doit`."""

from gamebear_tasks import artifact, {kind}, live

DOIT_CONFIG = {{"default_tasks": ["{name}"], "reporter": live}}


def task_{name}():
    """{title}"""
    return artifact(
        "buildscripts/{name}.py",
        sources={{"src": {source}}},
        outputs={outputs},
    )
'''


def task_name(text: str, taken: Collection[str]) -> str:
    """Return a valid task name that resembles a text.

    Args:
        text: Name of a folder or repository.
        taken: Names that no task may have.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower() or "project"
    return f"build_{name}" if name[0].isdigit() or name in taken else name


def dodo(name: str, title: str, outputs: Iterable[str], url: str = "", commit: str = "") -> str:
    """Return the content of `dodo.py`.

    Args:
        name: The task.
        title: Its docstring.
        outputs: File names, folders and patterns below `build`.
        url: URL of a git repository. Default: the source is the project's folder.
        commit: Its commit.
    """
    source = f"git({_quoted(url)}, rev={_quoted(commit)})" if url else FOLDER
    paths = [f"build/{name}/{output}" if "*" in output else f"build/{output}" for output in outputs]
    return DODO.format(
        kind="git" if url else "folder",
        name=name,
        title=title,
        source=source,
        outputs=f"[{', '.join(map(_quoted, paths))}]",
    )


def create(path: Path, text: str) -> str:
    """Create a file if it does not exist. Return the line that reports it."""
    path.parent.mkdir(exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return f"{path} exists: left as it is"
    return f"{path} created"


def add_settings(path: Path, values: Mapping[str, str]) -> str:
    """Append the table `[tool.gamebear]` to a `pyproject.toml` that lacks it. Return the line that reports it.

    Raises:
        SettingsError: The file is invalid, or has the table `tool` in a form that cannot be extended.
    """
    text = "\n".join(["[tool.gamebear]", *(f"{name} = {_quoted(value)}" for name, value in values.items()), ""])
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return create(path, text)
    tool = _parsed(data, path).get("tool", {})
    if isinstance(tool, dict) and "gamebear" in tool:
        return f"{path} has [tool.gamebear]: left as it is"
    added = _appended(data, f"\n{text}" if data.strip() else text)
    _parsed(data + added, path)
    with path.open("ab") as file:
        file.write(added)
    return f"{path}: [tool.gamebear] added"


def ignore(path: Path) -> str:
    """Append the missing lines to `.gitignore`. Return the line that reports them."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    known = {line.strip().strip("/") for line in data.decode("utf-8", "replace").splitlines()}
    missing = [line for line in IGNORED if line.strip("/") not in known]
    if not missing:
        return f"{path} has {', '.join(IGNORED)}: left as it is"
    with path.open("ab") as file:
        file.write(_appended(data, "".join(f"{line}\n" for line in missing)))
    return f"{path}: {', '.join(missing)} added"


def _appended(data: bytes, text: str) -> bytes:
    """Return the bytes that append lines to a file, with its line ends."""
    end = "\r\n" if b"\r\n" in data else "\n"
    lines = text.replace("\n", end)
    return (lines if not data or data.endswith(b"\n") else end + lines).encode()


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    try:
        return parse_toml(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"{path} cannot be extended: {error}.", f"Correct {path}, and run gamebear init again."
        ) from error


def _quoted(text: str) -> str:
    """Return a string literal of Python and TOML."""
    return json.dumps(text)
