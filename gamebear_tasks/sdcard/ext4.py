"""The root file system inside its image, read and written with e2fsprogs: they need neither root nor a loop device."""

from __future__ import annotations

import os
import re
import secrets
import struct
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ImageError
from ..runner.util.atomic_files import CHUNK
from ..util.process import check_not_interrupted
from ..util.text import size
from .base_image import check_readable, copy_part, read_bounded
from .partitions import Partition
from .program import environment, failure, run

BATCH = 24 << 10
"""Bytes of commands that debugfs is given before we read its answers: fewer than a pipe holds, so nobody waits."""

LINE = 8000
"""Bytes that a command may have: debugfs reads no longer lines."""

LARGEST_BLOCK = 6
"""How often a block of 1024 bytes is doubled at most."""

LINKS = 40
"""How many links are followed for one name, as in Linux."""

LONGEST_LINK = 4095
"""Bytes that a symbolic link may lead to (path_resolution(7), PATH_MAX)."""

MOST_SAID = 64 << 20
"""Bytes that debugfs may answer to one command: the listing of a folder of a million names has fewer."""


@dataclass(frozen=True)
class Superblock:
    """What a file system says of itself (Linux, Documentation/filesystems/ext4/super.rst).

    Attributes:
        block: bytes of a block.
        blocks: how many there are.
        free_blocks: those that ordinary users can have: what is reserved for root is not among them.
        free_inodes: how many more files, folders and links it can have.
        blocks_per_group: how many blocks come with a group.
        inodes_per_group: how many inodes come with a group.
        inode: bytes of an inode.
        time: when it was last written, mounted or checked, in seconds since 1970.
        has_quotas: it counts what each user has.
        has_journal_to_play: it was not unmounted.
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
    """Return what the root file system of an image says of itself; raises ImageError where that makes no sense."""
    with image.open("rb") as file:
        file.seek(root.start + 1024)
        data = file.read(1024)

    def number(at: int, high: int = 0) -> int:
        low: int = struct.unpack_from("<I", data, at)[0]
        return low + (struct.unpack_from("<I", data, high)[0] << 32 if high and is_64bit else 0)

    if len(data) < 1024 or number(0x18) > LARGEST_BLOCK:
        raise ImageError(
            "The root file system of the base is damaged: its superblock makes no sense.",
            "Download or make the base again.",
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


def mend(image: Path, root: Partition, now: int, name: str) -> None:
    """Bring a file system that was not unmounted into order, as at boot.

    Raises:
        ImageError: it is damaged beyond that.
    """
    if root.start and superblock(image, root).has_journal_to_play:
        # Once e2fsck has done that, it looks for the file system where the file begins.
        alone = image.parent / "root"
        alone.touch()
        copy_part(image, root.start, root.size, alone, 0)
        os.truncate(alone, root.size)
        mend(alone, replace(root, start=0), now, name)
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
    """Check a file system, and make holes of its free space; raises ImageError where there was anything to mend."""
    what = "The baked root file system is not in order, which is a fault of gamebear-tasks"
    run(["e2fsck", "-f", "-p", "-E", "discard", _at(image, root)], folder=image.parent, now=now, what=what)
    run(["e2fsck", "-f", "-n", _at(image, root)], folder=image.parent, now=now, what=what)


def resize(path: Path, now: int) -> None:
    """Let a file system take all of the file that it is in.

    That file has nothing else in it: resize2fs cuts a file to the size of its file system, wherever in it that begins.
    """
    run(["resize2fs", path.name], folder=path.parent, now=now, what="The root file system cannot be grown")


def _at(image: Path, root: Partition) -> str:
    """Return what e2fsprogs call a file system that is a part of a file."""
    return f"{image.name}?offset={root.start}"


def quoted(name: str | bytes) -> bytes:
    """Return a word for debugfs, whose quotes are doubled inside quotes; it knows no backslash."""
    data = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    return b'"' + data.replace(b'"', b'""') + b'"'


class Debugfs:
    """A session with debugfs, which ends with the block.

    It ends well whatever fails in it, so each command is followed by a comment, which debugfs repeats: what stands
    before that is the command's answer.

    Args:
        image: the image; debugfs runs in its folder.
        root: the file system.
        now: what it takes for the time.
        write: for writing.
    """

    def __init__(self, image: Path, root: Partition, now: int, *, write: bool = False) -> None:
        self._process = subprocess.Popen(
            ["debugfs", *(["-w"] if write else []), "-f", "-", _at(image, root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=image.parent,
            env=environment(now),
        )
        self._nonce = secrets.token_hex(8).encode()
        self._count = 0
        self._rest = b""
        self._write = write

    def __enter__(self) -> Debugfs:
        (said,) = self.ask([b"stat <2>"])
        if not said.startswith(b"Inode: 2 "):
            raise self._failed(said)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.kill()
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        said = self._rest + self._process.stdout.read()
        self._process.stdout.close()
        self._process.wait()
        if kind is None and said.strip():
            raise self._failed(said)

    def ask(self, commands: Sequence[bytes]) -> list[bytes]:
        """Give commands and return what debugfs answers to each."""
        answers: list[bytes] = []
        batch = b""
        waiting: list[bytes] = []
        for command in [b"", *commands]:
            if len(command) > LINE or b"\n" in command or b"\r" in command:
                raise ImageError(f"debugfs cannot take the name in {command[:100]!r}….", "Give it a shorter name.")
            self._count += 1
            marker = b"# %s %d\n" % (self._nonce, self._count)
            text = (command + b"\n" if command else b"") + marker
            if len(batch) + len(text) > BATCH:
                answers += self._send(batch, waiting)
                batch, waiting = b"", []
            batch += text
            waiting.append(marker)
        answers += self._send(batch, waiting)
        return [answer.partition(b"\n")[2] for answer in answers[1:]]  # the first line repeats the command

    def _send(self, batch: bytes, markers: Iterable[bytes]) -> list[bytes]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(batch)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(self._rest + self._process.stdout.read()) from None
        answers = []
        said = bytearray(self._rest)
        for marker in markers:
            seen = 0
            while (end := said.find(marker, seen)) < 0:
                seen = max(0, len(said) - len(marker))
                data = self._process.stdout.read1(CHUNK)  # type: ignore[attr-defined]  # it is buffered
                if not data:
                    raise self._ended(bytes(said))
                said += data
                if len(said) > MOST_SAID:
                    raise ImageError(
                        f"A folder of the root file system is too large to be read: {size(len(said))} of names.",
                        "Is the base whole? Download or make it again.",
                    )
            answers.append(bytes(said[:end]))
            del said[: end + len(marker)]
        self._rest = bytes(said)
        return answers

    def do(self, commands: Sequence[bytes]) -> None:
        """Give commands that say nothing when they succeed, or only which inode they made.

        Raises:
            ImageError: one failed.
        """
        for command, answer in zip(commands, self.ask(commands), strict=True):
            if not re.fullmatch(rb"\s*(Allocated inode: \d+)?\s*", answer):
                said = answer.decode("utf-8", "replace")
                name = command.decode("utf-8", "replace")[:200]
                raise failure(f"The root file system cannot be written ({name})", "debugfs", said)

    def _ended(self, said: bytes) -> ImageError:
        check_not_interrupted(self._process.wait())
        return self._failed(said)

    def _failed(self, said: bytes) -> ImageError:
        what = "written" if self._write else "read"
        return failure(
            f"The root file system cannot be {what}", "debugfs", said.decode("utf-8", "replace") or "nothing"
        )


@dataclass(frozen=True)
class Inode:
    """What a name in the base image stands for.

    Attributes:
        number: the inode.
        mode: type and permissions, as in stat(2).
        uid: owner.
        gid: group.
        size: bytes.
    """

    number: int
    mode: int
    uid: int
    gid: int
    size: int


ENTRY = re.compile(rb"/(\d+)/(\d{6})/(-?\d+)/(-?\d+)/([^/]*)/(\d*)/$", re.MULTILINE | re.DOTALL)
"""A line of debugfs's `ls -p`; a name may have a line break in it."""


