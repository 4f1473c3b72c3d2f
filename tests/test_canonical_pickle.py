"""Canonical pickles: equal digests if, and only if, the functions return the same."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamebear_tasks.jobspec.canonical_pickle import Pickle, PickleError, dump

MODULE = "module_of_test"


def module_of(text: str, file: str = "/nowhere/module_of_test.py") -> types.ModuleType:
    """Execute source text as a module, whose functions are pickled."""
    module = types.ModuleType(MODULE)
    module.__file__ = file
    sys.modules[MODULE] = module
    exec(compile(text, file, "exec", dont_inherit=True), vars(module))
    return module


def pickled(text: str, name: str = "build") -> Pickle:
    module = module_of(text)
    return dump(getattr(module, name), module)


def digest_of(text: str) -> str:
    return hashlib.sha256(pickled(text).data).hexdigest()


class Loader(pickle.Unpickler):
    """Loads a pickle as the runner does."""

    def __init__(self, pickled: Pickle) -> None:
        super().__init__(io.BytesIO(pickled.data))
        self.lines = pickled.lines

    def persistent_load(self, pid: str) -> object:
        part, _, number = pid.partition(" ")
        return getattr(self.lines[int(number)], part)


def called(pickled: Pickle) -> object:
    """Return the result of a pickled function in a process without its module."""
    sys.modules.pop(MODULE, None)
    return Loader(pickled).load()()


@pytest.fixture(autouse=True)
def _clean_modules() -> Iterator[None]:
    yield
    sys.modules.pop(MODULE, None)


# different results imply different digests

PAIRS = {
    "a global": """
X = <1|2>
def build(): return X
""",
    "a global of another type": """
X = <1|True>
def build(): return repr(X)
""",
    "the sign of zero": """
X = <|->0.0
def build(): return repr(X)
""",
    "a constant": """
def build(): return <1|2>
""",
    "an operator": """
def build(): return 3 <-|+> 1
""",
    "a default": """
def build(x=<1|2>): return x
""",
    "a default by keyword": """
def build(*, x=<1|2>): return x
""",
    "a closure": """
def make(x):
    def build(): return x
    return build
build = make(<1|2>)
""",
    "a value that changed since it was typed": """
CONF = {'lv': 0}
def build(): return CONF['lv']
CONF['lv'] = <1|9>
""",
    "the order of a dict": """
X = {<'a': 1, 'b': 2|'b': 2, 'a': 1>}
def build(): return list(X)
""",
    "a member of a set": """
X = {1, <2|3>}
def build(): return X
""",
    "a set and a list": """
X = <{1}|[1]>
def build(): return str(X)
""",
    "a set and a frozenset": """
X = <{1}|frozenset({1})>
def build(): return repr(X)
""",
    "one object and two equal ones": """
