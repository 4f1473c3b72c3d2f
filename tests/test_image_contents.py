"""Contents of tars are unpacked into images unchanged. Unsupported members are rejected by name, without an image."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import pytest
from baking import bake, refused
from card import Card, make_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gamebear_tasks import file, tar
from gamebear_tasks.errors import ImageError
from gamebear_tasks.sdcard.filesystems import ext4
from gamebear_tasks.sdcard.filesystems.ext4 import Debugfs, Inode, Reader
from gamebear_tasks.sdcard.filesystems.sparse_files import MOST_READ

ELF = {
    "armhf": bytes.fromhex("7f454c46010101000000000000000000030028000100000000000000340000000000000000040005")
    + bytes(40),
    "armel": bytes.fromhex("7f454c46010101000000000000000000030028000100000000000000340000000000000000020005")
    + bytes(40),
    "arm64": bytes.fromhex("7f454c4602010100000000000000000003 00b700".replace(" ", "")) + bytes(60),
    "amd64": bytes.fromhex("7f454c46020101000000000000000000 03003e00".replace(" ", "")) + bytes(60),
}
"""ELF headers of some architectures."""

XATTR = "SCHILY.xattr.system."

VIDEOCORE = bytes.fromhex("7f454c4601010100000000000000000002008900") + bytes(60)


@pytest.fixture(scope="session")
def base(system: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base image."""
    return make_base(tmp_path_factory.mktemp("base") / "base.img")


Mode: TypeAlias = Literal["w", "w:gz", "w:bz2", "w:xz"]


