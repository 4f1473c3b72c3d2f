"""Access to the ext4 root file system inside an image with e2fsprogs, which need neither root nor a loop device."""

from __future__ import annotations

import os
import re
import secrets
import struct
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import ImageError
from ...runner.util.atomic_files import CHUNK
from ...util.disk_space import room_hint
from ...util.subprocesses import check_not_interrupted, end, start
from ...util.text import size
from .partitions import Partition
from .program import environment, failure, run
from .sparse_files import check_readable, copy_part, read_bounded

BATCH = 24 << 10
"""Bytes of commands sent to debugfs before its answers are read. Fewer than a pipe holds, which prevents a deadlock."""

LINE = 8000
"""Maximum bytes of a command. debugfs does not read longer lines."""

LARGEST_BLOCK = 6
"""Maximum log2 of the block size divided by 1024 bytes."""

LINKS = 40
"""Maximum number of symbolic links followed per path, as in Linux."""

LONGEST_LINK = 4095
"""Maximum bytes of a symbolic link's target (path_resolution(7), PATH_MAX)."""

MAX_OUTPUT = 64 << 20
"""Maximum bytes of debugfs's answer to one command. The listing of a folder with a million names is shorter."""


@dataclass(frozen=True)
class Superblock:
    """Fields of an ext4 superblock (Linux, Documentation/filesystems/ext4/super.rst).

    Attributes:
        block: Bytes of a block.
        blocks: Number of blocks.
        free_blocks: Free blocks for ordinary users, without those that are reserved for root.
        free_inodes: Free inodes: how many more files, folders and links fit.
        blocks_per_group: Blocks of a block group.
        inodes_per_group: Inodes of a block group.
        inode: Bytes of an inode.
        time: Time of the last write, mount or check, in seconds since 1970.
        has_quotas: Quota accounting is enabled.
        has_journal_to_play: The file system was not unmounted cleanly.
    """

    block: int
    blocks: int
    free_blocks: int
    free_inodes: int
    blocks_per_group: int
    inodes_per_group: int
    inode: int
    time: int
    has_quotas: bool
    has_journal_to_play: bool


def superblock(image: Path, root: Partition) -> Superblock:
    """Read the superblock of an image's root file system.

    Raises:
        ImageError: The superblock is truncated or invalid.
    """
    with image.open("rb") as file:
        file.seek(root.start + 1024)
        data = file.read(1024)

    def number(at: int, high: int = 0) -> int:
        low: int = struct.unpack_from("<I", data, at)[0]
        return low + (struct.unpack_from("<I", data, high)[0] << 32 if high and is_64bit else 0)

    if len(data) < 1024 or number(0x18) > LARGEST_BLOCK:
        raise ImageError(
            "The root file system of the base is damaged: its superblock is invalid.",
            "Download or copy the base image again.",
        )
    is_64bit = bool(number(0x60) & 0x80)
    return Superblock(
        block=1024 << number(0x18),
        blocks=number(0x4, 0x150),
        free_blocks=max(0, number(0xC, 0x158) - number(0x8, 0x154)),
        free_inodes=number(0x10),
        blocks_per_group=number(0x20),
        inodes_per_group=number(0x28),
        inode=int.from_bytes(data[0x58:0x5A], "little"),
        time=max(number(0x2C), number(0x30), number(0x40), 1),
        has_quotas=bool(number(0x64) & 0x100),
        has_journal_to_play=bool(number(0x60) & 0x4),
    )


def repair(image: Path, root: Partition, now: int, name: str) -> None:
    """Check a file system, and repair it as at boot if it was not unmounted cleanly: replay its journal.

    Raises:
        ImageError: The damage cannot be repaired automatically.
    """
    if root.start and superblock(image, root).has_journal_to_play:
        # After e2fsck has replayed a journal, it reopens the file system at the beginning of the file, ignoring the
        # offset.
        alone = image.parent / "root"
        alone.touch()
        copy_part(image, root.start, root.size, alone, 0)
        os.truncate(alone, root.size)
        repair(alone, replace(root, start=0), now, name)
        copy_part(alone, 0, root.size, image, root.start)
        alone.unlink()
        return
    run(
        ["e2fsck", "-f", "-p", _at(image, root)],
        folder=image.parent,
        now=now,
        what=f"The root file system of {name} is damaged",
        allowed=(0, 1),
    )


