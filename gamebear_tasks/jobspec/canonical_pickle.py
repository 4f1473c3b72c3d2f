"""Canonical pickles: equal functions give equal bytes in every process, so a pickle's SHA-256 can name it.

cloudpickle decides how each object is taken apart (`reducer_override` and `dispatch_table`, the public parts of its
`Pickler`); this module writes the parts down. Its output is an ordinary pickle of protocol 4. It differs from
cloudpickle's own in what would vary between processes, checkouts or patch releases of Python:

- Equal text, bytes, numbers and tuples are one object. Which of them are shared depends on interning.
- Sets are sorted by the pickles of their members. Their order depends on the hash seed.
- The random ids by which cloudpickle recognises classes are left out.
- File names and line numbers of code are persistent ids (`Unpickler.persistent_load`), and their values are returned
  beside the pickle: they serve tracebacks and change nothing else. `__file__` is relative to the current folder.
- Of a package's submodules that happen to be imported, only those that the function's own file imports are loaded.

It also keeps what cloudpickle loses: which variables of closures functions share, globals that only the body of a class
inside a function uses, an enum's aliases, and the qualified names of classes.

The format of a pickle is documented in `pickletools`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import dis
import enum
import importlib.util
import inspect
import io
import os
import pickle
import re
import struct
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from .module_finder import names_in

PROTOCOL = 4

Node: TypeAlias = int
"""The number of an object in `_Graph.nodes`."""

TRACKER_ID = re.compile("[0-9a-f]{32}")
"""Pattern of cloudpickle's random id of a class or type variable, among the arguments that recreate it."""

CODE_FIELDS = (
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_nlocals", "co_stacksize", "co_flags", "co_code"),
    *("co_consts", "co_names", "co_varnames", "co_filename", "co_name"),
    *(("co_qualname",) if sys.version_info >= (3, 11) else ()),
    *("co_firstlineno", "co_linetable"),
    *(("co_exceptiontable",) if sys.version_info >= (3, 11) else ()),
    *("co_freevars", "co_cellvars"),
)
"""The arguments of `types.CodeType`, in order."""

LINE_FIELDS = ("co_filename", "co_firstlineno", "co_linetable")
"""Arguments that only tracebacks use."""


@dataclass(frozen=True)
class Lines:
    """Source position of a piece of code.

    Attributes:
        file: path, relative to the current folder where it is below it.
        first: number of its first line.
        table: CPython's table of line numbers by instruction (`co_linetable`).
    """

    file: str
    first: int
    table: bytes


@dataclass(frozen=True)
class Pickle:
    """An object, pickled.

    Attributes:
        data: the pickle. Its persistent ids are `file N`, `first N` and `table N`, for the fields of `lines[N]`.
        lines: where each piece of code was written.
        imports: dotted names of the modules that it refers to or imports.
    """

    data: bytes
    lines: tuple[Lines, ...]
    imports: frozenset[str]


class PickleError(Exception):
    """An object cannot be pickled, or not in the same way twice.

    Attributes:
        used: the dotted name under which the function knows the object; empty for the function itself.
        why: what is wrong with it.
    """

    def __init__(self, used: str, why: str) -> None:
        super().__init__(used, why)
        self.used = used
        self.why = why


class _Refused(Exception):
    """The object at hand has no pickle that is the same in every process."""


def dump(value: object, by_value: types.ModuleType | None = None) -> Pickle:
    """Pickle an object canonically.

    Args:
        value: what to pickle.
        by_value: a module whose functions and classes are pickled whole, and not by their name.

    Raises:
        PickleError: something that it uses cannot be pickled, has another pickle each time, or can only be sent by its
            name in that module.
    """
    graph = _Graph(by_value)
    try:
        done = graph.dump(value)
        if graph.has_reducers_of_others and _Graph(by_value).dump(value).data != done.data:
            raise _Refused("its pickle changes each time")
    except RecursionError as error:
        raise PickleError(graph.used, "it is nested too deeply, or contains itself") from error
    except Exception as error:  # the object's own pickling may raise anything
        raise PickleError(graph.used, str(error) or type(error).__name__) from error
    return done