class Packed:
    """A tar file under construction."""

    def __init__(self, path: Path, mode: Mode = "w") -> None:
        self.path = path
        self._mode = mode
        self._members: list[tuple[tarfile.TarInfo, bytes]] = []

    def add(self, name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any) -> Packed:
        """Add a member."""
        member = tarfile.TarInfo(name)
        member.type = kind
        member.size = len(data)
        for field, value in fields.items():
            setattr(member, field, value)
        self._members.append((member, data))
        return self

    def done(self) -> Path:
        """Write the tar file."""
        with tarfile.open(self.path, self._mode, format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
            for member, data in self._members:
                archive.addfile(member, io.BytesIO(data))
        return self.path


def test_an_image_has_the_contents_and_metadata_of_the_tar(base: Path, tmp_path: Path) -> None:
    packed = (
        Packed(tmp_path / "all.tar")
        .add("./", tarfile.DIRTYPE, mode=0o700, uid=1000)
        .add("opt/", tarfile.DIRTYPE, mode=0o2775, uid=7, gid=8, mtime=1_000_000_000)
        .add("opt/file", data=b"content", mode=0o4751, uid=70_000, gid=4_000_000_000, mtime=5_000_000_000)
        .add("opt/exact", pax_headers={"mtime": "1234567890.123456789", "atime": "2.000000001"})
        .add("opt/old", pax_headers={"mtime": "-1.5"})
        .add("opt/hard", tarfile.LNKTYPE, linkname="opt/file")
        .add("opt/link", tarfile.SYMTYPE, linkname="../etc/passwd", uid=5)
        .add("opt/long", tarfile.SYMTYPE, linkname="/" + "x" * 300)
        .add("opt/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        .add("opt/disk", tarfile.BLKTYPE, devmajor=259, devminor=300, mode=0o660)
        .add("opt/pipe", tarfile.FIFOTYPE, mode=0o600)
        .add("opt/a second", tarfile.LNKTYPE, linkname="opt/link")
        .add("opt/more", tarfile.LNKTYPE, linkname="opt/pipe")
        .add("null", tarfile.LNKTYPE, linkname="opt/null")
        .add("opt/capable", pax_headers={"SCHILY.xattr.user.note": "hello", "SCHILY.xattr.user.empty": ""})
        .done()
    )
    bake(base, tmp_path / "out.img", contents=[tar(packed)])
    card = Card(tmp_path / "out.img")
    found = card.files()
    assert (found["opt"].mode, found["opt"].owner, found["opt"].mtime) == (0o42775, (7, 8), 10**18)
    program = found["opt/file"]
    assert (program.mode, program.owner, program.content) == (0o104751, (70_000, 4_000_000_000), b"content")
    assert program.mtime == 5_000_000_000 * 10**9
    assert (found["opt/exact"].mtime, found["opt/exact"].atime) == (1234567890123456789, 2000000001)
    assert found["opt/old"].mtime == -1_500_000_000
    assert found["opt/hard"].inode == program.inode and program.links == 2
    assert (found["opt/link"].content, found["opt/link"].owner) == (b"../etc/passwd", (5, 0))
    assert found["opt/long"].content == b"/" + b"x" * 300
    assert (found["opt/null"].mode, found["opt/null"].device) == (stat.S_IFCHR | 0o666, (1, 3))
    assert (found["opt/disk"].mode, found["opt/disk"].device) == (stat.S_IFBLK | 0o660, (259, 300))
    assert found["opt/pipe"].mode == stat.S_IFIFO | 0o600
    for name, other in (("opt/a second", "opt/link"), ("opt/more", "opt/pipe"), ("null", "opt/null")):
        assert found[name].inode == found[other].inode and found[name].links == 2, name
    assert found["opt/capable"].xattrs == {"user.note": b"hello", "user.empty": b""}
    card.check()


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_tar_may_be_compressed(base: Path, tmp_path: Path, mode: Mode) -> None:
    packed = Packed(tmp_path / "some.tar", mode).add("opt/file", data=b"content").done()
    bake(base, tmp_path / "out.img", contents=[tar(packed)])
    assert Card(tmp_path / "out.img")["opt/file"].content == b"content"


def test_archives_of_gnu_tar_are_unpacked_unchanged(base: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree" / "opt"
    tree.mkdir(parents=True)
    (tree / "file").write_bytes(os.urandom(100_000))
    os.setxattr(tree / "file", "user.binary", b"\0\xff\n=\x01")
    with (tree / "holes").open("wb") as sparse:
        sparse.truncate(5 << 20)
        sparse.seek(3 << 20)
        sparse.write(b"here")
    os.link(tree / "file", tree / "again")
    os.chown(tree / "file", 12, 34)
    packed = tmp_path / "gnu.tar"
    command = f"tar --create --sparse --xattrs --format=posix --file={packed} --directory={tree.parent} ."
    assert os.system(command) == 0
    bake(base, tmp_path / "out.img", contents=[tar(packed)])
    card = Card(tmp_path / "out.img")
    found = card.files()
    for name in ("file", "again", "holes"):
        there = (tree / name).stat()
        assert found[f"opt/{name}"].content == (tree / name).read_bytes()
        assert found[f"opt/{name}"].mtime == there.st_mtime_ns
        assert found[f"opt/{name}"].owner == (there.st_uid, there.st_gid)
    assert found["opt/file"].xattrs == {"user.binary": b"\0\xff\n=\x01"}
    card.check()


def test_links_of_the_base_are_followed_and_retained(base: Path, tmp_path: Path) -> None:
    packed = Packed(tmp_path / "some.tar").add("lib/", tarfile.DIRTYPE, mode=0o755).add("lib/thing", data=b"1").done()
    bake(base, tmp_path / "out.img", contents=[tar(packed)])
    found = Card(tmp_path / "out.img").files()
    assert found["lib"].content == b"usr/lib"
    assert found["usr/lib/thing"].content == b"1"


def test_a_link_in_a_tar_never_leads_out_of_the_image(base: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    packed = (
        Packed(tmp_path / "some.tar")
        .add("way", tarfile.SYMTYPE, linkname=f"../../../..{outside}")
        .add("way/file", data=b"1")
        .add("etc/hostname", tarfile.SYMTYPE, linkname="/etc/elsewhere")
        .done()
    )
    bake(base, tmp_path / "out.img", contents=[tar(packed)], hostname="bear")
    found = Card(tmp_path / "out.img").files()
    assert list(outside.iterdir()) == []
    assert found[f"{outside}/file".lstrip("/")].content == b"1"
    assert found["etc/elsewhere"].content == b"bear\n", "the host name goes where the link leads"


def test_an_absolute_name_is_relative_to_the_root_of_the_image(base: Path, tmp_path: Path) -> None:
    packed = Packed(tmp_path / "some.tar").add("/opt//./file", data=b"1").done()
    bake(base, tmp_path / "out.img", contents=[tar(packed, "/srv")])
    assert Card(tmp_path / "out.img")["srv/opt/file"].content == b"1"


def test_the_later_of_two_members_with_one_name_counts(base: Path, tmp_path: Path) -> None:
    one = Packed(tmp_path / "one.tar").add("opt/x", data=b"1", mode=0o755).add("opt/x", data=b"2").done()
    two = Packed(tmp_path / "two.tar").add("opt/y", tarfile.SYMTYPE, linkname="x").add("etc/hostname", data=b"b").done()
    three = tmp_path / "y"
    three.write_bytes(b"3")
    bake(base, tmp_path / "out.img", contents=[tar(one), tar(two), file(three, "/opt/")])
    card = Card(tmp_path / "out.img")
    found = card.files()
    assert (found["opt/x"].content, found["opt/y"].content, found["etc/hostname"].content) == (b"2", b"3", b"b")
    assert stat.S_ISREG(found["opt/y"].mode), "the link is replaced, not followed"
    card.check()


def test_a_file_of_several_names_is_free_when_all_are_replaced(tmp_path: Path, base: Path) -> None:
    packed = (
        Packed(tmp_path / "a.tar")
        .add("a", data=b"1" * 9000, pax_headers={"SCHILY.xattr.user.x": "y" * 900})
        .add("b", tarfile.LNKTYPE, linkname="a")
        .done()
    )
    bake(base, tmp_path / "one.img", contents=[tar(packed)])
    again = Packed(tmp_path / "b.tar").add("a", data=b"2").add("b", data=b"3").done()
    bake(tmp_path / "one.img", tmp_path / "two.img", contents=[tar(again)])
    card = Card(tmp_path / "two.img")
    assert (card["a"].content, card["b"].content) == (b"2", b"3")
    card.check()


def test_a_folder_of_many_files_grows(base: Path, tmp_path: Path) -> None:
    packed = Packed(tmp_path / "many.tar").add("opt/many/first", data=b"1")
    for number in range(400):
        packed.add(f"opt/many/{number}{'-' * 60}", tarfile.LNKTYPE, linkname="opt/many/first")
        packed.add(f"opt/other/{number}{'-' * 60}", tarfile.SYMTYPE, linkname="x")
    bake(base, tmp_path / "out.img", contents=[tar(packed.done())])
    card = Card(tmp_path / "out.img")
    assert card["opt/many/first"].links == 401
    assert len(card.files()) > 800
    card.check()


def test_files_below_the_mount_point_are_on_the_boot_file_system(base: Path, tmp_path: Path) -> None:
    packed = (
        Packed(tmp_path / "some.tar")
        .add("boot/firmware/", tarfile.DIRTYPE)
        .add("boot/firmware/Overlays/NEW.dtbo", data=b"1" * 70_000, mtime=1)
        .add("boot/firmware/deep/er/a b.txt", data=b"2", mtime=5 * 10**9)
        .add("boot/firmware/CONFIG.TXT", data=b"# mine\n")
        .done()
    )
    into = [file(packed, "/boot/firmware/overlays"), file(packed, "/boot/firmware")]
    bake(base, tmp_path / "out.img", contents=[tar(packed), *into], config=["dtoverlay=dwc2"])
    card = Card(tmp_path / "out.img")
    boot = {name.lower(): content for name, content in card.boot().items()}
    assert boot["overlays/new.dtbo"] == b"1" * 70_000
    assert boot["deep/er/a b.txt"] == b"2"
    assert boot["overlays/some.tar"] == boot["some.tar"] == packed.read_bytes(), "a folder there is seen as one"
    assert boot["config.txt"] == b"# mine\ndtoverlay=dwc2\n"
    assert not any(name.startswith("boot/firmware/") for name in card.files())
    listed = subprocess.run(
        ["mdir", "-i", f"{tmp_path / 'out.img'}@@1M", "::/deep/er"], capture_output=True, text=True, check=True
    ).stdout
    assert "2107-12-31" in listed, "FAT has no later time"
    card.check()


@pytest.mark.system
def test_an_inode_without_room_for_later_times_has_the_last_one(tmp_path: Path) -> None:
    packed = Packed(tmp_path / "some.tar").add("opt/x", mtime=2**31).add("opt/y", mtime=-5).done()
    bake(make_base(tmp_path / "base.img", options=("-I", "128")), tmp_path / "out.img", contents=[tar(packed)])
    for name, time in (("x", "0x7fffffff"), ("y", "0xfffffffb")):
        command = ["/usr/sbin/debugfs", "-R", f"stat /opt/{name}", f"{tmp_path / 'out.img'}?offset={17 << 20}"]
        assert f"mtime: {time} " in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.system
def test_replacing_a_file_needs_no_more_room_on_the_boot_file_system(tmp_path: Path) -> None:
    small = make_base(tmp_path / "base.img", boot={"Kernel.img": "k" * 15_000_000})
    kernel = tmp_path / "kernel.img"
    kernel.write_bytes(os.urandom(15_001_000))
    bake(small, tmp_path / "out.img", contents=[file(kernel, "/boot/firmware/")])
    card = Card(tmp_path / "out.img")
    assert [content == kernel.read_bytes() for content in card.boot().values()] == [True]
    card.check()


def test_the_root_folder_of_a_boot_file_system_has_a_limited_number_of_names(base: Path, tmp_path: Path) -> None:
    many = Packed(tmp_path / "many.tar")
    for number in range(30):
        many.add(f"boot/firmware/{number}{'-' * 240}")
    refused(base, tmp_path / "out.img", "No directory slots", "a few hundred names", contents=[tar(many.done())])


ODD_NAMES = ("opt/caf\udce9", 'opt/"quoted"', "opt/<12>", "opt/-w", "opt/# x", "opt/a\\b", "opt/ ", "opt/\t", "!x")


def test_names_may_have_any_bytes(base: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "odd.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        for name in ODD_NAMES:
            archive.addfile(tarfile.TarInfo(name))
    bake(base, tmp_path / "out.img", contents=[tar(tmp_path / "odd.tar")])
    found = Card(tmp_path / "out.img").files()
    assert set(ODD_NAMES) <= set(found)


def test_a_file_is_placed_at_its_declared_path(base: Path, tmp_path: Path) -> None:
    program = tmp_path / "prog ram"
    program.write_bytes(ELF["armhf"])
    program.chmod(0o700)
    bake(
        base,
        tmp_path / "out.img",
        contents=[
            file(program, "/usr/local/bin"),
            file(program, "/bin/other"),
            file(program, "/new/folder/", mode=0o4710, owner=3, group=4),
        ],
    )
    found = Card(tmp_path / "out.img").files()
    assert (found["usr/local/bin/prog ram"].mode, found["usr/local/bin/prog ram"].owner) == (0o100755, (0, 0))
    assert found["usr/bin/other"].content == ELF["armhf"]
    assert (found["new/folder/prog ram"].mode, found["new/folder/prog ram"].owner) == (0o104710, (3, 4))


# rejected contents


@pytest.mark.parametrize("arch", ["armel", "arm64", "amd64"])
def test_a_program_for_another_architecture_is_rejected_by_name(base: Path, tmp_path: Path, arch: str) -> None:
    program = tmp_path / "program"
    program.write_bytes(ELF[arch])
    refused(
        base,
        tmp_path / "out.img",
        f"{program} is a program for {arch}, not for armhf.",
        contents=[file(program, "/bin/")],
    )
    packed = Packed(tmp_path / "some.tar").add("usr/lib/libx.so", data=ELF[arch]).done()
    refused(base, tmp_path / "out.img", f"{packed}: usr/lib/libx.so is a program for {arch}", contents=[tar(packed)])


def test_firmware_for_another_processor_is_not_a_foreign_program(base: Path, tmp_path: Path) -> None:
    packed = Packed(tmp_path / "some.tar").add("lib/firmware/start.elf", data=VIDEOCORE).done()
    bake(base, tmp_path / "out.img", contents=[tar(packed)])


@pytest.mark.parametrize(
    ("name", "kind", "fields", "message"),
    [
        ("../x", tarfile.REGTYPE, {}, "unsafe name '../x'"),
        ("a/../../x", tarfile.REGTYPE, {}, "unsafe name"),
        ("x", tarfile.LNKTYPE, {"linkname": "/etc/shadow"}, "'/etc/shadow', which does not precede it"),
        ("x", tarfile.LNKTYPE, {"linkname": "../../etc/shadow"}, "unsafe name"),
        ("a\nb", tarfile.REGTYPE, {}, "contains a line break"),
        ("a", tarfile.SYMTYPE, {"linkname": "b\nc"}, "link target contains a line break"),
        ("a", tarfile.CHRTYPE, {"devminor": 100_000, "devmajor": 1}, "has a number outside of 0 to 65535"),
        ("n" * 256, tarfile.REGTYPE, {}, "is longer than 255 bytes"),
        ("etc", tarfile.REGTYPE, {}, "/etc cannot be replaced: it is a folder"),
        ("etc/passwd", tarfile.DIRTYPE, {}, "/etc/passwd cannot be replaced: it is not a folder"),
        ("etc/passwd/x", tarfile.REGTYPE, {}, "/etc/passwd is not a folder"),
        ("boot/firmware/x", tarfile.SYMTYPE, {"linkname": "y"}, "FAT has no links or devices"),
        ("boot/firmware", tarfile.REGTYPE, {}, "/boot/firmware cannot be replaced: it is a folder"),
        ("boot/firmware/a:b", tarfile.REGTYPE, {}, "is not a valid name on the boot file system"),
        ("boot/firmware/caf\udce9/x", tarfile.REGTYPE, {}, "is not a valid name on the boot file system"),
        ("boot/firmware/abcdefg~1", tarfile.REGTYPE, {}, "is not a valid name on the boot file system"),
        ("boot/firmware/aux", tarfile.REGTYPE, {}, "is not a valid name on the boot file system"),
        ("x", tarfile.REGTYPE, {"pax_headers": {"SCHILY.acl.access": "user::rw-"}}, "has an access control list"),
        ("x", tarfile.REGTYPE, {"pax_headers": {f"{XATTR}posix_acl_access": "x"}}, "has an access control list"),
        ("x", tarfile.REGTYPE, {"pax_headers": {f"{XATTR}nfs4_acl": "x"}}, "unsupported attribute 'system.nfs4_acl'"),
        ("x", tarfile.REGTYPE, {"pax_headers": {"SCHILY.xattr.odd": "x"}}, "unsupported attribute 'odd'"),
        ("x", tarfile.REGTYPE, {"pax_headers": {"SCHILY.xattr.user.big": "x" * 5000}}, "too many extended attributes"),
        ("x", tarfile.REGTYPE, {"pax_headers": {"size": str(2**44 + 1)}}, "too large for ext4: 17592186044417 bytes"),
        ("x", tarfile.REGTYPE, {"pax_headers": {"mtime": "1e999999999"}}, "has the time 1e999999999"),
        ("x", tarfile.REGTYPE, {"pax_headers": {"mtime": "99999999999"}}, "has the time 99999999999"),
        ("x", tarfile.REGTYPE, {"pax_headers": {"mtime": str(5 * 2**31)}}, "has the time 10737418240"),
        ("x", b"Z", {}, "has the unsupported type b'Z'"),
    ],
)  # fmt: skip
def test_unsupported_contents_are_rejected_by_name(
    base: Path, tmp_path: Path, name: str, kind: bytes, fields: dict[str, Any], message: str
) -> None:
    packed = Packed(tmp_path / "bad.tar").add("good", data=b"1").add(name, kind, **fields).done()
    refused(base, tmp_path / "out.img", "bad.tar", message, contents=[tar(packed)])


def test_a_device_with_a_negative_number_is_rejected(base: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.GNU_FORMAT) as bad:
        member = tarfile.TarInfo("x")
        member.type, member.devmajor, member.devminor = tarfile.CHRTYPE, 1, -1
        bad.addfile(member)
    refused(base, tmp_path / "out.img", "has a number outside of 0 to 65535", contents=[tar(tmp_path / "bad.tar")])


def test_link_loops_are_rejected(base: Path, tmp_path: Path) -> None:
    packed = (
        Packed(tmp_path / "loop.tar")
        .add("a", tarfile.SYMTYPE, linkname="b")
        .add("b", tarfile.SYMTYPE, linkname="a")
        .add("a/x")
        .done()
    )
    refused(base, tmp_path / "out.img", "has a loop of symbolic links", contents=[tar(packed)])


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_truncated_or_damaged_tar_is_rejected(base: Path, tmp_path: Path, mode: Mode) -> None:
    packed = Packed(tmp_path / "bad.tar", mode).add("opt/x", data=b"1" * 512).add("opt/y", data=b"2").done()
    data = packed.read_bytes()
    cuts = (1024, 1300, 2048) if mode == "w" else (len(data) // 2, len(data) - 4)
    damages = [data[:cut] for cut in cuts]
    # A name in its second header; the checksum of the content, or the content.
    at = {"w": 1025, "w:gz": len(data) - 6, "w:bz2": len(data) - 4, "w:xz": len(data) - 40}[mode]
    damages.append(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    for damage in damages:
        packed.write_bytes(damage)
        refused(base, tmp_path / "out.img", "bad.tar cannot be unpacked", contents=[tar(packed)])


def test_a_header_with_an_impossible_size_is_rejected(base: Path, tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**70
    (tmp_path / "bad.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    message = "bad.tar cannot be unpacked: a header is invalid"
    refused(base, tmp_path / "out.img", message, contents=[tar(tmp_path / "bad.tar")])


def test_a_file_that_is_not_a_tar_is_rejected(base: Path, tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"hello" * 1000)
    message = "no.tar cannot be unpacked: it is not a tar file"
    refused(base, tmp_path / "out.img", message, contents=[tar(tmp_path / "no.tar")])


# arbitrary tars

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0\r\n", exclude_categories=["Cs"]), min_size=1, max_size=12
)
PATHS = st.lists(
    NAMES.filter(lambda name: name not in (".", "..") and name == name.strip("\udc00")), min_size=1, max_size=4
)


@st.composite
def members(draw: st.DrawFn) -> list[tuple[str, bytes, dict[str, Any]]]:
    """Draw the members of a tar: folders, files, links and hard links with any names, in separate folders."""
    found: list[tuple[str, bytes, dict[str, Any]]] = []
    files: list[str] = []
    taken: dict[str, bytes] = {}
    for path in draw(st.lists(PATHS, max_size=12)):
        name = "/".join(["top", *path])
        kind = draw(st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]))
        above = ["/".join(name.split("/")[:count]) for count in range(1, name.count("/") + 1)]
        if any(taken.get(folder, tarfile.DIRTYPE) != tarfile.DIRTYPE for folder in above):
            continue
        if name in taken and (taken[name] == tarfile.DIRTYPE) != (kind == tarfile.DIRTYPE):
            continue
        if kind == tarfile.LNKTYPE and not files:
            continue
        fields: dict[str, Any] = {
            "mode": draw(st.integers(0, 0o7777)),
            "uid": draw(st.integers(0, 2**32 - 2)),
            "gid": draw(st.integers(0, 2**32 - 2)),
            "mtime": draw(st.integers(-(2**31), 5 * 2**31 - 1)),
        }
        if kind == tarfile.REGTYPE:
            fields["data"] = draw(
                st.one_of(st.binary(max_size=20), st.integers(0, 3).map(lambda count: b"\0" * 70_000 * count))
            )
            files.append(name)
        elif kind == tarfile.SYMTYPE:
            fields["linkname"] = draw(
                st.text(
                    st.characters(codec="utf-8", exclude_characters="\0\r\n", exclude_categories=["Cs"]),
                    min_size=1,
                    max_size=90,
                )
            )
        elif kind == tarfile.LNKTYPE:
            fields = {"linkname": draw(st.sampled_from(files))}
            if fields["linkname"] == name or taken.get(fields["linkname"]) != tarfile.REGTYPE:
                continue
        taken.update(dict.fromkeys(above, tarfile.DIRTYPE))
        taken[name] = tarfile.REGTYPE if kind == tarfile.LNKTYPE else kind
        found.append((name, kind, fields))
    return found


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(held=members())
def test_any_tar_is_unpacked_into_the_image_unchanged(
    base: Path, tmp_path_factory: pytest.TempPathFactory, held: list[tuple[str, bytes, dict[str, Any]]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    packed = Packed(folder / "any.tar")
    expected: dict[str, tuple[bytes, dict[str, Any], bytes]] = {}
    for name, kind, fields in held:
        packed.add(name, kind, **fields)
        if kind == tarfile.LNKTYPE:
            expected[name] = expected[fields["linkname"]]
        else:
            expected[name] = (
                kind,
                fields,
                fields.get("data", fields.get("linkname", "").encode() if kind == tarfile.SYMTYPE else b""),
            )
    bake(base, folder / "out.img", contents=[tar(packed.done())])
    card = Card(folder / "out.img")
    found = card.files()
    kinds = {tarfile.REGTYPE: stat.S_IFREG, tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK}
    for name, (kind, fields, content) in expected.items():
        seen = found[name]
        mode = 0o777 if kind == tarfile.SYMTYPE else fields["mode"]
        assert seen.mode == kinds[kind] | mode
        assert seen.owner == (fields["uid"], fields["gid"])
        assert seen.mtime == fields["mtime"] * 10**9
        assert seen.content == content
    card.check()


# limits of reads


def grown(path: Path) -> Path:
    """Create a sparse file that slightly exceeds the limit for reads into memory."""
    path.touch()
    os.truncate(path, MOST_READ + 1)
    return path


@pytest.mark.system
def test_an_oversized_file_of_the_base_is_not_read(tmp_path: Path) -> None:
    small = make_base(tmp_path / "base.img")
    command = ["/usr/sbin/debugfs", "-w", "-R", f"sif /etc/hosts size {MOST_READ + 1}", f"{small}?offset={17 << 20}"]
    subprocess.run(command, check=True, capture_output=True)
    refused(small, tmp_path / "out.img", "/etc/hosts of the base is too large: 64.0 MiB", hostname="bear")
    bake(small, tmp_path / "out.img", contents=[file(grown(tmp_path / "long"), "/opt/")])


def test_a_large_file_is_baked_without_being_read_into_memory(base: Path, tmp_path: Path) -> None:
    long = grown(tmp_path / "long")
    hosts, config = file(long, "/etc/hosts"), file(long, "/boot/firmware/config.txt")
    refused(base, tmp_path / "out.img", "long is too large: 64.0 MiB", contents=[hosts], hostname="bear")
    refused(base, tmp_path / "out.img", "long is too large: 64.0 MiB", contents=[config], config=["a=1"])
    packed = Packed(tmp_path / "long.tar").add("etc/hosts", data=bytes(MOST_READ + 1)).done()
    message = "long.tar: etc/hosts is too large: 64.0 MiB"
    refused(base, tmp_path / "out.img", message, contents=[tar(packed, "/")], hostname="bear")


def test_an_oversized_file_or_link_is_not_requested(tmp_path: Path) -> None:
    reader = Reader(cast(Debugfs, None), tmp_path)
    with pytest.raises(ImageError, match=r"/etc/hosts is too large: 1024\.0 GiB"):  # and debugfs is not queried for it
        reader.content(Inode(12, stat.S_IFREG | 0o644, 0, 0, 1 << 40), "/etc/hosts")
    with pytest.raises(ImageError, match=r"symbolic link of inode 12 has 1099511627776 bytes"):
        reader.target(Inode(12, stat.S_IFLNK | 0o777, 0, 0, 1 << 40))


def test_a_folder_with_too_many_names_is_not_read(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ext4, "MAX_OUTPUT", 300)
    refused(base, tmp_path / "out.img", "A folder of the root file system is too large", hostname="bear")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize("first", [False, True])
def test_an_oversized_tar_header_is_rejected_unread(base: Path, tmp_path: Path, kind: bytes, first: bool) -> None:
    path = tmp_path / "odd.tar"
    member = tarfile.TarInfo("opt/x")
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, 4 << 20
    with path.open("wb") as out:
        out.write(b"" if first else member.tobuf(tarfile.USTAR_FORMAT))
        out.write(header.tobuf(tarfile.USTAR_FORMAT) + b"a" * header.size)
        out.write(member.tobuf(tarfile.USTAR_FORMAT) + bytes(10240))
    message = "odd.tar cannot be unpacked: a header is invalid"
    refused(base, tmp_path / "out.img", message, contents=[tar(path, "/")])
