"""A target is absent, or whole and verified; of several, all or none."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gamebear_tasks.builders.base import Output, Sink
from gamebear_tasks.client.install_outputs import Mismatch, part_pattern, place
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
    target = tmp_path / "new" / "umtprd"
    fetched = place({"umtprd": target}, {"umtprd": output(CONTENT["umtprd"], executable=True)}, fetch)
    assert target.read_bytes() == CONTENT["umtprd"]
    assert target.stat().st_mode & 0o100
    assert fetched == len(CONTENT["umtprd"])
    assert leftovers(target.parent) == []


def test_a_target_that_is_there_already_is_not_fetched(tmp_path: Path) -> None:
    target = tmp_path / "umtprd"
    target.write_bytes(CONTENT["umtprd"])
    before = target.stat().st_ino

    def never(name: str, offset: int, target: Sink, limit: int) -> None:
        raise AssertionError("fetched")

    assert place({"umtprd": target}, {"umtprd": output(CONTENT["umtprd"])}, never) == 0
    assert target.stat().st_ino == before


def test_another_content_than_was_said_is_not_placed(tmp_path: Path) -> None:
    target = tmp_path / "umtprd"
    target.write_bytes(b"the old one")
    said = output(b"x" * len(CONTENT["umtprd"]))
    with pytest.raises(Mismatch, match="did not arrive as the builder said"):
        place({"umtprd": target}, {"umtprd": said}, fetch)
    assert target.read_bytes() == b"the old one"
    assert leftovers(tmp_path) == []


def test_of_two_outputs_none_is_placed_when_one_is_wrong(tmp_path: Path) -> None:
    targets = {name: tmp_path / name for name in CONTENT}
    said = {"umtprd": output(CONTENT["umtprd"]), "b.tar": output(b"something else")}
    with pytest.raises(Mismatch):
        place(targets, said, fetch)
    assert not any(target.exists() for target in targets.values())


def test_of_two_outputs_none_is_left_when_one_cannot_be_renamed(
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


def test_a_broken_download_goes_on_where_it_broke(tmp_path: Path) -> None:
    target = tmp_path / "umtprd"
    said = {"umtprd": output(CONTENT["umtprd"])}
    with pytest.raises(BuilderLost):
        place({"umtprd": target}, said, broken_after(1000))
    assert not target.exists()
    assert place({"umtprd": target}, said, fetch) == len(CONTENT["umtprd"]) - 1000
    assert target.read_bytes() == CONTENT["umtprd"]
    assert leftovers(tmp_path) == []


def test_what_is_left_of_a_broken_download_is_checked_and_not_trusted(tmp_path: Path) -> None:
    target = tmp_path / "umtprd"
    said = {"umtprd": output(CONTENT["umtprd"])}
    with pytest.raises(BuilderLost):
        place({"umtprd": target}, said, broken_after(1000))
    (part,) = tmp_path.glob(part_pattern(target))
    part.write_bytes(b"?" * 1000)
    with pytest.raises(Mismatch, match="an earlier run"):
        place({"umtprd": target}, said, fetch)
    assert list(tmp_path.iterdir()) == []


def test_what_a_broken_download_of_something_else_has_left_goes_with_the_next_that_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "umtprd"
    for mine in (".umtprd.0123456789abcdef.part", ".umtprd.more.0123456789abcdef.part"):
        (tmp_path / mine).touch()
    place({"umtprd": target}, {"umtprd": output(CONTENT["umtprd"])}, fetch)
    assert leftovers(tmp_path) == [".umtprd.more.0123456789abcdef.part"], "another target's part is not ours"


def test_a_download_that_breaks_behind_a_hole_goes_on_behind_it(tmp_path: Path) -> None:
    target = tmp_path / "x"
    whole = bytes(5 * MIB) + b"end" + bytes(5 * MIB)
    said = {"x": Output(len(whole), hashlib.sha256(whole).hexdigest(), False, 3)}

    def breaks(name: str, offset: int, target: Sink, limit: int) -> None:
        target.skip(5 * MIB)
        raise BuilderLost("The connection broke.")

    def the_rest(name: str, offset: int, target: Sink, limit: int) -> None:
        assert (offset, limit) == (5 * MIB, 5 * MIB + 3)
        target.write(b"end")
        target.skip(5 * MIB)

    with pytest.raises(BuilderLost):
        place({"x": target}, said, breaks)
    place({"x": target}, said, the_rest)
    assert target.read_bytes() == whole
    assert target.stat().st_blocks * 512 < MIB


def test_a_sparse_artifact_needs_room_for_its_data_only(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free

    def skips(name: str, offset: int, target: Sink, limit: int) -> None:
        raise BuilderLost("It was asked for.")

    with pytest.raises(BuilderLost):
        place({"x": tmp_path / "x"}, {"x": Output(free * 2, "0" * 64, False, 1000)}, skips)
    with pytest.raises(JobError, match="There is no room for"):
        place({"x": tmp_path / "x"}, {"x": Output(free * 4, "0" * 64, False, free * 2)}, skips)


def test_a_download_that_breaks_before_its_first_byte_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BuilderLost):
        place({"umtprd": tmp_path / "umtprd"}, {"umtprd": output(CONTENT["umtprd"])}, broken_after(0))
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_for_which_there_is_no_room_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="There is no room for") as caught:
        place({"umtprd": tmp_path / "umtprd"}, {"umtprd": Output(10**15, "0" * 64, False)}, fetch)
    assert "Make room" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"\(/sys/made\)\. See that it is there and yours; then run doit again"):
        place({"x": Path("/sys/made/x")}, {"x": output(b"")}, fetch)
    (tmp_path / "build").symlink_to("nowhere")
    with pytest.raises(JobError, match="build is a file, and should be a folder"):
        place({"x": tmp_path / "build" / "x"}, {"x": output(b"")}, fetch)


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "umtprd").mkdir()
    with pytest.raises(JobError, match="is a folder"):
        place({"umtprd": tmp_path / "umtprd"}, {"umtprd": output(b"")}, fetch)


def test_a_link_where_the_part_would_be_is_not_written_through(tmp_path: Path) -> None:
    said = output(CONTENT["umtprd"])
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    with pytest.raises(BuilderLost):
        place({"umtprd": tmp_path / "umtprd"}, {"umtprd": said}, broken_after(1))
    (part,) = tmp_path.glob(part_pattern(tmp_path / "umtprd"))
    part.unlink()
    part.symlink_to(victim)
    with pytest.raises(JobError):
        place({"umtprd": tmp_path / "umtprd"}, {"umtprd": said}, fetch)
    assert victim.read_bytes() == b"mine"


def write_same(name: str, offset: int, target: Sink, limit: int) -> None:
    target.write(b"same")


def test_two_outputs_of_one_content_with_long_names_do_not_wait_for_each_other(tmp_path: Path) -> None:
    names = ["n" * 70 + "1", "n" * 70 + "2"]
    targets = {name: tmp_path / name for name in names}
    place(targets, dict.fromkeys(names, output(b"same")), write_same)
    assert [target.read_bytes() for target in targets.values()] == [b"same", b"same"]
