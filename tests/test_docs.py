"""The documentation matches the code: examples work; names, defaults and links are correct."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import generate
import pytest
from project import ROOT, Project

import gamebear_tasks
from gamebear_tasks.config import Settings, settings
from gamebear_tasks.errors import GamebearError
from gamebear_tasks.records import task_record
from gamebear_tasks.runner.script.container import Container
from gamebear_tasks.runner.script.image import Image
from gamebear_tasks.runner.script.language import read
from gamebear_tasks.sources.lockfile import Lock

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
BUILDSCRIPTS = ROOT / "docs" / "reference" / "buildscripts.md"
API = ROOT / "docs" / "reference" / "api.md"

SEEN = {
    "Container",
    "Image",
    "ImageNotFoundError",
    "CommandError",
    "TemporaryDirectory",
    "packages_image",
    "Path",
    "__sources__",
}
"""Globals of a buildscript besides builtins, args and other names with underscores."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document.

    Attributes:
        document: its path below the checkout.
        line: the line of its first line.
        language: what the fence says.
        text: what is in it.
    """

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def is_dodo(self) -> bool:
        """Whether the block is a dodo.py: it defines tasks."""
        return re.search(r"^def task_", self.text, re.MULTILINE) is not None

    @property
    def is_buildscript(self) -> bool:
        """Whether the block is a buildscript or a module of one: it does not import gamebear_tasks."""
        return "gamebear_tasks" not in self.text

    @property
    def file(self) -> str:
        """File name from a comment in the first line; empty without one."""
        match = re.match(r"# (\S+\.py)\n", self.text)
        return match[1] if match else ""


def _blocks(path: Path) -> Iterator[Block]:
    name = str(path.relative_to(ROOT))
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = path.read_text("utf-8")
    for match in fence.finditer(text):
        yield Block(name, text.count("\n", 0, match.start(2)) + 1, match[1], match[2])


BLOCKS = [block for path in DOCUMENTS for block in _blocks(path)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
DODOS = [block for block in PYTHON if block.is_dodo]
SCRIPTS = [block for block in PYTHON if block.is_buildscript]


def _in(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


# examples


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_an_example_compiles(block: Block) -> None:
    read(block.text.encode(), str(block))


def test_there_are_examples_of_each_kind() -> None:
    assert len(DODOS) >= 4 and len(SCRIPTS) >= 8 and _in("toml") and _in("json")


@pytest.mark.parametrize("block", SCRIPTS, ids=str)
def test_a_buildscript_uses_only_existing_names(block: Block) -> None:
    program = read(block.text.encode(), str(block))
    assert _free_names(block.text) - set(dir(builtins)) - SEEN - set(program.arguments) == set()
    for call in _calls(block.text):
        _check_call(call)


def _free_names(source: str) -> set[str]:
    """Return the free names of a script."""
    bound: set[str] = set()
    loaded: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return loaded - bound


def _calls(source: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))


def _check_call(call: ast.Call) -> None:
    """Assert that a call of a public function has valid arguments; `c.` and `img.` identify methods."""
    signature: inspect.Signature | None = None
    if isinstance(call.func, ast.Name) and call.func.id in ("Container", "Image", "packages_image"):
        signature = inspect.signature(generate.CALLS[call.func.id])
    elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        owner = {"c": Container, "img": Image}.get(call.func.value.id)
        if owner is not None:
            assert hasattr(owner, call.func.attr), ast.unparse(call)
            signature = _without_self(getattr(owner, call.func.attr))
    if signature is not None and not any(isinstance(item, ast.Starred) for item in call.args):
        signature.bind(*call.args, **{item.arg: item.value for item in call.keywords if item.arg})


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_names_imported_by_an_example_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "gamebear_tasks":
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def _project_of(block: Block, folder: Path) -> Project:
    """Create a project from a dodo.py; its buildscripts are those of the examples, or empty."""
    project = Project(folder / "project", home=folder / "home")
    project.write("dodo.py", block.text)
    examples = {example.file: example.text for example in SCRIPTS}
    for call in _calls(block.text):
        if isinstance(call.func, ast.Name) and call.func.id == "artifact" and isinstance(call.args[0], ast.Constant):
            name = str(call.args[0].value)
            project.write(name, examples.get(name, ""))
    return project


@pytest.mark.parametrize("block", DODOS, ids=str)
def test_sources_of_an_example_do_not_clash_with_its_outputs(block: Block) -> None:
    for call in _calls(block.text):
        given = {item.arg: item.value for item in call.keywords}
        if "sources" in given and "outputs" in given:
            assert isinstance(given["sources"], ast.Dict)
            folders = {node.value for node in given["sources"].keys if isinstance(node, ast.Constant)}
            outputs = {
                Path(str(node.value)).name for node in ast.walk(given["outputs"]) if isinstance(node, ast.Constant)
            }
            assert not folders & outputs, "copy_out() would put the file into the source's folder"


@pytest.mark.parametrize("block", DODOS, ids=str)
def test_doit_loads_an_example(block: Block, tmp_path: Path) -> None:
    tasks = re.findall(r"^def task_(\w+)", block.text, re.MULTILINE)
    listed = _project_of(block, tmp_path).doit("list").ok().out
    assert set(tasks) <= {line.split()[0] for line in listed.splitlines()}


@pytest.mark.system
def test_examples_without_a_container_build_their_outputs(tmp_path: Path) -> None:
    dodo = next(block for block in DODOS if "def greet(" in block.text)
    project = _project_of(dodo, tmp_path)
    project.doit().ok()
    assert json.loads((project.folder / "build" / "greeting.json").read_text()) == ["hello world", "hello world"]
    assert (project.folder / "build" / "greeting").read_text() == "hello World.\nhello World.\n"
    assert project.doit().ok().ran == []


def test_the_example_of_an_error_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    block = next(block for block in PYTHON if "except GamebearError" in block.text)
    exec(compile(block.text, str(block), "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("block", _in("toml"), ids=str)
def test_settings_in_an_example_exist(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tomllib.loads(block.text).get("tool", {}).get("gamebear", {})
    (tmp_path / "pyproject.toml").write_text(block.text)
    monkeypatch.chdir(tmp_path)
    found = dataclasses.asdict(settings())
    if isinstance(builders := given.get("builder"), dict):
        given["builder"] = ",".join(f"{arch}={url}" for arch, url in builders.items())
    assert {name: found[name] for name in given} == given


@pytest.mark.parametrize("block", _in("json"), ids=str)
def test_json_in_an_example_is_valid(block: Block, tmp_path: Path) -> None:
    data = json.loads(block.text)
    if "phases" in data:
        assert {phase["name"] for phase in data["phases"]} < {*task_record.CLIENT, *task_record.BUILDER}
    elif "version" in data:
        path = tmp_path / "gamebear.lock"
        path.write_text(block.text)
        lock = Lock.read(path)
        assert lock.git and lock.debian
        lock.write(path)
        assert path.read_text() == block.text, "the lock file is written as the example has it"


# the reference


def _section(document: Path, title: str) -> str:
    """Return the text under a heading of the second level, including subsections."""
    return next(part for part in re.split(r"^## ", document.read_text("utf-8"), flags=re.MULTILINE) if _is(part, title))


def _is(part: str, title: str) -> bool:
    return part.partition("\n")[0] == title


def _rows(text: str) -> dict[str, list[str]]:
    """Return the table rows of a text by the code in their first cell; several names may share a row."""
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!#)\|", line.strip("|"))]
            rows.update((name, cells[1:]) for name in re.findall(r"`([^`]+)`", cells[0]))
    return rows


def _public(owner: type) -> set[str]:
    """Return the public names of a class and the attributes that its constructor sets."""
    set_there = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(owner)))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if ast.unparse(node.value) in ("self", "image")  # other constructors of Image set `image`
    }
    return {name for name in {*dir(owner), *set_there} if not name.startswith("_")}


@pytest.mark.parametrize(("owner", "short"), [(Container, "c"), (Image, "img")])
def test_exactly_the_members_of_containers_and_images_are_documented(owner: type, short: str) -> None:
    text = _section(BUILDSCRIPTS, owner.__name__)
    described = set(re.findall(rf"^### {owner.__name__}\.(\w+)$", text, re.MULTILINE))
    described |= set(re.findall(rf"`{short}\.(\w+)`", text))
    if owner is Container:
        described |= set(_rows(text.partition("### Settings of a container")[2].partition("\n### ")[0]))
    assert described == _public(owner)


def _described_signatures() -> dict[str, str]:
    """Return the signatures in the references: name and line."""
    lines = [line for block in _in("text") for line in block.text.splitlines() if block.document.startswith("docs/ref")]
    return {line.partition("(")[0]: line for line in lines if re.match(r"[A-Za-z_.]+\(.*\)$", line)}


def _without_self(function: Callable[..., object]) -> inspect.Signature:
    signature = inspect.signature(function)
    kept = [item for name, item in signature.parameters.items() if name != "self"]
    return signature.replace(parameters=kept)


def test_every_call_is_documented() -> None:
    assert set(_described_signatures()) == set(generate.CALLS)


def test_generated_pages_are_current() -> None:
    stale = [path.name for path, text in generate.pages().items() if path.read_text("utf-8") != text]
    assert stale == [], "run docs/generate.py"


@pytest.mark.parametrize("name", generate.CALLS)
def test_every_parameter_is_documented(name: str) -> None:
    part = (API if hasattr(gamebear_tasks, name) else BUILDSCRIPTS).read_text("utf-8")
    part = part.partition(f"```text\n{_described_signatures()[name]}\n```")[2]
    part = re.split(r"^##", part, maxsplit=1, flags=re.MULTILINE)[0]
    told = set(_rows(part) if "| parameter |" in part else re.findall(r"`(\w+)`", part))
    parameters = _without_self(generate.CALLS[name]).parameters.values()
    wanted = {item.name for item in parameters if item.kind is not inspect.Parameter.VAR_KEYWORD}
    assert wanted - told == set()


def test_every_public_name_is_documented() -> None:
    text = API.read_text("utf-8")
    headings = set(re.findall(r"^##+ (\w+)$", text, re.MULTILINE))
    assert set(gamebear_tasks.__all__) <= headings


def test_every_kind_of_error_is_documented() -> None:
    kinds = {kind.__name__ for kind in _below(GamebearError) if kind.__module__ == "gamebear_tasks.errors"}
    assert set(_rows(_section(API, "GamebearError"))) == kinds


def _below(kind: type) -> Iterator[type]:
    inner: type
    for inner in kind.__subclasses__():
        yield inner
        yield from _below(inner)


@pytest.mark.parametrize("document", [ROOT / "README.md", API], ids=lambda path: path.name)
def test_every_setting_is_documented_with_its_default(document: Path) -> None:
    rows = _rows(_section(document, "Settings"))
    told = {name: cells[-1].strip("`") for name, cells in rows.items() if name in _DEFAULTS}
    assert told == _DEFAULTS


def _default(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


_DEFAULTS = {item.name: _default(item.default) for item in dataclasses.fields(Settings)}
_DEFAULTS |= {"arch": "this machine's", "sources": "the first"}


def test_the_globals_of_a_buildscript_are_documented() -> None:
    rows = set(_rows(_section(BUILDSCRIPTS, "Builtins")))
    assert rows == {*SEEN, "__return__", "__args__", "__file__", "__name__"}
    values: dict[str, object] = {}
    assert callable(read(b"return __return__", "script.py").run(values))
    build = (ROOT / "gamebear_tasks" / "runner" / "executor" / "worker.py").read_text()
    injected = re.search(r"seen = \{(.*?)\n    \}", build, re.DOTALL)
    assert injected is not None and set(re.findall(r'"(\w+)":', injected[1])) == SEEN


def test_the_changelog_begins_with_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project["version"] in sections[:2] and set(sections[:1]) <= {project["version"], "Unreleased"}


# links


def _without_blocks(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


@functools.cache
def _anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings by GitHub's rules."""
    headings = re.findall(r"^#+ (.+)$", _without_blocks(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKS = [
    (path, target)
    for path in DOCUMENTS
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_blocks(path))
    if not re.match(r"https?://", target)
]


@pytest.mark.parametrize(("path", "target"), LINKS, ids=lambda value: getattr(value, "name", str(value)))
def test_the_target_of_a_link_exists(path: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    document = (path.parent / name).resolve() if name else path
    assert document.exists() and document.is_relative_to(ROOT)
    assert not anchor or anchor in _anchors(document)
