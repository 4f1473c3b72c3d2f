"""Which local modules a Python file imports: found in its text, so that nobody has to list them.

Reading a text costs a hundred times what looking whether it has changed does, and a `dodo.py` with two thousand
artifacts is loaded for every `doit list`. So what was read is remembered, also from one doit to the next.
"""

from __future__ import annotations

import ast
import atexit
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..runner.util.atomic_files import open_regular
from ..util.file_hashes import is_settled, read_cache, version, write_cache
from ..util.locations import LOGS

KEPT = LOGS / ".imports"
"""The cache of the names that each file imports, in a project that has logs; its `version` is the Python that read
them. By path: the file's version (see `hashing`) and the names, with spaces between."""


def local_modules(script: Path) -> Mapping[str, Path]:
    """Find the modules beside a script that it imports, and those that they import.

    Args:
        script: a Python file. Of a symbolic link, the folder of its target is searched, as Python does.

    Returns:
        The file of each by its path below the script's folder, with `/`: a package's `__init__.py` is one of them.

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
    """Return an absolute path as an author would write it: relative, where it is below the current folder."""
    here = os.path.join(os.getcwd(), "")
    return path[len(here) :] if path.startswith(here) else path


def modules_named(folder: str, names: str | Iterable[str], but: str = "") -> Mapping[str, Path]:
    """Find the modules in a folder that have one of some dotted names, and those that they import.

    Args:
        folder: where to look; empty for the current one.
        names: some, or a text as `imported_names` returns it; names of other modules are passed over.
        but: a file to leave out.

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
    """A search for modules: what was found, and all that it depended on."""

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
        """Say whether it would end in the same way now."""
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
        if not is_so or kind is os.path.isdir:  # a file that is there is read, and that is noted
            self._seen.append((kind, self._path(relative), is_so))
        return is_so


_searches: dict[tuple[str, str], _Search] = {}


def imported_names(path: str) -> str:
    """Return every dotted name that a Python file might import a module by, with spaces between.

    Relative ones begin with dots. As long as the names stay the same, so does the object.
    """
    try:
        about = os.stat(path)
    except OSError as error:
        name = path if path.isprintable() else repr(path)
        raise SettingsError(
            f"The buildscript {name} cannot be read: {error.strerror}.", "Its path is relative to dodo.py's folder."
        ) from error
    now = version(about)
    known = _files.get(path)
    if known is None:
        known = _kept().get(path, "")
    if not known.startswith(now):
        _new[path] = is_settled(about)
        known = now + _read_names(path)
    _files[path] = known
    return sys.intern(known[len(now) :])


_files: dict[str, str] = {}
"""What is known of each file, as in `KEPT`: texts only, for two thousand lists keep the garbage collector busy."""

_new: dict[str, bool] = {}
"""What has been read in this process, and whether it may be kept for the next."""


def _entries(folder: str) -> frozenset[str] | None:
    """Return what is in a folder, the same set as long as that stays the same; None where that cannot be said."""
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
            warnings.simplefilter("ignore")  # they are for the log of the run
            with open_regular(path) as file:
                tree = ast.parse(file.read(), "script")
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read: {error.strerror}.", "It has to be a file that you may read."
        ) from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}," if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else error
        raise SettingsError(f"{path}{line} is not Python: {what}.", "Mend it there.") from error
    return " ".join(names_in(tree))


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


# from one doit to the next


def _kept() -> dict[str, str]:
    """Return what an earlier doit has kept of the current folder; read once."""
    place = os.path.abspath(KEPT)
    if place not in _read:
        atexit.register(_keep, place)
        _read[place] = read_cache(place, _python())
    return _read[place]


_read: dict[str, dict[str, str]] = {}


def _python() -> str:
    return "{}.{}".format(*sys.version_info[:2])


def _keep(place: str) -> None:
    """Keep what was read for the next doit, in a project that has been built before."""
    if os.path.abspath(KEPT) == place and any(_new.values()):
        write_cache(place, _python(), {path: known for path, known in _files.items() if _new.get(path, True)})