<A = [1]
X = (A, A|X = ([1], [1]>)
def build(): X[0].append(2); return X
""",
    "a class attribute from outside": """
import os
class C: level = int('<1|2>')
def build(): return C.level
""",
    "a class attribute set later": """
class C: level = 0
C.level = <1|2>
def build(): return C.level
""",
    "a function attribute": """
def build(): return build.level
build.level = int('<1|2>')
""",
    "a method of an enum of text": """
from enum import Enum
class V(str, Enum):
    P = 'x'
    def f(self): return <1|2>
def build(): return V.P.f()
""",
    "a method of an enum member that is a global": """
from enum import Enum
class V(str, Enum):
    P = 'x'
    def f(self): return <1|2>
X = V.P
def build(): return X.f()
""",
    "the value of an enum": """
from enum import Enum
class V(Enum): P = <1|2>
def build(): return V.P.value
""",
    "the method of a subclass of a builtin type": """
class L(list):
    def f(self): return <1|2>
X = L()
def build(): return X.f()
""",
    "what a subclass of a builtin type holds besides": """
class S(str): pass
X = S('a')
X.n = <1|2>
def build(): return X.n
""",
    "a subclass of dict with a default": """
from collections import defaultdict
X = defaultdict(<in|lis>t)
def build(): return X['a']
""",
    "the first of two lambdas on a line": """
both = {'a': lambda: 1, 'b': lambda: 2}
build = both['<a|b>']
""",
    "the second line of a lambda": """
build = lambda: (
    <1|2>)
""",
    "a bound method's object": """
class C:
    def __init__(self, x): self.x = x
    def f(self): return self.x
build = C(<1|2>).f
""",
    "an object that can be called": """
class C:
    def __init__(self, x): self.x = x
    def __call__(self): return self.x
build = C(<1|2>)
""",
    "a partial's argument": """
from functools import partial
def f(x): return x
build = partial(f, <1|2>)
""",
    "a partial's function": """
from functools import partial
def f(x): return <|->x
build = partial(f, 1)
""",
    "a decorator's wrapper": """
from functools import wraps
def d(f):
    @wraps(f)
    def w(): return f() + <1|2>
    return w
@d
def build(): return 1
""",
    "a helper's helper": """
def a(): return <1|2>
def b(): return a()
def build(): return b()
""",
    "a property": """
class C:
    @property
    def f(self): return <1|2>
def build(): return C().f
""",
    "a static method": """
class C:
    @staticmethod
    def f(): return <1|2>
def build(): return C.f()
""",
    "a base class": """
class A:
    x = <1|2>
class B(A): pass
def build(): return B.x
""",
    "the order of base classes": """
class A: x = 1
class B: x = 2
class C(<A, B|B, A>): pass
def build(): return C.x
""",
    "a metaclass": """
class M(type):
    def f(cls): return <1|2>
class C(metaclass=M): pass
def build(): return C.f()
""",
    "a slot's value": """
class C:
    __slots__ = ('x',)
X = C()
X.x = <1|2>
def build(): return X.x
""",
    "a dataclass's default": """
from dataclasses import dataclass
@dataclass
class C:
    x: int = <1|2>
def build(): return C().x
""",
    "a named tuple's field": """
from collections import namedtuple
P = namedtuple('P', '<a b|b a>')
def build(): return P(1, 2).b
""",
    "a subclass that is registered": """
from abc import ABC
class A(ABC): pass
class B: pass
<|A.register(B)
>def build(): return issubclass(B, A)
""",
    "an annotation": """
def build(): return f.__annotations__['x'].__name__
def f(x: <int|str>): pass
""",
    "a docstring": """
def build():
    '<one|two>'
    return build.__doc__
""",
    "a module": """
import <|c>math as m
def build(): return m.__name__
""",
    "a function of a module": """
from os.path import <dir|base>name as f
def build(): return f('/a/b')
""",
    "an import in the function": """
def build():
    from os.path import <dir|base>name as f
    return f('/a/b')
""",
    "a pattern's flags": """
import re
X = re.compile('a'<|, re.I>)
def build(): return bool(X.match('A'))
""",
    "a path": """
from pathlib import Path
X = Path('<a|b>')
def build(): return str(X)
""",
    "a number of 5,000 digits": """
X = 10 ** 5000<| + 1>
def build(): return X % 7
""",
    "bytes": r"""
X = b'\<0|1>'
def build(): return X
""",
    "half of a surrogate pair": """
X = '\\udc8<0|1>'
def build(): return X
""",
    "text and bytes": """
X = <|b>'a'
def build(): return repr(X)
""",
    "a complex number": """
X = <1|2>j
def build(): return X
""",
    "a date": """
import datetime
X = datetime.date(2020, 1, <1|2>)
def build(): return str(X)
""",
    "a list that holds itself": """
X = [<1|2>]
X.append(X)
def build(): return X[1][1][0]
""",
    "a tuple that holds itself": """
X = ([<1|2>],)
X[0].append(X)
def build(): return X[0][1][0][0]
""",
    "a tuple in itself": """
X = ([1],)
X[0].append(<X|([1],)>)
def build(): return X[0][1] is X
""",
    "an item of a subclass of dict": """
from collections import OrderedDict
X = OrderedDict(a=<1|2>)
def build(): return X['a']
""",
    "an item of a subclass of list": """
class L(list): pass
X = L([<1|2>])
def build(): return X[0]
""",
    "one of many texts": """
X = [f'text {n}' for n in range(300)] * 2
def build(): return X[<599|343>]
""",
    "many bytes": """
X = bytes(<300|400>)
def build(): return len(X)
""",
    "a long text": """
X = 'x' * <300|400>
def build(): return len(X)
""",
    "a generator's body": """
def f(): yield <1|2>
def build(): return list(f())
""",
    "an exception's handler": """
def build():
    try: 1 / 0
    except <ZeroDivisionError: return 1|ArithmeticError: return 2>
""",
    "a name that one of the class's functions uses": """
X = <1|2>
class C:
    def f(self): return X
def build(): return C().f()
""",
    "a nested class": """
class A:
    class B: x = <1|2>
def build(): return A.B.x
""",
    "a global in the body of a class in the function": """
X = <1|2>
def build():
    class C:
        class D: x = X
    return C.D.x
""",
    "a global with a builtin's name in the body of a class": """
def len(x): return <1|2>
def build():
    class C: x = len('')
    return C.x
""",
    "a class that holds an instance of itself": """
class C: x = <1|2>
C.one = C()
def build(): return C.one.x
""",
    "a dataclass that another one inherits from": """
from dataclasses import MISSING, dataclass, fields
@dataclass
class A: x: int<| = 2>
def build():
    @dataclass
    class B(A): pass
    try: return B().x
    except TypeError: return fields(B)[0].default is MISSING
""",
    "the constants of builtins": """
from typing import Tuple
X = [<...|NotImplemented>, Tuple[int, ...]]
def build(): return repr(X)
""",
    "a private slot": """
class C:
    __slots__ = ('__x',)
    def __init__(self): self.__x = <1|2>
    def f(self): return self.__x
X = C()
def build(): return X.f()
""",
    "a variable that two functions of a closure share": """
def make():
    x = 0
    def add():
        nonlocal x
        x += <1|2>
    def get(): return x
    return add, get
ADD, GET = make()
def build(): ADD(); return GET()
""",
    "a variable that methods share and that is set later": """
def make():
    class C:
        def set(self):
            nonlocal x
            x = <1|2>
        def get(self): return x, super().__eq__(self)
    return C
    x = 0
K = make()
def build(): c = K(); c.set(); return c.get()
""",
    "an alias of an enum's member": """
from enum import Enum
class V(Enum):
    A = 1
    B = 2
    C = <1|2>
def build(): return [(name, each.value) for name, each in V.__members__.items()], V['C'].name
""",
    "a flag of several bits and of none": """
from enum import Flag
class V(Flag):
    NONE = 0
    A = 1
    B = 2
    AB = <1|3>
def build(): return repr(V.NONE), V['AB'].name, list(V.__members__), V.A in V.AB
""",
    "a nested class's name": """
from dataclasses import dataclass
class A:
    @dataclass
    class B: x: int = <1|2>
X = A.B()
def build(): return repr(X), repr(A.B())
""",
    "super in a method": """
class A:
    def f(self): return <1|2>
class B(A):
    def f(self): return super().f()
def build(): return B().f()
""",
}
"""Pairs of programs; `<one|other>` marks their differences."""


def both(text: str) -> tuple[str, str]:
    return re.sub(r"<([^<>|]*)\|([^<>|]*)>", r"\1", text), re.sub(r"<([^<>|]*)\|([^<>|]*)>", r"\2", text)


@pytest.mark.parametrize("text", PAIRS.values(), ids=PAIRS)
def test_functions_with_different_results_have_different_digests(text: str) -> None:
    one, two = map(pickled, both(text))
    assert called(one) != called(two)
    assert one.data != two.data


@pytest.mark.parametrize("text", PAIRS.values(), ids=PAIRS)
def test_a_function_returns_the_same_without_its_module(text: str) -> None:
    for each in both(text):
        assert called(pickled(each)) == module_of(each).build()


# equal results have equal digests, despite other differences

SUBJECT = """
import enum
import re
from abc import ABC
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

SIZE = 3
KINDS = {"k", "l", "m"}
T = TypeVar("T")

class Base(ABC):
    start = SIZE

@Base.register
class One: pass

@Base.register
class Two: pass

@dataclass
class Line(Base):
    n: int
    rest: list = field(default_factory=list)

    def grow(self):
        self.b, self.a, self.c = 1, 2, 3

class Colour(enum.Enum):
    RED = "red"

def helper(x: T) -> T:
    return x

def build():
    return [SIZE, sorted(KINDS), Line(2).n, Colour.RED.name, helper("k" in {"k", "l", "m"}), __file__]

def unrelated():
    return 1
"""

CHANGES = [
    ("def unrelated", "# why\n\n\ndef unrelated"),
    ("SIZE = 3", "# a line more\nSIZE = 3"),
    ("def build():\n", "def build():  # why\n    # because\n"),
    ("return 1", "return 2"),
    ('{"k", "l", "m"}', '{"m", "l", "k"}'),
    ("return [SIZE, sorted", "return [\n        SIZE, sorted"),
    ("import enum\n", "import enum\nimport concurrent.futures\nimport logging\nLOG = logging.getLogger()\n"),
]


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_changes_without_effect_on_the_result_keep_the_digest(old: str, new: str) -> None:
    assert old in SUBJECT
    assert digest_of(SUBJECT.replace(old, new)) == digest_of(SUBJECT)


PROGRAM = """
import hashlib, importlib, sys
import gamebear_tasks.jobspec.canonical_pickle as canonical
subject = importlib.import_module("subject")
print(hashlib.sha256(canonical.dump(subject.build, subject).data).hexdigest())
"""

OTHER_RELEASES = ["/usr/bin/python3"]
"""Debian's Python, possibly another patch release of the same minor version."""


def test_every_process_folder_hash_seed_and_patch_release_computes_the_same_digest(tmp_path: Path) -> None:
    version = "import sys; print(*sys.version_info[:2])"
    same = subprocess.run([sys.executable, "-c", version], capture_output=True, check=True).stdout
    pythons = [sys.executable] * 3
    pythons += [
        python
        for python in OTHER_RELEASES
        if os.path.exists(python) and subprocess.run([python, "-c", version], capture_output=True).stdout == same
    ]
    found = set()
    for number, python in enumerate(pythons):
        folder = tmp_path / str(number) / "deeper"[:number]
        folder.mkdir(parents=True)
        (folder / "subject.py").write_text(SUBJECT)
        before = "import concurrent.futures, xml.dom, os.path\n" if number == 1 else ""
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [python, "-c", before + PROGRAM], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1


def test_a_digest_does_not_depend_on_which_submodules_others_have_imported() -> None:
    text = "import xml\ndef build():\n    return xml.dom.minidom"
    sys.modules.pop("xml.dom.minidom", None)
    before = digest_of(text)
    import xml.dom.minidom  # noqa: F401

    assert digest_of(text) == before


def test_a_digest_does_not_depend_on_what_was_copied_before() -> None:
    text = "import copy\nclass C: pass\nX = C()\n{}def build(): return C, X"
    assert digest_of(text.format("")) == digest_of(text.format("copy.copy(X)\n"))


def test_the_submodules_that_its_file_imports_are_imported(tmp_path: Path) -> None:
    file = tmp_path / "module_of_test.py"
    file.write_text("import xml.dom.minidom\ndef build():\n    return xml.dom.minidom.__name__\n")
    done = dump((module := module_of(file.read_text(), str(file))).build, module)
    for name in [name for name in sys.modules if name.startswith("xml")]:
        del sys.modules[name]
    assert called(done) == "xml.dom.minidom"


def test_modules_that_it_refers_to_or_imports_are_listed() -> None:
    constants = "; ".join(f"x = {n}" for n in range(1000, 1300))  # enough for an EXTENDED_ARG
    done = pickled(
        "import math\nfrom os.path import join\n__package__ = 'here.there'\n"
        f"def build():\n    {constants}\n    import json.decoder\n    from . import one\n"
        "    from ..two import three as four\n    from xml import dom\n    return x, math, join\n"
    )
    expected = {"math", "posixpath", "json.decoder", "xml", "xml.dom"}
    expected |= {"here.there", "here.there.one", "here.two", "here.two.three"}
    assert expected <= done.imports


@pytest.mark.parametrize("value", ["'a text'", "b'some bytes'", "(1, 'a text')", "10 ** 30"])
def test_equal_immutable_values_do_not_change_the_digest(value: str) -> None:
    one = f"A = {value}\nX = [A, A]\ndef build(): return X"
    two = f"A = {value}\nX = [A, eval({value!r})]\ndef build(): return X"
    assert digest_of(one) == digest_of(two)


def test_an_object_is_not_pickled_by_the_name_of_another() -> None:
    """The builder would load the other object."""
    text = "import json\ndef build(): return 1\nbuild.__module__, build.__qualname__ = 'json', 'dumps'"
    assert called(pickled(text)) == 1


def test_the_file_of_a_function_has_its_name_on_the_builder(tmp_path: Path) -> None:
    assert called(pickled("def build(): return __file__")) == "module_of_test.py"


def test_source_lines_for_tracebacks_are_stored_beside_the_pickle() -> None:
    text = "\n\ndef build():\n    '''Not in the pickle: its place.'''\n    raise ValueError\n"
    done = pickled(text)
    with pytest.raises(ValueError) as caught:
        called(done)
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno) == ("/nowhere/module_of_test.py", 4)
    assert b"nowhere" not in done.data


