"""Small base images, and independent readers of baked images: 7-Zip and a Python package, not used for baking."""

from __future__ import annotations

import gzip
import io
import lzma
import re
import stat
import subprocess
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ext4 import Inode

TIME = 1_700_000_000
"""Creation time of a small base, in seconds since 1970."""

SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"

MIB = 1 << 20

PASSWD = "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
GROUP = "root:x:0:\nsudo:x:27:\nvideo:x:44:\nnogroup:x:65534:\n"

SYSTEM: Mapping[str, str] = {
    "bin": "-> usr/bin",
    "lib": "-> usr/lib",
    "sbin": "-> usr/sbin",
    "usr/bin/sh": "#!/nothing\n",
    "usr/bin/bash": "#!/nothing\n",
    "usr/sbin/init": "#!/nothing\n",
    "usr/lib/systemd/system/getty@.service": "[Install]\nWantedBy=getty.target\nDefaultInstance=tty1\n",
    "usr/lib/systemd/system/ssh.service": "[Install]\nWantedBy=multi-user.target\nAlias=sshd.service\n",
    "usr/lib/systemd/system/static.service": "[Service]\nExecStart=true\n",
    "usr/local/bin/": "",
    "etc/systemd/system/masked.service": "-> /dev/null",
    "etc/fstab": "LABEL=root / ext4 defaults 0 1\nLABEL=BOOT /boot/firmware vfat defaults 0 2\n",
    "etc/hostname": "base\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n127.0.1.1\tbase\n::1\tip6-localhost\n",
    "etc/passwd": PASSWD,
    "etc/shadow": "root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n",
    "etc/group": GROUP,
    "etc/gshadow": "root:*::\nsudo:*::\nvideo:*::\nnogroup:*::\n",
    "etc/skel/.profile": "umask 022\n",
    "etc/skel/.config/": "",
    "boot/firmware/": "",
    "home/": "",
    "root/": "",
    "tmp/": "",
}
"""A minimal system, by names relative to the root. Folders end with a slash, targets of links begin with an arrow."""

BOOT: Mapping[str, str] = {
    "config.txt": "arm_64bit=0\n\n[pi4]\narm_boost=1\n",
    "cmdline.txt": "console=tty1 root=LABEL=root rootwait\n",
    "overlays/dwc2.dtbo": "an overlay\n",
}
"""Content of its boot file system."""


def make_base(
    path: Path,
    *,
    label: str = "dos",
    size: int = 24,
    boot: Mapping[str, str] | None = BOOT,
    system: Mapping[str, str] = SYSTEM,
    options: tuple[str, ...] = (),
    root_first: bool = False,
) -> Path:
    """Create a small image like Raspberry Pi OS: FAT boot partition and ext4 root.

    Args:
        path: The image to create. The suffix selects the compression.
        label: Type of the partition table: `dos` or `gpt`.
        size: MiB of the root partition.
        boot: Content of the boot file system; None for no boot partition.
        system: Content of the root file system.
        options: Additional options for mke2fs.
        root_first: The root partition is not the last one.
    """
    scratch = path.parent / f"{path.name}.parts"
    root = scratch / "root"
    root.mkdir(parents=True)
    for name, text in system.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            place.mkdir(exist_ok=True)
        elif text.startswith("-> "):
            place.symlink_to(text[3:])
        else:
            place.write_text(text)
    if (root / "etc/shadow").exists():
        (root / "etc/shadow").chmod(0o640)
    image = scratch / "image"
    starts = (MIB, 17 * MIB) if not root_first else ((1 + size) * MIB, MIB)
    with image.open("wb") as file:
        file.truncate((18 + size) * MIB)
    kinds = (
        ("c", "83")
        if label == "dos"
        else ("EBD0A0A2-B9E5-4433-87C0-68B6B72699C7", "0FC63DAF-8483-4772-8E79-3D69D8477DE4")
    )
    lines = [(starts[1], size, kinds[1])]
    if boot is not None:
        lines.append((starts[0], 16, kinds[0]))
    identity = "0x01020304" if label == "dos" else "11111111-2222-3333-4444-555555555555"
    table = f"label: {label}\nlabel-id: {identity}\n" + "".join(
        f"start={start // 512}, size={mib * 2048}, type={kind}\n" for start, mib, kind in sorted(lines)
    )
    _run("sfdisk", "--quiet", str(image), stdin=table)
    _run(
        "mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", str(root), "-U", "01020304-0506-0708-090a-0b0c0d0e0f10",
        "-E", f"offset={starts[1]},root_owner=0:0,hash_seed=01020304-0506-0708-090a-0b0c0d0e0f10", *options, str(image),
        f"{size}M",
    )  # fmt: skip
    if boot is not None:
        fat = scratch / "fat"
        with fat.open("wb") as file:
            file.truncate(16 * MIB)
        _run("mkfs.fat", "-F", "16", "-i", "01020304", "-n", "BOOT", str(fat))
        for folder in sorted({name.rpartition("/")[0] for name in boot} - {""}):
            _run("mmd", "-i", str(fat), f"::/{folder}")
        for name, text in boot.items():
            (scratch / "file").write_text(text)
            _run("mcopy", "-i", str(fat), str(scratch / "file"), f"::/{name}")
        with image.open("r+b") as file:
            file.seek(starts[0])
            file.write(fat.read_bytes())
    data = image.read_bytes()
    pack(path, data)
    _run("rm", "-r", str(scratch))
    return path


