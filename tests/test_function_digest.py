"""Functions of a dodo.py as jobs: pickled, and identified by a digest of everything they use."""

from __future__ import annotations

import base64
import functools
import importlib.util
import io
import json
import os
import shutil
import sys
import types
import zipfile
from pathlib import Path

import cloudpickle
import pytest
from project import Project

from gamebear_tasks.errors import SettingsError
from gamebear_tasks.jobspec import function_digest

VERSION = "{}.{}".format(*sys.version_info[:2])


@pytest.fixture
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An empty project that shares its builder's store with other fast tests."""
    return Project(tmp_path / "project", home=tmp_path_factory.getbasetemp() / "quick-home")


def load(folder: Path, text: str, name: str = "dodo_of_test") -> types.ModuleType:
    """Import a module from source text as doit imports dodo.py, replacing the previous one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# modules that a function includes

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
def template(system: None, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A built project with a function that uses everything a function may use."""
    made = Project(tmp_path_factory.mktemp("functions"), home=tmp_path_factory.getbasetemp() / "quick-home")
    write_project(made)
    made.doit().ok()
    return made


@pytest.fixture
def built(template: Project, tmp_path: Path) -> Project:
    """A copy of the built project in another folder."""
    shutil.copytree(template.folder, tmp_path / "built")
    return Project(tmp_path / "built", home=template.home)


def write_project(project: Project) -> None:
    project.write("dodo.py", EVERYTHING)
    for name, text in MODULES.items():
        project.write(name, text)


def test_a_function_uses_helpers_constants_classes_modules_closure_and_arguments(built: Project) -> None:
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
def test_doit_detects_changes_of_a_function(built: Project, name: str, old: str, new: str, again: bool) -> None:
    text = (built.folder / name).read_text()
    assert old in text
    built.write(name, text.replace(old, new, 1) or new)
    assert built.doit("list", "--all", "--status").ok().out == f"{'R' if again else 'U'} x   \n"


def test_the_modules_of_a_function_are_file_dependencies(built: Project) -> None:
    info = built.doit("info", "--no-status", "x").ok().out
    expected = [f" - {name}" for name in [*MODULES, "build/x"] if name != "unused.py"]
    assert sorted(line for line in info.splitlines() if line.startswith(" - ")) == sorted(expected)


FROM_MODULE = """
from gamebear_tasks import artifact
from tools.build import build

def task_x():
    return artifact(build, outputs=["build/x"])
"""


@pytest.mark.system
def test_a_function_may_be_imported_from_a_package(project: Project) -> None:
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


@pytest.mark.system
def test_lambdas_decorated_functions_and_static_methods_are_accepted(project: Project) -> None:
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


@pytest.mark.system
def test_another_process_finds_the_job_again(project: Project, tmp_path: Path) -> None:
    write_project(project)
    project.write("dodo.py", EVERYTHING.replace('"?"', repr(str(tmp_path))))
    project.doit().ok(), project.doit("clean").ok(), project.doit("forget", "-a").ok()
    jobs = project.home / ".cache/gamebear/v1/jobs"
    before = {path: path.stat().st_mtime_ns for path in jobs.glob("*/state.json")}
    assert project.doit(PYTHONHASHSEED="7").ok().ran == ["x"]
    assert {path: path.stat().st_mtime_ns for path in jobs.glob("*/state.json")} == before


@pytest.mark.system
def test_the_loaded_function_is_built_although_its_file_was_edited(project: Project, tmp_path: Path) -> None:
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


class Callable_:
    def __call__(self) -> None:
        pass


def test_the_name_of_a_function_is_used_as_a_file_name() -> None:
    assert function_digest.name_of(load).endswith("load")
    assert function_digest.name_of(Callable_.__call__) == "Callable_.__call__"
    assert function_digest.name_of(functools.partial(load)) == "partial"
    assert function_digest.name_of(Callable_()) == "Callable_"
    odd = functools.wraps(load)(lambda: None)
    odd.__qualname__ = "a/b/c"
    assert function_digest.name_of(odd) == "a_b_c"