def test_files_below_the_current_folder_are_named_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = module_of("def build(): pass", str(tmp_path / "tools/x.py"))
    assert [each.file for each in dump(module.build, module).lines] == ["tools/x.py"]


# any function


class Rendering:
    """Writes values as Python source, with differences that have no meaning."""

    def __init__(self, seed: int, varies: bool) -> None:
        self.random = random.Random(seed)
        self.varies = varies

    def noise(self) -> str:
        return self.random.choice(["", "\n", "# why\n", "\n# because\n\n", "UNUSED = object()\n"])

    def value(self, value: Any) -> str:
        if isinstance(value, set | frozenset):
            members = sorted(map(self.value, value))
            if self.varies:
                self.random.shuffle(members)
            return f"{type(value).__name__}([{', '.join(members)}])"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self.value(key)}: {self.value(item)}' for key, item in value.items())}}}"
        if isinstance(value, list):
            return f"[{', '.join(map(self.value, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(f'{self.value(each)}, ' for each in value)})"
        if isinstance(value, str) and self.varies and self.random.random() < 0.3:
            return f"''.join({[*value]!r})"  # equal, and not interned
        return f"float({str(value)!r})" if isinstance(value, float) else repr(value)


CARRIERS = {
    "global": "X = {v}\n{n}def f(): return X",
    "closure": "def make(x):\n    def f(): return x\n    return f\n{n}f = make({v})",
    "default": "def f(x={v}): return x\n{n}",
    "keyword": "def f(*, x={v}): return x\n{n}",
    "attribute": "def f(): return f.x\n{n}f.x = {v}",
    "class": "class C:\n    x = {v}\n{n}def f(): return C.x",
    "set on class": "class C: pass\n{n}C.x = {v}\ndef f(): return C.x",
    "instance": "class C: pass\nX = C()\n{n}X.x = {v}\ndef f(): return X.x",
    "body": "{n}def f(): return {v}",
    "method": "class C:\n    def m(self): return {v}\n{n}def f(): return C().m()",
    "enum": "from enum import Enum\nclass E(Enum):\n    A = [{v}]\n{n}def f(): return E.A.value[0]",
    "dict of lambdas": "{n}both = {{'a': lambda: None, 'b': lambda: {v}}}\nf = both['b']",
    "partial": "from functools import partial\ndef g(x): return x\n{n}f = partial(g, {v})",
    "subclass": "class L(list): pass\nX = L([{v}])\n{n}def f(): return X[0]",
    "dict in use": "X = {{'x': None}}\ndef f(): return X['x']\n{n}X['x'] = {v}",
    "generator": "X = {v}\n{n}def g():\n    yield X\ndef f(): return next(g())",
}
"""Ways in which a function can refer to a value."""

