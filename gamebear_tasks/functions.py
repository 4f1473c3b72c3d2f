"""A Python function as a job's program: what it is (for the digest) and its pickle (for the journey).

A pickle differs from one Python to the next and sometimes from one process to the next, so it cannot name a job. What
does is the function's source and that of whatever of its own module it uses, with the values it holds. It is told when
dodo.py has just been loaded: the source on the disk may be another when the function is sent, hours later.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import importlib.util
import inspect
import math
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
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
    return hashlib.sha256(canonical_json(_described(function)[0])).hexdigest()


def modules(function: Function) -> dict[str, Path]:
    """Return the local modules that a function imports, by their path below the folder they are found in.

    That folder is the one from which the function's own module is imported.

    Raises:
        SettingsError: as `identity`.
    """
    _, imports = _described(function)
    file = inspect.getsourcefile(inspect.unwrap(function))
    if not file:
        return {}
    own = sys.modules.get(function.__module__)
    package = getattr(own, "__package__", None) or ""
    folder = Path(file).parents[len(package.split(".")) if package else 0]
    return {name: _from_here(path) for name, path in modules_named(str(folder), sorted(imports)).items()}


def _described(function: Function) -> tuple[Json, set[str]]:
    """Return a function's description and the dotted names of what it imports."""
    description = _Description(function)
    try:
        described = description.describe(function, "itself")
        canonical_json(described)
    except (RecursionError, ValueError) as error:
        raise description.refusal("a value that contains itself, or is too large") from error
    return described, description.imports


def _from_here(path: Path) -> Path:
    """Return a path as an author would write it: relative, where it is below the current folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def python_version() -> str:
    """Return `major.minor` of this Python: a pickled function is read by no other."""
    return "{}.{}".format(*sys.version_info[:2])


def pickled(function: Function) -> bytes:
    """Return the function as cloudpickle sends it, its own module by value.

    Raises:
        SettingsError: it holds something that cannot be pickled.
    """
    import cloudpickle

    module = sys.modules.get(function.__module__ or "")
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


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class _Description:
    """Describes a function and what it uses, each thing once."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.module = getattr(function, "__module__", None)
        self.seen: dict[int, str] = {}
        self.imports: set[str] = set()

    def refusal(self, what: str) -> SettingsError:
        """Return the error that says why a function cannot be a job's program."""
        return SettingsError(
            f"The function {name_of(self.function)} uses {what}, which has no stable text to be told by, so its job"
            " could not be found again by its digest.",
            "Give it plain values (args= is for that), or make it a buildscript.",
        )

    def describe(self, value: object, name: str) -> Json:
        """Return a text, as JSON, that stands for a value.

        Args:
            value: what the function uses.
            name: what the function knows it under.
        """
        kind = type(value).__name__
        if value is None or isinstance(value, bool | int | str):
            return {"value": value}
        if isinstance(value, float):
            return {"value": value} if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        if isinstance(value, list | tuple):
            return {kind: [self.describe(item, name) for item in value]}
        if isinstance(value, set | frozenset):
            return {kind: sorted((self.describe(item, name) for item in value), key=canonical_json)}
        if isinstance(value, dict):
            pairs = [[self.describe(key, name), self.describe(item, name)] for key, item in value.items()]
            return {kind: pairs}  # in order, which a program may go by
        if isinstance(value, PurePath):
            return {"path": str(value)}
        if isinstance(value, re.Pattern):
            return {"pattern": self.describe(value.pattern, name), "flags": value.flags}
        if isinstance(value, types.ModuleType):
            self.imports.add(value.__name__)
            return {"import": value.__name__}
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            if value.__module__ != self.module and _is_importable(value):
                self.imports.add(value.__module__)
                return {"import": f"{value.__module__}.{value.__qualname__}"}
            if not isinstance(value, types.BuiltinFunctionType):
                return self._own(value)
        raise self.refusal(f"{name}, a {kind}" if value is not self.function else f"a {kind}")

    def _own(self, value: Any) -> Json:
        """Describe a function or class that travels by value."""
        if id(value) in self.seen:
            return {"see": self.seen[id(value)]}
        self.seen[id(value)] = value.__qualname__
        is_class = isinstance(value, type)
        try:
            # of a function that a decorator has made: its own, and not that of the one it stands for
            source = textwrap.dedent(inspect.getsource(value if is_class else value.__code__))
        except (OSError, TypeError) as error:
            raise SettingsError(
                f"The function {name_of(self.function)} uses {value.__qualname__}, which has no source to be told by"
                f" ({error}).",
                "Define it in dodo.py or in a module, or make it a buildscript.",
            ) from error
        tree: ast.AST | None = None
        try:
            tree = ast.parse(source)
        except SyntaxError:
            pass  # a lambda's source is the line that it stands in
        else:
            self._import(names_in(tree), value)
        described: dict[str, Json] = {"name": value.__qualname__, "source": source}
        if is_class:
            space = vars(sys.modules.get(value.__module__, types))
            names = {name for name in _class_level_names(tree) if name in space} if tree else set()
            described["bases"] = [self.describe(base, base.__qualname__) for base in value.__bases__]
            described["uses"] = {name: self.describe(space[name], name) for name in sorted(names)}
            written = {item.name for item in ast.walk(tree) if isinstance(item, _DEFINITIONS)} if tree else set()
            described["methods"] = [[each.__qualname__, self._uses(each)] for each in _methods(value, written)]
        else:
            described["defaults"] = self.describe(value.__defaults__ or (), "a default")
            described["kwdefaults"] = self.describe(value.__kwdefaults__ or {}, "a default")
            described["uses"] = self._uses(value)
        return described

    def _import(self, names: Iterable[str], user: Any) -> None:
        """Note what import statements import, relative ones too."""
        package = getattr(sys.modules.get(user.__module__), "__package__", None)
        for name in names:
            if not name.startswith("."):
                self.imports.add(name)
            elif package:
                self.imports.add(importlib.util.resolve_name(name, package))

    def _uses(self, function: types.FunctionType) -> Json:
        """Describe what a function finds in its closure and among its module's names."""
        uses: dict[str, Json] = {}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                held = cell.cell_contents
            except ValueError:
                uses[f"closure {name}"] = None  # not bound yet
            else:
                uses[f"closure {name}"] = self.describe(held, name)
        names, attributes = _names(function.__code__)
        for name in sorted(names):
            if name in function.__globals__:
                value = function.__globals__[name]
                uses[name] = self.describe(value, name)
                if isinstance(value, types.ModuleType):
                    self.imports.update(_submodules(value.__name__, attributes))
        return uses


