"""The lock file and `gamebear lock`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from project import Project
from upstreams import call_git, commit, no_programs

from gamebear_tasks.errors import SourceError
from gamebear_tasks.runner.util.atomic_files import sha256_of
from gamebear_tasks.sources.base import TREES
from gamebear_tasks.sources.declare import debian, either, git
from gamebear_tasks.sources.lockfile import DebianEntry, GitEntry, Lock
from gamebear_tasks.sources.resolver import resolve

pytest_plugins = ("upstreams",)


@pytest.fixture
def lock_path(tmp_path: Path) -> Path:
    """Path of a lock file that does not exist yet."""
    return tmp_path / "gamebear.lock"


def test_branches_and_tags_are_locked_to_their_commits(
    upstream: Path, lock_path: Path, cache: Path, daemon: Callable[[str], str]
) -> None:
    """An annotated tag is pinned to its commit. A tag precedes a branch of the same name."""
    first = call_git(upstream, "rev-parse", "HEAD")
    call_git(upstream, "tag", "--annotate", "--message", "release", "v1")
    call_git(upstream, "tag", "both")
    second = commit(upstream)
    call_git(upstream, "branch", "both")
    url = daemon("upstream")
    revs = {"main": second, "v1": first, "both": first, "refs/heads/both": second, "HEAD": second}
    lines = resolve([git(url, rev) for rev in revs], lock_path, cache)
    tags = {"v1": " (v1)", "both": " (both)"}
    assert lines == [f"git {url} {rev}: {revs[rev]}{tags.get(rev, '')}" for rev in sorted(revs)]
    lock = Lock.read(lock_path)
    assert {rev: git(url, rev).identity(lock)["git"] for rev in revs} == revs
    tar = git(url, "v1").fetch(cache, lock)
    assert tar.name == f"git-{first}.{TREES}.{sha256_of(tar)}.tar"


def test_the_tag_of_a_branchs_commit_is_locked(upstream: Path, lock_path: Path, cache: Path) -> None:
    """In the order of `git describe --tags --exact-match`: an annotated tag, then the highest version."""
    source = git(str(upstream), "main")

    def tag() -> str:
        resolve([source], lock_path, cache, update=True)
        return Lock.read(lock_path).git[source.key].tag

    assert tag() == ""
    for name in ("v1.9", "v1.10-rc1", "v1.10", "latest"):
        call_git(upstream, "tag", name)
    assert tag() == "v1.10"
    call_git(upstream, "tag", "--annotate", "--message", "release", "r1")
    assert tag() == "r1"
    commit(upstream)
    assert tag() == ""
    assert '"tag"' not in lock_path.read_text()


def test_the_lock_file_has_stable_readable_text(lock_path: Path) -> None:
    """Sorted, indented, readable by all, with a newline at the end."""
    Lock({"https://git.example/ü main": GitEntry("a" * 40)}, {"hello": DebianEntry("1-1", {"h.dsc": "b" * 64})}).write(
        lock_path
    )
    assert lock_path.read_text(encoding="utf-8") == (
        '{\n  "debian": {\n    "hello": {\n      "files": {\n        "h.dsc": "' + "b" * 64 + '"\n      },\n'
        '      "version": "1-1"\n    }\n  },\n  "git": {\n    "https://git.example/ü main": {\n      "commit": "'
        + "a" * 40
        + '"\n    }\n  },\n  "version": 1\n}\n'
    )
    assert lock_path.stat().st_mode & 0o777 == 0o644


def test_a_pin_is_unchanged_until_it_is_updated(upstream: Path, lock_path: Path, cache: Path) -> None:
    """Although the branch has moved. The file is not written without need."""
    source = git(str(upstream), "main")
    first = call_git(upstream, "rev-parse", "HEAD")
    resolve([source], lock_path, cache)
    written = lock_path.stat().st_ino
    second = commit(upstream)
    assert resolve([source], lock_path, cache) == []
    assert lock_path.stat().st_ino == written
    assert resolve([source], lock_path, cache, update=True) == [f"git {source.key}: {first} -> {second}"]
    assert source.identity(Lock.read(lock_path)) == {"git": second}


def test_an_undeclared_pin_is_retained_until_it_is_pruned(upstream: Path, lock_path: Path, cache: Path) -> None:
    declared = git(str(upstream), "main")
    entry = DebianEntry("1-1", {"hello.dsc": "b" * 64})
    Lock(
        {declared.key: GitEntry("a" * 40), "https://git.example/gone main": GitEntry("b" * 40)}, {"hello": entry}
    ).write(lock_path)
    before = lock_path.read_bytes()
    kept = "not declared, kept; `gamebear lock --prune` removes it"
    assert resolve([declared], lock_path, cache) == [
        f"git https://git.example/gone main: {kept}",
        f"debian hello: {kept}",
    ]
    assert lock_path.read_bytes() == before
    assert resolve([declared], lock_path, cache, prune=True) == [
        "git https://git.example/gone main: removed, not declared",
        "debian hello: removed, not declared",
    ]
    assert Lock.read(lock_path) == Lock({declared.key: GitEntry("a" * 40)})


LATE = """
from pathlib import Path
from doit import create_after
from gamebear_tasks import artifact, either, git