@contextlib.contextmanager
def _pickled_by_value(module: types.ModuleType | None) -> Iterator[None]:
    """Make cloudpickle pickle a module's objects by value during the block."""
    import cloudpickle

    registered = cloudpickle.list_registry_pickle_by_value()
    if module is None or module.__name__ in registered or sys.modules.get(module.__name__) is not module:
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


@dataclass
class _Constant:
    """A value without parts.

    Attributes:
        code: the pickle's instructions that push it.
        is_short: whether it is shorter than a reference to it.
    """

    code: bytes
    is_short: bool = False


@dataclass
class _Global:
    """A function, class or other object that is found by its name in a module."""

    module: Node
    name: Node


@dataclass
class _Tuple:
    members: tuple[Node, ...]


@dataclass
class _Collection:
    """A list, set or frozenset.

    Attributes:
        kind: its type; a list whose order means nothing is sorted as sets are.
        members: what is in it.
        is_sorted: whether its members are pickled in the order of their pickles.
    """

    kind: type
    members: list[Node] = field(default_factory=list)
    is_sorted: bool = False


@dataclass
class _Dict:
    items: list[tuple[Node, Node]] = field(default_factory=list)


@dataclass
class _Code:
    """A code object: the arguments of `types.CodeType`, with None for `LINE_FIELDS`."""

    constructor: Node
    arguments: list[Node | None]
    lines: Lines


@dataclass
class _Object:
    """An object as returned by its reducer (see `object.__reduce__`)."""

    function: Node = 0
    arguments: Node = 0
    state: Node | None = None
    setter: Node | None = None
    items: list[Node] = field(default_factory=list)
    pairs: list[tuple[Node, Node]] = field(default_factory=list)


class _Unordered(list):  # type: ignore[type-arg]
    """A list whose order is irrelevant."""


