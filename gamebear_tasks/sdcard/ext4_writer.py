"""Puts what goes into an image into its root file system, and counts beforehand what that takes."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable

from ..errors import ImageError
from .ext4 import Debugfs, Superblock, quoted
from .file_tree import Entry, Tree

FAST_LINK = 60
"""Bytes from which on a link's target takes a block."""

SMALLEST = 128
"""Bytes of an inode that keeps no parts of seconds, and no time after 2038."""

DEVICE = 65535
"""The largest major or minor number that debugfs can write."""


def room(tree: Tree, block: int) -> tuple[int, int]:
    """Return how many blocks and inodes a tree's entries take, rather too many than too few.

    Args:
        tree: what goes in.
        block: bytes of a block.
    """
    blocks = 16
    inodes = 0
    names: dict[str, int] = {}
    seen: set[int] = set()
    for name, entry in tree.added.items():
        folder, _, last = name.rpartition("/")
        is_new = tree.inode(name) is None
        if is_new:
            names[folder] = names.get(folder, 0) + 12 + len(last.encode("utf-8", "surrogateescape"))
        if id(entry) in seen or (entry.is_folder and not is_new):
            continue
        seen.add(id(entry))
        inodes += 1
        data = -(-entry.size // block)
        blocks += data + data // 64 + (1 if data > 4 else 0)  # its extents
        blocks += 1 if entry.is_folder or len(entry.target.encode("utf-8", "surrogateescape")) >= FAST_LINK else 0
        blocks += -(-sum(len(value) + 64 for value in entry.xattrs.values()) // block)
    # A block of a folder may be half empty: an entry does not go over its end.
    return blocks + sum(2 * size // block + 1 for size in names.values()), inodes


def write(session: Debugfs, tree: Tree, about: Superblock) -> bool:
    """Put a tree's entries in.

    Args:
        session: with debugfs, for writing; it runs in the folder where contents are staged.
        tree: what goes in.
        about: what the file system says of itself.

    Returns:
        Whether e2fsck has to mend what debugfs has left: the attributes of files that went, and users' quotas.

    Raises:
        ImageError: debugfs could not.
    """
    _check(tree, about)
    leaves = about.has_quotas or _leaves_attributes(session, tree)
    session.do(_in_folders(tree, _removals(tree)))
    session.do(_in_folders(tree, _folders(tree)))
    names: dict[int, list[str]] = {}
    for name, entry in tree.added.items():
        if not entry.is_folder:
            names.setdefault(id(entry), []).append(name)
    firsts = {min(group) for group in names.values()}
    session.do(_in_folders(tree, ((name, [_creation(name, tree.added[name])]) for name in sorted(firsts))))
    groups = [sorted(group) for group in names.values() if len(group) > 1]
    for (_, *others), number in zip(groups, _numbers(session, tree, [group[0] for group in groups]), strict=True):
        for name in others:
            _link(session, tree, name, number)
    described = sorted(firsts | {name for name, entry in tree.added.items() if entry.is_folder})
    session.do(
        _in_folders(
            tree,
            (
                (name, _description(name, tree.added[name], len(names.get(id(tree.added[name]), "1")), about.inode))
                for name in described
            ),
        )
    )
    _write_xattrs(session, tree, described)
    return leaves


def _check(tree: Tree, about: Superblock) -> None:
    """Refuse what debugfs cannot write."""
    for name, entry in tree.added.items():
        if any(char in text for text in (name, entry.target) for char in "\r\n\0"):
            raise ImageError(
                f"{entry.origin}: the name {name!r} has a line break in it, or leads to one that has.",
                "It cannot be baked; give it another name.",
            )
        if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in name.split("/")):
            raise ImageError(
                f"{entry.origin}: the name {name[:300]!r} is longer than 255 bytes.",
                "ext4 takes no longer one; give it another.",
            )
        if stat.S_ISLNK(entry.mode) and not 0 < len(entry.target.encode("utf-8", "surrogateescape")) < 4096:
            raise ImageError(
                f"{entry.origin}: the link {name!r} leads nowhere, or to too long a name.",
                "Make it lead to a name of 1 to 4095 bytes, or leave it out.",
            )
        if sum(map(len, entry.xattrs.values())) > about.block + about.inode:
            raise ImageError(
                f"{entry.origin} has more extended attributes than ext4 keeps of a file: they go into one block.",
                "Pack it without.",
            )
        if not all(0 <= number <= DEVICE for number in entry.device):
            raise ImageError(
                f"{entry.origin}: the device {name!r} has a number that is not from 0 to {DEVICE}.", "Leave it out."
            )


def _in_folders(tree: Tree, parts: Iterable[tuple[str, list[bytes]]]) -> list[bytes]:
    """Return commands that work on names, each in its folder: so no command is long, and no name taken for an inode."""
    commands = []
    here: str | None = None
    for name, wanted in parts:
        folder = name.rpartition("/")[0]
        if folder != here:
            commands.append(b"cd /")
            commands += [b"cd " + quoted(f"./{part}") for part in folder.split("/") if part]
            here = folder
        commands += wanted
    return commands


def _last(name: str) -> bytes:
    return quoted(name.rpartition("/")[2])


def _here(name: str) -> bytes:
    return quoted(f"./{name.rpartition('/')[2]}")


def _leaves_attributes(session: Debugfs, tree: Tree) -> bool:
    """Say whether something goes that has attributes in a block of their own, which debugfs does not free."""
    inodes = {inode.number for name in tree.added if (inode := tree.inode(name)) and not stat.S_ISDIR(inode.mode)}
    answers = session.ask([b"stat <%d>" % number for number in sorted(inodes)])
    return any(re.search(rb"^File ACL: [1-9]", said, re.MULTILINE) for said in answers)


def _removals(tree: Tree) -> Iterable[tuple[str, list[bytes]]]:
    for name in sorted(tree.added):
        inode = tree.inode(name)
        if inode is not None and not stat.S_ISDIR(inode.mode):
            yield name, [b"rm " + _here(name)]


def _folders(tree: Tree) -> Iterable[tuple[str, list[bytes]]]:
    for name in sorted(name for name, entry in tree.added.items() if entry.is_folder):
        if tree.inode(name) is None:
            yield name, [b"mkdir " + _last(name)]


def _creation(name: str, entry: Entry) -> bytes:
    if stat.S_ISREG(entry.mode):
        return b"write %s %s" % (entry.staged.encode(), _last(name))
    if stat.S_ISLNK(entry.mode):
        return b"symlink %s %s" % (_last(name), quoted(entry.target))
    if stat.S_ISFIFO(entry.mode):
        return b"mknod %s p" % _last(name)
    kind = b"c" if stat.S_ISCHR(entry.mode) else b"b"
    return b"mknod %s %s %d %d" % (_last(name), kind, *entry.device)


def _numbers(session: Debugfs, tree: Tree, names: list[str]) -> list[int]:
    """Return the inodes of names that have been made."""
    answers = session.ask(_in_folders(tree, ((name, [b"stat " + _here(name)]) for name in names)))
    return [int(match[1]) for said in answers if (match := re.match(rb"Inode: (\d+) ", said))]


def _link(session: Debugfs, tree: Tree, name: str, number: int) -> None:
    """Give a file a further name. debugfs makes no room for it in its folder by itself."""
    cd = _in_folders(tree, [(name, [])])
    command = b"ln <%d> %s" % (number, _last(name))
    session.do(cd)
    (said,) = session.ask([command])
    if b"No free space in the directory" in said:
        session.do([b"expand_dir .", command])
    elif said.strip():
        session.do([command])  # it fails again, and says why


def _description(name: str, entry: Entry, links: int, inode_size: int) -> list[bytes]:
    """Return the commands that set what an entry is but for its content."""
    fields = [(b"mode", b"0%o" % entry.mode), (b"uid", b"%d" % entry.uid), (b"gid", b"%d" % entry.gid)]
    if links > 1:
        fields.append((b"links_count", b"%d" % links))
    for kind, time in ((b"mtime", entry.mtime), (b"atime", entry.atime)):
        seconds, nanoseconds = divmod(time, 10**9)
        if inode_size == SMALLEST:
            seconds = min(seconds, 2**31 - 1)  # as Linux has it there
        low = seconds & 0xFFFFFFFF
        fields.append((kind, b"@%d" % low))
        if inode_size > SMALLEST:
            # Two bits more of the seconds, whose lower 32 are signed, and the rest (ext4's i_mtime_extra).
            epoch = ((seconds - (low - 2**32 if low >= 2**31 else low)) >> 32) & 3
            fields.append((kind + b"_extra", b"%d" % (nanoseconds << 2 | epoch)))
    return [b"sif %s %s %s" % (_here(name), key, value) for key, value in fields]


def _write_xattrs(session: Debugfs, tree: Tree, names: Iterable[str]) -> None:
    commands = []
    count = 0
    for name in names:
        entry = tree.added[name]
        wanted = []
        for key, value in sorted(entry.xattrs.items()):
            count += 1
            staged = f"attribute-{count}"
            (tree.staging / staged).write_bytes(value)
            wanted.append(b"ea_set -f %s %s %s" % (staged.encode(), _here(name), quoted(key)))
        if wanted:
            commands += _in_folders(tree, [(name, wanted)])
    session.do(commands)
