"""Create a user and set the host name by editing the files of useradd(8) and hostname(5)."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from ..errors import ImageError
from ..runner.util.atomic_files import open_regular
from .filesystems.fat import Fat
from .filesystems.file_tree import Tree
from .recipe import User, is_public_key

FIRST_UID = 1000
LAST_UID = 59999
"""Last id of Debian's range for ordinary users (adduser.conf(5))."""

DAY = 86400

USERCONF = "/usr/lib/userconf-pi/userconf"
"""Program of Raspberry Pi OS that renames the user with the first uid at the first boot."""


def set_hostname(tree: Tree, name: str) -> None:
    """Set the host name, and add it to /etc/hosts."""
    tree.write("/etc/hostname", f"{name}\n".encode(), "hostname=")
    lines = (tree.read("/etc/hosts") or b"127.0.0.1\tlocalhost\n").decode("utf-8", "surrogateescape").splitlines()
    own = f"127.0.1.1\t{name}"
    places = [at for at, line in enumerate(lines) if line.split()[:1] == ["127.0.1.1"]]
    if places:
        lines[places[0]] = own
        lines = [line for at, line in enumerate(lines) if at not in places[1:]]
    else:
        lines.append(own)
    tree.write("/etc/hosts", "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"), "hostname=")


COLUMNS: dict[str, tuple[int, tuple[int, ...]]] = {
    "/etc/passwd": (6, (2, 3)),
    "/etc/group": (4, (2,)),
    "/etc/shadow": (3, ()),
    "/etc/gshadow": (4, ()),
}
"""Minimum number of columns of each file, and the columns that are numeric. See passwd(5), group(5), shadow(5)."""

NUMBER = re.compile(r"[0-9]{1,10}")
"""User or group id."""


class Table:
    """A colon-separated table of the image, such as /etc/passwd. Rows are validated only when they are requested.

    Args:
        tree: The tree of the image.
        path: A key of `COLUMNS`.

    Attributes:
        is_there: Whether the file exists.
        rows: Columns of each line.
    """

    def __init__(self, tree: Tree, path: str) -> None:
        self._tree = tree
        self._path = path
        data = tree.read(path)
        self.is_there = data is not None
        self.rows = [line.split(":") for line in (data or b"").decode("utf-8", "surrogateescape").splitlines() if line]

    def row(self, value: str, column: int = 0) -> list[str] | None:
        """Return the first row with the specified value in a column, or None.

        Raises:
            ImageError: The row is damaged.
        """
        row = next((row for row in self.rows if len(row) > column and row[column] == value), None)
        if row is None:
            return None
        columns, numbers = COLUMNS[self._path]
        if len(row) < columns or not all(NUMBER.fullmatch(row[column]) for column in numbers):
            raise ImageError(f"{self._path} of the image is damaged: the line of {row[0]!r}.", "Fix it in the base.")
        return row

    def numbers(self, column: int) -> set[int]:
        """Return the numbers in a column, ignoring invalid ones."""
        return {int(row[column]) for row in self.rows if len(row) > column and NUMBER.fullmatch(row[column])}

    def save(self, origin: str) -> None:
        """Write the table to the tree."""
        text = "".join(f"{':'.join(row)}\n" for row in self.rows)
        self._tree.write(self._path, text.encode("utf-8", "surrogateescape"), origin)


def set_user(tree: Tree, boot: Fat | None, user: User, keys: list[str]) -> None:
    """Create a user, or change the existing user of that name.

    Args:
        tree: The tree of the image.
        boot: The boot file system, or None.
        user: Declaration of the user.
        keys: Lines for authorized_keys.

    Raises:
        ImageError: The image has no /etc/passwd or /etc/shadow, a group does not exist, or the user cannot be renamed.
    """
    origin = f"user({user.name!r})"
    passwd = Table(tree, "/etc/passwd")
    if not passwd.is_there:
        raise ImageError(f"{origin}: the image has no /etc/passwd.", "Use a base with a complete system.")
    row = passwd.row(user.name)
    if tree.exists(USERCONF) and boot is not None and user.name != "root":
        # Without userconf.txt, Raspberry Pi OS prompts for a user name at the first boot, and waits.
        line = f"{user.name}:{user.password or '!'}\n"
        boot.add("userconf.txt", tree.entry(line.encode(), origin, 0o600))
        row = row or passwd.row(str(FIRST_UID), 2)
    name = row[0] if row else user.name
    if row and name != user.name and tree.exists(f"/home/{user.name}"):
        raise ImageError(
            f"{origin}: the image renames {name} at its first boot, but /home/{user.name} exists.",
            f"Add the content of the home folder to {row[5]}.",
        )
    if row is None:
        row = _new_user(tree, passwd, user, origin)
    elif row[1] != "x":  # otherwise passwd itself has the password, or login needs none
        row[1] = "x"
        passwd.save(origin)
    _set_password(tree, name, user.password, origin)
    _join(tree, name, user.groups, origin)
    owner = int(row[2]), int(row[3])
    if tree.set_owner(row[5], owner, 0o700):
        _copy_skeleton(tree, "/etc/skel", row[5], owner, origin)
    if keys:
        tree.folder(row[5], origin, 0o700, owner)
        tree.folder(f"{row[5]}/.ssh", origin, 0o700, owner)
        path = f"{row[5]}/.ssh/authorized_keys"
        lines = (tree.read(path) or b"").decode("utf-8", "surrogateescape").splitlines()
        lines += [key for key in keys if key not in lines]
        text = "".join(f"{line}\n" for line in lines)
        tree.write(path, text.encode("utf-8", "surrogateescape"), origin, 0o600, owner)


