"""Functions of a dodo.py as jobs: sent by cloudpickle, named by what they are made of."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from project import Project

from gamebear_tasks import functions
from gamebear_tasks.errors import SettingsError

VERSION = "{}.{}".format(*sys.version_info[:2])


@pytest.fixture
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An empty project; its builder's store is that of the other quick tests."""
    return Project(tmp_path / "project", home=tmp_path_factory.getbasetemp() / "quick-home")


def load(folder: Path, text: str, name: str = "dodo_of_test") -> types.ModuleType:
    """Import a module from a text, as doit imports dodo.py, in place of the one imported before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# what a function takes along

EVERYTHING = """
import json
import os.path
from pathlib import Path

import helpers
import tools.text
from gamebear_tasks import artifact
from more import shout
from tools import late

SIZE = 3
NAMES = {"x": ["y", None], "z": {1: (2.5, b"3")}}

class Line:
    mark = "-"

    def __init__(self, n):
        self.n = n

    def __str__(self):
        return self.mark * (self.n + SIZE)

def line(n):
    return str(Line(n))

def make(suffix):
    def build(word, times=2, *, ending="!"):
        import collections
        from beside import beside
        parts = [line(times), helpers.twice(word), shout(word), tools.text.AT, late.late(), beside, suffix, ending]
        assert os.path.exists("in") and collections.OrderedDict(NAMES)["x"] == ["y", None]
        Path("x").write_text(json.dumps(parts))
    return build

def task_x():
    return artifact(make("?"), args={"word": "ho"}, inputs=["in"], outputs=["build/x"])
"""

MODULES = {
    "helpers.py": "import hidden\ndef twice(word): return word * hidden.TWO\n",
    "hidden.py": "TWO = 2\n",
    "more.py": "def shout(word): return word.upper()\n",
    "beside.py": "beside = 'beside'\n",
    "tools/__init__.py": "",
    "tools/text.py": "from .at import AT\n",
    "tools/at.py": "AT = '@'\n",
    "tools/late.py": "def late():\n    from . import later\n    return later.LATER\n",
    "tools/later.py": "LATER = 'later'\n",
    "unused.py": "",
    "in": "",
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose one function uses all that a function may use, built."""
    made = Project(tmp_path_factory.mktemp("functions"), home=tmp_path_factory.getbasetemp() / "quick-home")
    lay_everything(made)
    made.doit().ok()
    return made


@pytest.fixture
def built(template: Project, tmp_path: Path) -> Project:
    """A copy of it, elsewhere."""
    shutil.copytree(template.folder, tmp_path / "built")
    return Project(tmp_path / "built", home=template.home)


def lay_everything(project: Project) -> None:
    project.write("dodo.py", EVERYTHING)
    for name, text in MODULES.items():
        project.write(name, text)


def test_a_function_finds_helpers_constants_classes_modules_closure_and_arguments(built: Project) -> None:
    assert (built.folder / "build/x").read_text() == '["-----", "hoho", "HO", "@", "later", "beside", "?", "!"]'
    assert built.doit().ok().ran == []


@pytest.mark.parametrize(
    ("name", "old", "new", "again"),
    [
        ("hidden.py", "2", "3", True),
        ("tools/at.py", "@", "at", True),
        ("tools/later.py", "later'", "later!'", True),
        ("dodo.py", "SIZE = 3", "SIZE = 4", True),
        ("dodo.py", '"word": "ho"', '"word": "hi"', True),
        ("unused.py", "", "1", False),
        ("dodo.py", "def task_x", "def unrelated(): return 1\n\ndef task_x", False),
    ],
)
def test_doit_sees_what_changes_a_function(built: Project, name: str, old: str, new: str, again: bool) -> None:
    text = (built.folder / name).read_text()
    assert old in text
    built.write(name, text.replace(old, new, 1) or new)
    assert built.doit("list", "--all", "--status").ok().out == f"{'R' if again else 'U'} x   \n"


def test_its_modules_are_dependencies_as_an_author_would_write_them(built: Project) -> None:
    info = built.doit("info", "--no-status", "x").ok().out
    expected = [f" - {name}" for name in [*MODULES, "build/x"] if name != "unused.py"]
    assert sorted(line for line in info.splitlines() if line.startswith(" - ")) == sorted(expected)


FROM_MODULE = """
from gamebear_tasks import artifact
from tools.build import build

def task_x():
    return artifact(build, outputs=["build/x"])
"""