class _Graph:
    """All objects that are reachable from an object, without duplicates."""

    def __init__(self, by_value: types.ModuleType | None) -> None:
        import cloudpickle

        self.by_value = by_value
        self.nodes: list[Any] = []
        self.imports: set[str] = set()
        self.has_reducers_of_others = False
        self.path: list[object] = []
        """Keys of the dicts on the path to the current object; after an exception, to the object that caused it."""
        self._pickler = cloudpickle.Pickler(io.BytesIO(), protocol=PROTOCOL)
        self._by_id: dict[int, Node] = {}
        self._by_value: dict[tuple[object, ...], Node] = {}
        self._cells: dict[int, object] = {}
        """The empty cell that each cell of a closure is made as, by the cell's id."""
        self._alive: list[object] = []
        """Temporary objects, referenced so that their ids stay valid."""
        self.orders: dict[Node, list[Node]] = {}
        """The members of each set in the order in which they are written."""

    @property
    def used(self) -> str:
        """Names on the path to the current object, as written in the source."""
        names = [key for key in self.path if isinstance(key, str) and not key.startswith("_")]
        return ".".join(names)

    def dump(self, value: object) -> Pickle:
        with _pickled_by_value(self.by_value):
            root = self.node(value)
        writer = _Writer(self)
        return Pickle(writer.whole(root), tuple(writer.lines), frozenset(self.imports))

    # taking apart

    def node(self, value: Any) -> Node:
        """Return the number of an object."""
        kind = type(value)
        if kind in _CONSTANTS:
            return self._constant(_CONSTANTS[kind](value))
        known = self._by_id.get(id(value))
        if known is not None:
            return known
        self._alive.append(value)
        if kind is tuple:
            return self._tuple(value)
        if kind is frozenset:
            return self._add(value, _Collection(kind, [self.node(member) for member in value], is_sorted=True))
        if kind in (list, set, _Unordered):
            collection = _Collection(list if kind is _Unordered else kind, is_sorted=kind is not list)
            number = self._add(value, collection)
            collection.members += [self.node(member) for member in value]
            return number
        if kind is dict:
            found = _Dict()
            number = self._add(value, found)
            for key, item in value.items():
                self.path.append(key)
                found.items.append((self.node(key), self.node(item)))
                self.path.pop()
            return number
        if kind is types.CodeType:
            return self._code(value)
        return self._reduced(value)

    def _add(self, value: object, node: object) -> Node:
        self.nodes.append(node)
        self._by_id[id(value)] = len(self.nodes) - 1
        return len(self.nodes) - 1

    def _shared(self, key: tuple[object, ...], make: Callable[[], object]) -> Node:
        """Return the number of an immutable value, the same for equal ones."""
        if key not in self._by_value:
            self.nodes.append(make())
            self._by_value[key] = len(self.nodes) - 1
        return self._by_value[key]

    def _constant(self, code: bytes) -> Node:
        return self._shared((code,), lambda: _Constant(code, len(code) < 6))

    def _tuple(self, value: tuple[object, ...]) -> Node:
        members = tuple(self.node(member) for member in value)
        number = self._by_id[id(value)] = self._shared(("tuple", *members), lambda: _Tuple(members))
        return number

    def _code(self, code: types.CodeType) -> Node:
        lines = Lines(_relative(code.co_filename), code.co_firstlineno, code.co_linetable)
        node = _Code(self.node(types.CodeType), [], lines)
        number = self._add(code, node)
        node.arguments += [None if name in LINE_FIELDS else self.node(getattr(code, name)) for name in CODE_FIELDS]
        return number

    def _reduced(self, value: Any) -> Node:
        if isinstance(value, types.ModuleType):
            self.imports.add(value.__name__)
        if type(value) is type(os.environ):
            raise _Refused("it is the whole environment, which may hold secrets")
        if value is getattr(sys.modules.get("random"), "_inst", None):
            raise _Refused("it draws from the state of the module random, another one in each process: use random.NAME")
        if value is dataclasses.MISSING:  # compared by identity, and pickled by value
            return self._global(value, "MISSING")
        reduced = self._reduce(value)
        if isinstance(reduced, str):
            return self._global(value, reduced)
        function, arguments, state, items, pairs, setter = (*reduced, None, None, None, None)[:6]
        state = self._without_noise(value, state)
        if isinstance(value, types.FunctionType):
            for each in arguments:
                if type(each) is dict and id(each) not in self._by_id:  # the globals that functions of a module share
                    _make_portable(each, value.__globals__.get("__package__"))
            if value.__closure__:
                arguments = (*arguments[:-1], tuple(map(self._empty_cell, value.__closure__, arguments[-1])))
            self._note_imports(value)
        if isinstance(value, enum.EnumMeta):
            state = _with_aliases(value, arguments, state)
        elif isinstance(value, type) and value.__qualname__ != value.__name__:
            next(each for each in arguments if type(each) is dict)["__qualname__"] = value.__qualname__
        if isinstance(value, type | typing.TypeVar):
            arguments = tuple(None if _is_tracker_id(each) else each for each in arguments)
        if _is_unordered(value):
            arguments = (_Unordered(arguments[0]), *arguments[1:])
        node = _Object()
        # An object that its own arguments lead back to has no end, here as in pickle.
        made = self.node(function), self.node(arguments)
        number = self._add(value, node)
        node.function, node.arguments = made
        node.setter = None if setter is None else self.node(setter)
        node.state = None if state is None else self.node(state)
        node.items += [self.node(each) for each in items or ()]
        node.pairs += [(self.node(key), self.node(each)) for key, each in pairs or ()]
        return number

    def _empty_cell(self, cell: types.CellType, empty: object) -> object:
        """Return the empty cell that a closure's cell is made as: the same for all functions that share the cell."""
        self._alive.append(cell)
        return self._cells.setdefault(id(cell), empty)

    def _reduce(self, value: Any) -> Any:
        reduced = self._pickler.reducer_override(value)
        if reduced is not NotImplemented:
            return reduced
        reducer = self._pickler.dispatch_table.get(type(value))
        if reducer is not None:
            return reducer(value)
        if isinstance(value, type | types.FunctionType):
            return value.__qualname__
        self.has_reducers_of_others = True
        return value.__reduce_ex__(PROTOCOL)

    def _global(self, value: Any, name: str) -> Node:
        """Return the node of an object that is pickled by its module and name."""
        module = "builtins" if value is ... or value is NotImplemented else str(getattr(value, "__module__", None))
        found: object = sys.modules.get(module)
        with contextlib.suppress(AttributeError):
            for part in name.split("."):
                found = getattr(found, part)
        if found is not value or module == "__main__" or sys.modules.get(module) is self.by_value:
            raise _Refused(f"it can only be sent by its name, {name}, and the builder does not have its module")
        self.imports.add(module)
        number = self._shared(("global", module, name), lambda: _Global(self.node(module), self.node(name)))
        self._by_id[id(value)] = number
        return number

    def _without_noise(self, value: object, state: Any) -> Any:
        """Return the state of a class or function without what differs from one process to the next."""
        if isinstance(value, type) and _is_pair_of_dicts(state):
            space, slots = dict(state[0]), state[1]
            space.pop("__firstlineno__", None)  # Python 3.13
            space.pop("__slotnames__", None)  # a cache of copyreg's, there once an instance was copied or pickled
            for name, each in state[0].items():  # a private slot, which cloudpickle does not know by this name
                if isinstance(each, types.MemberDescriptorType) and each.__objclass__ is value:
                    del space[name]
            if isinstance(attributes := space.get("__static_attributes__"), tuple):  # unsorted in Python 3.13.0
                space["__static_attributes__"] = tuple(sorted(attributes))
            if isinstance(subclasses := space.get("_abc_impl"), list):  # those registered, from a set
                space["_abc_impl"] = _Unordered(subclasses)
            return space, slots
        if isinstance(value, types.FunctionType) and _is_pair_of_dicts(state):
            slots = dict(state[1])
            if isinstance(submodules := slots.get("_cloudpickle_submodules"), list):
                imported = _imported_by(value)
                names = sorted(each.__name__ for each in submodules if each.__name__ in imported)
                slots["_cloudpickle_submodules"] = [sys.modules[name] for name in names]
            if isinstance(names_used := slots.get("__globals__"), dict):
                slots["__globals__"] = {**names_used, **_globals_of_classes_in(value)}
                _make_portable(slots["__globals__"], value.__globals__.get("__package__"))
            return state[0], slots
        return state

    def _note_imports(self, function: types.FunctionType) -> None:
        package = function.__globals__.get("__package__")
        self.imports |= {_absolute(name, package) for name in _imports_in(function.__code__)} - {""}


