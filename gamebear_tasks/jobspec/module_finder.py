"""Module finder: detect the local modules that a Python file imports, by parsing it.

Parsing a file takes a hundred times as long as checking whether it changed, and thousands of artifacts may share a
script. So the results are cached, but only in memory: with 50 scripts in 2,000 tasks, a cache file saved 3 % of an
up-to-date run.
"""

from __future__ import annotations

import ast
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..runner.util.atomic_files import open_regular
from ..util.file_hashes import is_settled, version


def local_modules(script: Path) -> Mapping[str, Path]:
    """Find the modules beside a script that it imports, recursively.

    Args:
        script: path of a Python file. If it is a symbolic link, the folder of its target is searched, as Python does.

    Returns:
        The path of each module, by its path relative to the script's folder, with `/`. The `__init__.py` of a package
        counts as a module.

    Raises:
        SettingsError: the script does not exist or is not Python; a module is not Python.
    """
    path = str(script)
    names = imported_names(path)
    if not names:
        return {}
    real = _from_here(os.path.realpath(path)) if os.path.islink(path) else path
    folder, slash, name = real.rpartition("/")
    return modules_named(folder or slash, names, but=real if name == script.name else "")


def _from_here(path: str) -> str:
    """Make an absolute path relative if it is below the current folder."""
    here = os.path.join(os.getcwd(), "")
    return path[len(here) :] if path.startswith(here) else path


def modules_named(folder: str, names: str | Iterable[str], but: str = "") -> Mapping[str, Path]:
    """Find the modules in a folder by their dotted names, and the modules that they import, recursively.

    Args:
        folder: the folder to search; empty for the current one.
        names: dotted names, or a text as returned by `imported_names`. Names of other modules are ignored.
        but: path of a file to exclude.

    Returns:
        The path of each module, by its path relative to the folder.

    Raises:
        SettingsError: a module is not Python.
    """
    wanted = names if isinstance(names, str) else " ".join(names)
    known = _searches.get((folder, wanted))
    if known is None or not known.still_holds():
        known = _searches[folder, wanted] = _Search(folder, wanted)
    if but not in known.paths:
        return known.found
    return {name: path for name, path in known.found.items() if str(path) != but}


class _Search:
    """A cached search for modules: its result, and the file system queries that the result depends on.

    Attributes:
        found: path of each module, by its path relative to the folder.
        paths: the paths of the modules.
    """

    def __init__(self, folder: str, names: str) -> None:
        self._seen: list[tuple[Callable[[str], object], str, object]] = []
        self._folder = folder
        self._entries = self._look(_entries, folder or ".")
        found: dict[str, Path] = {}
        todo = [("", names)]
        while todo:
            package, wanted = todo.pop()
            for name in wanted.split():
                for relative in self._files_of(name, package):
                    if relative not in found:
                        path = self._path(relative)
                        found[relative] = Path(path)
                        todo.append((os.path.dirname(relative), self._look(imported_names, path)))
        self.found = dict(sorted(found.items()))
        self.paths = {str(path) for path in found.values()}

    def still_holds(self) -> bool:
        """Return whether the search would have the same result now."""
        if self._entries is None:
            return False
        try:
            for look, path, saw in self._seen:
                if look(path) is not saw:
                    return False
        except SettingsError:
            return False
        return True

    def _look(self, look: Callable[[str], Any], path: str) -> Any:
        saw = look(path)
        self._seen.append((look, path, saw))
        return saw

    def _path(self, relative: str) -> str:
        return os.path.join(self._folder, relative)

    def _files_of(self, name: str, package: str) -> list[str]:
        """Return the files that importing a name loads, relative to the folder; none if the module is not local."""
        levels = len(name) - len(name.lstrip("."))
        parts = [part for part in name.split(".") if part and part != "*"]
        if levels:
            base = [part for part in package.split("/") if part]
            if levels > len(base):
                return []  # relative import beyond the top-level package, which Python rejects too
            parts = [*base[: len(base) - levels + 1], *parts]
        files = []
        for count in range(1, len(parts) + 1):
            stem = "/".join(parts[:count])
            if self._is(os.path.isfile, f"{stem}/__init__.py"):
                files.append(f"{stem}/__init__.py")
            elif self._is(os.path.isfile, f"{stem}.py"):
                files.append(f"{stem}.py")
                break
            elif not self._is(os.path.isdir, stem):
                break
        return files

    def _is(self, kind: Callable[[str], bool], relative: str) -> bool:
        if self._entries is not None and relative.partition("/")[0] not in self._entries:
            return False
        is_so = kind(self._path(relative))
        if not is_so or kind is os.path.isdir:  # an existing file is parsed, which records the dependency
            self._seen.append((kind, self._path(relative), is_so))
        return is_so


_searches: dict[tuple[str, str], _Search] = {}


def imported_names(path: str) -> str:
    """Return every dotted name by which a Python file may import a module, separated by spaces.

    Relative names begin with dots. The text is interned: equal names are the same object.

    Raises:
        SettingsError: the file cannot be read, or is not Python.
    """
    try:
        about = os.stat(path)
    except OSError as error:
        name = path if path.isprintable() else repr(path)
        raise SettingsError(
            f"The buildscript {name} cannot be read: {error.strerror}.",
            "Fix its path, which is relative to the folder of dodo.py.",
        ) from error
    now = version(about)
    known = _files.get(path, "")
    if not known.startswith(now):
        known = now + _read_names(path)
        if is_settled(about):
            _files[path] = known
    return sys.intern(known[len(now) :])


_files: dict[str, str] = {}
"""Version (see `file_hashes`) and names, separated by spaces, of each file. They are a text, because thousands of lists
slow down garbage collection."""


def _entries(folder: str) -> frozenset[str] | None:
    """Return the names in a folder, the same object until the folder changes.

    None if the folder cannot be read, or was modified so recently that its timestamp is not reliable.
    """
    try:
        about = os.stat(folder)
        now = version(about)
        known = _folders.get(folder)
        if known is None or known[0] != now:
            if not is_settled(about):
                return None
            known = _folders[folder] = now, frozenset(os.listdir(folder))
    except OSError:
        return None
    return known[1]


_folders: dict[str, tuple[str, frozenset[str]]] = {}


def _read_names(path: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # running the script shows them in its log
            with open_regular(path) as file:
                tree = ast.parse(file.read(), "script")
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read: {error.strerror}.", "Use a regular file with read permission."
        ) from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}," if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else error
        raise SettingsError(f"{path}{line} is not Python: {what}.", "Fix it there.") from error
    return " ".join(names_in(tree))


def names_in(tree: ast.AST) -> tuple[str, ...]:
    """Return every dotted name by which the import statements of a syntax tree may import a module."""
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