IN_CODE = {"body", "method", "dict of lambdas"}
"""Ways in which another notation of the value is another program."""

SHOW = """
def show(value):
    kind = type(value).__name__
    if isinstance(value, (set, frozenset)):
        return [kind, sorted(map(repr, map(show, value)))]
    if isinstance(value, dict):
        return [kind, [[show(key), show(item)] for key, item in value.items()]]
    if isinstance(value, (list, tuple)):
        return [kind, [show(each) for each in value]]
    return [kind, repr(value)]
def build():
    return WAY, show(f())
"""

HASHABLE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
VALUES = st.recursive(
    HASHABLE | st.sets(HASHABLE, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HASHABLE, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=6,
)


@st.composite
def programs(draw: st.DrawFn) -> tuple[str, str]:
    """Two programs: often with the same value, sometimes with nearly equal values."""
    ways = st.sampled_from(sorted(CARRIERS))
    one = draw(ways), draw(VALUES)
    nearly: st.SearchStrategy[Any] = st.sampled_from(
        [1, True, 1.0, "1", b"1", 0.0, -0.0, (), [], {}, set(), frozenset(), None, ""]
    )
    other = draw(st.just(one) | st.tuples(st.just(one[0]), nearly | VALUES) | st.tuples(ways, st.just(one[1])))
    texts = []
    for way, value in (one, other):
        rendering = Rendering(draw(st.integers(0, 2**32)), way not in IN_CODE)
        text = CARRIERS[way].format(v=rendering.value(value), n=rendering.noise())
        texts.append(f"WAY = {way!r}\n{rendering.noise()}{text}\n{rendering.noise()}{SHOW}")
    return texts[0], texts[1]


EXAMPLES = int(os.environ.get("CANONICAL_PICKLE_EXAMPLES", "200"))


@given(programs())
@settings(max_examples=EXAMPLES, deadline=None)
def test_digests_are_equal_if_and_only_if_results_are(texts: tuple[str, str]) -> None:
    one, two = map(pickled, texts)
    assert (one.data == two.data) == (called(one) == called(two))


def test_a_set_is_pickled_in_a_canonical_order() -> None:
    orders = {
        json.dumps(called(pickled(f"X = set({[*order]})\ndef build(): return list(X)")))
        for order in itertools.permutations([0, 8, 16, 32])
    }
    assert len(orders) == 1
    made = "class S(set): pass\nX = S()\nfor n in {}: X.add(n)\ndef build(): return list(X)"
    assert digest_of(made.format([0, 8])) == digest_of(made.format([8, 0]))


# functions that cannot be sent

ENUM_WITH_FIELDS = """
from enum import Enum
class E(Enum):
    A = 1
    def __init__(self, x): self.y = x
def build(): return E.A.y
"""

ENUM_OF_OTHER_TEXT = """
from enum import Enum
class E(str, Enum):
    A = 'a'
    def __new__(cls, x):
        new = str.__new__(cls, x.upper())
        new._value_ = x
        return new
def build(): return E.A + ''
"""

REFUSED = [
    ("import threading\nX = threading.Lock()\ndef build(): X.acquire()", "X", "lock"),
    ("import threading\nclass C: x = threading.Lock()\ndef build(): C.x.acquire()", "C.x", "lock"),
    ("X = {'a': [iter(open('/dev/null', 'rb'))]}\ndef build(): return X", "X.a", "BufferedReader"),
    ("from os import environ\ndef build(): return environ['HOME']", "environ", "secrets"),
    ("import functools\n@functools.cache\ndef f(): pass\ndef build(): f()", "f", "only be sent by its name"),
    (
        "class C:\n    def __reduce__(self): return 'gone'\nX = C()\ndef build(): X",
        "X",
        "only be sent by its name, gone",
    ),
    (
        "class C:\n    def __reduce__(self): return 'dumps'\n    __module__ = 'json'\nX = C()\ndef build(): X",
        "X",
        "dumps",
    ),
    ("from random import randint\ndef build(): return randint(0, 9)", "randint", "another one in each process"),
    ("X = (n for n in [])\ndef build(): return X", "X", "generator"),
    (ENUM_WITH_FIELDS, "E", "member A has more than its value"),
    (ENUM_OF_OTHER_TEXT, "E", "member A has more than its value"),
    ("X = {object(), object()}\ndef build(): return X", "", "order changes"),
    (
        "import uuid\nclass C:\n    def __reduce__(self): return str, (uuid.uuid4().hex,)\nX = C()\ndef build(): X",
        "",
        "changes each time",
    ),
]


@pytest.mark.parametrize(("text", "used", "why"), REFUSED, ids=[why for _, _, why in REFUSED])
def test_an_object_without_a_reproducible_pickle_is_rejected(text: str, used: str, why: str) -> None:
    with pytest.raises(PickleError) as caught:
        pickled(text)
    assert caught.value.used == used
    assert why in caught.value.why


def test_an_object_nested_beyond_the_recursion_limit_is_rejected() -> None:
    text = f"X = []\nfor _ in range({sys.getrecursionlimit()}): X = [X]\ndef build(): return X"
    with pytest.raises(PickleError, match="nested too deeply"):
        pickled(text)


def test_pickling_has_no_side_effects_on_the_process() -> None:
    import cloudpickle

    pickled(SUBJECT)
    assert MODULE not in cloudpickle.list_registry_pickle_by_value()
