"""The buildscript language: top-level return, `#|` lines, args."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import pytest

from gamebear_tasks.runner.script.language import ScriptError, TemporaryDirectory, add_requirements, bind, read


def run(source: str, **names: object) -> tuple[object, dict[str, object]]:
    """Run a script and return what it returned and its globals."""
    values: dict[str, object] = {"__name__": "__script__", **names}
    return read(source.encode(), "script.py").run(values), values


def test_a_script_returns_at_top_level() -> None:
    returned, names = run("x = 1\nif x:\n    return x + 1\nx = 5")
    assert returned == 2 and names["x"] == 1


def test_a_bare_return_ends_the_script() -> None:
    returned, names = run("x = 1\nreturn\nx = 2")
    assert returned is None and names["x"] == 1


def test_a_return_is_not_caught_by_a_bare_except_and_runs_finally() -> None:
    returned, names = run(
        "try:\n    try:\n        return 7\n    except:\n        x = 'caught'\nfinally:\n    done = True"
    )
    assert returned == 7 and names["done"] is True and "x" not in names


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        ("a = 1", "a", 1),
        ("a: int = 2", "a", 2),
        ("a = 1\na += 2", "a", 3),
        ("(a, *b), c = (1, 2, 3), 4", "b", [2, 3]),
        ("for a in (1, 2): pass", "a", 2),
        ("import os.path as a\na = a.sep", "a", "/"),
        ("import os.path\na = os.sep", "a", "/"),
        ("from os import sep as a", "a", "/"),
        ("from string import *\na = digits", "a", "0123456789"),
        ("[a := n for n in (1, 2)]", "a", 2),
        ("def f():\n    return a\na = 5\nb = f()", "b", 5),
        ("def f():\n    global a\n    a = 6\na = 1\nf()", "a", 6),
        ("global a\na = 7", "a", 7),
        ("class C:\n    a = 1\n    def f(self): return b\nb = 8\na = C().f()", "a", 8),
        ("def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\na = fib(10)", "a", 55),
        ("n = 3\na = [n * m for m in range(n)]", "a", [0, 3, 6]),
        ("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    a = str(e)", "a", "division by zero"),
        ("with open('/dev/null') as f:\n    a = f.read()", "a", ""),
        ("a = 1\ndel a\na = globals()['__name__']", "a", "__script__"),
        ("from __future__ import annotations\na = annotations.compiler_flag > 0", "a", True),
        ("'The docstring.'\nfrom __future__ import annotations\na = __doc__", "a", "The docstring."),
    ],
)
@pytest.mark.parametrize("end", ["", "\nreturn", "\nif True:\n    return 3"], ids=["plain", "return", "nested return"])
def test_names_are_global_whether_a_script_returns_or_not(body: str, name: str, value: object, end: str) -> None:
    assert run(body + end)[1][name] == value


@pytest.mark.skipif(sys.version_info < (3, 10), reason="match is new in Python 3.10")
def test_names_bound_by_match_are_global() -> None:
    assert run("match {'k': [1, 2]}:\n    case {'k': [a, *b]}:\n        return")[1]["b"] == [2]


def test_an_annotation_without_a_value_binds_nothing() -> None:
    assert "a" not in run("a: int\nreturn")[1]


def test_line_numbers_are_those_of_the_file() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run("import os\n\n\ndef f():\n    1 / 0\n\nf()\nreturn")
    frames = [(frame.lineno, frame.name) for frame in traceback.extract_tb(caught.tb) if frame.filename == "script.py"]
    assert frames == [(7, "<module>"), (5, "f")]


@pytest.mark.parametrize(
    ("source", "message", "line"),
    [
        ("return 1\nx = = 2", "invalid syntax", 2),
        ("return 1\nyield 2", "'yield' outside function", 2),
        ("def f():\n    nonlocal x\nx = 1\nreturn", "no binding for nonlocal 'x' found", 2),
        ("class C:\n    return 1", "'return' outside function", 2),
        ("if 1:\nreturn", "expected an indented block", 2),
    ],
)
def test_a_syntax_error_is_pythons_own(source: str, message: str, line: int) -> None:
    with pytest.raises(SyntaxError, match=message) as caught:
        read(source.encode(), "script.py")
    assert (caught.value.filename, caught.value.lineno) == ("script.py", line)


def test_future_imports_of_the_runner_do_not_affect_the_script() -> None:
    assert run("def f(x: 1 + 1): pass\na = f.__annotations__")[1]["a"] == {"x": 2} or sys.version_info >= (3, 14)


def test_a_function_can_end_the_script() -> None:
    returned, names = run("def f():\n    __return__(4)\nf()\nx = 1")
    assert returned == 4 and "x" not in names


def test_a_source_in_another_encoding_is_read_as_python_reads_it() -> None:
    program = read("# coding: latin-1\nreturn 'ä'".encode("latin-1"), "script.py")
    assert program.run({}) == "ä"


# #| lines


def test_pip_lines_are_collected_in_order() -> None:
    source = (
        b'#!/usr/bin/env buildahscript-py\n#| pip: requests>=2; python_version > "3"\nx = """\n#| pip: no\n"""\n#|pip:b'
    )
    assert read(source, "s.py").requirements == ('requests>=2; python_version > "3"', "b")


