"""The buildscript language: Python with `#|` lines, args as globals and a top-level `return`.

Python's own compiler compiles a script, under its own name and with its own line numbers. The extensions are
transformations of the syntax tree. A script with a top-level `return` becomes the body of a function. The function
declares all its names global, so that the script otherwise behaves as a module.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib
import io
import json
import re
import shutil
import site
import subprocess
import symtable
import sys
import tempfile
import tokenize
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from ..util.errors import RunnerError
from ..util.locks import locked

DIRECTIVE = re.compile(r"#\|(?P<kind>[^:]*):(?P<data>.*)")
"""A `#|` line: a comment that starts in the first column. Without a colon it is an ordinary comment."""

ARGUMENT = re.compile(r"(?P<name>\w+)\s*(?::\s*(?P<type>[\w.]+)\s*)?(?:=\s*(?P<default>.+))?")
"""The part after `#| arg:`: a name, a type (a dotted name), a default (a Python literal)."""

BODY = "<module>"
"""Name of a script's outermost frame in a traceback, as for any Python file."""


class ScriptError(RunnerError):
    """A buildscript violates the language's rules, or was given arguments that it does not accept."""

    kind = "script"


class Argument(NamedTuple):  # NamedTuple, not a dataclass: see `capabilities.Facts`
    """An arg that a script declares.

    Attributes:
        name: The global that it becomes.
        type: Dotted name of the callable that converts the value; empty for no conversion.
        default: Value if none is given; `...` makes the arg required.
        line: Line of the declaration.
    """

    name: str
    type: str
    default: object
    line: int


class Program(NamedTuple):
    """A compiled buildscript.

    Attributes:
        name: Name of the file, as it appears in tracebacks.
        requirements: Requirements for pip, in order.
        arguments: Declared args, by name.
        code: Code of the module.
        returns: Whether the code defines the script as a function, which must then be called.
        doc: Docstring of the script.
    """

    name: str
    requirements: tuple[str, ...]
    arguments: Mapping[str, Argument]
    code: types.CodeType
    returns: bool
    doc: str | None

    def run(self, names: dict[str, object]) -> object:
        """Execute the script with these globals and return its return value.

        Args:
            names: Globals of the script; afterwards they include the names that the script bound.
        """
        names.setdefault("__builtins__", builtins)
        names["__doc__"] = self.doc
        names["__return__"] = finish
        try:
            if not self.returns:
                exec(self.code, names)
                return None
            names[IMPORT_STAR] = _star_importer(names)
            exec(self.code, names)
            function = cast(types.FunctionType, names.pop(FUNCTION))
            function.__code__ = function.__code__.replace(co_name=BODY, **_qualified(BODY))
            return function()
        except Finished as finished:
            return finished.value


class Finished(BaseException):
    """Carries the script's return value out of a function that called `__return__`."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value


def finish(value: object = None) -> None:
    """End the script from any function, like a top-level `return value`; scripts call it `__return__`."""
    raise Finished(value)


class TemporaryDirectory(tempfile.TemporaryDirectory[str]):
    """A temporary folder whose `with` block yields a `Path`; it is removed at the end of the block."""

    def __enter__(self) -> Path:  # type: ignore[override]  # the standard library's returns a str
        """Return the folder."""
        return Path(self.name)


# parsing


def read(source: bytes, name: str) -> Program:
    """Compile a buildscript.

    Args:
        source: Content of the file.
        name: Name of the file.

    Raises:
        SyntaxError: The file is not valid Python; the error has file, line and text.
        ScriptError: The file contains null bytes, or one of its `#|` lines is invalid.
    """
    try:
        tree = ast.parse(source, name)
    except ValueError as error:  # null bytes, before Python 3.12
        raise ScriptError(f"{name} is not Python: {error}.", "Check that the script is a text file in UTF-8.") from None
    requirements, arguments = _directives(source, name)
    visible = _WithoutReturns()
    module = _compile(visible.visit(ast.parse(source, name)), name)
    doc = ast.get_docstring(tree, clean=False)
    if not visible.found:
        return Program(name, requirements, arguments, module, False, doc)
    return Program(name, requirements, arguments, _compile(_as_function(tree), name), True, doc)


FUNCTION = "__script__"
IMPORT_STAR = "__import_star__"


def _compile(tree: ast.AST, name: str) -> types.CodeType:
    # dont_inherit: this module's __future__ imports must not apply to the script
    return compile(cast(ast.Module, tree), name, "exec", dont_inherit=True)


class _TopLevel(ast.NodeTransformer):
    """Visits the statements of a module that are outside of functions and classes."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node


