"""Digest of Python functions: a function is sent as a canonical pickle, whose SHA-256 the job's digest covers."""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import SettingsError
from .canonical_pickle import Lines, PickleError, dump
from .module_finder import modules_named

Function: TypeAlias = Callable[..., object]


@dataclass(frozen=True)
class PickledFunction:
    """A function as it was when `artifact()` was called.

    Attributes:
        name: its name in messages and in its job.
        data: its pickle (see `canonical_pickle`).
        modules: local modules that it imports, by path relative to the folder of its own module.
        lines: source positions of its code for tracebacks, as JSON: a list of `[file, first line, line table in
            Base64]`. The digest does not cover them.
    """

    name: str
    data: bytes
    modules: Mapping[str, Path]
    lines: bytes

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the pickle, in lower-case hex."""
        return hashlib.sha256(self.data).hexdigest()


def name_of(function: Function) -> str:
    """Return a function's name for messages and for its job."""
    return str(getattr(function, "__qualname__", type(function).__name__)).replace("/", "_")


def pickled(function: Function) -> PickledFunction:
    """Pickle a function canonically; everything that it uses from its own module is pickled by value.

    Raises:
        SettingsError: the function uses an object that cannot be pickled, or not reproducibly; a local module is not
            Python.
    """
    own = _own_module(function)
    try:
        done = dump(function, own)
    except PickleError as error:
        used = f" uses {error.used}, which" if error.used else ""
        raise SettingsError(
            f"The function {name_of(function)}{used} cannot be sent to a builder: {error.why}.",
            "Pass what it needs in args=, or use a buildscript.",
        ) from error
    return PickledFunction(name_of(function), done.data, _modules(own, done.imports), _lines(done.lines))


def _own_module(function: Any) -> Any:
    """Return the module that defines a function; None if it is unknown."""
    while isinstance(wrapped := getattr(function, "func", None), Callable):  # type: ignore[arg-type]
        function = wrapped  # functools.partial
    return sys.modules.get(getattr(function, "__module__", None) or "")


def _modules(own: Any, imports: frozenset[str]) -> dict[str, Path]:
    """Return the local modules among the imports: those in the folder that a function's own module is imported from."""
    file = getattr(own, "__file__", None)
    if not isinstance(file, str):
        return {}
    package = getattr(own, "__package__", None) or ""
    folder = Path(file).parents[len(package.split(".")) if package else 0]
    return {name: _from_here(path) for name, path in modules_named(str(folder), sorted(imports)).items()}


def _from_here(path: Path) -> Path:
    """Make a path relative if it is below the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _lines(lines: tuple[Lines, ...]) -> bytes:
    listed = [[each.file, each.first, base64.b64encode(each.table).decode()] for each in lines]
    return json.dumps(listed, separators=(",", ":")).encode()


def python_version() -> str:
    """Return `major.minor` of this Python; no other version can read its pickled functions."""
    return "{}.{}".format(*sys.version_info[:2])


def cloudpickle_archive() -> bytes:
    """Return the cloudpickle package as an importable zip archive, with reproducible bytes for each version."""
    import io
    import zipfile

    import cloudpickle

    folder = Path(inspect.getfile(cloudpickle)).parent
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.glob("*.py")):
            archive.writestr(zipfile.ZipInfo(f"cloudpickle/{path.name}", (1980, 1, 1, 0, 0, 0)), path.read_bytes())
    return buffer.getvalue()