@pytest.mark.parametrize("line", ["# arg: x", "#| a note", "#|", "  #| arg: x", "x = 1  #| arg: x"])
def test_other_comments_are_ignored(line: str) -> None:
    assert not read(f"if 1:\n{line}\n  y = 1".encode() if line[0] == " " else line.encode(), "s.py").arguments


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("#| pipp: x", "s.py, line 2: unknown directive `#| pipp:`. Use `#| pip:` or `#| arg:`."),
        ("#| pip:", "s.py, line 2: `#| pip:` without a requirement. Write `#| pip: requests`."),
        ("#| arg: my-arg", "s.py, line 2: invalid directive `#| arg: my-arg`."),
        ("#| arg: x: = 3", "s.py, line 2: invalid directive `#| arg: x: = 3`."),
        ("#| arg: 2x", "s.py, line 2: invalid directive `#| arg: 2x`."),
        ("#| arg: x = y", "s.py, line 2: default of arg x is not a Python literal: y"),
    ],
)
def test_an_invalid_line_is_an_error_with_its_number(line: str, message: str) -> None:
    with pytest.raises(ScriptError) as caught:
        read(f"\n{line}\n".encode(), "s.py")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("line", "given", "value"),
    [
        ("x", None, None),
        ("x", "1", "1"),
        ("x", 1, 1),
        ("x = 5  # five", None, 5),
        ("x: int = 5", "7", 7),
        ("x:int=5", 7, 7),
        ("x: str", 7, "7"),
        ("x: float", 7, 7.0),
        ("x: bool = False", "true", True),
        ("x: bool = True", "no", False),
        ("x: bool", "0", False),
        ("x: bool", "", False),
        ("x: bool", True, True),
        ("x: bool", 0, False),
        ("x: str.title", "a b", "A B"),
        ("x: pathlib.Path", "/a", Path("/a")),
        ("x: os.path.basename", "/a/b", "b"),
        ("x = 'a # b'", None, "a # b"),
        ("x: list = [1]", [2], [2]),
    ],
)
def test_an_arg_is_converted_to_its_declared_type(line: str, given: object, value: object) -> None:
    program = read(f"#| arg: {line}".encode(), "s.py")
    assert bind(program, {} if given is None else {"x": given}) == {"x": value}


@pytest.mark.parametrize(
    ("line", "given", "message"),
    [
        ("x: int", {"x": "y"}, "s.py, line 1: invalid value 'y' for arg x: int: invalid literal"),
        ("x: bool", {"x": "maybe"}, "s.py, line 1: invalid value 'maybe' for arg x: bool: expected true or false"),
        ("x: nothing", {}, "s.py, line 1: unknown type nothing of arg x."),
        ("x: os.path", {}, "s.py, line 1: unknown type os.path of arg x"),
        ("x: str = ...", {}, 's.py, line 1: arg x has no value. Set it in the task: args={"x": …}.'),
        ("x", {"y": 1, "z": 1}, "s.py: unknown arg 'y', 'z'. Use one of x, or declare `#| arg: y`."),
    ],
)
def test_a_wrong_arg_is_an_error_that_names_it(line: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(ScriptError) as caught:
        bind(read(f"#| arg: {line}".encode(), "s.py"), given)
    assert str(caught.value).startswith(message)


def test_an_arg_for_a_script_without_declarations_is_an_error_with_the_fix() -> None:
    with pytest.raises(ScriptError, match=r"s\.py: unknown arg 'y'\. Declare `#\| arg: y`\."):
        bind(read(b"", "s.py"), {"y": 1})


def test_an_arg_can_be_of_a_type_from_a_module_beside_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_the_script.py").write_text("def double(text): return text * 2")
    monkeypatch.syspath_prepend(tmp_path)
    program = read(b"#| arg: x: beside_the_script.double", "s.py")
    assert bind(program, {"x": "ab"}) == {"x": "abab"}


# the rest


def test_a_temporary_directory_is_a_path() -> None:
    with TemporaryDirectory() as folder:
        (folder / "bin").mkdir()
    assert not folder.exists()


@pytest.mark.system
def test_a_failed_pip_install_is_an_error_and_leaves_no_environment(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ScriptError, match=r"pip failed with status 1: ./no-such-folder not installed"):
        add_requirements(tmp_path, ["./no-such-folder"])
    assert [path.suffix for path in (tmp_path / "venvs").iterdir()] == [".lock"]


@pytest.mark.system
def test_requirements_are_installed_once_and_importable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    wheel = package / "gamebear_test_only-1-py3-none-any.whl"
    _write_wheel(wheel)
    monkeypatch.setattr(sys, "path", list(sys.path))
    add_requirements(tmp_path, [f"gamebear-test-only @ {wheel.as_uri()}"])
    wheel.unlink()
    add_requirements(tmp_path, [f"gamebear-test-only @ {wheel.as_uri()}"])
    assert __import__("gamebear_test_only").ANSWER == 42


def _write_wheel(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("gamebear_test_only.py", "ANSWER = 42\n")
        info = "gamebear_test_only-1.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gamebear-test-only\nVersion: 1\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