DOIT_CONFIG = {{"default_tasks": []}}

def task_first():
    return {{"actions": ["echo first > first; echo > late.py"], "targets": ["first"]}}

@create_after(executed="first", target_regex="late")
def task_late():
    def inner():
        yield {{"name": "x", **artifact("late.py", sources={{"up": git({url!r}, "main")}}, outputs=["late"])}}
    {before}
    yield inner()

@create_after(executed="first", creates=["named", "also"])
def task_named():
    for name in ("named", "also"):
        yield {{"basename": name, **artifact("x.py", sources={{"up": git({url!r}, "v1")}}, outputs=[name])}}
"""


@pytest.fixture
def late(project: Project, upstream: Path) -> Project:
    """A project whose only artifacts belong to tasks that are created late."""
    call_git(upstream, "tag", "v1")
    project.write("x.py", "")
    project.write("late.py", "import shutil; shutil.copy('up/README', 'late')")
    project.write("dodo.py", LATE.format(url=upstream.as_uri(), before=""))
    return project


def locked(project: Project) -> set[str]:
    """Return the pinned revisions."""
    return {key.rpartition(" ")[2] for key in Lock.read(project.folder / "gamebear.lock").git}


def test_sources_of_tasks_that_are_created_later_are_pinned_and_fetched(late: Project) -> None:
    message = late.gamebear("lock").ok().out
    assert "known" not in message and "kept" not in message
    assert locked(late) == {"main", "v1"}
    assert "skipped" not in late.gamebear("sources").ok().out
    assert not (late.folder / "first").exists(), "no task was run"
    assert len(list((late.home / ".cache/gamebear-tasks/sources").glob("git-*.tar"))) == 1


def test_pins_of_tasks_that_cannot_be_created_yet_are_retained(late: Project) -> None:
    """Their creator needs the target of another task, which existed when they were pinned."""
    late.gamebear("lock").ok()
    text = (late.folder / "dodo.py").read_text()
    needs = "    Path('first').read_text()\n"
    text = text.replace("    yield inner()", f"{needs}    yield inner()")
    late.write("dodo.py", text.replace('    for name in ("named"', f'{needs}    for name in ("named"'))
    for arguments in (("lock",), ("lock", "--update"), ("lock", "--prune")):
        message = late.doit(*arguments).ok().out
        for name in ("late", "named"):
            why = f"task {name} was skipped, because it cannot be created: FileNotFoundError: "
            assert message.count(why) == 1
        assert "task also" not in message, "it has the same creator"
        assert "(run doit first, then this command again)" in message
        assert ("no pin was removed" in message) == ("--prune" in arguments)
        assert locked(late) == {"main", "v1"}
    late.doit("first").ok()
    assert "skipped" not in late.gamebear("lock", "--prune").ok().out
    assert locked(late) == {"main", "v1"}
    late.write("dodo.py", (late.folder / "dodo.py").read_text().replace('"v1"', '"main"'))
    assert "v1: removed, not declared" in late.gamebear("lock", "--prune").ok().out
    assert locked(late) == {"main"}


def test_pins_of_another_dodo_file_are_retained(late: Project) -> None:
    late.gamebear("lock").ok()
    late.write("other.py", "def task_x():\n    return {'actions': []}\n")
    assert late.gamebear("lock", "-f", "other.py").ok().out.count("not declared, kept") == 2
    assert locked(late) == {"main", "v1"}


def test_sources_that_are_pins_need_no_lock_file(lock_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is queried and nothing written."""
    no_programs(monkeypatch)
    assert resolve([git("https://git.example/x", "a" * 40)], lock_path, cache) == []
    assert not lock_path.exists()


