"""Which local modules a Python file imports: found in its text, so that nobody has to list them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from .errors import SettingsError


def local_modules(script: Path) -> dict[str, Path]:
    """Find the modules beside a script that it imports, and those that they import.

    Args:
        script: a Python file.

    Returns:
        The file of each by its path below the script's folder, with `/`: a package's `__init__.py` is one of them.

    Raises:
        SettingsError: the script does not exist or is not Python; a module is not Python.
    """
    return modules_named(script.parent, imported_names(script), but=script)


def modules_named(folder: Path, names: Iterable[str], but: Path | None = None) -> dict[str, Path]:
    """Find the modules in a folder that have one of some dotted names, and those that they import.

    Args:
        folder: where to look.
        names: as `imported_names` returns them; names of other modules are passed over.
        but: a file to leave out.

    Raises:
        SettingsError: a module is not Python.
    """
    found: dict[str, Path] = {}
    todo = [("", tuple(names))]
    while todo:
        package, wanted = todo.pop()
        for name in wanted:
            for relative in _files_of(folder, name, package):
                path = folder / relative
                if relative not in found and path != but:
                    found[relative] = path
                    todo.append((str(Path(relative).parent) if "/" in relative else "", imported_names(path)))
    return dict(sorted(found.items()))


def imported_names(path: Path) -> tuple[str, ...]:
    """Return every dotted name that a Python file might import a module by; relative ones begin with dots."""
    try:
        about = path.stat()
    except OSError as error:
        raise SettingsError(
            f"The buildscript {path} cannot be read: {error.strerror}.", "Its path is relative to dodo.py's folder."
        ) from error
    return _imported_names(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=4096)
def _imported_names(path: Path, _mtime: int, _size: int) -> tuple[str, ...]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are for the log of the run
            tree = ast.parse(path.read_bytes(), "script")
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.", "It has to be a file.") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}," if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else error
        raise SettingsError(f"{path}{line} is not Python: {what}.") from error
    return names_in(tree)


def names_in(tree: ast.AST) -> tuple[str, ...]:
    """Return every dotted name that the import statements of a piece of Python might import a module by."""
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(dict.fromkeys(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            names[start] = None
            joint = "" if start.endswith(".") or not start else "."
            names.update(dict.fromkeys(f"{start}{joint}{alias.name}" for alias in node.names))
    return tuple(names)


def _files_of(folder: Path, name: str, package: str) -> list[str]:
    """Return the files that importing a name loads, as paths below the folder; none where it is not local."""
    levels = len(name) - len(name.lstrip("."))
    parts = [part for part in name.split(".") if part and part != "*"]
    if levels:
        base = [part for part in package.split("/") if part]
        if levels > len(base):
            return []  # it leads out of the package: Python refuses it too
        parts = [*base[: len(base) - levels + 1], *parts]
    files = []
    for count in range(1, len(parts) + 1):
        stem = "/".join(parts[:count])
        if (folder / stem / "__init__.py").is_file():
            files.append(f"{stem}/__init__.py")
        elif (folder / f"{stem}.py").is_file():
            files.append(f"{stem}.py")
            break
        elif not (folder / stem).is_dir():
            break
    return files