def test_a_function_includes_the_modules_beside_its_own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import functools\ndef build():\n    import beside, package.sub\nrest = functools.partial(build)\n"
    (tmp_path / "project" / "package").mkdir(parents=True)
    for name in ("beside.py", "package/sub.py", "package/unused.py"):
        (tmp_path / "project" / name).write_text("")
    module = load(tmp_path / "project", text)
    for here, folder in (
        (tmp_path / "project", Path()),
        (tmp_path, Path("project")),
        (Path("/"), tmp_path / "project"),
    ):
        monkeypatch.chdir(here)
        folder = folder.relative_to("/") if here == Path("/") else folder
        for function in (module.build, module.rest):
            assert function_digest.pickled(function).modules == {
                "beside.py": folder / "beside.py",
                "package/sub.py": folder / "package/sub.py",
            }
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert function_digest.pickled(module.build).modules["beside.py"] == tmp_path / "project/beside.py"


def test_a_function_of_a_package_includes_the_modules_beside_the_package(tmp_path: Path) -> None:
    for name in ("outer", "outer/inner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "outer/inner/other.py").write_text("")
    module = load(
        tmp_path / "outer" / "inner", "def build():\n    import beside\n    from . import other\n", "outer.inner.own"
    )
    module.__package__ = "outer.inner"
    assert "beside.py" in function_digest.pickled(module.build).modules
    module.__package__ = ""
    assert "beside.py" not in function_digest.pickled(module.build).modules


def test_a_function_whose_module_has_no_file_includes_no_modules(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("")
    module = load(tmp_path, "def build():\n    import beside\n")
    module.__file__ = None
    assert function_digest.pickled(module.build).modules == {}


def test_the_archive_of_cloudpickle_is_importable_and_reproducible(tmp_path: Path) -> None:
    data = function_digest.cloudpickle_archive()
    assert function_digest.cloudpickle_archive() == data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        assert {"cloudpickle/__init__.py", "cloudpickle/cloudpickle.py"} <= set(names) and names == sorted(names)
        for entry in archive.infolist():
            assert (entry.date_time, entry.compress_type) == ((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED)
        (folder,) = cloudpickle.__path__
        assert all(archive.read(name) == (Path(folder).parent / name).read_bytes() for name in names)


def test_lines_are_json_for_tracebacks(tmp_path: Path) -> None:
    path = tmp_path / "dodo_of_test.py"
    lines = function_digest.pickled(load(tmp_path, "\n\ndef build():\n    return 1\n").build).lines
    ((file, first, table),) = json.loads(lines)
    assert (Path(file).name, first) == (path.name, 3)
    assert base64.b64decode(table) == load(tmp_path, path.read_text()).build.__code__.co_linetable
    assert b" " not in lines.replace(str(path).encode(), b"")


def test_a_function_that_cannot_be_sent_is_named_with_the_reason(tmp_path: Path) -> None:
    module = load(tmp_path, "import threading\nLOCK = threading.Lock()\ndef build():\n    return LOCK\n")
    with pytest.raises(SettingsError, match=r"build.*LOCK") as caught:
        function_digest.pickled(module.build)
    assert "args=" in caught.value.hint


def test_another_python_version_has_another_pickle_version() -> None:
    assert function_digest.python_version() == VERSION


# its digest (see also test_canonical_pickle)


def digest_of(folder: Path, text: str) -> str:
    return function_digest.pickled(load(folder, text).build).sha256


def test_the_digest_of_a_function_from_a_factory_covers_its_closure(tmp_path: Path) -> None:
    factory = "def make(step):\n    def inner():\n        return step\n    return inner\n"
    digests = set()
    for text, step in ((factory, 1), (factory, 2), (factory.replace("step\n", "-step\n"), 1)):
        load(tmp_path, text, "factory_of_test")
        digests.add(digest_of(tmp_path, f"import factory_of_test\nbuild = factory_of_test.make({step})"))
        step_of = f"from factory_of_test import make\nstep = make({step})\ndef build():\n    return step()\n"
        digests.add(digest_of(tmp_path, step_of))
    assert len(digests) == 6


ISSUED = """
import os
from enum import Enum
from pathlib import Path
from gamebear_tasks import artifact

CONF = {"lv": 0}

def prog():
    Path("out").write_text(str(CONF["lv"]))

class Config:
    level = os.environ.get("LEVEL", "O0")

def attribute():
    Path("out").write_text(attribute.level)

attribute.level = os.environ.get("LEVEL", "O0")

class Variant(str, Enum):
    PROD = "x"
    def flags(self): return "-O2"

LAMBDAS = {"a": lambda: Path("out").write_text("1"), "b": lambda: Path("out").write_text("2")}

def task_x():
    for lv in (1, 9):
        CONF["lv"] = lv
        yield {**artifact(prog, outputs=[f"glob{lv}/out"]), "name": f"glob{lv}"}
    yield {**artifact(lambda: Path("out").write_text(Config.level), outputs=["class/out"]), "name": "class"}
    yield {**artifact(attribute, outputs=["attribute/out"]), "name": "attribute"}
    yield {**artifact(lambda: Path("out").write_text(Variant.PROD.flags()), outputs=["enum/out"]), "name": "enum"}
    for name, function in LAMBDAS.items():
        yield {**artifact(function, outputs=[f"{name}/out"]), "name": name}
    yield {**artifact(lambda:
        Path("out").write_text("one"), outputs=["lines/out"]), "name": "lines"}
"""


@pytest.mark.system
def test_exactly_the_bytes_covered_by_the_digest_are_sent(project: Project) -> None:
    def contents() -> dict[str, str]:
        return {path.parent.name: path.read_text() for path in project.folder.glob("*/out")}

    project.write("dodo.py", ISSUED)
    project.doit().ok()
    first = {"glob1": "1", "glob9": "9", "class": "O0", "attribute": "O0", "enum": "-O2", "a": "1", "b": "2"}
    assert contents() == {**first, "lines": "one"}
    assert project.doit().ok().ran == []
    assert project.doit(LEVEL="O3").ok().ran == ["x:class", "x:attribute"]
    assert contents() == {**first, "lines": "one", "class": "O3", "attribute": "O3"}
    project.write("dodo.py", ISSUED.replace('"-O2"', '"-O1"').replace('"one"', '"two"'))
    assert project.doit(LEVEL="O3").ok().ran == ["x:enum", "x:lines"]
    assert contents() == {**first, "lines": "two", "class": "O3", "attribute": "O3", "enum": "-O1"}


# functions that cannot be sent


def test_an_invalid_function_is_rejected_when_dodo_is_loaded(project: Project) -> None:
    project.write(
        "dodo.py",
        "import threading\nfrom gamebear_tasks import artifact\nLOCK = threading.Lock()\n"
        "def build():\n    LOCK.acquire()\n"
        "def task_x():\n    return artifact(build, outputs=['x'])\n",
    )
    run = project.doit()
    run.failed("ERROR: The function build uses LOCK, which cannot be sent to a builder: cannot pickle", "args=")
    assert run.status == 3


@pytest.mark.system
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def build():\n    raise ValueError('upside down')", "ValueError: upside down"),
        ("def build(word):\n    pass", "missing 1 required positional argument: 'word'"),
        ("def build():\n    pass", "output x is missing from the working directory"),
        ("import doit\ndef build():\n    doit.run()", "cannot be loaded on the builder: ModuleNotFoundError"),
    ],
)
def test_a_failed_function_is_an_error_without_a_traceback(project: Project, body: str, message: str) -> None:
    project.write(
        "dodo.py",
        f"from gamebear_tasks import artifact\n{body}\ndef task_x():\n    return artifact(build, outputs=['x'])\n",
    )
    project.doit().failed("x failed on local: ", message)


OTHER_PYTHON = """#!{python}
# Python, saying that it is another version.
import os, sys
if "-c" not in sys.argv:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
before = "import sys; sys.version_info = (3, 9, 2, 'final', 0); sys.version = '3.9.2 (main) [GCC]'; "
code = sys.argv.index("-c") + 1
os.execv({python!r}, [{python!r}, *sys.argv[1:code], before + sys.argv[code], *sys.argv[code + 1 :]])
"""


@pytest.mark.system
def test_a_builder_with_another_python_is_rejected_before_the_build(project: Project, tmp_path: Path) -> None:
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
        f"Python {VERSION} pickled it, and the builder has Python 3.9.2",
        "Run doit with Python 3.9, or use a buildscript.",
    )
    assert not (tmp_path / "built").exists()
    project.doit("y", PATH=path).ok()
