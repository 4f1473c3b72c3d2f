"""`__sources__`: the metadata of sources for programs, which the job's digest covers."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from project import Project
from upstreams import COMMIT_TIME, call_git

from gamebear_tasks import archive, git
from gamebear_tasks.client.order import order_of
from gamebear_tasks.config import Settings
from gamebear_tasks.jobspec.plan import Plan
from gamebear_tasks.sources.declare import debian
from gamebear_tasks.sources.lockfile import DebianEntry, GitEntry, Lock

pytest_plugins = ("upstreams",)

DATE = "2020-09-13T12:26:40Z"
"""`COMMIT_TIME`."""


@pytest.fixture
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that shares its builder's store with other fast tests."""
    return Project(tmp_path / "project", home=tmp_path_factory.getbasetemp() / "quick-home")


def test_a_date_is_iso_8601() -> None:
    import datetime

    assert datetime.datetime.fromisoformat(DATE.replace("Z", "+00:00")).timestamp() == COMMIT_TIME


TELL = "import json\nopen('x', 'w').write(json.dumps(__sources__))\n"


@pytest.mark.parametrize("kind", ["script", "module", "function", "module of a function"])
def test_a_program_can_read_the_metadata_of_its_sources(upstream: Path, project: Project, kind: str) -> None:
    """In each part of a program."""
    call_git(upstream, "tag", "v1.2")
    head = call_git(upstream, "rev-parse", "HEAD")
    project.write("told.py", f"def tell():\n    {'; '.join(TELL.splitlines())}\n")
    program = "'x.py'"
    if kind == "script":
        project.write("x.py", TELL)
    elif kind == "module":
        project.write("x.py", "import told\ntold.tell()\n")
    else:
        program = "build"
    body = f"    {'; '.join(TELL.splitlines())}\n" if kind == "function" else "    import told\n    told.tell()\n"
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact, git\n\n"
        f"def build():\n{body}\n"
        "def task_x():\n"
        f"    return artifact({program}, outputs=['build/x'], sources={{'src': git({str(upstream)!r}, 'main')}})\n",
    )
    project.gamebear("lock").ok()
    project.doit("x").ok()
    assert json.loads((project.folder / "build/x").read_text()) == {
        "src": {"url": str(upstream), "commit": head, "tag": "v1.2", "date": DATE}
    }


@pytest.mark.system
def test_a_program_without_sources_has_no_metadata(project: Project) -> None:
    project.write("x.py", TELL)
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\ndef task_x():\n    return artifact('x.py', outputs=['build/x'])\n",
    )
    project.doit("x").ok()
    assert (project.folder / "build/x").read_text() == "{}"


def test_each_kind_of_source_has_its_metadata() -> None:
    entry = DebianEntry("1:1.2-3", {"hello.dsc": "b" * 64})
    lock = Lock({"https://git.example/x v1": GitEntry("a" * 40, "v1")}, {"hello": entry})
    assert git("https://git.example/x", "v1").metadata(lock) == {
        "url": "https://git.example/x",
        "commit": "a" * 40,
        "tag": "v1",
    }
    assert git("ssh://git@git.example/x", "c" * 40).metadata(lock) == {
        "url": "ssh://git@git.example/x",
        "commit": "c" * 40,
        "tag": "",
    }
    web = archive("https://web.example/x.tar?token=secret", "d" * 64)
    assert web.metadata(lock) == {"url": "https://web.example/x.tar", "sha256": "d" * 64}
    assert debian("hello").metadata(lock) == {"package": "hello", "version": "1:1.2-3"}


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return the digest of a job with a program text and one source."""
    monkeypatch.chdir(tmp_path)

    def of(text: str, url: str = "https://git.example/x", tag: str = "", module: str = "") -> str:
        Path("x.py").write_text(text)
        Path("m.py").write_text(module)
        Lock({f"{url} main": GitEntry("a" * 40, tag)}).write(tmp_path / "gamebear.lock")
        plan = Plan(Path("x.py"), {"x": "x"}, modules={"m.py": Path("m.py")}, sources={"src": git(url, "main")})
        return order_of(plan, Settings(arch="armhf")).job.digest

    return of


def test_trees_are_ordered_by_their_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("x.py").write_text("")
    with tarfile.open("up.tar", "w") as tar:
        tar.add("x.py", "up/x.py")
    up = archive((tmp_path / "up.tar").as_uri(), sha256=hashlib.sha256(Path("up.tar").read_bytes()).hexdigest())
    trees = order_of(Plan(Path("x.py"), {"x": "x"}, sources={"src": up}), Settings(arch="armhf")).fetch_trees()
    sha256, path = trees["src"]
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_metadata_visible_to_a_program_is_part_of_its_digest(digest: Callable[..., str]) -> None:
    for text, module in ((TELL, ""), ("import m", TELL)):
        seen = {
            digest(text, module=module),
            digest(text, module=module, tag="v1"),
            digest(text, module=module, url="https://mirror.example/x"),
        }
        assert len(seen) == 3


def test_a_mirrors_url_does_not_matter_to_a_program_without_metadata(digest: Callable[..., str]) -> None:
    assert digest("pass") == digest("pass", tag="v1") == digest("pass", url="https://mirror.example/x")


def test_changed_metadata_is_named_as_the_reason_for_a_build(upstream: Path, project: Project) -> None:
    project.write("x.py", TELL)
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact, git\n"
        "def task_x():\n"
        f"    return artifact('x.py', outputs=['build/x'], sources={{'src': git({str(upstream)!r}, 'main')}})\n",
    )
    project.gamebear("lock").ok()
    project.doit("x").ok()
    call_git(upstream, "tag", "v2")
    project.gamebear("lock", "-u").ok()
    assert project.doit("x").ok().ran == ["x"]
    assert json.loads((project.folder / "build/x").read_text())["src"]["tag"] == "v2"
    record = json.loads((project.folder / "build/logs/x.json").read_text())
    assert record["why"] == ["the metadata of source src changed"]