def _new_user(tree: Tree, passwd: Table, user: User, origin: str) -> list[str]:
    group = Table(tree, "/etc/group")
    taken = passwd.numbers(2) | group.numbers(2)
    number = next((number for number in range(FIRST_UID, LAST_UID + 1) if number not in taken), None)
    if number is None:
        raise ImageError(
            f"{origin}: no user id from {FIRST_UID} to {LAST_UID} is free in the image.",
            "Use an existing user of the base.",
        )
    own = group.row(user.name)
    gid = own[2] if own else str(number)
    home = f"/home/{user.name}"
    shell = "/bin/bash" if tree.exists("/bin/bash") else "/bin/sh"
    row = [user.name, "x", str(number), gid, "", home, shell]
    passwd.rows.append(row)
    passwd.save(origin)
    if own is None:
        group.rows.append([user.name, "x", gid, ""])
        group.save(origin)
        gshadow = Table(tree, "/etc/gshadow")
        if gshadow.is_there:
            gshadow.rows.append([user.name, "!", "", ""])
            gshadow.save(origin)
    owner = number, int(gid)
    if not tree.is_folder(home):
        tree.folder(home, origin, 0o700, owner)
        _copy_skeleton(tree, "/etc/skel", home, owner, origin)
    return row


def _copy_skeleton(tree: Tree, source: str, target: str, owner: tuple[int, int], origin: str) -> None:
    if not tree.is_folder(source):
        return
    for name in tree.names(source):
        path, copy = f"{source}/{name}", f"{target}/{name}"
        there = tree.mode(tree.resolve(copy, origin, last=False))
        mode = tree.mode(tree.resolve(path, origin, last=False))
        if stat.S_ISDIR(mode):
            tree.folder(copy, origin, stat.S_IMODE(mode), owner)
            _copy_skeleton(tree, path, copy, owner, origin)
        elif there:
            continue
        elif stat.S_ISLNK(mode):
            tree.symlink(copy, tree.link(tree.resolve(path, origin, last=False)), origin, owner)
        elif stat.S_ISREG(mode):
            tree.write(copy, tree.read(path) or b"", origin, stat.S_IMODE(mode), owner)


def _set_password(tree: Tree, name: str, password: str | None, origin: str) -> None:
    shadow = Table(tree, "/etc/shadow")
    row = shadow.row(name)
    changed = str(tree.now // 10**9 // DAY)
    if row is None:
        shadow.rows.append([name, password or "!", changed, "0", "99999", "7", "", "", ""])
    elif row[1] == password or (password is None and row[1].startswith(("!", "*"))):
        return
    else:
        row[1:3] = [password or "!", changed]
    if shadow.is_there:
        shadow.save(origin)
    else:
        raise ImageError(f"{origin}: the image has no /etc/shadow.", "Use a base with a complete system.")


def _join(tree: Tree, name: str, groups: tuple[str, ...], origin: str) -> None:
    for path in ("/etc/group", "/etc/gshadow"):
        table = Table(tree, path)
        for group in groups:
            row = table.row(group)
            if row is None:
                if path == "/etc/group":
                    raise ImageError(f"{origin}: the image has no group {group!r}.", "Check groups=.")
                continue
            members = [member for member in row[3].split(",") if member]
            if name not in members:
                row[3] = ",".join([*members, name])
        if table.is_there:
            table.save(origin)


def public_keys(user: User) -> list[str]:
    """Return a user's public keys as lines, including those read from files.

    Raises:
        ImageError: A file cannot be read, or contains anything but public keys.
    """
    found: list[str] = []
    for key in user.authorized_keys:
        if isinstance(key, str):
            found.append(key)
            continue
        lines = [line.strip() for line in _text(key).splitlines() if line.strip() and not line.startswith("#")]
        if not lines or not all(is_public_key(line) for line in lines):
            raise ImageError(f"{key} contains no public SSH keys.", "Use the .pub file, not the private key.")
        found += lines
    return list(dict.fromkeys(found))


def _text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return file.read(1 << 20).decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}.", "Check the path in authorized_keys=.") from error