class _WithoutReturns(_TopLevel):
    """Removes top-level returns, so that the compiler reports the same errors as for a module.

    Otherwise a `yield` or `nonlocal` at top level would be valid, because the script's body becomes a function.
    """

    def __init__(self) -> None:
        self.found = False

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.found = True
        return ast.copy_location(ast.Expr(node.value) if node.value else ast.Pass(), node)


class _IntoFunction(_TopLevel):
    """Rewrites statements that are valid in a module but not in a function that declares its names global."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if not isinstance(node.target, ast.Name):
            return node
        plain = ast.Assign([node.target], node.value) if node.value else ast.Pass()
        return ast.copy_location(plain, node)

    def visit_Global(self, node: ast.Global) -> ast.AST:
        return ast.copy_location(ast.Pass(), node)  # every name is global already

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.names[0].name != "*":
            return node
        call = ast.Call(
            func=ast.Name(IMPORT_STAR, ast.Load()),
            args=[ast.Constant(node.module or ""), ast.Constant(node.level)],
            keywords=[],
        )
        return ast.copy_location(ast.Expr(call), node)


def _as_function(tree: ast.Module) -> ast.Module:
    """Transform the module into one that defines the script as a function."""
    future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    body = [node for node in tree.body if node not in future]
    body = [_IntoFunction().visit(node) for node in body]
    function = cast(ast.FunctionDef, ast.parse(f"def {FUNCTION}(): pass").body[0])
    function.body = body
    module = ast.Module([*future, function], [])
    ast.fix_missing_locations(module)
    # The compiler's symbol table covers every way of binding a name. It accepts source text only.
    table = symtable.symtable(ast.unparse(module), "", "exec")
    inner = next(child for child in table.get_children() if child.get_name() == FUNCTION)
    names = sorted(symbol.get_name() for symbol in inner.get_symbols() if symbol.is_local())
    if names:
        function.body = [ast.copy_location(ast.Global(names), function), *body]
    return module


def _qualified(name: str) -> dict[str, Any]:
    return {"co_qualname": name} if sys.version_info >= (3, 11) else {}


def _star_importer(names: dict[str, object]) -> Callable[[str, int], None]:
    """Return the function that replaces `from module import *`."""

    def import_star(module: str, level: int) -> None:
        if level:
            raise ImportError("attempted relative import with no known parent package")
        found = vars(importlib.import_module(module))
        public = found.get("__all__", [name for name in found if not name.startswith("_")])
        names.update((name, getattr(sys.modules[module], name)) for name in public)

    return import_star


def _directives(source: bytes, name: str) -> tuple[tuple[str, ...], dict[str, Argument]]:
    """Return the content of the `#|` lines: requirements, and args by name."""
    requirements: list[str] = []
    arguments: dict[str, Argument] = {}
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        match = DIRECTIVE.match(token.string) if token.type == tokenize.COMMENT and token.start[1] == 0 else None
        if match is None:
            continue
        kind, data, line = match["kind"].strip(), match["data"].strip(), token.start[0]
        if kind == "pip":
            if not data:
                raise ScriptError(f"{name}, line {line}: `#| pip:` without a requirement.", "Write `#| pip: requests`.")
            requirements.append(data)
        elif kind == "arg":
            argument = _argument(data, name, line)
            arguments[argument.name] = argument
        else:
            raise ScriptError(f"{name}, line {line}: unknown directive `#| {kind}:`.", "Use `#| pip:` or `#| arg:`.")
    return tuple(requirements), arguments


def _argument(data: str, script: str, line: int) -> Argument:
    match = ARGUMENT.fullmatch(data)
    if match is None or not match["name"].isidentifier():
        raise ScriptError(
            f"{script}, line {line}: invalid directive `#| arg: {data}`.",
            "Write `#| arg: name: type = default`. The type (a dotted name) and the default (a Python literal) are"
            " optional.",
        )
    text = (match["default"] or "None").strip()
    try:
        default = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ScriptError(
            f"{script}, line {line}: default of arg {match['name']} is not a Python literal: {text}",
            'Quote strings: `= "text"`.',
        ) from None
    return Argument(match["name"], match["type"] or "", default, line)


# args


def bind(program: Program, given: Mapping[str, object]) -> dict[str, object]:
    """Return the value of every arg of a script.

    The arg's type converts strings and all other values that are not exactly of that type. None counts as not given. An
    arg that was not given has its default, or None.

    Args:
        program: The script.
        given: Values from the job, by name.

    Raises:
        ScriptError: An arg is unknown or missing, or its type rejects the value.
    """
    unknown = sorted(set(given) - set(program.arguments))
    if unknown:
        known = ", ".join(program.arguments)
        raise ScriptError(
            f"{program.name}: unknown arg {', '.join(map(repr, unknown))}.",
            (f"Use one of {known}, or declare" if known else "Declare") + f" `#| arg: {unknown[0]}`.",
        )
    values: dict[str, object] = {}
    for argument in program.arguments.values():
        value = given.get(argument.name)
        if value is not None:
            values[argument.name] = _convert(argument, value, program.name)
        elif argument.default is ...:
            raise ScriptError(
                f"{program.name}, line {argument.line}: arg {argument.name} has no value.",
                f'Set it in the task: args={{"{argument.name}": …}}.',
            )
        else:
            _type(argument, program.name)
            values[argument.name] = argument.default
    return values


def _convert(argument: Argument, value: object, script: str) -> object:
    kind = _type(argument, script)
    if kind is None or type(value) is kind:
        return value
    try:
        return _boolean(value) if kind is bool else kind(value)
    except Exception as error:  # noqa: BLE001 - the script's own type may raise anything
        declared = f"{argument.name}: {argument.type}"
        raise ScriptError(
            f"{script}, line {argument.line}: invalid value {value!r} for arg {declared}: {error}.",
            "Change args= of artifact(), or the declared type.",
        ) from None


def _boolean(value: object) -> bool:
    """Return a boolean from the words that people use for it."""
    text = str(value).strip().lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0", ""):
        return False
    raise ValueError("expected true or false, yes or no, on or off, 1 or 0")


def _type(argument: Argument, script: str) -> Callable[[object], object] | None:
    """Return the object with the arg's dotted name: from a module, or else a builtin."""
    if not argument.type:
        return None
    found = _lookup(argument.type.split("."))
    if not callable(found):
        raise ScriptError(
            f"{script}, line {argument.line}: unknown type {argument.type} of arg {argument.name}.",
            "Use a builtin (`int`, `bool`, `str`) or a dotted name in a module (`pathlib.Path`).",
        )
    return cast(Callable[[object], object], found)