class Reader:
    """Reads the base's root file system, each folder once.

    Args:
        session: with debugfs.
        folder: where debugfs runs, and leaves what it dumps.
    """

    def __init__(self, session: Debugfs, folder: Path) -> None:
        self._session = session
        self._folder = folder
        self._folders: dict[int, Mapping[str, Inode]] = {}

    def listing(self, number: int) -> Mapping[str, Inode]:
        """Return what is in a folder, by name."""
        if number not in self._folders:
            (said,) = self._session.ask([b"ls -p <%d>" % number])
            found = {}
            for inode, mode, uid, gid, name, size in ENTRY.findall(said):
                if name not in (b".", b"..", b"") and int(inode):
                    found[name.decode("utf-8", "surrogateescape")] = Inode(
                        int(inode), int(mode, 8), int(uid) & 0xFFFFFFFF, int(gid) & 0xFFFFFFFF, int(size or 0)
                    )
            self._folders[number] = found
        return self._folders[number]

    def content(self, inode: Inode, name: str) -> bytes:
        """Return what is in a file; raises ImageError, too, where it is too long to be read."""
        check_readable(inode.size, name)  # before debugfs writes all of it, zeros for holes
        dumped = self._folder / "dumped"
        dumped.unlink(missing_ok=True)
        self._session.do([b"dump <%d> dumped" % inode.number])
        return read_bounded(dumped, name)[: inode.size]  # debugfs has zeros after what is kept in an inode

    def target(self, inode: Inode) -> str:
        """Return where a symbolic link leads; raises ImageError where it is longer than any in Linux."""
        if inode.size > LONGEST_LINK:
            raise ImageError(
                f"A symbolic link of the base has {inode.size} bytes (inode {inode.number}).",
                "The base is damaged: download or make it again.",
            )
        (said,) = self._session.ask([b"stat <%d>" % inode.number])
        match = re.search(rb'^Fast link dest: "(.*)"$', said, re.MULTILINE | re.DOTALL)
        if match:
            return match[1].decode("utf-8", "surrogateescape")
        (said,) = self._session.ask([b"cat <%d>" % inode.number])
        return said[: inode.size].decode("utf-8", "surrogateescape")
