"""Detection of the local modules that a buildscript imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from project import Project

from gamebear_tasks.errors import SettingsError
from gamebear_tasks.jobspec import module_finder
from gamebear_tasks.jobspec.module_finder import imported_names, local_modules, modules_named
from gamebear_tasks.util import file_hashes


def write_modules(folder: Path, *names: str, **texts: str) -> None:
    """Write Python files: empty ones by path, others with `__` for `/` and `INIT` for `__init__` in their names."""
    paths = {name: name.replace("__", "/").replace("INIT", "__init__") for name in texts}
    contents = dict.fromkeys(names, "") | {f"{paths[name]}.py": text for name, text in texts.items()}
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def found(folder: Path, text: str) -> list[str]:
    """Return the modules found for a script of a folder."""
    write_modules(folder, x=text)
    modules = local_modules(folder / "x.py")
    assert modules == {name: folder / name for name in modules}
    return list(modules)


PACKAGE = ("a.py", "b.py", "pkg/__init__.py", "pkg/mod.py", "pkg/sub/__init__.py", "pkg/sub/deep.py", "space/mod.py")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import a", ["a.py"]),
        ("import a, b as c", ["a.py", "b.py"]),
        ("from a import anything", ["a.py"]),
        ("from a import *", ["a.py"]),
        ("import pkg", ["pkg/__init__.py"]),
        ("import pkg.mod", ["pkg/__init__.py", "pkg/mod.py"]),
        ("from pkg import mod", ["pkg/__init__.py", "pkg/mod.py"]),
        ("from pkg import mod as m, absent", ["pkg/__init__.py", "pkg/mod.py"]),
        ("from pkg.sub.deep import x", ["pkg/__init__.py", "pkg/sub/__init__.py", "pkg/sub/deep.py"]),
        ("import space.mod", ["space/mod.py"]),
        ("from space import mod", ["space/mod.py"]),
        ("def f():\n    import a", ["a.py"]),
        ("try:\n    import a\nexcept ImportError:\n    import b", ["a.py", "b.py"]),
        ("import os, os.path, paramiko", []),
        ("import a.nothing.below", ["a.py"]),
        ("import x", []),
        ('"import a"  # import b', []),
        ("#| arg: n: int = 1\nimport a\nreturn a", ["a.py"]),
        ("\ufeffimport a", ["a.py"]),
    ],
)
def test_an_import_includes_the_module_that_python_would_load(tmp_path: Path, text: str, names: list[str]) -> None:
    write_modules(tmp_path, *PACKAGE)
    assert found(tmp_path, text) == names


def test_imports_are_followed_through_modules_packages_and_circles(tmp_path: Path) -> None:
    write_modules(
        tmp_path,
        "pkg/sub/leaf.py",
        one="import two",
        two="import one, x\nfrom pkg import *",
        pkg__INIT="from .mod import name",
        pkg__mod="from . import near\nfrom .sub.far import y",
        pkg__near="import json",
        pkg__sub__INIT="",
        pkg__sub__far="from . import leaf\nfrom .. import up\nfrom ..near import z\nfrom ...beyond import w",
        pkg__up="import top",
        top="",
        near="raise SystemExit  # not the package's",
        beyond="raise SystemExit  # not in the package",
    )
    assert found(tmp_path, "import one") == [
        "one.py",
        "pkg/__init__.py",
        "pkg/mod.py",
        "pkg/near.py",
        "pkg/sub/__init__.py",
        "pkg/sub/far.py",
        "pkg/sub/leaf.py",
        "pkg/up.py",
        "top.py",
        "two.py",
    ]


def test_a_module_of_the_project_takes_precedence(tmp_path: Path) -> None:
    write_modules(tmp_path, "json.py")
    assert found(tmp_path, "import json") == ["json.py"]


def test_modules_are_searched_beside_each_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_modules(tmp_path, "common.py", "scripts/common.py", scripts__x="import common", y="import common")
    assert local_modules(Path("scripts/x.py")) == {"common.py": Path("scripts/common.py")}
    assert local_modules(Path("y.py")) == {"common.py": Path("common.py")}


def test_an_edited_module_is_read_again(tmp_path: Path) -> None:
    write_modules(tmp_path, "a.py", "b.py")
    assert found(tmp_path, "import a") == ["a.py"]
    (tmp_path / "a.py").write_text("import b")
    assert found(tmp_path, "import a") == ["a.py", "b.py"]


@pytest.mark.parametrize(
    ("content", "output"),
    [
        (b"c.run([\n", "x.py, line 1, is not Python: '[' was never closed."),
        (b"a = 1\nif a\n", "x.py, line 2, is not Python: expected ':'."),
        (b"\xff\xfe", "x.py, line 1, is not Python: (unicode error) 'utf-8' codec can't decode"),
        (b"a = 1\0", "x.py is not Python: source code string cannot contain null bytes."),
        (b"# coding: nonsense\n", "is not Python:"),
        (b"x = " + b"(" * 10_000, "is not Python: too many nested parentheses."),
        (b"x = " + b"-" * 100_000 + b"1", "is not Python:"),
    ],
)
def test_a_script_that_is_not_python_is_an_error_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.py").write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        local_modules(Path("x.py"))
    assert output in str(caught.value)
    assert str(caught.value).count("\n") == 1, "what failed, and the fix"


def test_a_module_that_is_not_python_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_modules(tmp_path, x="import a", a="def f(:\n")
    with pytest.raises(SettingsError, match=r"^a\.py, line 1, is not Python: invalid syntax\.\n→ Fix it there\.$"):
        local_modules(Path("x.py"))


def test_a_script_that_is_missing_or_a_folder_is_an_error_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"^The buildscript x\.py cannot be read: No such file or directory\."):
        local_modules(Path("x.py"))
    Path("x.py").mkdir()
    with pytest.raises(SettingsError, match=r"^x\.py cannot be read: Is a directory\."):
        local_modules(Path("x.py"))


def test_syntax_warnings_are_left_to_the_build(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(tmp_path, r"pattern = '\d'; 1 is 1") == []


names = st.sampled_from(["a", "b", "pkg", "pkg.a", "pkg.b", "pkg.sub", "pkg.sub.a"])
lines = st.one_of(
    names.map("import {}".format),
    st.tuples(names, st.sampled_from(["a", "b", "sub"])).map(lambda pair: "from {} import {}".format(*pair)),
)
relative = st.tuples(st.sampled_from([".", "..", ".sub", ".a"]), st.sampled_from(["a", "b"])).map(
    lambda pair: "from {} import {}".format(*pair)
)
FILES = ["a.py", "b.py", "pkg/__init__.py", "pkg/a.py", "pkg/b.py", "pkg/sub/__init__.py", "pkg/sub/a.py"]

LOADED = """
import sys
sys.path.insert(0, sys.argv[1])
try:
    import x