def pack(path: Path, data: bytes) -> None:
    """Write an image with the compression of its suffix."""
    if path.suffix == ".xz":
        path.write_bytes(lzma.compress(data, preset=0))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(data, 1, mtime=0))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("readme.txt", "an image\n")
            archive.writestr("card.img", data)
    elif path.suffix == ".zst":
        path.write_bytes(subprocess.run(["zstd", "-q", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout)
    else:
        path.write_bytes(data)


def unpacked(path: Path) -> bytes:
    """Return the uncompressed image."""
    program = {".xz": "xz", ".zst": "zstd"}.get(path.suffix)
    if program is None:
        return path.read_bytes()
    return subprocess.run([program, "-dc", path], stdout=subprocess.PIPE, check=True).stdout


def _run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(
        command,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={
            "PATH": SBIN,
            "E2FSPROGS_FAKE_TIME": str(TIME),
            "SOURCE_DATE_EPOCH": str(TIME),
            "TZ": "UTC",
            "LC_ALL": "C.UTF-8",
        },
    )
    assert done.returncode == 0, (command, done.stdout)
    return done.stdout


@dataclass(frozen=True)
class Seen:
    """A file or folder of an image.

    Attributes:
        mode: Type and permissions.
        owner: User and group id.
        mtime: Modification time, in nanoseconds since 1970.
        atime: Access time, in nanoseconds since 1970.
        content: Bytes of a file, or target of a link.
        inode: Inode number.
        links: Number of names.
        xattrs: Extended attributes.
        device: Major and minor device number.
    """

    mode: int
    owner: tuple[int, int]
    mtime: int
    atime: int
    content: bytes
    inode: int
    links: int
    xattrs: Mapping[str, bytes]
    device: tuple[int, int]


class Card:
    """A baked image, read by independent programs.

    Args:
        path: The image, compressed or not.
    """

    def __init__(self, path: Path) -> None:
        self.data = unpacked(path)
        self._plain = path.parent / f"{path.name}.plain"
        self._plain.write_bytes(self.data)
        table = _run("sfdisk", "--dump", str(self._plain))
        self.parts = [
            (int(start) * 512, int(size) * 512) for start, size in re.findall(r"start=\s*(\d+), size=\s*(\d+)", table)
        ]
        self.table = table.replace(str(self._plain), "image")
        self._root = next(start for start, _ in self.parts if self.data[start + 1080 : start + 1082] == b"\x53\xef")

    def __getitem__(self, name: str) -> Seen:
        """Return the entry of a name relative to the root. Links are not followed."""
        return self.files()[name]

    def files(self) -> dict[str, Seen]:
        """Return all entries of the root file system, by names relative to the root."""
        from ext4 import Volume  # needs Python 3.11, and only system tests read images

        volume = Volume(io.BufferedReader(io.BytesIO(self.data)), offset=self._root)
        found: dict[str, Seen] = {}
        pending = [("", volume.root)]
        while pending:
            folder, inode = pending.pop()
            for entry, _ in inode.opendir():
                name = entry.name_bytes.decode("utf-8", "surrogateescape")
                if name in (".", ".."):
                    continue
                path = f"{folder}/{name}".lstrip("/")
                child = volume.inodes[entry.inode]
                found[path] = _seen(child)
                if stat.S_ISDIR(int(child.i_mode)):
                    pending.append((path, child))
        return found

    def boot(self) -> dict[str, bytes]:
        """Return the files of the boot file system, extracted by 7-Zip."""
        start, size = next(part for part in self.parts if part[0] != self._root)
        fat = self._plain.with_suffix(".fat")
        fat.write_bytes(self.data[start : start + size])
        out = self._plain.with_suffix(".boot")
        _run("7zz", "x", "-tFAT", f"-o{out}", "-y", str(fat))
        files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        _run("rm", "-r", str(out), str(fat))
        return files

    def check(self) -> None:
        """Check both file systems again."""
        for start, size in self.parts:
            part = self._plain.with_suffix(".part")
            part.write_bytes(self.data[start : start + size])
            _run(*(("fsck.ext4", "-fn") if start == self._root else ("fsck.fat", "-n")), str(part))
            part.unlink()


def _seen(inode: Inode) -> Seen:
    mode = int(inode.i_mode)
    content = b""
    device = (0, 0)
    if stat.S_ISREG(mode):
        content = inode.open().read()
    elif stat.S_ISLNK(mode):
        content = inode.readlink()
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        old, new = (int(number) for number in inode.i_block[:2])
        device = (old >> 8, old & 255) if old else (new >> 8 & 0xFFF, new & 255 | new >> 12 & 0xFFF00)
    high = inode.osd2.linux2
    return Seen(
        mode,
        (inode.i_uid | high.l_i_uid_high << 16, inode.i_gid | high.l_i_gid_high << 16),
        _time(inode.i_mtime, inode.i_mtime_extra),
        _time(inode.i_atime, inode.i_atime_extra),
        content,
        inode.i_no,
        inode.i_links_count,
        dict(inode.xattrs),
        device,
    )


def _time(low: int, extra: int) -> int:
    """Return a time in nanoseconds. ext4's i_mtime_extra has two bits of seconds, then thirty of nanoseconds."""
    seconds = (low - 2**32 if low >= 2**31 else low) + ((extra & 3) << 32)
    return seconds * 10**9 + (extra >> 2)
