"""Targets are absent, or complete and verified; of several, all or none."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from gamebear_tasks.builders.base import Output, Sink
from gamebear_tasks.client.install_outputs import Mismatch, part_pattern, place, statement_of
from gamebear_tasks.errors import BuilderLost, JobError

MIB = 1 << 20

CONTENT = {"umtprd": b"\x7fELF" + bytes(range(256)) * 1000, "b.tar": b"tar" * 9}


def output(data: bytes, executable: bool = False) -> Output:
    return Output(len(data), hashlib.sha256(data).hexdigest(), executable)


def fetch(name: str, offset: int, target: Sink, limit: int) -> None:
    target.write(CONTENT[name][offset : offset + limit])


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in CONTENT)


def test_a_target_has_the_content_and_the_mode(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deeper" / "umtprd"
    fetched = place({"umtprd": target}, {"umtprd": output(CONTENT["umtprd"], executable=True)}, fetch)
    assert target.read_bytes() == CONTENT["umtprd"]
    assert target.stat().st_mode & 0o100
    assert fetched == len(CONTENT["umtprd"])
    assert leftovers(target.parent) == []


def test_an_existing_target_is_not_fetched(tmp_path: Path) -> None:
    target = tmp_path / "umtprd"
    target.write_bytes(CONTENT["umtprd"])
    before = target.stat().st_ino

    def never(name: str, offset: int, target: Sink, limit: int) -> None:
        raise AssertionError("fetched")

    assert place({"umtprd": target}, {"umtprd": output(CONTENT["umtprd"])}, never) == 0
    assert target.stat().st_ino == before


def test_an_output_with_the_wrong_hash_is_not_installed(tmp_path: Path) -> None:
    target = tmp_path / "umtprd"
    target.write_bytes(b"the old one")
    announced = output(b"x" * len(CONTENT["umtprd"]))
    with pytest.raises(Mismatch, match="did not arrive intact"):
        place({"umtprd": target}, {"umtprd": announced}, fetch)
    assert target.read_bytes() == b"the old one"
    assert leftovers(tmp_path) == []


def test_neither_of_two_outputs_is_installed_if_one_is_wrong(tmp_path: Path) -> None:
    targets = {name: tmp_path / name for name in CONTENT}
    announced = {"umtprd": output(CONTENT["umtprd"]), "b.tar": output(b"something else")}
    with pytest.raises(Mismatch):
        place(targets, announced, fetch)
    assert not any(target.exists() for target in targets.values())


def test_neither_of_two_outputs_remains_if_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = {name: tmp_path / name for name in CONTENT}
    rename = os.replace

    def refuse(source: Path, target: Path) -> None:
        if target == targets["b.tar"]:
            raise PermissionError(1, "Operation not permitted", str(target))
        rename(source, target)

    monkeypatch.setattr("gamebear_tasks.client.install_outputs.os.replace", refuse)
    with pytest.raises(JobError, match="Operation not permitted"):
        place(targets, {name: output(data) for name, data in CONTENT.items()}, fetch)
    assert list(tmp_path.iterdir()) == []


def broken_after(count: int) -> Callable[[str, int, Sink, int], None]:
    def fetch_some(name: str, offset: int, target: Sink, limit: int) -> None:
        target.write(CONTENT[name][offset : offset + count])
        raise BuilderLost("The connection broke.")

    return fetch_some


def test_an_interrupted_download_resumes(tmp_path: Path) -> None:
    target = tmp_path / "umtprd"
    announced = {"umtprd": output(CONTENT["umtprd"])}
    with pytest.raises(BuilderLost):
        place({"umtprd": target}, announced, broken_after(1000))
    assert not target.exists()
    assert place({"umtprd": target}, announced, fetch) == len(CONTENT["umtprd"]) - 1000
    assert target.read_bytes() == CONTENT["umtprd"]
    assert leftovers(tmp_path) == []


def test_a_partial_download_is_verified_before_it_is_resumed(tmp_path: Path) -> None:
    target = tmp_path / "umtprd"
    announced = {"umtprd": output(CONTENT["umtprd"])}
    with pytest.raises(BuilderLost):
        place({"umtprd": target}, announced, broken_after(1000))
    (part,) = tmp_path.glob(part_pattern(target))
    part.write_bytes(b"?" * 1000)
    with pytest.raises(Mismatch, match="an earlier run"):
        place({"umtprd": target}, announced, fetch)
    assert list(tmp_path.iterdir()) == []


def test_unused_partial_downloads_are_removed_by_the_next_successful_one(tmp_path: Path) -> None:
    target = tmp_path / "umtprd"
    for mine in (".umtprd.0123456789abcdef.part", ".umtprd.more.0123456789abcdef.part"):
        (tmp_path / mine).touch()
    place({"umtprd": target}, {"umtprd": output(CONTENT["umtprd"])}, fetch)
    assert leftovers(tmp_path) == [".umtprd.more.0123456789abcdef.part"], "another target's part is not ours"


def test_a_download_interrupted_after_a_hole_resumes_there(tmp_path: Path) -> None:
    target = tmp_path / "x"
    whole = bytes(5 * MIB) + b"end" + bytes(5 * MIB)
    announced = {"x": Output(len(whole), hashlib.sha256(whole).hexdigest(), False, 3)}

    def breaks(name: str, offset: int, target: Sink, limit: int) -> None:
        target.skip(5 * MIB)
        raise BuilderLost("The connection broke.")

    def the_rest(name: str, offset: int, target: Sink, limit: int) -> None:
        assert (offset, limit) == (5 * MIB, 5 * MIB + 3)
        target.write(b"end")
        target.skip(5 * MIB)

    with pytest.raises(BuilderLost):
        place({"x": target}, announced, breaks)
    place({"x": target}, announced, the_rest)
    assert target.read_bytes() == whole
    assert target.stat().st_blocks * 512 < MIB


def test_a_sparse_artifact_needs_room_for_its_data_only(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free

    def skips(name: str, offset: int, target: Sink, limit: int) -> None:
        raise BuilderLost("It was asked for.")

    with pytest.raises(BuilderLost):
        place({"x": tmp_path / "x"}, {"x": Output(free * 2, "0" * 64, False, 1000)}, skips)
    with pytest.raises(JobError, match="does not fit on the disk"):
        place({"x": tmp_path / "x"}, {"x": Output(free * 4, "0" * 64, False, free * 2)}, skips)


def test_a_download_interrupted_before_its_first_byte_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(BuilderLost):
        place({"umtprd": tmp_path / "umtprd"}, {"umtprd": output(CONTENT["umtprd"])}, broken_after(0))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_leaves_the_part_of_another_doit_alone(tmp_path: Path) -> None:
    target = tmp_path / "b.tar"

    def breaks(name: str, offset: int, sink: Sink, limit: int) -> None:
        (part,) = tmp_path.glob(part_pattern(target))
        part.unlink()
        part.write_bytes(b"another's")
        raise BuilderLost("The connection broke.")

    with pytest.raises(BuilderLost):
        place({"b.tar": target}, {"b.tar": BOTH["b.tar"]}, breaks)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"another's"]


def test_an_artifact_larger_than_the_free_space_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="does not fit on the disk") as caught:
        place({"umtprd": tmp_path / "umtprd"}, {"umtprd": Output(10**15, "0" * 64, False)}, fetch)
    assert "Free disk space" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written_is_named_with_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(JobError, match=r"/x\)\.\n→ Mount the file system read-write"):
            place({"x": tmp_path / "x"}, {"x": output(b"")}, write_nothing)
    (tmp_path / "build").symlink_to("nowhere")
    with pytest.raises(JobError, match="build is a file, not a folder"):
        place({"x": tmp_path / "build" / "x"}, {"x": output(b"")}, fetch)


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, int]] = []

    def access(path: Path, mode: int) -> bool:
        asked.append((path, mode))
        return False  # root may write everywhere

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(JobError, match="no write permission for"):
        place({"x": tmp_path / "new" / "x"}, {"x": output(b"")}, fetch)
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_place_of_a_target_is_named(tmp_path: Path) -> None:
    (tmp_path / "umtprd").mkdir()
    with pytest.raises(JobError, match="is a folder"):
        place({"umtprd": tmp_path / "umtprd"}, {"umtprd": output(b"")}, fetch)


def test_a_link_in_place_of_the_part_is_not_followed(tmp_path: Path) -> None:
    announced = output(CONTENT["umtprd"])
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    with pytest.raises(BuilderLost):
        place({"umtprd": tmp_path / "umtprd"}, {"umtprd": announced}, broken_after(1))
    (part,) = tmp_path.glob(part_pattern(tmp_path / "umtprd"))
    part.unlink()
    part.symlink_to(victim)
    with pytest.raises(JobError):
        place({"umtprd": tmp_path / "umtprd"}, {"umtprd": announced}, fetch)
    assert victim.read_bytes() == b"mine"


def write_nothing(name: str, offset: int, target: Sink, limit: int) -> None:
    pass


def write_same(name: str, offset: int, target: Sink, limit: int) -> None:
    target.write(b"same")


def test_two_outputs_of_one_content_with_long_names_do_not_wait_for_each_other(tmp_path: Path) -> None:
    names = ["n" * 70 + "1", "n" * 70 + "2"]
    targets = {name: tmp_path / name for name in names}
    place(targets, dict.fromkeys(names, output(b"same")), write_same)
    assert [target.read_bytes() for target in targets.values()] == [b"same", b"same"]


BOTH = {name: output(data) for name, data in CONTENT.items()}


@pytest.fixture
def targets(tmp_path: Path) -> Mapping[str, Path]:
    """Targets for both outputs, in separate folders that do not exist yet."""
    return {name: tmp_path / f"{name}.d" / name for name in CONTENT}


def test_every_output_is_fetched_completely_and_installed(targets: Mapping[str, Path]) -> None:
    asked: list[tuple[str, int, int]] = []

    def noted(name: str, offset: int, target: Sink, limit: int) -> None:
        asked.append((name, offset, limit))
        fetch(name, offset, target, limit)

    assert place(targets, BOTH, noted) == sum(map(len, CONTENT.values()))
    assert {name: target.read_bytes() for name, target in targets.items()} == CONTENT
    assert asked == [(name, 0, len(data)) for name, data in CONTENT.items()]


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize(("executable", "mode"), [(False, 0o640), (True, 0o750)])
def test_the_mode_is_the_outputs_minus_the_umask(tmp_path: Path, is_there: bool, executable: bool, mode: int) -> None:
    target = tmp_path / "b.tar"
    if is_there:
        target.write_bytes(CONTENT["b.tar"])
        target.chmod(0o604)
    before = os.umask(0o027)
    try:
        place({"b.tar": target}, {"b.tar": output(CONTENT["b.tar"], executable)}, fetch)
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o7777 == mode


def test_content_is_synced_before_the_first_rename_and_folders_after_the_last(
    targets: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.replace

    def synced(fd: int) -> None:
        sync(fd)
        events.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        events.append(("rename", str(target)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    place(targets, BOTH, fetch)
    parts = [path for kind, path in events[: len(targets)] if kind == "sync" and path.endswith(".part")]
    assert [Path(path).parent for path in parts] == [target.parent for target in targets.values()]
    assert events[len(targets) : -len(targets)] == [("rename", str(target)) for target in targets.values()]
    assert sorted(events[-len(targets) :]) == sorted(("sync", str(target.parent)) for target in targets.values())


def test_several_old_outputs_are_removed_before_the_first_new_one_is_visible(
    targets: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for target in targets.values():
        target.parent.mkdir()
        target.write_bytes(b"the old one")
    rename = os.replace
    seen: list[list[str]] = []

    def renamed(source: Path, target: Path) -> None:
        seen.append([name for name, other in targets.items() if other.exists()])
        rename(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    place(targets, BOTH, fetch)
    assert seen == [[], ["umtprd"]]


@pytest.mark.parametrize("other", [None, b"the old one"], ids=["missing", "changed"])
def test_only_the_outputs_that_are_missing_or_changed_are_fetched(
    targets: Mapping[str, Path], other: bytes | None
) -> None:
    for target in targets.values():
        target.parent.mkdir()
    targets["umtprd"].write_bytes(CONTENT["umtprd"])
    before = targets["umtprd"].stat().st_ino
    if other is not None:
        targets["b.tar"].write_bytes(other)
    assert place(targets, BOTH, fetch) == len(CONTENT["b.tar"])
    assert {name: target.read_bytes() for name, target in targets.items()} == CONTENT
    assert targets["umtprd"].stat().st_ino == before
    assert place(targets, BOTH, fetch) == 0


def test_an_existing_output_is_removed_if_another_cannot_be_renamed(
    targets: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for target in targets.values():
        target.parent.mkdir()
        target.write_bytes(b"the old one")
    targets["umtprd"].write_bytes(CONTENT["umtprd"])

    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        place(targets, BOTH, fetch)
    assert not any(target.exists() for target in targets.values())


@pytest.mark.parametrize("error", [PermissionError(1, "Operation not permitted"), KeyboardInterrupt()], ids=repr)
def test_a_single_old_target_is_retained_if_its_successor_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = tmp_path / "umtprd"
    target.write_bytes(b"the old one")

    def refuse(source: Path, target: Path) -> None:
        raise error

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises((JobError, KeyboardInterrupt)):
        place({"umtprd": target}, {"umtprd": BOTH["umtprd"]}, fetch)
    assert target.read_bytes() == b"the old one"


def test_no_output_remains_if_the_second_rename_is_interrupted(
    targets: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if target == targets["b.tar"]:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        place(targets, BOTH, fetch)
    assert not any(target.exists() for target in targets.values())


def test_the_statements_of_the_old_targets_are_removed(targets: Mapping[str, Path]) -> None:
    for target in targets.values():
        target.parent.mkdir()
        statement_of(target).write_text("{}")
    place(targets, BOTH, fetch)
    assert not any(statement_of(target).exists() for target in targets.values())


@pytest.mark.parametrize("old", ["a link", "another content of that size"])
def test_only_a_regular_file_with_the_expected_content_is_retained(tmp_path: Path, old: str) -> None:
    target, elsewhere = tmp_path / "b.tar", tmp_path / "umtprd"
    if old == "a link":
        elsewhere.write_bytes(CONTENT["b.tar"])
        target.symlink_to(elsewhere)
    else:
        target.write_bytes(bytes(len(CONTENT["b.tar"])))
    assert place({"b.tar": target}, {"b.tar": BOTH["b.tar"]}, fetch) == len(CONTENT["b.tar"])
    assert not target.is_symlink()
    assert target.read_bytes() == CONTENT["b.tar"]


def test_a_part_that_is_longer_than_the_output_is_fetched_from_the_start(tmp_path: Path) -> None:
    target = tmp_path / "b.tar"
    with pytest.raises(BuilderLost):
        place({"b.tar": target}, {"b.tar": BOTH["b.tar"]}, broken_after(1))
    (part,) = tmp_path.glob(part_pattern(target))
    part.write_bytes(CONTENT["b.tar"] + b"?")
    assert place({"b.tar": target}, {"b.tar": BOTH["b.tar"]}, fetch) == len(CONTENT["b.tar"])
    assert target.read_bytes() == CONTENT["b.tar"]


def test_a_complete_part_is_installed_without_fetching_a_byte(tmp_path: Path) -> None:
    target = tmp_path / "b.tar"
    size = len(CONTENT["b.tar"])
    with pytest.raises(BuilderLost):
        place({"b.tar": target}, {"b.tar": BOTH["b.tar"]}, broken_after(size))
    assert place({"b.tar": target}, {"b.tar": BOTH["b.tar"]}, fetch) == 0
    assert target.read_bytes() == CONTENT["b.tar"]


def test_the_part_of_another_running_download_is_left_alone(tmp_path: Path) -> None:
    target, busy = tmp_path / "b.tar", tmp_path / ".b.tar.0123456789abcdef.part"
    with busy.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        place({"b.tar": target}, {"b.tar": BOTH["b.tar"]}, fetch)
        assert busy.exists()
    place({"b.tar": target}, {"b.tar": output(b"same")}, write_same)
    assert not busy.exists()


def test_an_unused_part_that_cannot_be_removed_does_not_prevent_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, unused = tmp_path / "b.tar", tmp_path / ".b.tar.0123456789abcdef.part"
    unused.touch()
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == unused:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    place({"b.tar": target}, {"b.tar": BOTH["b.tar"]}, fetch)
    assert target.read_bytes() == CONTENT["b.tar"]


def test_a_part_is_locked_while_it_is_fetched_and_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b.tar"
    rename = os.replace

    def assert_locked() -> None:
        (part,) = tmp_path.glob(part_pattern(target))
        with part.open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def fetched(name: str, offset: int, target: Sink, limit: int) -> None:
        assert_locked()
        fetch(name, offset, target, limit)

    def renamed(source: Path, target: Path) -> None:
        assert_locked()
        rename(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    place({"b.tar": target}, {"b.tar": BOTH["b.tar"]}, fetched)


def test_no_part_is_left_when_a_rename_fails(targets: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(JobError, match=r": No space left on device\.\n→ Free disk space"):
        place(targets, BOTH, fetch)
    assert [list(target.parent.iterdir()) for target in targets.values()] == [[], []]


@pytest.mark.parametrize("name", ["a*b?[c]!", "n" * 255, "n" + "\N{LATIN SMALL LETTER E WITH ACUTE}" * 127])
def test_the_pattern_of_parts_finds_this_targets_part_only(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    for other in (target, target.with_name("aXbYc!"), target.with_name(f"{name[:-1]}2")):
        with pytest.raises(BuilderLost):
            place({"b.tar": other}, {"b.tar": BOTH["b.tar"]}, broken_after(1))
    (part,) = tmp_path.glob(part_pattern(target))
    place({"b.tar": target}, {"b.tar": BOTH["b.tar"]}, fetch)
    assert not part.exists()
    assert len(list(tmp_path.glob(".*.part"))) == 2


def test_a_removed_target_does_not_hide_the_error_of_the_others(
    targets: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def refuse(source: Path, target: Path) -> None:
        if target == targets["b.tar"]:
            targets["umtprd"].unlink()
            raise PermissionError(errno.EPERM, "Operation not permitted")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(JobError, match="Operation not permitted"):
        place(targets, BOTH, fetch)


def test_an_existing_target_counts_although_its_mode_cannot_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "b.tar"
    target.write_bytes(CONTENT["b.tar"])

    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    assert place({"b.tar": target}, {"b.tar": BOTH["b.tar"]}, fetch) == 0


def test_data_after_a_hole_is_written_at_its_offset(tmp_path: Path) -> None:
    whole = b"begin" + bytes(3) + b"end"

    def sparse(name: str, offset: int, target: Sink, limit: int) -> None:
        target.write(b"begin")
        target.skip(3)
        target.write(b"end")

    place({"x": tmp_path / "x"}, {"x": output(whole)}, sparse)
    assert (tmp_path / "x").read_bytes() == whole


def test_a_part_is_removed_if_there_is_no_room_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, announced = {"umtprd": tmp_path / "umtprd"}, {"umtprd": BOTH["umtprd"]}
    with pytest.raises(BuilderLost):
        place(targets, announced, broken_after(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=len(CONTENT["umtprd"]) - 1001))
    with pytest.raises(JobError, match="does not fit on the disk"):
        place(targets, announced, fetch)
    assert list(tmp_path.iterdir()) == []


def test_resuming_a_part_needs_room_for_the_rest_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, announced = {"umtprd": tmp_path / "umtprd"}, {"umtprd": BOTH["umtprd"]}
    with pytest.raises(BuilderLost):
        place(targets, announced, broken_after(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=len(CONTENT["umtprd"]) - 1000))
    place(targets, announced, fetch)
    assert targets["umtprd"].read_bytes() == CONTENT["umtprd"]