def test_a_failure_leaves_the_lock_file_unchanged(upstream: Path, lock_path: Path, cache: Path) -> None:
    """One of two sources does not exist."""
    Lock({"https://git.example/gone main": GitEntry("b" * 40)}).write(lock_path)
    before = lock_path.read_bytes()
    with pytest.raises(SourceError) as caught:
        resolve([git(str(upstream), "main"), git(str(upstream), "nosuch")], lock_path, cache)
    assert caught.value.message.startswith(f"git source {upstream} nosuch cannot be resolved: ")
    assert "no branch or tag of that name" in caught.value.message
    assert f"`git ls-remote {upstream}`" in caught.value.hint
    assert lock_path.read_bytes() == before


def test_an_abbreviated_commit_is_not_a_pin(upstream: Path, lock_path: Path, cache: Path) -> None:
    """The error contains the fix."""
    with pytest.raises(SourceError, match="Write an abbreviated commit hash in full"):
        resolve([git(str(upstream), call_git(upstream, "rev-parse", "--short", "HEAD"))], lock_path, cache)


@pytest.mark.system
def test_a_missing_repository_is_an_error(tmp_path: Path, lock_path: Path, cache: Path) -> None:
    """The error contains git's message."""
    with pytest.raises(SourceError, match=r"cannot be resolved: '.*/nowhere' does not appear to be a git"):
        resolve([git(str(tmp_path / "nowhere"), "main")], lock_path, cache)


