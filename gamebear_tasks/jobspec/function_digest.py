"""Python functions as jobs: a canonical pickle, which is what is sent and what the job's digest covers."""

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
        name: what it is called in messages and in its job.
        data: its pickle, see `canonical_pickle`.
        modules: the local modules that it imports, by their path below the folder of its own module.
        lines: where its code was written, as JSON: a list of `[file, first line, line table in Base64]`. It serves
            tracebacks, and the digest does not cover it.
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
    """Return what a function is called in messages and in its job."""
    return str(getattr(function, "__qualname__", type(function).__name__)).replace("/", "_")


def pickled(function: Function) -> PickledFunction:
    """Pickle a function, with what it uses of its own module by value.

    Raises:
        SettingsError: it uses something that cannot be pickled, or not in the same way twice; a local module is not
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
    """Return the module that a function belongs to; None where it has none."""
    while isinstance(wrapped := getattr(function, "func", None), Callable):  # type: ignore[arg-type]
        function = wrapped  # functools.partial
    return sys.modules.get(getattr(function, "__module__", None) or "")


def _modules(own: Any, imports: frozenset[str]) -> dict[str, Path]:
    """Return the local modules among some imports: those in the folder from which a function's module is imported."""
    file = getattr(own, "__file__", None)
    if not isinstance(file, str):
        return {}
    package = getattr(own, "__package__", None) or ""
    folder = Path(file).parents[len(package.split(".")) if package else 0]
    return {name: _from_here(path) for name, path in modules_named(str(folder), sorted(imports)).items()}


def _from_here(path: Path) -> Path:
    """Return a path as an author would write it: relative, where it is below the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _lines(lines: tuple[Lines, ...]) -> bytes:
    listed = [[each.file, each.first, base64.b64encode(each.table).decode()] for each in lines]
    return json.dumps(listed, separators=(",", ":")).encode()


def python_version() -> str:
    """Return `major.minor` of this Python: a pickled function is read by no other."""
    return "{}.{}".format(*sys.version_info[:2])


def cloudpickle_archive() -> bytes:
    """Return cloudpickle's own package as a zip that Python can import from, the same bytes for the same version."""
    import io
    import zipfile

    import cloudpickle

    folder = Path(inspect.getfile(cloudpickle)).parent
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.glob("*.py")):
            archive.writestr(zipfile.ZipInfo(f"cloudpickle/{path.name}", (1980, 1, 1, 0, 0, 0)), path.read_bytes())
    return buffer.getvalue()