class _Writer:
    """Writes an object's nodes as a pickle; each is written once, and referred to by its number in the memo then."""

    def __init__(self, graph: _Graph) -> None:
        self.graph = graph
        self.lines: list[Lines] = []
        self._out: list[bytes] = []
        self._memo: dict[Node, int] = {}

    def whole(self, root: Node) -> bytes:
        self._write(root)
        return pickle.PROTO + bytes([PROTOCOL]) + b"".join(self._out) + pickle.STOP

    def _write(self, number: Node) -> None:
        out = self._out
        if number in self._memo:
            out.append(_get(self._memo[number]))
            return
        node = self.graph.nodes[number]
        if isinstance(node, _Constant):
            out.append(node.code)
            if not node.is_short:
                self._memoize(number)
        elif isinstance(node, _Global):
            self._write(node.module)
            self._write(node.name)
            out.append(pickle.STACK_GLOBAL)
            self._memoize(number)
        elif isinstance(node, _Tuple):
            self._write_tuple(number, node)
        elif isinstance(node, _Collection):
            self._write_collection(number, node)
        elif isinstance(node, _Dict):
            out.append(pickle.EMPTY_DICT)
            self._memoize(number)
            self._write_pairs(node.items)
        elif isinstance(node, _Code):
            self._write_code(number, node)
        else:
            self._write_object(number, node)

    def _memoize(self, number: Node) -> None:
        self._memo[number] = len(self._memo)
        self._out.append(pickle.MEMOIZE)

    def _write_tuple(self, number: Node, node: _Tuple) -> None:
        if not node.members:
            self._out.append(pickle.EMPTY_TUPLE)
            return
        self._out.append(pickle.MARK)
        for member in node.members:
            self._write(member)
        if number in self._memo:  # a member holds it, and has written it
            self._out.append(pickle.POP_MARK + _get(self._memo[number]))
            return
        self._out.append(pickle.TUPLE)
        self._memoize(number)

    def _write_collection(self, number: Node, node: _Collection) -> None:
        members = self._in_order(number, node.members) if node.is_sorted else node.members
        if node.kind is frozenset:
            self._out.append(pickle.MARK)
            for member in members:
                self._write(member)
            self._out.append(pickle.FROZENSET)
            self._memoize(number)
            return
        self._out.append(pickle.EMPTY_SET if node.kind is set else pickle.EMPTY_LIST)
        self._memoize(number)
        self._write_members(members, pickle.ADDITEMS if node.kind is set else pickle.APPENDS)

    def _write_members(self, members: Iterable[Node], instruction: bytes) -> None:
        self._out.append(pickle.MARK)
        for member in members:
            self._write(member)
        self._out.append(instruction)

    def _write_pairs(self, pairs: Iterable[tuple[Node, Node]]) -> None:
        self._write_members((each for pair in pairs for each in pair), pickle.SETITEMS)

    def _in_order(self, number: Node, members: list[Node]) -> list[Node]:
        """Return the members of a set in the order of their pickles, each pickled alone."""
        if number not in self.graph.orders:
            alone = {member: _Writer(self.graph).whole(member) for member in members}
            if len({*alone.values()}) < len(alone):
                raise _Refused("a set has two members with the same pickle, so their order changes")
            self.graph.orders[number] = sorted(members, key=alone.__getitem__)
        return self.graph.orders[number]

    def _write_code(self, number: Node, node: _Code) -> None:
        place = len(self.lines)
        self.lines.append(node.lines)
        ids = iter((f"file {place}", f"first {place}", f"table {place}"))
        self._write(node.constructor)
        self._out.append(pickle.MARK)
        for argument in node.arguments:
            if argument is None:
                self._out.append(_text(next(ids)) + pickle.BINPERSID)
            else:
                self._write(argument)
        self._out.append(pickle.TUPLE + pickle.REDUCE)
        self._memoize(number)

    def _write_object(self, number: Node, node: _Object) -> None:
        self._write(node.function)
        self._write(node.arguments)
        self._out.append(pickle.REDUCE)
        self._memoize(number)
        if node.items:
            self._write_members(node.items, pickle.APPENDS)
        if node.pairs:
            self._write_pairs(node.pairs)
        if node.state is None:
            return
        if node.setter is None:
            self._write(node.state)
            self._out.append(pickle.BUILD)
            return
        self._write(node.setter)
        self._write(number)
        self._write(node.state)
        self._out.append(pickle.TUPLE2 + pickle.REDUCE + pickle.POP)