except (ImportError, RecursionError):
    pass
for module in list(sys.modules.values()):
    if (getattr(module, "__file__", None) or "").startswith(sys.argv[1]):
        print(module.__file__[len(sys.argv[1]) + 1 :])
"""


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_all_modules_that_python_would_load_are_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("modules")
    for name in [*FILES, "x.py"]:
        kinds = st.one_of(lines, relative) if "/" in name else lines
        text = "\n".join(data.draw(st.lists(kinds, min_size=name == "x.py", max_size=2)))
        write_modules(folder, **{name[:-3].replace("__init__", "INIT").replace("/", "__"): text})
    done = subprocess.run(
        [sys.executable, "-ISB", "-c", LOADED, str(folder)], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) - {"x.py"} <= set(local_modules(folder / "x.py"))


@pytest.mark.system
def test_the_modules_are_available_when_the_script_runs(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project = Project(tmp_path / "project", home=tmp_path_factory.getbasetemp() / "quick-home")
    write_modules(
        project.folder / "scripts",
        x="import parts.flags\nfrom common import write\nwrite(parts.flags.FLAGS)",
        common="from parts import NAME\ndef write(text): open(NAME, 'w').write(text)",
        parts__INIT="NAME = 'x'",
        parts__flags="from .base import FLAGS",
        parts__base="FLAGS = '-O2'",
    )
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\ndef task_x(): return artifact('scripts/x.py', outputs=['build/x'])",
    )
    project.doit(PYTHONDONTWRITEBYTECODE="").ok()
    assert (project.folder / "build/x").read_text() == "-O2"
    assert not list((project.folder / "scripts").rglob("__pycache__")), "the client only reads them"


def imported_by_python(script: Path) -> str:
    """Return the output of a script run by Python itself."""
    return subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout


def test_modules_of_a_linked_script_are_searched_beside_its_target_as_python_does(tmp_path: Path) -> None:
    write_modules(
        tmp_path, "real/near.py", scripts__a="print('link')", real__a="print('target')", real__x="import a, near"
    )
    script = tmp_path / "scripts/x.py"
    script.symlink_to("../real/x.py")
    assert imported_by_python(script) == "target\n"
    assert local_modules(script) == {name: tmp_path / "real" / name for name in ("a.py", "near.py")}


def test_modules_of_a_linked_script_below_the_current_folder_have_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_modules(tmp_path, "real/a.py", real__x="import a", scripts__b="")
    Path("scripts/x.py").symlink_to(tmp_path / "real/x.py")
    assert local_modules(Path("scripts/x.py")) == {"a.py": Path("real/a.py")}


def test_a_retargeted_script_link_has_the_modules_of_its_new_target(tmp_path: Path) -> None:
    write_modules(tmp_path, "one/a.py", "two/a.py", one__x="import a", two__x="import a")
    script = tmp_path / "x.py"
    for folder in ("one", "two"):
        script.unlink(missing_ok=True)
        script.symlink_to(f"{folder}/x.py")
        assert local_modules(script) == {"a.py": tmp_path / folder / "a.py"}


def test_a_linked_script_may_import_its_target_by_its_own_name(tmp_path: Path) -> None:
    write_modules(tmp_path, real__y="if __name__ == '__main__':\n    import y\nelse:\n    print('imported')")
    script = tmp_path / "x.py"
    script.symlink_to("real/y.py")
    assert imported_by_python(script) == "imported\n"
    assert local_modules(script) == {"y.py": tmp_path / "real/y.py"}


def test_linked_modules_and_packages_are_found_under_their_links_names(tmp_path: Path) -> None:
    write_modules(
        tmp_path, "shared/pkg/sub.py", shared__m="import n", shared__pkg__INIT="from . import sub", shared__n="wrong"
    )
    write_modules(tmp_path, scripts__n="", scripts__x="import module, package")
    (tmp_path / "scripts/module.py").symlink_to("../shared/m.py")
    (tmp_path / "scripts/package").symlink_to("../shared/pkg")
    assert imported_by_python(tmp_path / "scripts/x.py") == ""
    assert list(local_modules(tmp_path / "scripts/x.py")) == [
        "module.py",
        "n.py",
        "package/__init__.py",
        "package/sub.py",
    ]


# caches


TICK = 0.05
"""Seconds after which a change is visible in timestamps: longer than the kernel's clock tick."""


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder, with empty caches."""
    monkeypatch.chdir(tmp_path)
    for name in ("_files", "_folders", "_searches"):
        monkeypatch.setattr(module_finder, name, {})


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parsed source texts."""
    texts: list[str] = []
    parse = ast.parse

    def noted(text: bytes, *arguments: str) -> ast.AST:
        texts.append(text.decode())
        return parse(text, *arguments)

    monkeypatch.setattr(ast, "parse", noted)
    return texts