def test_a_function_may_come_from_a_module_of_a_package(project: Project) -> None:
    project.write("dodo.py", FROM_MODULE)
    project.write("tools/__init__.py", "from .build import build\n")
    project.write("tools/build.py", "from . import flags\ndef build():\n    open('x', 'w').write(flags.FLAGS)\n")
    project.write("tools/flags.py", "FLAGS = '-O2'\n")
    project.doit().ok()
    assert (project.folder / "build/x").read_text() == "-O2"
    project.write("tools/flags.py", "FLAGS = '-O3'\n")
    project.doit().ok()
    assert (project.folder / "build/x").read_text() == "-O3"
    assert project.doit().ok().ran == []


def test_a_lambda_a_decorated_function_and_a_method_of_no_object_are_functions_too(project: Project) -> None:
    project.write(
        "dodo.py",
        """
import functools
from gamebear_tasks import artifact

def loud(function):
    @functools.wraps(function)
    def wrapper(**args):
        print("building")
        return function(**args)
    return wrapper

@loud
def build(text):
    open("x", "w").write(text)

class Builds:
    @staticmethod
    def build(text):
        open("x", "w").write(text)

def task_x():
    yield {**artifact(build, args={"text": "1"}, outputs=["1/x"]), "name": "1"}
    yield {**artifact(lambda text: open("x", "w").write(text), args={"text": "2"}, outputs=["2/x"]), "name": "2"}
    yield {**artifact(Builds.build, args={"text": "3"}, outputs=["3/x"]), "name": "3"}
""",
    )
    assert "building\n" in project.doit().ok().out
    assert [(project.folder / name / "x").read_text() for name in "123"] == ["1", "2", "3"]


def test_another_process_finds_the_job_again(project: Project, tmp_path: Path) -> None:
    lay_everything(project)
    project.write("dodo.py", EVERYTHING.replace('"?"', repr(str(tmp_path))))
    project.doit().ok(), project.doit("clean").ok(), project.doit("forget", "-a").ok()
    jobs = project.home / ".cache/gamebear/v1/jobs"
    before = {path: path.stat().st_mtime_ns for path in jobs.glob("*/state.json")}
    assert project.doit(PYTHONHASHSEED="7").ok().ran == ["x"]
    assert {path: path.stat().st_mtime_ns for path in jobs.glob("*/state.json")} == before


def test_what_was_loaded_is_built_though_the_file_is_edited_meanwhile(project: Project, tmp_path: Path) -> None:
    project.write(
        "dodo.py",
        f"""
from pathlib import Path
from gamebear_tasks import artifact

def task_edit():
    def edit():
        path = Path("dodo.py")
        path.write_text(path.read_text().replace('"bef' 'ore"', '"after"'))
    return {{"actions": [edit]}}

def build():
    Path("x").write_text("before" + {str(tmp_path)!r})

def task_x():
    return artifact(build, outputs=["x"])
""",
    )
    project.doit().ok()
    assert (project.folder / "x").read_text() == f"before{tmp_path}"
    assert project.doit("x").ok().ran == ["x"], "the edited function is another"
    assert (project.folder / "x").read_text() == f"after{tmp_path}"


# what it is called by

SUBJECT = """
import enum
import functools
import re
from dataclasses import dataclass, field
from pathlib import Path

SIZE = 3
PLACE = Path("in")
PATTERN = re.compile("a+", re.I)
ORDER = {"a": 1, "b": 2}
KINDS = {"k", "l", "m"}
NOTHING = float("nan")
UNUSED = 1

class Base:
    start = SIZE

@dataclass
class Line(Base):
    n: int
    rest: list = field(default_factory=list)

    @property
    def length(self):
        return scale(self.n)

class Colour(enum.Enum):
    RED = "red"

def scale(n):
    return n * 2

def traced(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper

@traced
def helper(n=SIZE):
    return [PATTERN, PLACE, ORDER, KINDS, NOTHING, Line(n).length, Colour.RED, recursive(n)]

def recursive(n):
    return n and recursive(n - 1)

def make(step):
    def build(word, times=2, *, ending="!"):
        return [step, helper(), (lambda: SIZE)()]
    return build

def unrelated():
    return UNUSED

build = make(1)
"""

SUBJECT_DIGEST = "696776ce8478cf1197cbc1f1f8019b69ca46c6fe000b3ada880b7739ad8ec834"