def test_an_unavailable_alternative_retains_its_entry(
    lock_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locking on a machine without apt, in a project that also has a Debian source."""
    entry = DebianEntry("1-1", {"hello.dsc": "b" * 64})
    Lock({}, {"hello": entry}).write(lock_path)
    no_programs(monkeypatch)
    declared = either(git=git("https://git.example/x", "a" * 40), debian=debian("hello"))
    assert resolve([declared], lock_path, cache, update=True) == [
        "not resolved: debian source hello cannot be used: apt is not installed."
    ]
    assert Lock.read(lock_path).debian == {"hello": entry}
    with pytest.raises(SourceError, match="apt is not installed"):
        resolve([either(debian=debian("hello", suite="sid"))], lock_path, cache)


def test_a_debian_package_is_locked_without_the_mirrors_name(apt_cache: tuple[Path, Lock, Path]) -> None:
    """The pin is the version and the SHA-256 of all files, as signed by Debian."""
    cache, lock, _ = apt_cache
    entry = lock.debian["umtp-responder"]
    assert entry.version.startswith("1.3.10-")
    assert {name.rpartition("_")[0] for name in entry.files} == {"umtp-responder"}
    assert [name for name in entry.files if name.endswith(".orig.tar.gz")]
    assert debian("umtp-responder").identity(lock)["dsc"] == entry.files[entry.dsc]
    assert "http" not in (cache.parent / "gamebear.lock").read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<<<<<<< HEAD\n{}", r"is damaged: Expecting value: line 1 column 1 \(char 0\)\.\n→ Restore it from version"),
        ("[]", "is damaged: it has no version"),
        ("{}", "is damaged: it has no version"),
        ('{"version": 2}', "has the unsupported version 2; .*\n→ Upgrade gamebear-tasks"),
        ('{"version": 1, "git": []}', "is damaged: 'git' is not a table"),
        (
            '{"version": 1, "git": {"x main": {"commit": "--all"}}}',
            "is damaged: the entry 'x main' in 'git' is invalid",
        ),
        (
            json.dumps({"version": 1, "debian": {"x": {"version": "1", "files": {"../x.dsc": "a" * 64}}}}),
            "is damaged: the entry 'x' in 'debian' is invalid",
        ),
        ("\xff", "is damaged"),
        (
            '{"version": 1, "git": {"x": {"commit": "' + "a" * 40 + '"}, "x": {"commit": "' + "b" * 40 + '"}}}',
            "is damaged: it has 'x' twice",
        ),
        ('{"version": 1, "git": {"x main": {"commit": "' + "a" * 40 + '", "tag": 1}}}', "in 'git' is invalid"),
    ],
)
def test_an_invalid_lock_file_is_rejected(text: str, reason: str, lock_path: Path) -> None:
    """The error names the cause."""
    lock_path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError, match=reason):
        Lock.read(lock_path)


hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
commits = hashes | st.binary(min_size=20, max_size=20).map(bytes.hex)
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
git_entries = st.builds(GitEntry, commits, st.sampled_from(["", "v1", "release/1.0", "ü"]))
debian_entries = st.builds(
    lambda version, files, dsc: DebianEntry(version, {**files, "x.dsc": dsc}),
    keys,
    st.dictionaries(st.sampled_from(["x.tar.xz", "x.tar.xz.asc", "dsc"]), hashes),
    hashes,
)


@given(st.dictionaries(keys, git_entries, max_size=3), st.dictionaries(keys, debian_entries, max_size=3))
def test_a_lock_file_is_read_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, GitEntry], packages: dict[str, DebianEntry]
) -> None:
    path = tmp_path_factory.mktemp("lock") / "gamebear.lock"
    lock = Lock(entries, packages)
    lock.write(path)
    assert Lock.read(path) == lock
    assert all(entry.dsc == "x.dsc" for entry in Lock.read(path).debian.values())


def entry(**parts: Any) -> bytes:
    """Return a lock file with one entry of a table."""
    ((table, value),) = parts.items()
    return json.dumps({"version": 1, table: {"the-key": value}}).encode()


DSC = {"x.dsc": "a" * 64}


@pytest.mark.parametrize(
    "commit", ["a" * 39, "a" * 41, "a" * 63, "a" * 65, "A" * 40, "g" * 40, "a" * 40 + "\n", "main", "", 1, None]
)
def test_a_pin_is_a_full_commit_hash(lock_path: Path, commit: object) -> None:
    lock_path.write_bytes(entry(git={"commit": commit}))
    with pytest.raises(SourceError, match="the-key"):
        Lock.read(lock_path)


@pytest.mark.parametrize(
    "tag", ["a b", "a~1", "a^", "a:b", "a?", "a*", "a[", "a\\b", "a\n", "a\x7f", "\0", 1, None, ["a"]]
)
def test_a_tag_has_a_name_that_git_allows(lock_path: Path, tag: object) -> None:
    lock_path.write_bytes(entry(git={"commit": "a" * 40, "tag": tag}))
    with pytest.raises(SourceError, match="the-key"):
        Lock.read(lock_path)


@pytest.mark.parametrize(
    "value",
    [
        {"version": "1"},
        {"files": DSC},
        {"version": 1, "files": DSC},
        {"version": "1", "files": ["x.dsc"]},
        {"version": "1", "files": {}},
        {"version": "1", "files": {"x.tar": "a" * 64}},
        {"version": "1", "files": {**DSC, "y.dsc": "b" * 64}},
        {"version": "1", "files": {**DSC, "../x": "b" * 64}},
        {"version": "1", "files": {**DSC, "x.tar": "b" * 63}},
        {"version": "1", "files": {**DSC, "x.tar": None}},
    ],
    ids=json.dumps,
)
def test_a_package_has_a_version_and_files_with_one_dsc(lock_path: Path, value: dict[str, Any]) -> None:
    lock_path.write_bytes(entry(debian=value))
    with pytest.raises(SourceError, match="the-key"):
        Lock.read(lock_path)


@pytest.mark.parametrize("table", ["git", "debian"])
@pytest.mark.parametrize("value", ["[]", "1", "null", '{"x": 1}', '{"x": []}'])
def test_a_table_has_entries_only(lock_path: Path, table: str, value: str) -> None:
    lock_path.write_text(f'{{"version": 1, "{table}": {value}}}')
    with pytest.raises(SourceError, match=f"damaged.*{table}"):
        Lock.read(lock_path)


@pytest.mark.parametrize("version", ["0", "2", "-1"])
def test_a_lock_file_of_another_version_is_not_damaged(lock_path: Path, version: str) -> None:
    lock_path.write_text(f'{{"version": {version}, "git": 1}}')
    with pytest.raises(SourceError, match=f"version {version};.*supports 1") as caught:
        Lock.read(lock_path)
    assert "Upgrade" in caught.value.hint


@pytest.mark.parametrize("version", ["1.0", '"1"', "null", "[1]"])
def test_a_version_is_a_number(lock_path: Path, version: str) -> None:
    lock_path.write_text(f'{{"version": {version}}}')
    with pytest.raises(SourceError, match="damaged"):
        Lock.read(lock_path)


def test_a_lock_file_may_have_its_maximum_size(lock_path: Path) -> None:
    text = '{"version": 1}'
    lock_path.write_text(text + " " * ((16 << 20) - len(text)))
    assert Lock.read(lock_path) == Lock()


def test_a_lock_file_that_cannot_be_read_or_written_is_named(lock_path: Path) -> None:
    lock_path.mkdir()
    with pytest.raises(SourceError, match=r"gamebear\.lock .*Is a directory"):
        Lock.read(lock_path)
    with pytest.raises(SourceError, match=r"gamebear\.lock .*written"):
        Lock().write(lock_path)


def test_an_entry_is_shown_with_its_tag() -> None:
    assert str(GitEntry("a" * 40)) == "a" * 40
    assert str(GitEntry("a" * 40, "v1")) == f"{'a' * 40} (v1)"


def test_an_oversized_lock_file_is_rejected(lock_path: Path) -> None:
    """By its nesting, or by its size."""
    lock_path.write_text("[" * 200_000)
    with pytest.raises(SourceError, match="is damaged: its values are nested too deeply"):
        Lock.read(lock_path)
    lock_path.write_text(" " * ((16 << 20) + 1))
    with pytest.raises(SourceError, match="is damaged: it is larger than 16 MiB"):
        Lock.read(lock_path)


def test_a_lock_file_that_is_not_a_regular_file_is_rejected(lock_path: Path) -> None:
    """A FIFO would block, and a device may be endless."""
    os.mkfifo(lock_path)
    with pytest.raises(SourceError, match="cannot be read: it is not a regular file"):
        Lock.read(lock_path)
    lock_path.unlink()
    lock_path.symlink_to("/dev/zero")
    with pytest.raises(SourceError, match="cannot be read: it is not a regular file"):
        Lock.read(lock_path)


def test_a_missing_lock_file_counts_as_empty(lock_path: Path) -> None:
    """A project without one."""
    assert Lock.read(lock_path) == Lock()
