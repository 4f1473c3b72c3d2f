"""Plans: the job that a declaration yields with the current content of its files, and its state for doit."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gamebear_tasks.client.order import order_of
from gamebear_tasks.config import Settings
from gamebear_tasks.errors import JobError, SettingsError
from gamebear_tasks.jobspec import function_digest, plan
from gamebear_tasks.jobspec.canonical_json import FORMAT
from gamebear_tasks.jobspec.function_digest import PickledFunction
from gamebear_tasks.jobspec.plan import Contents, Plan, check_choice, declare, read_lock
from gamebear_tasks.jobspec.spec import File
from gamebear_tasks.records.task_record import Stopwatch
from gamebear_tasks.sources.base import FetchedSource
from gamebear_tasks.sources.cache import sources_folder
from gamebear_tasks.sources.declare import either, git
from gamebear_tasks.sources.lockfile import GitEntry, Lock

FUNCTION = PickledFunction("build", b"the pickle", {"m.py": Path("m.py")}, b"[]")


def sha256(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


@dataclass(frozen=True)
class Local:
    """A source with fixed pin, metadata and files, and without a tree."""

    pin: str = "1"
    about: str = "a tag"
    local: Mapping[str, Path] = field(default_factory=dict)

    def files(self) -> Mapping[str, Path]:
        return self.local

    def identity(self, lock: Lock) -> Mapping[str, Any]:
        return {"pin": self.pin, "locked": sorted(lock.git)}

    def metadata(self, lock: Lock) -> Mapping[str, str]:
        return {"tag": self.about, "locked": ",".join(lock.git)}


@FetchedSource.register
class Upstream(Local):
    """A source whose tree is fetched."""

    def fetch(self, cache: Path, lock: Lock) -> Path:
        return cache / self.pin / f"{','.join(lock.git)}.{sha256('tree')}.tar"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a script, its module, an input and a lock file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("x.py").write_text("import m\n")
    Path("m.py").write_text("M = 1\n")
    Path("in").write_text("input")
    Path("in").chmod(0o755)
    Lock({"u main": GitEntry("a" * 40)}).write(Path("gamebear.lock"))
    return tmp_path


def declared(program: Path | PickledFunction = Path("x.py"), **more: Any) -> Plan:
    parts: dict[str, Any] = {
        "targets": {"out": "build/out", "log": "build/log"},
        "modules": {"m.py": Path("m.py")},
        "inputs": {"data": "in"},
        "sources": {"src": Upstream()},
        "args": b'{"n":1}',
    }
    return Plan(program, **{**parts, **more})


# contents


def test_contents_are_those_of_the_current_files_and_pins() -> None:
    contents = declared().read("armhf")
    assert contents == Contents(
        arch="armhf",
        program=sha256("import m\n"),
        modules={"m.py": sha256("M = 1\n")},
        inputs={"data": (sha256("input"), True)},
        sources={"src": {"pin": "1", "locked": ["u main"]}},
        metadata={"src": {"tag": "a tag", "locked": "u main"}},
        paths={"m.py": Path("m.py")},
        lock=Lock({"u main": GitEntry("a" * 40)}),
    )


def test_modules_are_searched_again_unless_already_done() -> None:
    Path("x.py").write_text("import m, later\n")
    Path("later.py").write_text("")
    assert sorted(declared().read("armhf").modules) == ["later.py", "m.py"]
    assert sorted(declared().read("armhf", search=False).modules) == ["m.py"]
    assert declared().read("armhf", search=False).paths == {"m.py": Path("m.py")}
    assert sorted(declared(FUNCTION).read("armhf").modules) == ["m.py"], "those of a function are known"


def test_a_declared_architecture_comes_before_the_settings() -> None:
    assert declared(arch="arm64").read("armhf").arch == "arm64"
    assert declared().read("armhf").arch == "armhf"


def test_a_function_is_sent_as_it_was_declared() -> None:
    contents = declared(FUNCTION).read("armhf")
    assert (contents.program, contents.modules) == (sha256(b"the pickle"), {"m.py": sha256("M = 1\n")})


def test_without_sources_no_lock_file_is_read() -> None:
    Path("gamebear.lock").write_text("damaged")
    contents = declared(sources={}).read("armhf")
    assert (contents.sources, contents.metadata, contents.lock) == ({}, {}, None)


def test_files_are_read_with_the_passed_function() -> None:
    read: list[str] = []

    def content(path: str) -> tuple[str, bool]:
        read.append(path)
        return sha256(path), False

    contents = declared().read("armhf", content)
    assert read == ["x.py", "m.py", "in"]
    assert contents.inputs == {"data": (sha256("in"), False)}


@pytest.mark.parametrize("name", ["x.py", "m.py", "in"])
def test_a_file_that_cannot_be_read_is_named(name: str) -> None:
    def content(path: str) -> tuple[str, bool]:
        if path == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return "0" * 64, False

    with pytest.raises(JobError, match=f"^{name} .*Input/output error") as caught:
        declared().read("armhf", content)
    assert isinstance(caught.value.__cause__, OSError)


# state


def state(plan: Plan, **contents: Any) -> str:
    return plan.state(plan.read("armhf")._replace(**contents))


def test_a_state_changes_with_anything_that_is_built() -> None:
    other = Plan(Path("y.py"), {"out": "build/out", "log": "build/log"})
    plans = [
        declared(),
        declared(targets={"out": "build/out"}),
        declared(targets={"other": "build/out", "log": "build/log"}),
        declared(targets={"out": "elsewhere/out", "log": "build/log"}),
        declared(args=b'{"n":2}'),
    ]
    contents: list[dict[str, Any]] = [
        {"arch": "arm64"},
        {"program": "0" * 64},
        {"modules": {}},
        {"modules": {"m.py": "0" * 64}},
        {"inputs": {"data": ("0" * 64, True)}},
        {"inputs": {"data": (sha256("input"), False)}},
        {"inputs": {"renamed": (sha256("input"), True)}},
        {"sources": {"src": {"pin": "2"}}},
        {"metadata": {}},
    ]
    found = [state(each) for each in plans] + [state(declared(), **each) for each in contents]
    found.append(other.state(declared().read("armhf")))
    assert len(set(found)) == len(found)
    assert all(len(each) == 64 for each in found)


def test_a_state_does_not_depend_on_the_way_files_are_read() -> None:
    paths: dict[str, Any] = {"paths": {"m.py": Path("elsewhere/m.py")}, "lock": None}
    assert state(declared()) == state(declared()) == state(declared(), **paths) == state(declared(time_limit=3.0))


def test_a_functions_state_depends_on_the_python_that_pickled_it(monkeypatch: pytest.MonkeyPatch) -> None:
    function, script = state(declared(FUNCTION)), state(declared())
    monkeypatch.setattr(function_digest, "python_version", lambda: "3.99")
    assert state(declared(FUNCTION)) != function
    assert state(declared()) == script


def test_a_new_job_format_changes_every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(declared())
    monkeypatch.setattr(plan, "FORMAT", FORMAT + 1)
    assert state(declared()) != before


# order


def test_an_order_has_the_job_and_the_files_that_it_names() -> None:
    order = order_of(declared(), Settings(arch="armhf", time_limit=60.0, base="bootstrap", keep_failed=True))
    job = order.job
    assert (job.arch, job.program, job.identity, job.python) == ("armhf", "x.py", sha256("import m\n"), "")
    assert sorted(job.outputs) == ["log", "out"]
    assert job.modules == {"m.py": File(sha256("M = 1\n"))}
    assert job.inputs == {"data": File(sha256("input"), executable=True)}
    assert job.sources == {"src": {"pin": "1", "locked": ["u main"]}}
    assert job.args == {"n": 1}
    assert job.metadata == {}, "the program does not use it"
    assert order.files == {
        sha256("import m\n"): Path("x.py"),
        sha256("M = 1\n"): Path("m.py"),
        sha256("input"): Path("in"),
    }
    assert (order.time_limit, order.base, order.keep_failed, order.python) == (60.0, "bootstrap", True, None)


def test_files_of_local_sources_are_sent_and_only_the_others_are_fetched() -> None:
    sources = {"src": Upstream(), "here": Local(local={sha256("tree"): Path("tree/file")})}
    order = order_of(declared(sources=sources), Settings(arch="armhf"))
    assert order.files[sha256("tree")] == Path("tree/file")
    assert order.job.sources.keys() == {"src", "here"}
    assert order.fetch_trees().keys() == {"src"}


def test_a_function_is_sent_with_the_python_that_can_read_it() -> None:
    order = order_of(declared(FUNCTION), Settings(arch="armhf"))
    assert order.python == order.job.python == function_digest.python_version()
    assert order.job.identity == sha256(b"the pickle")
    assert order.files[sha256(b"the pickle")].read_bytes() == b"the pickle"
    assert order.files[sha256("M = 1\n")] == Path("m.py")
    assert not order.keep_failed


@pytest.mark.parametrize(("declared_limit", "limit"), [(None, 86400.0), (0.0, 0.0), (5.0, 5.0)])
def test_a_declared_time_limit_comes_before_the_settings(declared_limit: float | None, limit: float) -> None:
    assert order_of(declared(time_limit=declared_limit), Settings(arch="armhf")).time_limit == limit


def test_an_order_with_known_contents_reads_no_file() -> None:
    contents = declared().read("arm64")
    for name in ("in", "gamebear.lock"):
        Path(name).unlink()
    order = order_of(declared(), Settings(arch="armhf"), contents)
    assert order.job.arch == "arm64" and order.job.inputs == {"data": File(sha256("input"), True)}
    assert order.fetch_trees() == {"src": (sha256("tree"), sources_folder() / "1" / f"u main.{sha256('tree')}.tar")}


@pytest.mark.parametrize("where", ["x.py", "m.py", "function", "module of a function"])
def test_a_program_that_mentions_the_metadata_of_its_sources_gets_it(where: str) -> None:
    if where in ("x.py", "m.py"):
        Path(where).write_text(f"{Path(where).read_text()}print(__sources__)\n")
        program: Path | PickledFunction = Path("x.py")
    elif where == "function":
        program = PickledFunction("build", b"... __sources__ ...", {}, b"[]")
    else:
        Path("m.py").write_text("print(__sources__)\n")
        program = FUNCTION
    order = order_of(declared(program), Settings(arch="armhf"))
    assert order.job.metadata == {"src": {"tag": "a tag", "locked": "u main"}}
    assert order_of(declared(program, sources={}), Settings(arch="armhf")).job.metadata == {}


def test_a_program_removed_before_its_metadata_search_is_named() -> None:
    contents = declared().read("armhf")
    Path("x.py").unlink()
    with pytest.raises(JobError, match=r"^x.py .*No such file"):
        order_of(declared(), Settings(arch="armhf"), contents)


def test_trees_are_fetched_as_the_phase_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []
    listener = SimpleNamespace(phase=phases.append, moved=lambda up, down: None)
    order = order_of(declared(FUNCTION), Settings(arch="armhf"))
    with Stopwatch(cast(Any, listener)).running():
        trees = order.fetch_trees()
    assert phases == ["sources", ""]
    assert trees.keys() == {"src", "/function.lines", "/cloudpickle.zip"}
    assert trees["/function.lines"][1].read_bytes() == b"[]"
    assert trees["/cloudpickle.zip"][1].read_bytes() == function_digest.cloudpickle_archive()
    assert order_of(declared(sources={}), Settings(arch="armhf")).fetch_trees() == {}


# declarations


@pytest.fixture
def declarations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dodo.py without declarations."""
    monkeypatch.setattr(plan, "declared", {})
    monkeypatch.setattr(plan, "_alternatives", set())


def test_sources_are_unique_and_ordered(declarations: None) -> None:
    sources = [git("https://git.example/x", "a" * 40), git("https://git.example/y", "b" * 40)]
    for source in [*sources, *reversed(sources)]:
        declare(source)
    assert list(plan.declared) == sources


def test_a_choice_that_no_source_offers_is_rejected(declarations: None) -> None:
    declare(git("https://git.example/x", "a" * 40))
    check_choice("anything")  # no source has alternatives
    declare(either(git=git("https://git.example/x", "a" * 40), other=git("https://git.example/y", "b" * 40)))
    for choice in ("", "git", "other"):
        check_choice(choice)
    with pytest.raises(SettingsError, match="neither") as caught:
        check_choice("neither")
    assert "git" in caught.value.hint and "other" in caught.value.hint


def test_a_lock_file_is_read_once_until_it_changes(folder: Path) -> None:
    path = folder / "gamebear.lock"
    first = read_lock(path)
    assert read_lock(path) is first
    Lock({"u main": GitEntry("b" * 40)}).write(path)
    assert read_lock(path) == Lock({"u main": GitEntry("b" * 40)})
    path.unlink()
    assert read_lock(path) == Lock()