def identity_of(folder: Path, text: str) -> str:
    return functions.identity(load(folder, text).build)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("UNUSED = 1", "UNUSED = 2"),
        ("return UNUSED", "return -UNUSED"),
        ("def unrelated", "\n\n# why\ndef unrelated"),
        ('{"k", "l", "m"}', '{"m", "l", "k"}'),
        ("import enum\n", "import enum\nimport logging\nlog = logging.getLogger()\n"),
    ],
)
def test_what_a_function_does_not_use_does_not_change_it(tmp_path: Path, old: str, new: str) -> None:
    assert old in SUBJECT
    assert identity_of(tmp_path / "b", SUBJECT.replace(old, new)) == identity_of(tmp_path / "a", SUBJECT)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SIZE = 3", "SIZE = 4"),
        ("SIZE = 3", "SIZE = 3.0"),
        ("SIZE = 3", "SIZE = '3'"),
        ('Path("in")', 'Path("out")'),
        ('"a+"', '"b+"'),
        (", re.I)", ")"),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}'),
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 3}'),
        ('{"k", "l", "m"}', '["k", "l", "m"]'),
        ('{"k", "l", "m"}', 'frozenset({"k", "l", "m"})'),
        ('float("nan")', 'float("inf")'),
        ("start = SIZE", "start = SIZE + 1"),
        ("n * 2", "n * 3"),
        ("[step,", "[-step,"),
        ("make(1)", "make(2)"),
        ("times=2", "times=3"),
        ('ending="!"', 'ending="?"'),
        ("function(*args, **kwargs)", "print() or function(*args, **kwargs)"),
        ('RED = "red"', 'RED = "rot"'),
        ("recursive(n - 1)", "recursive(n - 2)"),
        ("@traced\n", ""),
    ],
)
def test_whatever_a_function_uses_changes_it(tmp_path: Path, old: str, new: str) -> None:
    assert old in SUBJECT
    assert identity_of(tmp_path / "b", SUBJECT.replace(old, new)) != identity_of(tmp_path / "a", SUBJECT)


def test_a_function_that_another_module_makes_is_told_by_what_it_holds(tmp_path: Path) -> None:
    factory = "def make(step):\n    def inner():\n        return step\n    return inner\n"
    identities = set()
    for text, step in ((factory, 1), (factory, 2), (factory.replace("step\n", "-step\n"), 1)):
        load(tmp_path, text, "factory_of_test")
        identities.add(identity_of(tmp_path, f"import factory_of_test\nbuild = factory_of_test.make({step})"))
        step_of = f"from factory_of_test import make\nstep = make({step})\ndef build():\n    return step()\n"
        identities.add(identity_of(tmp_path, step_of))
    assert len(identities) == 6


def test_a_function_is_called_the_same_in_every_process_and_folder(tmp_path: Path) -> None:
    here = identity_of(tmp_path / "here", SUBJECT)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "dodo_of_test.py").write_text(SUBJECT)
    for seed in ("1", "2"):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import dodo_of_test as d, gamebear_tasks.functions as f; print(f.identity(d.build))",
            ],
            cwd=tmp_path / "there",
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == here


def test_the_name_that_is_written_down_stays(tmp_path: Path) -> None:
    """On every Python: no release may change it without raising `job.FORMAT`."""
    assert identity_of(tmp_path, SUBJECT) == SUBJECT_DIGEST


# what cannot be sent

