"""SD card images: kinds of bases and targets, contents, and rebuilds only after changes."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from baking import bake, baked, refused
from card import BOOT, MIB, SYSTEM, Card, make_base, pack, unpacked
from project import Project, wait_for
from statements import by_role, read_statement

from gamebear_tasks import archive, file, sd_image, tar, user
from gamebear_tasks.errors import ImageError
from gamebear_tasks.records import task_record
from gamebear_tasks.records.run_reader import last_runs
from gamebear_tasks.records.task_record import Record
from gamebear_tasks.sdcard.boot_config import with_lines, with_words
from gamebear_tasks.sdcard.filesystems.program import check_installed, run
from gamebear_tasks.sdcard.workdir import work_folder

HASH = "$6$saltsalt$" + "h" * 86
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGl0IGlzIG5vIHJlYWwga2V5LCBidXQgYXMgbG9uZyEh me@here"


@pytest.fixture(scope="session")
def base(system: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base image."""
    return make_base(tmp_path_factory.mktemp("base") / "base.img")


@pytest.fixture
def thing(tmp_path: Path) -> Path:
    """A file for the image."""
    path = tmp_path / "thing"
    path.write_bytes(b"a thing\n")
    return path


# bases and targets


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zip", ".zst"])
def test_a_base_may_be_compressed(base: Path, thing: Path, tmp_path: Path, suffix: str) -> None:
    packed = tmp_path / f"base.img{suffix}"
    pack(packed, base.read_bytes())
    bake(packed, tmp_path / "out.img", contents=[file(thing, "/opt/")])
    bake(base, tmp_path / "same.img", contents=[file(thing, "/opt/")])
    assert (tmp_path / "out.img").read_bytes() == (tmp_path / "same.img").read_bytes()


@pytest.mark.system
@pytest.mark.parametrize(
    ("label", "size"),
    [
        ("dos", {}),
        ("gpt", {}),
        ("dos", {"size": "100M"}),
        ("gpt", {"size": "100M"}),
        ("gpt\ntable-length: 256", {"size": "100M"}),
    ],
)
def test_the_base_may_have_either_kind_of_table_and_grow(
    tmp_path: Path, thing: Path, label: str, size: dict[str, str]
) -> None:
    small = make_base(tmp_path / "base.img", label=label)
    bake(small, tmp_path / "out.img", contents=[file(thing, "/opt/"), file(thing, "/boot/firmware/")], **size)
    before, card = Card(small), Card(tmp_path / "out.img")
    assert card["opt/thing"].content == card.boot()["thing"] == b"a thing\n"
    assert len(card.data) == (100 * MIB if size else len(before.data))
    without_sizes = [re.sub(r"size= *\d+|last-lba: \d+", "", found.table) for found in (before, card)]
    assert without_sizes[0] == without_sizes[1], "ids, types and starts are as they were"
    tail = {"dos": 0, "gpt": 33 * 512}.get(label, 65 * 512)
    if size:
        assert sum(card.parts[-1]) == 100 * MIB - tail
    subprocess.run(["sfdisk", "--verify", tmp_path / "out.img"], check=True, env={"PATH": "/usr/sbin:/sbin"})
    card.check()


@pytest.mark.parametrize("suffix", ["", ".xz", ".zst"])
def test_equal_inputs_give_identical_images(
    base: Path, thing: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "contents": [file(thing, "/opt/"), file(thing, "/boot/firmware/new/")],
        "user": user("bear", password=HASH, authorized_keys=[KEY]),
        "hostname": "bear",
        "config": ["dtoverlay=dwc2"],
        "free": "30M",
    }
    bake(base, tmp_path / f"one.img{suffix}", **settings)
    os.utime(thing, (1, 1))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mtoolsrc").write_text("nothing that mtools knows\n")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    (tmp_path / "elsewhere").mkdir()
    time.sleep(1.1)  # the clock has advanced, in case the image depends on it
    bake(base, tmp_path / "elsewhere" / f"two.img{suffix}", **settings)
    one = (tmp_path / f"one.img{suffix}").read_bytes()
    assert one == (tmp_path / "elsewhere" / f"two.img{suffix}").read_bytes()


def test_an_ordinary_user_bakes_the_same_as_root(base: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "some.tar", "w") as some:
        member = tarfile.TarInfo("opt/thing")
        member.uid, member.mode = 12, 0o4755
        some.addfile(member)
        member = tarfile.TarInfo("dev/null")
        member.type, member.devmajor, member.devminor = tarfile.CHRTYPE, 1, 3
        some.addfile(member)
    bake(base, tmp_path / "root.img", contents=[tar(tmp_path / "some.tar")], free="30M")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in (base, tmp_path / "some.tar"):
            shutil.copy(path, folder)
        os.chown(folder, 65534, 65534)
        child = os.fork()
        if child == 0:  # the user may be unable to read the interpreter's files, but all modules are loaded
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            failure = baked(folder / "base.img", folder / "user.img", contents=[tar(folder / "some.tar")], free="30M")
            os._exit(failure is not None)
        assert os.waitpid(child, 0)[1] == 0
        assert (folder / "user.img").read_bytes() == (tmp_path / "root.img").read_bytes()
        assert sorted(path.name for path in folder.iterdir()) == ["base.img", "build", "some.tar", "user.img"]


@pytest.mark.system
def test_free_and_replaced_blocks_are_holes(tmp_path: Path, thing: Path) -> None:
    secret = os.urandom(4 * MIB)
    first = tmp_path / "first.img"
    (tmp_path / "secret").write_bytes(secret)
    bake(make_base(tmp_path / "base.img", size=60), first, contents=[file(tmp_path / "secret", "/opt/thing")])
    bake(first, tmp_path / "out.img", contents=[file(thing, "/opt/")], size="300M")
    image = tmp_path / "out.img"
    assert image.stat().st_size == 300 * MIB
    assert image.stat().st_blocks * 512 < 12 * MIB
    assert secret[: 1 << 16] not in image.read_bytes()
    Card(image).check()