def _is_importable(value: Any) -> bool:
    """Say whether a class or function is found under its name in its module: pickles then say no more than the name."""
    found: object = sys.modules.get(value.__module__ or "")
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _submodules(package: str, attributes: set[str]) -> Iterator[str]:
    """Give the imported submodules of a package that can be reached by some attributes; as cloudpickle does."""
    for name in list(sys.modules):
        if name.startswith(f"{package}.") and attributes.issuperset(name[len(package) + 1 :].split(".")):
            yield name


def _names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Return the module's names that a piece of code loads, and all names in it, attributes included."""
    loads = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
    names = {str(item.argval) for item in dis.get_instructions(code) if item.opname in loads}
    attributes = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            more = _names(constant)
            names |= more[0]
            attributes |= more[1]
    return names, attributes


def _class_level_names(tree: ast.AST) -> Iterator[str]:
    """Give the names that a class's statement and body use, without those in its methods."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name):
            yield node.id
        if isinstance(node, _DEFINITIONS):
            todo += [*node.decorator_list, *node.args.defaults, *(item for item in node.args.kw_defaults if item)]
        else:
            todo += ast.iter_child_nodes(node)


def _methods(of: type, written: set[str]) -> Iterator[types.FunctionType]:
    """Give a class's functions of some names, those of nested classes included."""
    for name, item in vars(of).items():
        if isinstance(item, type) and item.__qualname__.startswith(f"{of.__qualname__}."):
            yield from _methods(item, written)
        if name in written:
            parts = (item, *(getattr(item, part, None) for part in ("__func__", "fget", "fset", "fdel", "func")))
            yield from (part for part in parts if isinstance(part, types.FunctionType))