def _get(place: int) -> bytes:
    return pickle.BINGET + bytes([place]) if place < 256 else pickle.LONG_BINGET + struct.pack("<I", place)


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    if len(data) < 256:
        return pickle.SHORT_BINUNICODE + bytes([len(data)]) + data
    return pickle.BINUNICODE8 + struct.pack("<Q", len(data)) + data


def _bytes(value: bytes) -> bytes:
    if len(value) < 256:
        return pickle.SHORT_BINBYTES + bytes([len(value)]) + value
    return pickle.BINBYTES8 + struct.pack("<Q", len(value)) + value


def _integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(data) < 256:
        return pickle.LONG1 + bytes([len(data)]) + data
    return pickle.LONG4 + struct.pack("<i", len(data)) + data


_CONSTANTS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: pickle.NONE,
    bool: lambda value: pickle.NEWTRUE if value else pickle.NEWFALSE,
    int: _integer,
    float: lambda value: pickle.BINFLOAT + struct.pack(">d", value),
    bytes: _bytes,
    str: _text,
}
"""How values of exactly these types are written; a subclass of one is an object like any other."""


MEMBER_STATE = {"_value_", "_name_", "__objclass__", "_sort_order_", "_inverted_"}
"""Attributes of an enum member that the enum module sets."""