@pytest.mark.system
def test_an_image_without_a_boot_file_system_is_baked_too(tmp_path: Path, thing: Path) -> None:
    small = make_base(tmp_path / "base.img", boot=None)
    bake(small, tmp_path / "out.img", contents=[file(thing, "/boot/firmware/")])
    assert Card(tmp_path / "out.img")["boot/firmware/thing"].content == b"a thing\n"
    refused(small, tmp_path / "no.img", "has no FAT file system", config=["dtoverlay=dwc2"])


@pytest.mark.system
@pytest.mark.parametrize(
    "options",
    [
        ("-O", "^metadata_csum,^64bit"),
        ("-I", "128"),
        ("-b", "1024"),
        ("-b", "4096", "-O", "^has_journal"),
        ("-O", "^extent,^64bit,^metadata_csum,^flex_bg,^huge_file"),
        ("-O", "quota,inline_data"),
    ],
    ids=" ".join,
)
def test_older_and_other_kinds_of_root_file_systems(tmp_path: Path, thing: Path, options: tuple[str, ...]) -> None:
    small = make_base(tmp_path / "base.img", options=options)
    bake(small, tmp_path / "out.img", contents=[file(thing, "/opt/")], size="80M", hostname="bear")
    env = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    for name, content in (
        ("/opt/thing", b"a thing\n"),
        ("/etc/hosts", b"127.0.0.1\tlocalhost\n127.0.1.1\tbear\n::1\tip6-localhost\n"),
    ):
        dumped = subprocess.run(
            ["debugfs", "-R", f"cat {name}", f"{tmp_path / 'out.img'}?offset={17 * MIB}"], capture_output=True, env=env
        )
        assert dumped.stdout.rstrip(b"\0") == content, "debugfs has zeros after what is kept in an inode"


@pytest.mark.system
def test_a_base_that_was_not_unmounted_is_recovered(tmp_path: Path, thing: Path) -> None:
    small = make_base(tmp_path / "base.img", options=("-O", "^metadata_csum"))
    with small.open("r+b") as file_:
        file_.seek(17 * MIB + 1024 + 0x10)  # the superblock's count of free inodes
        file_.write((7).to_bytes(4, "little"))
    bake(small, tmp_path / "out.img", contents=[file(thing, "/opt/")])
    Card(tmp_path / "out.img").check()