REFUSED = [
    ("import logging\nlog = logging.getLogger()\ndef build():\n    log.info('')\n", "build uses log, a RootLogger"),
    ("import threading\nlock = threading.Lock()\ndef build():\n    lock.acquire()\n", "build uses lock, a lock"),
    ("from os import environ\ndef build():\n    return environ['HOME']\n", "build uses environ, a _Environ"),
    ("file = open(__file__)\ndef build():\n    return file\n", "build uses file, a TextIOWrapper"),
    ("def make(it):\n    return lambda: it\nbuild = make(object())\n", "make.<locals>.<lambda> uses it, a object"),
    ("def build(it=object()):\n    pass\n", "build uses a default, a object"),
    ("it = [{'a': (object(),)}]\ndef build():\n    return it\n", "build uses it, a object"),
    ("it = []\nit.append(it)\ndef build():\n    return it\n", "build uses a value that contains itself"),
    ("it = 10 ** 5000\ndef build():\n    return it\n", "build uses a value that contains itself, or is too large"),
    ("import functools\nbuild = functools.partial(print, 1)\n", "partial uses a partial"),
    ("class Build:\n    def __call__(self):\n        pass\nbuild = Build()\n", "Build uses a Build"),
    ("class Build:\n    def run(self):\n        pass\nbuild = Build().run\n", "Build.run uses a method"),
    ("append = [].append\ndef build():\n    append(1)\n", "build uses append, a builtin_function_or_method"),
    ("import functools\n@functools.cache\ndef f(): pass\ndef build():\n    f()\n", "uses f, a _lru_cache_wrapper"),
    (
        "from collections import namedtuple\nP = namedtuple('P', 'a')\ndef build():\n    P(1)\n",
        "uses P, which has no source",
    ),
    ("exec('def build(): pass')\n", "build uses build, which has no source"),
    ("build = print\n", "print uses a builtin_function_or_method"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_has_no_stable_text_is_refused_with_a_way_out(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        identity_of(tmp_path, text)
    paragraph = str(caught.value)
    assert said in paragraph
    assert "make it a buildscript" in paragraph
    assert "\n" not in paragraph


def test_the_refusal_is_shown_when_dodo_is_loaded(project: Project) -> None:
    project.write(
        "dodo.py",
        "import threading\nfrom gamebear_tasks import artifact\nLOCK = threading.Lock()\n"
        "def build():\n    LOCK.acquire()\n"
        "def task_x():\n    return artifact(build, outputs=['x'])\n",
    )
    run = project.doit()
    run.failed("ERROR: The function build uses LOCK, a lock, which has no stable text")
    assert run.status == 3


def test_what_cannot_be_pickled_is_refused_with_a_way_out(project: Project) -> None:
    project.write(
        "dodo.py",
        "import threading\nfrom gamebear_tasks import artifact\n"
        "class Shared:\n    lock = threading.Lock()\n"
        "def build():\n    Shared.lock.acquire()\n"
        "def task_x():\n    return artifact(build, outputs=['x'])\n",
    )
    project.doit().failed("The function build cannot be sent to a builder:", "lock", "make it a buildscript")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def build():\n    raise ValueError('upside down')", "ValueError: upside down"),
        ("def build(word):\n    pass", "missing 1 required positional argument: 'word'"),
        ("def build():\n    pass", "its output x is not in its working directory"),
        ("import doit\ndef build():\n    doit.run()", "cannot be loaded on the builder: ModuleNotFoundError"),
    ],
)
def test_a_function_that_fails_is_one_paragraph(project: Project, body: str, said: str) -> None:
    project.write(
        "dodo.py",
        f"from gamebear_tasks import artifact\n{body}\ndef task_x():\n    return artifact(build, outputs=['x'])\n",
    )
    project.doit().failed("build, built by local:, failed.", said)


OTHER_PYTHON = """#!{python}
# Python, saying that it is another version.
import os, sys
if "-c" not in sys.argv:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
before = "import sys; sys.version_info = (3, 9, 2, 'final', 0); sys.version = '3.9.2 (main) [GCC]'; "
code = sys.argv.index("-c") + 1
os.execv({python!r}, [{python!r}, *sys.argv[1:code], before + sys.argv[code], *sys.argv[code + 1 :]])
"""


def test_a_builder_with_another_python_is_told_apart_before_anything_is_built(project: Project, tmp_path: Path) -> None:
    wrapper = tmp_path / "bin" / "python3"
    wrapper.parent.mkdir()
    wrapper.write_text(OTHER_PYTHON.format(python=sys.executable))
    wrapper.chmod(0o755)
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n"
        f"def build():\n    open({str(tmp_path / 'built')!r}, 'w'), open('x', 'w')\n"
        "def task_x():\n    return artifact(build, outputs=['x'])\n"
        "def task_y():\n    return artifact('y.py', outputs=['y'])\n",
    )
    project.write("y.py", f"open('y', 'w').write({str(tmp_path)!r})")
    path = f"{wrapper.parent}:{os.environ['PATH']}"
    project.doit("x", PATH=path).failed(
        f"The function was pickled by Python {VERSION}, and the builder's python3 is 3.9.2",
        "Run doit with Python 3.9, or make the function a buildscript.",
    )
    assert not (tmp_path / "built").exists()
    project.doit("y", PATH=path).ok()


def test_its_text_is_read_with_the_indentation_it_has(tmp_path: Path) -> None:
    nested = textwrap.indent("def build():\n    '''text\nat the margin'''\n", "    ")
    assert identity_of(tmp_path, f"if True:\n{nested}")