def check(image: Path, root: Partition, now: int) -> None:
    """Check a file system, and punch holes for its free space.

    Raises:
        ImageError: The check found an error.
    """
    what = "The root file system of the image is damaged, which is a bug in gamebear-tasks"
    run(["e2fsck", "-f", "-p", "-E", "discard", _at(image, root)], folder=image.parent, now=now, what=what)
    run(["e2fsck", "-f", "-n", _at(image, root)], folder=image.parent, now=now, what=what)


def resize(path: Path, now: int) -> None:
    """Grow a file system to the size of its file.

    The file must contain nothing else: resize2fs truncates it to the size of the file system, ignoring an offset.
    """
    run(["resize2fs", path.name], folder=path.parent, now=now, what="The root file system cannot be grown")


def _at(image: Path, root: Partition) -> str:
    """Return the argument by which e2fsprogs address a file system inside a file."""
    return f"{image.name}?offset={root.start}"


def quoted(name: str | bytes) -> bytes:
    """Quote an argument for debugfs: quotes inside quotes are doubled; a backslash has no special meaning."""
    data = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    return b'"' + data.replace(b'"', b'""') + b'"'


class Debugfs:
    """A debugfs process for the duration of a `with` block.

    debugfs exits with status 0 whatever fails. Therefore each command is followed by a comment with a nonce, which
    debugfs
    echoes. The output before the comment is the answer to the command.

    Args:
        image: The image. debugfs runs in its folder.
        root: Partition of the file system.
        now: Time that debugfs writes, in seconds since 1970.
        write: Open the file system for writing.
    """

    def __init__(self, image: Path, root: Partition, now: int, *, write: bool = False) -> None:
        self._process = start(
            ["debugfs", *(["-w"] if write else []), "-f", "-", _at(image, root)],
            stdin=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=image.parent,
            env=environment(now),
        )
        self._nonce = secrets.token_hex(8).encode()
        self._count = 0
        self._rest = b""
        self._done = "written" if write else "read"
        self._folder = image.parent

    def __enter__(self) -> Debugfs:
        try:
            (output,) = self.query([b"stat <2>"])
            if not output.startswith(b"Inode: 2 "):
                raise self._failed(output)
        except BaseException:
            end(self._process)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        try:
            if kind is not None:
                return
            self._process.stdin.close()
            output = self._rest + self._process.stdout.read()
            self._process.wait()
        finally:
            end(self._process)
        if output.strip():
            raise self._failed(output)

    def query(self, commands: Sequence[bytes]) -> list[bytes]:
        """Send commands and return debugfs's answer to each.

        Raises:
            ImageError: A command is too long or has a line break, an answer is too long, or debugfs exited.
        """
        answers: list[bytes] = []
        batch = b""
        waiting: list[bytes] = []
        for command in [b"", *commands]:
            if len(command) > LINE or b"\n" in command or b"\r" in command:
                raise ImageError(f"{command[:100]!r}… is too long or has a line break.", "Use a shorter name.")
            self._count += 1
            marker = b"# %s %d\n" % (self._nonce, self._count)
            text = (command + b"\n" if command else b"") + marker
            if len(batch) + len(text) > BATCH:
                answers += self._send(batch, waiting)
                batch, waiting = b"", []
            batch += text
            waiting.append(marker)
        answers += self._send(batch, waiting)
        return [answer.partition(b"\n")[2] for answer in answers[1:]]  # the first line echoes the command

    def _send(self, batch: bytes, markers: Iterable[bytes]) -> list[bytes]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(batch)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(self._rest + self._process.stdout.read()) from None
        answers = []
        output = bytearray(self._rest)
        for marker in markers:
            seen = 0
            while (end := output.find(marker, seen)) < 0:
                seen = max(0, len(output) - len(marker))
                data = self._process.stdout.read1(CHUNK)  # type: ignore[attr-defined]  # it is buffered
                if not data:
                    raise self._ended(bytes(output))
                output += data
                if len(output) > MAX_OUTPUT:
                    raise ImageError(
                        f"A folder of the root file system is too large: {size(len(output))} of names.",
                        "Download or copy the base image again.",
                    )
            answers.append(bytes(output[:end]))
            del output[: end + len(marker)]
        self._rest = bytes(output)
        return answers

    def do(self, commands: Sequence[bytes]) -> None:
        """Send commands that print nothing on success, except the inode that they allocate.

        Raises:
            ImageError: A command failed.
        """
        for command, answer in zip(commands, self.query(commands), strict=True):
            if not re.fullmatch(rb"\s*(Allocated inode: \d+)?\s*", answer):
                _, quote, name = command.partition(b'"')
                shown = name.partition(b'"')[0].decode("utf-8", "replace") if quote else "The root file system"
                raise self._failure(f"{shown} cannot be {self._done}", answer)

    def _ended(self, output: bytes) -> ImageError:
        check_not_interrupted(self._process.wait())
        return self._failed(output)

    def _failed(self, output: bytes) -> ImageError:
        return self._failure(f"The root file system cannot be {self._done}", output or b"it exited without a message")

    def _failure(self, what: str, output: bytes) -> ImageError:
        return failure(what, "debugfs", output.decode("utf-8", "replace"), room_hint(self._folder))