@pytest.mark.system
def test_the_journal_of_a_running_base_is_replayed(tmp_path: Path, thing: Path) -> None:
    small = make_base(tmp_path / "base.img")
    data = small.read_bytes()
    (tmp_path / "root").write_bytes(data[17 * MIB :])
    message = subprocess.run(
        ["/usr/sbin/debugfs", "-R", "blocks /etc/hostname", "root"], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    (tmp_path / "block").write_bytes(b"late\n".ljust(1024, b"\0"))
    commands = b"journal_open\njournal_write -b %s block\njournal_close\n" % message.strip()
    subprocess.run(["/usr/sbin/debugfs", "-w", "-f", "-", "root"], cwd=tmp_path, input=commands, check=True)
    small.write_bytes(data[: 17 * MIB] + (tmp_path / "root").read_bytes())
    bake(small, tmp_path / "out.img", contents=[file(thing, "/opt/")])
    card = Card(tmp_path / "out.img")
    assert (card["etc/hostname"].content, card["opt/thing"].content) == (b"late\n", b"a thing\n")
    card.check()


@pytest.mark.system
def test_a_damaged_root_file_system_is_rejected(tmp_path: Path) -> None:
    small = make_base(tmp_path / "base.img")
    data = bytearray(small.read_bytes())
    at = data.index(b"systemd\0")
    data[at - 8 : at + 40] = os.urandom(48)
    small.write_bytes(data)
    refused(small, tmp_path / "out.img", "The root file system of", "base.img is damaged: e2fsck: ")
    data[17 * MIB + 1024 + 0x18] = 0xFF  # the block size
    small.write_bytes(data)
    refused(small, tmp_path / "out.img", "The root file system of the base is damaged: its superblock is invalid")


def test_a_root_file_system_larger_than_its_partition_is_rejected(base: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.img"
    shutil.copy(base, bad)
    command = ["sfdisk", "--quiet", "--partno=2", str(bad)]
    subprocess.run(command, input=b",20000", check=True, env={"PATH": "/usr/sbin:/sbin"})
    refused(bad, tmp_path / "out.img", "bad.img is damaged: its root file system is larger than partition 2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: 30 * MIB], "is truncated: partition 2"),
        (lambda data: bytes(MIB) + data[MIB:], "has no partition table"),
        (lambda data: b"BZh91AY&SY" * 1000, "plain or compressed with xz, zstd, gzip or zip"),
        (lambda data: data[: 17 * MIB] + bytes(MIB) + data[18 * MIB :], "has 0 ext4 and 1 FAT file systems"),
        (lambda data: b"", "has no partition table"),
    ],
)
def test_a_file_that_is_not_an_image_is_rejected(base: Path, tmp_path: Path, damage: object, message: str) -> None:
    assert callable(damage)
    bad = tmp_path / "bad.img"
    bad.write_bytes(damage(base.read_bytes()))
    refused(bad, tmp_path / "out.img", "bad.img", message)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zip", ".zst"])
def test_a_truncated_compressed_base_is_rejected(base: Path, tmp_path: Path, suffix: str) -> None:
    bad = tmp_path / f"bad.img{suffix}"
    pack(bad, base.read_bytes())
    bad.write_bytes(bad.read_bytes()[:-5000])
    refused(bad, tmp_path / "out.img", f"bad.img{suffix} cannot be unpacked")


@pytest.mark.system
def test_a_zip_file_with_damaged_lzma_data_is_rejected(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_LZMA) as bad:
        bad.writestr("a.img", os.urandom(1000))
    data = (tmp_path / "bad.zip").read_bytes()
    (tmp_path / "bad.zip").write_bytes(data[:48] + b"\xff" * 200 + data[248:])
    refused(tmp_path / "bad.zip", tmp_path / "out.img", "bad.zip cannot be unpacked")


@pytest.mark.system
def test_a_zip_file_has_one_image(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as two:
        two.writestr("a.img", b"")
        two.writestr("b.img", b"")
    refused(tmp_path / "two.zip", tmp_path / "out.img", "does not contain exactly one image, but a.img, b.img")


def test_a_zip_file_of_macos_has_one_image_too(base: Path, tmp_path: Path) -> None:
    pack(tmp_path / "mac.zip", base.read_bytes())
    with zipfile.ZipFile(tmp_path / "mac.zip", "a") as archive:
        archive.writestr("__MACOSX/._card.img", b"where it was downloaded from")
    bake(tmp_path / "mac.zip", tmp_path / "out.img")


@pytest.fixture
def web(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """Serve the compressed base. Yield its URL and the received requests."""
    asked: list[str] = []
    folder = tmp_path / "web"
    folder.mkdir()
    pack(folder / "base.img.xz", base.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

        def log_request(self, code: object = "-", size: object = "-") -> None:
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/base.img.xz", asked
    server.shutdown()
    server.server_close()


def test_a_base_from_the_web_is_downloaded_once(
    web: tuple[str, list[str]], thing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url, asked = web
    sha256 = hashlib.sha256((tmp_path / "web" / "base.img.xz").read_bytes()).hexdigest()
    source = archive(url, sha256=sha256)
    task = sd_image(source, output=tmp_path / "out.img", arch="armhf", contents=[file(thing, "/opt/")])
    assert not asked, "not when dodo.py is loaded"
    for _ in range(2):
        function, given = task["actions"][0]
        assert isinstance(function(*given, task=SimpleNamespace(name="image")), dict), "what doit saves"
    assert asked == ["/base.img.xz"]
    assert Card(tmp_path / "out.img")["opt/thing"].content == b"a thing\n"
    assert [path.name for path in (tmp_path / "cache" / "gamebear-tasks" / "sources").glob("[!.]*")] == [
        f"download-{sha256}"
    ]
    wrong = archive(url, sha256="0" * 64)
    task = sd_image(wrong, output=tmp_path / "no.img", arch="armhf")
    function, given = task["actions"][0]
    assert "does not match its pin" in function(*given, task=SimpleNamespace(name="image")).message


# room


def big(path: Path, mib: int) -> Path:
    """Create a file without zero blocks."""
    path.write_bytes(os.urandom(MIB) * mib)
    return path


def test_the_image_grows_as_needed(base: Path, tmp_path: Path) -> None:
    content = big(tmp_path / "big", 30)
    bake(base, tmp_path / "out.img", contents=[file(content, "/opt/")])
    card = Card(tmp_path / "out.img")
    assert card["opt/big"].content == content.read_bytes()
    assert 47 * MIB < len(card.data) < 80 * MIB
    card.check()


def test_the_requested_space_remains_free(base: Path, tmp_path: Path, thing: Path) -> None:
    bake(base, tmp_path / "out.img", contents=[file(thing, "/opt/")], free="200M")
    message = subprocess.run(
        ["dumpe2fs", "-h", f"{tmp_path / 'out.img'}?offset={17 * MIB}"],
        capture_output=True, text=True, check=True, env={"PATH": "/usr/sbin:/sbin"},
    ).stdout  # fmt: skip
    numbers = {name: int(number) for name, number in re.findall(r"^(.+?):\s+(\d+)$", message, re.MULTILINE)}
    free = (numbers["Free blocks"] - numbers["Reserved block count"]) * numbers["Block size"]
    assert 200 * MIB <= free < 240 * MIB


@pytest.mark.system
def test_an_image_grows_for_the_inodes_of_many_small_files(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", size=8, options=("-N", "128"))
    with tarfile.open(tmp_path / "many.tar", "w") as many:
        for number in range(500):
            many.addfile(tarfile.TarInfo(f"opt/{number % 30}/{number}"))
    bake(base, tmp_path / "out.img", contents=[tar(tmp_path / "many.tar")])
    card = Card(tmp_path / "out.img")
    assert sum(name.startswith("opt/") for name in card.files()) == 530
    card.check()
    refused(
        base,
        tmp_path / "no.img",
        "files and folders needed, ",
        contents=[tar(tmp_path / "many.tar")],
        size="26M",
    )


def test_a_full_image_is_an_error_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    content = big(tmp_path / "big", 40)
    refused(
        base,
        tmp_path / "out.img",
        "out.img is too small",
        "40.",
        "MiB free",
        "Set size= to more than 50.0 MiB",
        contents=[file(content, "/opt/")],
        size="50M",
    )
    refused(
        base,
        tmp_path / "out.img",
        "The boot file system of",
        "is too small",
        "it cannot grow",
        contents=[file(content, "/boot/firmware/")],
    )
    refused(base, tmp_path / "out.img", "base.img has 42.0 MiB", size="20M")


@pytest.mark.system
def test_a_root_that_is_not_last_does_not_grow(tmp_path: Path, thing: Path) -> None:
    small = make_base(tmp_path / "base.img", root_first=True)
    bake(small, tmp_path / "out.img", contents=[file(thing, "/opt/")])
    refused(
        small,
        tmp_path / "no.img",
        "cannot grow: its root partition is not the last one",
        contents=[file(big(tmp_path / "big", 40), "/opt/")],
    )


@pytest.mark.system
def test_a_root_in_an_extended_partition_does_not_grow(tmp_path: Path, thing: Path) -> None:
    small = make_base(tmp_path / "base.img", boot=None)
    table = f"label: dos\nstart={16 * 2048}, size={25 * 2048}, type=f\nstart={17 * 2048}, size={24 * 2048}, type=83\n"
    command = ["sfdisk", "--quiet", "--wipe=never", str(small)]
    subprocess.run(command, input=table, text=True, check=True, env={"PATH": "/usr/sbin:/sbin"})
    bake(small, tmp_path / "out.img", contents=[file(thing, "/opt/")])
    assert Card(tmp_path / "out.img")["opt/thing"].content == b"a thing\n"
    refused(small, tmp_path / "no.img", "cannot grow: its root partition is a logical", size="60M")


@pytest.mark.system
def test_free_space_after_the_root_partition_is_used_before_the_image_grows(tmp_path: Path) -> None:
    small = make_base(tmp_path / "base.img")
    os.truncate(small, 60 * MIB)
    content = big(tmp_path / "big", 24)
    bake(small, tmp_path / "out.img", contents=[file(content, "/opt/")])
    bake(small, tmp_path / "same.img", contents=[file(content, "/opt/")], size="60M")
    card = Card(tmp_path / "out.img")
    assert (len(card.data), sum(card.parts[-1])) == (60 * MIB, 60 * MIB)
    assert card["opt/big"].content == content.read_bytes()
    assert card.data == (tmp_path / "same.img").read_bytes()


def test_a_full_disk_is_an_error_and_leaves_no_files(base: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    content = big(tmp_path / "big", 30)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40M", "tmpfs", small], check=True)
    try:
        (small / "out.img").write_bytes(b"old")
        failure = baked(base, small / "out.img", contents=[file(content, "/opt/")])
        assert failure is not None and "o space left" in failure.message, failure
        assert failure.message.count("\n") == 1 and "Make room" in failure.message
        assert [path.name for path in small.iterdir() if path.name != "build"] == ["out.img"]
        assert (small / "out.img").read_bytes() == b"old"
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("stage", ["debugfs", "xz", "any program"])
def test_the_fix_for_a_disk_that_a_program_fills(stage: str, base: Path, tmp_path: Path) -> None:
    """Independent of the program's messages."""
    small = tmp_path / "small"
    small.mkdir()
    content = tmp_path / "big"
    content.write_bytes(os.urandom(8 * MIB))
    bake(base, tmp_path / "whole.img", contents=[file(content, "/opt/")])
    used = (tmp_path / "whole.img").stat().st_blocks * 512
    size = {"debugfs": used + 4 * MIB, "xz": used + 12 * MIB}.get(stage, 4096)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", small], check=True)
    try:
        if stage == "any program":
            (small / "filling").write_bytes(bytes(4096))
            with pytest.raises(ImageError) as caught:
                run(["sh", "-c", "echo ei onnistu; exit 1"], folder=small, now=0, what="It failed")
            message = str(caught.value)
        else:
            output = small / ("out.img.xz" if stage == "xz" else "out.img")
            failure = baked(base, output, contents=[file(content, "/opt/")])
            assert failure is not None
            message = failure.message
            assert f": {stage}: " in message
        assert "Make room in" in message
    finally:
        subprocess.run(["umount", small], check=True)


# configuration of the image


def test_lines_and_words_for_the_boot_loader_and_the_kernel(base: Path, tmp_path: Path) -> None:
    settings = {
        "config": ["dtoverlay=dwc2", "arm_64bit=0", "[pi4]", "over_voltage=2", "[all]", "enable_uart=1"],
        "cmdline": ["modules-load=dwc2 quiet", "console=tty1"],
    }
    bake(base, tmp_path / "one.img", **settings)
    boot = Card(tmp_path / "one.img").boot()
    assert boot["config.txt"].decode() == (
        BOOT["config.txt"] + "[all]\ndtoverlay=dwc2\n[pi4]\nover_voltage=2\n[all]\nenable_uart=1\n"
    )
    assert boot["cmdline.txt"] == b"console=tty1 root=LABEL=root rootwait modules-load=dwc2 quiet\n"
    bake(tmp_path / "one.img", tmp_path / "two.img", **settings)
    assert Card(tmp_path / "two.img").boot() == boot, "nothing goes in twice"


@pytest.mark.parametrize(
    ("text", "wanted", "becomes"),
    [
        ("[HDMI:1]\na=1", ["[pi4]", "b=2"], "[HDMI:1]\na=1\n[all]\n[pi4]\nb=2\n[all]\n"),
        ("", ["[pi4]", "[HDMI:0]", "b=2", "[all]", "c=3"], "[pi4]\n[HDMI:0]\nb=2\n[all]\nc=3\n"),
        ("[HDMI:0]\n[PI4]\nb=2\n", ["[pi3]", "[pi4]", "[HDMI:0]", "b=2"], None),
        ("[tryboot]\r\na=1\r\n[pi4]\r\n", ["[0x1f]", "[pi4]", "a=1"],
         "[tryboot]\r\na=1\r\n[pi4]\r\n[all]\n[0x1f]\n[pi4]\na=1\n[all]\n"),
    ],
)  # fmt: skip
def test_headings_of_config_txt_join_as_the_firmware_joins_them(
    text: str, wanted: list[str], becomes: str | None
) -> None:
    assert with_lines(text, wanted) == (text if becomes is None else becomes)


def test_a_word_for_the_kernel_may_have_spaces_in_quotes() -> None:
    word = 'dyndbg="file a.c +p; file b.c +p"'
    assert with_words("quiet", [word, "quiet"]) == f"quiet {word}\n"
    assert with_words(f"quiet {word}\n", [f"{word} file"]) == f"quiet {word} file\n"


@pytest.mark.system
def test_a_base_without_cmdline_would_not_boot_with_a_new_one(tmp_path: Path) -> None:
    small = make_base(tmp_path / "base.img", boot={})
    bake(small, tmp_path / "out.img", config=["dtoverlay=dwc2"])
    assert Card(tmp_path / "out.img").boot() == {"config.txt": b"dtoverlay=dwc2\n"}
    refused(small, tmp_path / "no.img", "has no cmdline.txt", cmdline=["quiet"])


def test_units_are_enabled_as_systemctl_does(base: Path, tmp_path: Path) -> None:
    unit = tmp_path / "mine@.service"
    unit.write_text(
        "[Unit]\nDescription=x\n[Install]\nWantedBy=a.target \\\n  b@%i.target\n"
        "RequiredBy=c.target\nAlias=other@%i.service\nAlso=ssh.service\n; WantedBy=no.target\n"
    )
    bake(
        base,
        tmp_path / "out.img",
        contents=[file(unit, "/etc/systemd/system/")],
        enable=["mine@one.service", "getty@.service", "ssh"],
    )
    found = Card(tmp_path / "out.img").files()
    links = {
        name.removeprefix("etc/systemd/system/"): seen.content.decode()
        for name, seen in found.items()
        if name.startswith("etc/systemd/system/") and seen.mode & 0o170000 == 0o120000
    }
    mine, getty, ssh = (
        "/etc/systemd/system/mine@.service",
        "/usr/lib/systemd/system/getty@.service",
        "/usr/lib/systemd/system/ssh.service",
    )
    assert links == {
        "a.target.wants/mine@one.service": mine,
        "b@one.target.wants/mine@one.service": mine,
        "c.target.requires/mine@one.service": mine,
        "other@one.service": mine,
        "getty.target.wants/getty@tty1.service": getty,
        "multi-user.target.wants/ssh.service": ssh,
        "sshd.service": ssh,
        "masked.service": "/dev/null",
    }


@pytest.mark.system
def test_systemctl_itself_agrees(tmp_path: Path) -> None:
    """The same units, enabled by systemctl and by sd_image()."""
    root = tmp_path / "root"
    units = {
        **{name: text for name, text in SYSTEM.items() if name.startswith("usr/lib/systemd") and "static" not in name},
        "etc/systemd/system/one@only.service": "[Install]\nWantedBy=multi-user.target\nAlso=gone.service ssh.service\n",
        "usr/lib/systemd/system/plain.service": "[Service]\nExecStart=true\n",
        "usr/lib/systemd/system/plain.service.d/10-a.conf": "[Install]\nWantedBy=never.target\n",
        "etc/systemd/system/plain.service.d/10-a.conf": "[Install]\nWantedBy=a.target\n",
        "etc/systemd/system/plain.service.d/20-b.conf": "[Install]\nWantedBy=b.target\n[Service]\nWantedBy=no.target\n",
    }
    for name, text in units.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    names = ["ssh.service", "getty@tty5.service", "one@only.service", "plain.service"]
    subprocess.run(["systemctl", f"--root={root}", "enable", *names], check=True, capture_output=True)
    theirs = {str(path.relative_to(root)): os.readlink(path) for path in root.rglob("*") if path.is_symlink()}
    bake(make_base(tmp_path / "base.img", system={**SYSTEM, **units}), tmp_path / "out.img", enable=names)
    found = Card(tmp_path / "out.img").files()
    ours = {name for name, seen in found.items() if name.startswith("etc/systemd/") and stat.S_ISLNK(seen.mode)}
    assert {name: found[name].content.decode() for name in ours - {"etc/systemd/system/masked.service"}} == theirs


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ("nothing.service", "nothing.service cannot be enabled: the image has no such unit"),
        ("static.service", "it has no [Install] section"),
        ("masked.service", "it is masked or empty"),
        ("../x.service", "is not a unit name"),
        ("astray.service", "astray.service cannot be enabled: '../../passwd' in [Install]"),
    ],
)
def test_a_unit_that_cannot_be_enabled_is_named(base: Path, tmp_path: Path, unit: str, message: str) -> None:
    astray = tmp_path / "astray.service"
    astray.write_text("[Install]\nAlias=../../passwd\n")
    refused(base, tmp_path / "out.img", message, contents=[file(astray, "/etc/systemd/system/")], enable=[unit])


def test_the_image_has_a_host_name_and_a_user_who_may_log_in(base: Path, tmp_path: Path) -> None:
    pub = tmp_path / "id.pub"
    pub.write_text(f"# mine\n{KEY}\n")
    settings = {
        "hostname": "gamebear",
        "user": user(
            "bear", password=HASH, authorized_keys=[pub, KEY, KEY.replace("me@here", "other")], groups=["sudo", "video"]
        ),
    }
    bake(base, tmp_path / "one.img", **settings)
    card = Card(tmp_path / "one.img")
    found = card.files()
    assert found["etc/hostname"].content == b"gamebear\n"
    assert found["etc/hosts"].content == b"127.0.0.1\tlocalhost\n127.0.1.1\tgamebear\n::1\tip6-localhost\n"
    assert found["etc/passwd"].content.decode().splitlines()[-1] == "bear:x:1000:1000::/home/bear:/bin/bash"
    name, password, changed, *_ = found["etc/shadow"].content.decode().splitlines()[-1].split(":")
    assert (name, password) == ("bear", HASH) and changed.isdecimal()
    assert found["etc/shadow"].mode == 0o100640, "it is as secret as before"
    assert "sudo:x:27:bear\nvideo:x:44:bear\n" in found["etc/group"].content.decode()
    assert found["etc/group"].content.decode().splitlines()[-1] == "bear:x:1000:"
    assert "sudo:*::bear" in found["etc/gshadow"].content.decode()
    for path, mode in (
        ("", 0o40700),
        ("/.profile", 0o100644),
        ("/.config", 0o40755),
        ("/.ssh", 0o40700),
        ("/.ssh/authorized_keys", 0o100600),
    ):
        seen = found[f"home/bear{path}"]
        assert (seen.mode, seen.owner) == (mode, (1000, 1000)), path
    keys = found["home/bear/.ssh/authorized_keys"].content.decode().splitlines()
    assert keys == [KEY, KEY.replace("me@here", "other")]
    assert "etc/systemd/system/multi-user.target.wants/ssh.service" in found, "the SSH server is on"
    bake(tmp_path / "one.img", tmp_path / "two.img", **settings)
    again = Card(tmp_path / "two.img").files()
    assert {name: seen.content for name, seen in again.items()} == {name: seen.content for name, seen in found.items()}


def test_a_user_without_a_password_is_locked_and_one_who_is_there_is_changed(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bake(base, tmp_path / "one.img", user=user("bear"))
    assert b"\nbear:!:" in Card(tmp_path / "one.img")["etc/shadow"].content
    bake(tmp_path / "one.img", tmp_path / "two.img", user=user("bear", password=HASH))
    shadow = Card(tmp_path / "two.img")["etc/shadow"].content.decode()
    assert shadow.count("bear:") == 1 and f"\nbear:{HASH}:" in shadow
    bake(base, tmp_path / "three.img", user=user("root", authorized_keys=[KEY], groups=[]))
    assert Card(tmp_path / "three.img")["root/.ssh/authorized_keys"].content.decode() == f"{KEY}\n"
    refused(base, tmp_path / "no.img", "has no group 'wheel'", user=user("bear", groups=["wheel"]))
    assert "user('bear') has neither a key nor a password" in capfd.readouterr().err
    bake(tmp_path / "two.img", tmp_path / "four.img", user=user("bear", authorized_keys=[KEY]))
    assert b"\nbear:!:" in Card(tmp_path / "four.img")["etc/shadow"].content, "no password is none to log in with"
    assert "neither" not in capfd.readouterr().err


@pytest.mark.system
def test_damaged_lines_matter_only_if_they_are_used(tmp_path: Path) -> None:
    system = {
        **{name: text for name, text in SYSTEM.items() if name != "etc/hostname"},
        "etc/passwd": f"{SYSTEM['etc/passwd']}+\nhalf:x\nodd:x:some:7::/home/odd:/bin/sh\n",
        "etc/shadow": f"{SYSTEM['etc/shadow']}half:\n",
        "etc/group": f"{SYSTEM['etc/group']}+\nbits:x:9\n",
        "usr/lib/userconf-pi/userconf": "#!/bin/sh\n",
        "etc/hostname/": "",
    }
    small = make_base(tmp_path / "base.img", system=system)
    bake(small, tmp_path / "out.img", user=user("bear", password=HASH))
    assert b"\n+\nhalf:x\nodd:x:some:" in Card(tmp_path / "out.img")["etc/passwd"].content
    for name, groups, message in (
        ("half", [], "/etc/passwd of the image is damaged: the line of 'half'"),
        ("odd", [], "/etc/passwd of the image is damaged: the line of 'odd'"),
        ("bear", ["bits"], "/etc/group of the image is damaged: the line of 'bits'"),
    ):
        refused(small, tmp_path / "no.img", message, user=user(name, password=HASH, groups=groups))
    refused(small, tmp_path / "no.img", "/etc/hostname is not a regular file", hostname="bear")


@pytest.mark.system
def test_the_user_is_configured_as_raspberry_pi_os_expects(tmp_path: Path) -> None:
    system = {
        **SYSTEM,
        "usr/lib/userconf-pi/userconf": "#!/bin/sh\n",
        "etc/passwd": SYSTEM["etc/passwd"] + "pi:x:1000:1000::/home/pi:/bin/bash\n",
        "etc/shadow": SYSTEM["etc/shadow"] + "pi:!:19000:0:99999:7:::\n",
        "home/pi/": "",
    }
    small = make_base(tmp_path / "base.img", system=system)
    bake(small, tmp_path / "out.img", user=user("bear", password=HASH, authorized_keys=[KEY]))
    card = Card(tmp_path / "out.img")
    assert card.boot()["userconf.txt"].decode() == f"bear:{HASH}\n"
    assert card["home/pi/.ssh/authorized_keys"].owner == (1000, 1000), "the first boot moves it with the home"
    assert b"bear" not in card["etc/passwd"].content
    home = [file(tmp_path / "base.img", "/home/bear/")]
    refused(small, tmp_path / "no.img", "/home/bear exists", contents=home, user=user("bear"))


def test_contents_of_a_home_folder_belong_to_its_user(tmp_path: Path, thing: Path, base: Path) -> None:
    contents = [file(thing, "/home/bear/.config/app/"), file(thing, "/home/bear/.profile", owner=1000, group=1000)]
    bake(base, tmp_path / "out.img", contents=contents, user=user("bear"))
    found = Card(tmp_path / "out.img").files()
    for path, mode in (("", 0o40700), ("/.config", 0o40755), ("/.config/app", 0o40755)):
        assert (found[f"home/bear{path}"].mode, found[f"home/bear{path}"].owner) == (mode, (1000, 1000)), path
    assert found["home/bear/.profile"].content == b"a thing\n", "a file that is there is not replaced"
    with tarfile.open(tmp_path / "home.tar", "w") as packed:
        member = tarfile.TarInfo("home/bear/")
        member.type, member.uid, member.mode = tarfile.DIRTYPE, 7, 0o711
        packed.addfile(member)
    bake(base, tmp_path / "tar.img", contents=[*contents, tar(tmp_path / "home.tar")], user=user("bear"))
    seen = Card(tmp_path / "tar.img")["home/bear"]
    assert (seen.mode, seen.owner) == (0o40711, (7, 0)), "a tar says itself"


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (KEY, True),
        (f'restrict,command="x y" {KEY}', True),
        (KEY.replace(" ", "\t", 1).replace(" ", "  ", 1), True),
        (KEY.replace("bG9uZyEh", ""), False),
        (KEY.replace("ed25519 ", "rsa "), False),
        (f"x{KEY}", False),
    ],
)
def test_a_truncated_public_key_is_rejected(base: Path, tmp_path: Path, text: str, is_one: bool) -> None:
    (tmp_path / "key.pub").write_bytes(f"\ufeff{text}\r\n".encode())
    failure = baked(base, tmp_path / "out.img", user=user("bear", authorized_keys=[tmp_path / "key.pub"]))
    if not is_one:
        assert failure is not None and "contains no public SSH keys" in failure.message
        return
    assert user("bear", authorized_keys=[f"{text}\n"]).authorized_keys == (text,)
    assert Card(tmp_path / "out.img")["home/bear/.ssh/authorized_keys"].content.decode() == f"{text}\n"


@pytest.mark.parametrize("name", ["id_ed25519", "empty"])
def test_a_file_without_a_public_key_is_rejected_and_not_shown(base: Path, tmp_path: Path, name: str) -> None:
    secret = "c2VjcmV0c2VjcmV0" if name == "id_ed25519" else ""
    (tmp_path / name).write_text(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{secret}\n" if secret else "")
    failure = baked(base, tmp_path / "out.img", user=user("bear", authorized_keys=[tmp_path / name]))
    assert failure is not None and "contains no public SSH keys" in failure.message
    assert not secret or secret not in failure.message


def test_a_base_of_another_architecture_is_rejected(base: Path, tmp_path: Path) -> None:
    shell = tmp_path / "sh"
    shutil.copy("/bin/sh", shell)
    machine = subprocess.run(
        ["dpkg", "--print-architecture"], capture_output=True, text=True, check=True
    ).stdout.strip()
    bake(base, tmp_path / "own.img", contents=[file(shell, "/bin/sh")], arch=machine)
    refused(tmp_path / "own.img", tmp_path / "out.img", f"has the architecture {machine}, not s390x", arch="s390x")


# doit


DODO = """
from gamebear_tasks import file, sd_image, tar, user

DOIT_CONFIG = {{"default_tasks": ["image"]}}

def task_thing():
    return {{"actions": ["echo made > thing"], "targets": ["thing"], "uptodate": [True]}}

def task_image():
    return sd_image(
        "base.img",
        output="build/card.img",
        contents=[file("thing", "/opt/")],
        user=user("bear", password={password!r}, authorized_keys=["key.pub"]),
        arch="armhf",
        {more}
    )
"""


@pytest.fixture
def project(base: Path, tmp_path: Path) -> Project:
    """A project with an image."""
    project = Project(tmp_path / "project", home=tmp_path / "home")
    shutil.copy(base, project.folder / "base.img")
    project.write("key.pub", f"{KEY}\n")
    project.write("dodo.py", DODO.format(password=HASH, more=""))
    return project


def test_only_a_real_change_bakes_again(project: Project) -> None:
    assert project.doit().ok().ran == ["thing", "image"]
    first = (project.folder / "build" / "card.img").read_bytes()
    assert project.doit().ok().ran == []
    assert project.doit("fresh=yes").ok().ran == ["image"]
    about = json.loads((project.folder / "build" / "logs" / "image.json").read_bytes())
    assert about["why"] == ["fresh=yes"]
    (project.folder / "thing").touch()
    assert project.doit().ok().ran == []
    for change in ('hostname="bear",', 'config=["dtoverlay=dwc2"],', 'size="44M",'):
        project.write("dodo.py", DODO.format(password=HASH, more=change))
        assert project.doit().ok().ran == ["image"], change
    project.write("dodo.py", DODO.format(password=HASH, more=""))
    assert project.doit().ok().ran == ["image"]
    assert (project.folder / "build" / "card.img").read_bytes() == first
    project.write("key.pub", f"{KEY}er\n")
    assert project.doit().ok().ran == ["image"]
    (project.folder / "thing").chmod(0o755)
    assert project.doit().ok().ran == ["image"], "its mode goes in, too"
    project.write("dodo.py", DODO.format(password=HASH.replace("h", "i"), more=""))
    assert project.doit().ok().ran == ["image"]


def rewrite(project: Project, name: str, text: str) -> None:
    """Overwrite a file and restore its mtime."""
    path = project.folder / name
    before = path.stat()
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(("name", "text"), [("thing", "MADE\n"), ("thing", "more\n\n"), ("key.pub", f"{KEY}er\n")])
def test_a_file_with_other_content_and_the_same_mtime_bakes_again(project: Project, name: str, text: str) -> None:
    project.doit().ok()
    assert project.doit().ok().ran == []
    rewrite(project, name, text)
    assert project.doit().ok().ran == ["image"]
    assert project.doit().ok().ran == []


def test_a_file_changed_by_a_later_action_counts_as_not_baked(project: Project) -> None:
    text = DODO.format(password=HASH, more="").replace("return sd_image(", "task = sd_image(")
    project.write("dodo.py", f"{text}    return {{**task, 'actions': [*task['actions'], 'echo late > thing']}}\n")
    project.doit("-n", "2").ok()
    assert project.doit().ok().ran == ["image"]
    assert project.doit().ok().ran == []


def test_the_image_of_a_killed_run_is_not_mistaken_for_the_previous_one(project: Project) -> None:
    text = DODO.format(password=HASH, more="").replace("return sd_image(", "task = sd_image(")
    kill = "test ! -e kill || kill -9 $PPID"
    project.write("dodo.py", f"{text}    return {{**task, 'actions': [*task['actions'], {kill!r}]}}\n")
    project.doit().ok()
    first = (project.folder / "build/card.img").read_bytes()
    rewrite(project, "thing", "MADE\n")
    project.write("kill", "")
    assert project.doit().status != 0
    assert (project.folder / "build/card.img").read_bytes() != first
    (project.folder / "kill").unlink()
    rewrite(project, "thing", "made\n")
    assert project.doit().ok().ran == ["image"]
    assert (project.folder / "build/card.img").read_bytes() == first


def record_of(project: Project) -> Record:
    record = Record.read(project.folder / "build/logs/image.json")
    assert record
    return record


def test_a_bake_has_a_record(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.doit().ok()
    record = record_of(project)
    assert (record.state, record.origin, record.builder) == ("done", "baked", "")
    assert record.why == ("not built here before",)
    (made,) = record.outputs
    assert (made.path, made.size) == ("build/card.img", (project.folder / made.path).stat().st_size)
    assert {"unpack", "check", "compose", "write"} < {phase.name for phase in record.phases}
    assert {phase.name for phase in record.phases} <= {"load", *task_record.BAKER}
    project.write("key.pub", f"{KEY}er\n")
    project.write("dodo.py", DODO.format(password=HASH, more='enable=["nothing.service"],'))
    project.doit().failed()
    record = record_of(project)
    assert record.why == ("its declaration changed: settings, names or modes", "key.pub changed")
    assert (record.state, record.failure[:33]) == ("failed", "nothing.service cannot be enabled")
    monkeypatch.chdir(project.folder)
    assert [[entry.record.state for entry in run.entries] for run in last_runs()] == [["failed"], ["done"]]


def test_an_image_has_provenance_like_an_artifact(project: Project) -> None:
    project.doit("provenance=true").ok()
    image = project.folder / "build" / "card.img"
    first = read_statement(image)
    for role, path in (("base", "base.img"), ("file", "thing"), ("key", "key.pub")):
        digest = hashlib.sha256((project.folder / path).read_bytes()).hexdigest()
        assert [(name, each.digest["sha256"]) for name, each in by_role(first, role).items()] == [(path, digest)]
    statement = image.with_name("card.img.intoto.json")
    statement.unlink()
    assert project.gamebear("provenance").ok().out == "build/card.img.intoto.json\n"
    assert read_statement(image) == first
    assert HASH not in statement.read_text()
    os.utime(image, (1, 1))
    project.gamebear("provenance").failed("build/card.img does not match the record of image")
    project.write("key.pub", f"{KEY}er\n")
    project.gamebear("provenance", "image").failed("image is not up to date")
    project.doit().ok()
    assert not statement.exists()


def test_secrets_are_neither_shown_nor_stored_by_doit(project: Project) -> None:
    message = (
        project.doit("-v2").ok().text + project.doit("info", "image").text + project.doit("list", "--status").ok().text
    )
    assert HASH not in message
    for path in [*project.folder.glob(".doit.db*"), *(project.folder / "build/logs").rglob("*.json*")]:
        assert HASH.encode() not in path.read_bytes()


def test_clean_removes_the_image_and_leftovers_of_a_killed_bake(project: Project) -> None:
    project.doit().ok()
    left = project.folder / "build" / ".card.img.abc.bake"
    left.mkdir()
    (left / "image").write_bytes(b"x")
    others = left.with_name(".card.img.xz.abc.bake")
    others.mkdir()
    project.doit("clean", "image").ok()
    assert {path.name for path in (project.folder / "build").iterdir()} == {others.name, "logs"}


def test_a_temporary_folder_removed_by_another_bake_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tempfile.mkdtemp
    made: list[str] = []

    def removed_at_once(**arguments: str) -> str:
        made.append(make(**arguments))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", removed_at_once)
    with work_folder(tmp_path / "card.img") as folder:
        assert len(made) == 2 and folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_an_error_has_no_traceback_and_leaves_the_old_image(project: Project) -> None:
    project.doit().ok()
    before = (project.folder / "build" / "card.img").read_bytes()
    project.write("dodo.py", DODO.format(password=HASH, more='enable=["nothing.service"],'))
    project.doit().failed("nothing.service cannot be enabled: the image has no such unit")
    assert (project.folder / "build" / "card.img").read_bytes() == before


def test_loading_a_dodo_and_an_up_to_date_image_run_nothing(project: Project) -> None:
    project.doit().ok()
    loads = (
        "import dodo, sys; dodo.task_image(); print([name for name in ('tarfile', 'paramiko') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", loads], cwd=project.folder, env=project.environment, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
    assert project.doit(PATH="/nonexistent").ok().ran == []


def users_of(folder: Path) -> list[str]:
    """Processes whose PATH contains a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


@pytest.mark.parametrize("options", [(), ("-n2",), ("-n2", "-P", "thread")], ids=["serial", "processes", "threads"])
@pytest.mark.parametrize("signal", ["KILL", "TERM", "INT"])
def test_leftovers_of_an_interrupted_bake_are_removed_by_the_next(
    project: Project, signal: str, options: tuple[str, ...]
) -> None:
    slow = project.folder / "bin"
    slow.mkdir()
    (slow / "resize2fs").write_text(f"#!/bin/sh\ntouch '{project.folder}/reached'\nexec sleep 60\n")
    (slow / "resize2fs").chmod(0o755)
    project.write("dodo.py", DODO.format(password=HASH, more='free="90M",'))
    environment = {**project.environment, "PATH": f"{slow}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        project.command(*options), cwd=project.folder, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(lambda: (project.folder / "reached").exists())
    if signal == "INT":
        os.killpg(process.pid, 2)  # a terminal signals all processes
    else:
        process.send_signal(9 if signal == "KILL" else 15)
    message = process.communicate()[0].decode()
    wait_for(lambda: not users_of(slow))
    assert "Traceback" not in message, message
    left = list((project.folder / "build").glob(".*.bake"))
    assert bool(left) == (signal == "KILL" and options != ("-n2",)), "a process of doit -n clears up"
    assert not (project.folder / "build" / "card.img").exists()
    if signal != "KILL":
        record = record_of(project)
        assert (record.state, record.outputs) == ("interrupted", ())
    project.doit().ok()
    assert {path.name for path in (project.folder / "build").iterdir()} == {"card.img", "logs"}


def test_a_program_that_receives_ctrl_c_before_doit_has_not_failed(project: Project) -> None:
    impatient = project.write("bin/resize2fs", "#!/bin/sh\nkill -INT $$\n")
    impatient.chmod(0o755)
    project.write("dodo.py", DODO.format(password=HASH, more='free="90M",'))
    run = project.doit("-n2", "-P", "thread", PATH=f"{impatient.parent}:{os.environ['PATH']}")
    assert run.status != 0 and "Traceback" not in run.text, run.text
    assert record_of(project).state == "interrupted"
    assert [path.name for path in (project.folder / "build").iterdir()] == ["logs"]


@pytest.mark.parametrize("change", ["echo changed >> ../../thing", "cp -p ../../other ../../thing"])
def test_an_image_whose_inputs_change_during_the_bake_is_not_installed(project: Project, change: str) -> None:
    project.doit("thing").ok()
    project.write("other", "MADE\n")
    os.utime(project.folder / "other", ns=(1, (project.folder / "thing").stat().st_mtime_ns))
    slow = project.folder / "bin"
    slow.mkdir()
    (slow / "fsck.fat").write_text(f'#!/bin/sh\n{change}\nPATH=/usr/sbin:/sbin exec fsck.fat "$@"\n')
    (slow / "fsck.fat").chmod(0o755)
    project.doit(PATH=f"{slow}:{os.environ['PATH']}").failed("was not installed: an input changed during the build")
    assert not (project.folder / "build" / "card.img").exists()


def test_missing_programs_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(ImageError) as error:
        check_installed(["mcopy", "debugfs"])
    assert str(error.value).endswith("packages): e2fsprogs, mtools") and "debugfs, mcopy not installed." in str(
        error.value
    )


def test_a_hash_is_not_in_a_users_representation() -> None:
    assert HASH not in repr(user("bear", password=HASH))


def test_a_missing_file_is_named(base: Path, tmp_path: Path) -> None:
    refused(base, tmp_path / "out.img", f"{tmp_path / 'no'} cannot be read", contents=[file(tmp_path / "no", "/opt/")])
    refused(tmp_path / "no.img", tmp_path / "out.img", "no.img cannot be read")
    refused(base, tmp_path / "out.img", "is not a regular file", contents=[file(tmp_path, "/opt/")])
    assert unpacked(base)