def _with_aliases(kind: enum.EnumMeta, arguments: tuple[Any, ...], state: Any) -> Any:
    """Add the aliases of an enum to the members that it is made of, and return its state without them.

    The enum is made from its members' values alone, before it has its methods.

    Raises:
        _Refused: a member made so would be another.
    """
    members: dict[str, Any] = dict(kind.__members__)
    for name, member in members.items():
        if vars(member).keys() - MEMBER_STATE or not _is_made_of_its_value(kind, member):
            raise _Refused(f"its member {name} has more than its value")
    by_name = next(each for each in arguments if type(each) is dict)
    by_name.update({name: member.value for name, member in members.items() if name not in by_name})
    ordered = {name: by_name[name] for name in members}
    by_name.clear()
    by_name.update(ordered)
    space, slots = state
    return {name: value for name, value in space.items() if name not in members}, slots


def _is_made_of_its_value(kind: Any, member: Any) -> bool:
    """Return whether the part of a member that is a text or number follows from its value."""
    mixin = kind._member_type_
    if mixin is object:
        return True
    arguments = member.value if isinstance(member.value, tuple) else (member.value,)
    try:
        return mixin.__eq__(mixin(*arguments), member) is True
    except (TypeError, ValueError):
        return False


def _is_tracker_id(value: object) -> bool:
    return type(value) is str and TRACKER_ID.fullmatch(value) is not None


def _is_pair_of_dicts(state: object) -> bool:
    return type(state) is tuple and len(state) == 2 and all(type(each) is dict for each in state)


def _is_unordered(value: object) -> bool:
    """Return whether a value is a set that is reduced to a list of its members."""
    kind = type(value)
    if kind is weakref.WeakSet:
        return True
    return any(issubclass(kind, base) and kind.__reduce__ is base.__reduce__ for base in (set, frozenset))


def _relative(path: str) -> str:
    """Return a path relative to the current folder if it is below it."""
    here = os.getcwd()
    return path[len(here) + 1 :] if path.startswith(f"{here}/") else path


def _make_portable(names: dict[str, Any], package: object) -> None:
    """Make `__file__` and `__path__` among a module's names relative to the folder that it is imported from.

    On the builder that is the job's working folder, where its modules are.
    """
    parents = [part for part in str(package or "").split(".") if part]
    if isinstance(file := names.get("__file__"), str):
        names["__file__"] = "/".join([*parents, os.path.basename(file)])
    if "__path__" in names:
        names["__path__"] = ["/".join(parents)]


def _imports_in(code: types.CodeType) -> Iterator[str]:
    """Yield the dotted names by which a piece of code may import modules, relative ones with their dots."""
    level: object = 0
    names: object = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "EXTENDED_ARG":
            continue
        if instruction.opname == "IMPORT_NAME":
            start = "." * (level if isinstance(level, int) else 0) + str(instruction.argval)
            yield start
            joint = "" if start.endswith(".") else "."
            yield from (f"{start}{joint}{name}" for name in (names if isinstance(names, tuple) else ()))
        level, names = names, instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _imports_in(constant)


def _globals_of_classes_in(function: types.FunctionType) -> dict[str, Any]:
    """Return the globals that classes defined in a function use in their bodies, which cloudpickle overlooks."""
    names = dict.fromkeys(_names_of_classes_in(function.__code__))
    known = function.__globals__
    return {name: known[name] for name in names if name in known and name != "__name__"}


def _names_of_classes_in(code: types.CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if not constant.co_flags & inspect.CO_OPTIMIZED:
                for instruction in dis.get_instructions(constant):
                    if instruction.opname in ("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
                        yield str(instruction.argval)
            yield from _names_of_classes_in(constant)


def _absolute(name: str, package: object) -> str:
    """Return a module's absolute name; empty if its dots lead out of the package."""
    if not name.startswith("."):
        return name
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.resolve_name(name, package if isinstance(package, str) else None)
    return ""


def _imported_by(function: types.FunctionType) -> frozenset[str]:
    """Return the dotted names that the file which defines a function imports."""
    file = function.__code__.co_filename
    package = function.__globals__.get("__package__")
    try:
        about = os.stat(file)
        names = _names_in_file(file, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    return frozenset(_absolute(name, package) for name in names)


@lru_cache(maxsize=64)
def _names_in_file(file: str, *version: int) -> tuple[str, ...]:
    return names_in(ast.parse(Path(file).read_bytes()))