def _lookup(names: Sequence[str]) -> object:
    found: object = None
    rest: Sequence[str] = ()
    for count in range(len(names), 0, -1):
        module = ".".join(names[:count])
        try:
            found, rest = importlib.import_module(module), names[count:]
            break
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
        except ValueError:
            return None
    else:
        found, rest = builtins, names
    for name in rest:
        found = getattr(found, name, None)
    return found


# names for modules and functions


def inject(names: Mapping[str, object]) -> None:
    """Make names visible in the script, in modules that it imports, and in functions sent to the builder.

    They are added to `builtins`, the only namespace that every module searches. An imported module has its own globals,
    and a function unpickled by cloudpickle keeps the globals of its original module. Helper modules written for
    buildahscript's pseudo-module `__buildah__` find the names there too.
    """
    for name, value in names.items():
        setattr(builtins, name, value)
    module = types.ModuleType("__buildah__", "Globals of a buildscript, for modules that import them by name.")
    vars(module).update(names)
    module.__dict__["__return__"] = finish
    module.__dict__["__all__"] = [*names, "__return__"]
    sys.modules["__buildah__"] = module


# pip


def add_requirements(root: Path, requirements: Iterable[str]) -> None:
    """Install requirements with pip, and make them importable after the script's folder and before everything else.

    Each set of requirements has one virtual environment in the store, created once for each version of Python and
    shared by all jobs. A requirement without a version stays at the release that was newest at that time.

    Raises:
        ScriptError: The installation failed; pip's output is in the log.
    """
    wanted = sorted(set(requirements))
    if not wanted:
        return
    key = hashlib.sha256(json.dumps([sys.version_info[:2], wanted]).encode()).hexdigest()
    folder = root / "venvs" / key
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    whole = folder / "complete"
    with locked(folder.with_name(f"{key}.lock")):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _make_environment(folder, wanted)
        whole.touch()  # records the last use too
    before = list(sys.path)
    for packages in sorted(folder.glob("lib/python*/site-packages")):
        site.addsitedir(str(packages))
    added = [path for path in sys.path if path not in before]
    sys.path[:] = [*before[:1], *added, *before[1:]]
    importlib.invalidate_caches()


def _make_environment(folder: Path, requirements: Sequence[str]) -> None:
    if _run([sys.executable, "-m", "venv", str(folder)]):
        shutil.rmtree(folder, ignore_errors=True)
        raise ScriptError(
            "`#| pip:` failed: Python cannot create a virtual environment on the builder.",
            "Run there: sudo apt install python3-venv",
        )
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    status = _run([*pip, "install", "--quiet", "--", *requirements])
    if status:
        shutil.rmtree(folder, ignore_errors=True)
        raise ScriptError(
            f"pip failed with status {status}: {', '.join(requirements)} not installed; the log has pip's output.",
            "Check the `#| pip:` lines, and that the builder reaches its package index.",
        )


def _run(command: Sequence[str]) -> int:
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