@pytest.mark.usefixtures("empty")
def test_an_unchanged_file_is_parsed_once(parsed: list[str]) -> None:
    write_modules(Path(), x="import a", a="import json")
    time.sleep(2 * file_hashes.SETTLED)
    for _ in range(2):
        assert local_modules(Path("x.py")) == {"a.py": Path("a.py")}
    assert sorted(parsed) == ["import a", "import json"]


@pytest.mark.usefixtures("empty")
def test_a_file_of_the_same_size_and_mtime_is_read_again() -> None:
    write_modules(Path(), "a.py", "b.py", x="import a")
    time.sleep(2 * file_hashes.SETTLED)
    assert list(local_modules(Path("x.py"))) == ["a.py"]
    before = os.stat("x.py")
    Path("x.py").write_text("import b")
    os.utime("x.py", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert list(local_modules(Path("x.py"))) == ["b.py"]


@pytest.mark.usefixtures("empty")
def test_a_file_that_may_change_without_new_timestamps_is_read_again(
    parsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_modules(Path(), x="import a")
    monkeypatch.setattr(module_finder, "version", lambda _about: "the same ")
    monkeypatch.setattr(module_finder, "is_settled", lambda _about: False)
    assert imported_names("x.py") == "a"
    Path("x.py").write_text("import b")
    monkeypatch.setattr(module_finder, "is_settled", lambda _about: True)
    for _ in range(2):
        assert imported_names("x.py") == "b"
    assert parsed == ["import a", "import b"]


@pytest.mark.usefixtures("empty")
def test_equal_module_lists_are_one_object() -> None:
    write_modules(Path(), x="import some.thing")
    first = imported_names("x.py")
    time.sleep(TICK)
    write_modules(Path(), x="import some.thing  # again")
    assert imported_names("x.py") is first


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("settled", [False, True])
def test_a_created_or_removed_module_is_detected(monkeypatch: pytest.MonkeyPatch, settled: bool) -> None:
    monkeypatch.setattr(module_finder, "is_settled", lambda about: settled)
    write_modules(Path(), "scripts/pkg/deep/a.py", scripts__x="import m, pkg.deep.b, pkg.deep.a")

    def found_now() -> list[str]:
        time.sleep(TICK)
        return list(local_modules(Path("scripts/x.py")))

    assert found_now() == ["pkg/deep/a.py"]
    write_modules(Path("scripts"), "m.py")
    assert found_now() == ["m.py", "pkg/deep/a.py"]
    write_modules(Path("scripts"), "pkg/deep/b.py")
    assert found_now() == ["m.py", "pkg/deep/a.py", "pkg/deep/b.py"]
    write_modules(Path("scripts"), "pkg/deep/__init__.py")
    assert found_now() == ["m.py", "pkg/deep/__init__.py", "pkg/deep/a.py", "pkg/deep/b.py"]
    Path("scripts/m.py").unlink()
    assert found_now() == ["pkg/deep/__init__.py", "pkg/deep/a.py", "pkg/deep/b.py"]
    Path("scripts/pkg/deep/a.py").unlink()
    assert found_now() == ["pkg/deep/__init__.py", "pkg/deep/b.py"]
    Path("scripts/pkg").rename("scripts/gone")
    assert found_now() == []


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("settled", [False, True])
def test_changed_imports_of_an_imported_module_are_detected(monkeypatch: pytest.MonkeyPatch, settled: bool) -> None:
    monkeypatch.setattr(module_finder, "is_settled", lambda about: settled)
    write_modules(Path(), "b.py", "c.py", x="import a", a="import b")
    assert list(local_modules(Path("x.py"))) == ["a.py", "b.py"]
    time.sleep(TICK)
    write_modules(Path(), a="import c")
    assert list(local_modules(Path("x.py"))) == ["a.py", "c.py"]
    Path("a.py").write_text("import (")
    for _ in range(2):
        with pytest.raises(SettingsError, match=r"a\.py, line 1, is not Python"):
            local_modules(Path("x.py"))


@pytest.mark.usefixtures("empty")
def test_a_valid_search_result_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_finder, "is_settled", lambda about: True)
    write_modules(Path(), "a.py", x="import a")
    found = modules_named("", "a")
    assert modules_named("", ["a"]) is found
    assert dict(modules_named("", "a", but="a.py")) == {}
    assert modules_named("", "a", but="b.py") is found


def test_warnings_of_other_code_are_shown_as_before(tmp_path: Path) -> None:
    filters = list(warnings.filters)
    found(tmp_path, r"pattern = '\d'")
    assert warnings.filters == filters


def test_several_names_are_searched_at_once(tmp_path: Path) -> None:
    write_modules(tmp_path, "a.py", "b.py", "c.py")
    assert list(modules_named(str(tmp_path), ["a", "b"])) == ["a.py", "b.py"]


def test_modules_of_a_script_in_a_linked_folder_have_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_modules(tmp_path, "real/a.py", real__x="import a")
    Path("link").symlink_to("real")
    assert local_modules(Path("link/x.py")) == {"a.py": Path("link/a.py")}