@dataclass(frozen=True)
class Inode:
    """A directory entry of the base image.

    Attributes:
        number: Inode number.
        mode: Type and permissions, as in stat(2).
        uid: User id of the owner.
        gid: Group id.
        size: Bytes.
    """

    number: int
    mode: int
    uid: int
    gid: int
    size: int


ENTRY = re.compile(rb"/(\d+)/(\d{6})/(-?\d+)/(-?\d+)/([^/]*)/(\d*)/$", re.MULTILINE | re.DOTALL)
"""Line of debugfs's `ls -p`. A name may contain line breaks."""


class Reader:
    """Reader of the base's root file system that caches directory listings.

    Args:
        session: Session of debugfs.
        folder: Working folder of debugfs, which receives dumped files.
    """

    def __init__(self, session: Debugfs, folder: Path) -> None:
        self._session = session
        self._folder = folder
        self._folders: dict[int, Mapping[str, Inode]] = {}

    def listing(self, number: int) -> Mapping[str, Inode]:
        """Return the entries of a folder by name."""
        if number not in self._folders:
            (output,) = self._session.query([b"ls -p <%d>" % number])
            found = {}
            for inode, mode, uid, gid, name, size in ENTRY.findall(output):
                if name not in (b".", b"..", b"") and int(inode):
                    found[name.decode("utf-8", "surrogateescape")] = Inode(
                        int(inode), int(mode, 8), int(uid) & 0xFFFFFFFF, int(gid) & 0xFFFFFFFF, int(size or 0)
                    )
            self._folders[number] = found
        return self._folders[number]

    def content(self, inode: Inode, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            ImageError: It cannot be read, or is too large.
        """
        check_readable(inode.size, name)  # first, because debugfs dumps holes as zeros
        dumped = self._folder / "dumped"
        dumped.unlink(missing_ok=True)
        self._session.do([b"dump <%d> dumped" % inode.number])
        return read_bounded(dumped, name)[: inode.size]  # debugfs pads inline data with zeros

    def target(self, inode: Inode) -> str:
        """Return the target of a symbolic link.

        Raises:
            ImageError: The target is longer than Linux allows.
        """
        if inode.size > LONGEST_LINK:
            raise ImageError(
                f"The base is damaged: the symbolic link of inode {inode.number} has {inode.size} bytes.",
                "Download or copy the base image again.",
            )
        (output,) = self._session.query([b"stat <%d>" % inode.number])
        match = re.search(rb'^Fast link dest: "(.*)"$', output, re.MULTILINE | re.DOTALL)
        if match:
            return match[1].decode("utf-8", "surrogateescape")
        (output,) = self._session.query([b"cat <%d>" % inode.number])
        return output[: inode.size].decode("utf-8", "surrogateescape")
