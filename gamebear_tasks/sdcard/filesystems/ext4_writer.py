"""Write the contents of an image into its root file system with debugfs, and estimate the required space."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable

from ...errors import ImageError
from .ext4 import Debugfs, Superblock, quoted
from .file_tree import Entry, Tree

FAST_LINK = 60
"""Bytes from which a link's target occupies a block."""

SMALLEST = 128
"""Bytes of a small inode, which stores neither nanoseconds nor times after 2038."""

DEVICE = 65535
"""Largest major or minor device number that debugfs can write."""


def room(tree: Tree, block: int) -> tuple[int, int]:
    """Return an upper estimate of the blocks and inodes that a tree's new entries need.

    Args:
        tree: The tree.
        block: Bytes of a block.
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
        blocks += data + data // 64 + (1 if data > 4 else 0)  # blocks of the extent tree
        blocks += 1 if entry.is_folder or len(entry.target.encode("utf-8", "surrogateescape")) >= FAST_LINK else 0
        blocks += -(-sum(len(value) + 64 for value in entry.xattrs.values()) // block)
    # Directory blocks may be half empty, because an entry does not cross the end of a block.
    return blocks + sum(2 * size // block + 1 for size in names.values()), inodes


def write(session: Debugfs, tree: Tree, about: Superblock) -> bool:
    """Write the new entries of a tree.

    Args:
        session: Session of debugfs, opened for writing, in the staging folder.
        tree: The tree.
        about: Superblock of the file system.

    Returns:
        Whether e2fsck has to repair what debugfs leaves inconsistent: attribute blocks of removed files, and quotas.

    Raises:
        ImageError: debugfs failed, or cannot write an entry.
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
    """Reject entries that debugfs or ext4 cannot represent.

    Raises:
        ImageError: There is such an entry.
    """
    for name, entry in tree.added.items():
        if any(char in text for text in (name, entry.target) for char in "\r\n\0"):
            raise ImageError(
                f"{entry.origin}: the name {name!r} or its link target contains a line break.",
                "Rename it.",
            )
        if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in name.split("/")):
            raise ImageError(
                f"{entry.origin}: the name {name[:300]!r} is longer than 255 bytes.",
                "Use a shorter name.",
            )
        if stat.S_ISLNK(entry.mode) and not 0 < len(entry.target.encode("utf-8", "surrogateescape")) < 4096:
            raise ImageError(
                f"{entry.origin}: the link {name!r} has an empty or too long target.",
                "Use a target of 1 to 4095 bytes, or leave it out.",
            )
        if sum(map(len, entry.xattrs.values())) > about.block + about.inode:
            raise ImageError(
                f"{entry.origin} has too many extended attributes: ext4 stores one block of them.",
                "Pack it without.",
            )
        if not all(0 <= number <= DEVICE for number in entry.device):
            raise ImageError(
                f"{entry.origin}: the device {name!r} has a number outside of 0 to {DEVICE}.", "Leave it out."
            )


def _in_folders(tree: Tree, parts: Iterable[tuple[str, list[bytes]]]) -> list[bytes]:
    """Return commands with a change of folder before them, so that each uses the last part of a name only.

    This keeps commands short, and debugfs cannot mistake a name for an inode number.
    """
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
    """Return whether a file to be replaced has an attribute block, which debugfs does not free."""
    inodes = {inode.number for name in tree.added if (inode := tree.inode(name)) and not stat.S_ISDIR(inode.mode)}
    answers = session.query([b"stat <%d>" % number for number in sorted(inodes)])
    return any(re.search(rb"^File ACL: [1-9]", output, re.MULTILINE) for output in answers)


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
    """Return the inode numbers of existing names."""
    answers = session.query(_in_folders(tree, ((name, [b"stat " + _here(name)]) for name in names)))
    return [int(match[1]) for output in answers if (match := re.match(rb"Inode: (\d+) ", output))]


def _link(session: Debugfs, tree: Tree, name: str, number: int) -> None:
    """Create a hard link. debugfs does not extend a full directory by itself."""
    cd = _in_folders(tree, [(name, [])])
    command = b"ln <%d> %s" % (number, _last(name))
    session.do(cd)
    (output,) = session.query([command])
    if output.strip():  # a full directory, or another error, which the second attempt raises
        session.do([b"expand_dir .", command])


def _description(name: str, entry: Entry, links: int, inode_size: int) -> list[bytes]:
    """Return the commands that set an entry's metadata."""
    fields = [(b"mode", b"0%o" % entry.mode), (b"uid", b"%d" % entry.uid), (b"gid", b"%d" % entry.gid)]
    if links > 1:
        fields.append((b"links_count", b"%d" % links))
    for kind, time in ((b"mtime", entry.mtime), (b"atime", entry.atime)):
        seconds, nanoseconds = divmod(time, 10**9)
        if inode_size == SMALLEST:
            seconds = min(seconds, 2**31 - 1)  # the limit that Linux uses for such inodes
        low = seconds & 0xFFFFFFFF
        fields.append((kind, b"@%d" % low))
        if inode_size > SMALLEST:
            # Two upper bits that extend the signed 32-bit seconds, then the nanoseconds (ext4's i_mtime_extra).
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
