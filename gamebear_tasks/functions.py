"""A Python function as a job's program: what it is (for the digest) and its pickle (for the journey).

A pickle differs from one Python to the next and sometimes from one process to the next, so it cannot name a job. What
does is the function's source and that of whatever of its own module it uses, with the values it holds.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import hashlib
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from .errors import SettingsError
from .imports import modules_named, names_in
from .job import Json, canonical_json

Function: TypeAlias = Callable[..., object]


def name_of(function: Function) -> str:
    """Return what a function is called in messages and in its job."""
    return str(getattr(function, "__qualname__", type(function).__name__)).replace("/", "_")


def identity(function: Function) -> str:
    """Return a SHA-256 that changes when the function, or anything of its module that it uses, changes.

    Raises:
        SettingsError: it has no source, or uses a value for which no stable text is known.
    """
    return hashlib.sha256(canonical_json(_Description(function).describe(function))).hexdigest()


def modules(function: Function) -> dict[str, Path]:
    """Return the local modules, beside the function's own, that it uses, by their path below that folder.

    Raises:
        SettingsError: as `identity`.
    """
    description = _Description(function)
    description.describe(function)
    file = inspect.getsourcefile(inspect.unwrap(function))
    return modules_named(Path(file).parent, sorted(description.imports), but=Path(file)) if file else {}


def python_version() -> str:
    """Return `major.minor` of this Python: a pickled function is read by no other."""
    return "{}.{}".format(*sys.version_info[:2])


def pickled(function: Function) -> bytes:
    """Return the function as cloudpickle sends it, its own module by value.

    Raises:
        SettingsError: it holds something that cannot be pickled.
    """
    import cloudpickle

    module = sys.modules.get(function.__module__)
    registered = cloudpickle.list_registry_pickle_by_value()
    if module is not None and module.__name__ not in registered and module.__name__ != "__main__":
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(function, protocol=4))
    except Exception as error:
        raise SettingsError(
            f"The function {name_of(function)} cannot be sent to a builder: {error}.",
            "Give it what it needs as args=, or make it a buildscript.",
        ) from error


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


class _Description:
    """Describes a function and what it uses, each thing once."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.module = function.__module__
        self.seen: dict[int, str] = {}
        self.imports: set[str] = set()

    def describe(self, value: object) -> Json:
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        if isinstance(value, list | tuple):
            return {"list": [self.describe(item) for item in value]}
        if isinstance(value, set | frozenset):
            return {"set": sorted((self.describe(item) for item in value), key=canonical_json)}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"mapping": {key: self.describe(item) for key, item in value.items()}}
        if isinstance(value, types.ModuleType):
            self.imports.add(value.__name__)
            return {"import": value.__name__}
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            if value.__module__ != self.module:
                self.imports.add(value.__module__)
                return {"import": f"{value.__module__}.{value.__qualname__}"}
            return self._own(value)
        raise SettingsError(
            f"The function {name_of(self.function)} uses a {type(value).__name__} ({value!r:.60}), which has no stable"
            " text, so its job could not be found again by its digest.",
            "Give it plain values (args= is for that), or make it a buildscript.",
        )

    def _own(self, value: Any) -> Json:
        """Describe a function or class of the function's own module."""
        if id(value) in self.seen:
            return {"see": self.seen[id(value)]}
        self.seen[id(value)] = value.__qualname__
        try:
            source = textwrap.dedent(inspect.getsource(value))
        except (OSError, TypeError) as error:
            raise SettingsError(
                f"The function {name_of(self.function)} has no source to tell it by ({error}).",
                "Define it in dodo.py or in a module, or make it a buildscript.",
            ) from error
        with contextlib.suppress(SyntaxError):  # a lambda's source is the line that it stands in
            self.imports.update(names_in(ast.parse(source)))
        described: dict[str, Json] = {"name": value.__qualname__, "source": source}
        if isinstance(value, type):
            functions = [item for item in vars(value).values() if isinstance(item, types.FunctionType)]
            described["uses"] = {item.__name__: self._uses(item) for item in functions}
        else:
            described["defaults"] = self.describe(value.__defaults__ or ())
            described["kwdefaults"] = self.describe(value.__kwdefaults__ or {})
            described["uses"] = self._uses(value)
        return described

    def _uses(self, function: types.FunctionType) -> Json:
        uses: dict[str, Json] = {}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                uses[f"closure {name}"] = self.describe(cell.cell_contents)
            except ValueError:
                uses[f"closure {name}"] = None  # not bound yet
        for name in sorted(set(_global_names(function.__code__))):
            if name in function.__globals__:
                uses[name] = self.describe(function.__globals__[name])
        return uses


def _global_names(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)
