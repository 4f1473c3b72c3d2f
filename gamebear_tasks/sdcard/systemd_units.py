"""Enable systemd units like `systemctl enable`: create the symbolic links that their [Install] sections request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ..errors import ImageError
from .filesystems.file_tree import Tree

FOLDERS = (
    "/etc/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)
"""Unit search path of systemd, in order of precedence (systemd.unit(5))."""

WANTED = {"WantedBy": "wants", "RequiredBy": "requires", "UpheldBy": "upholds"}

UNIT = re.compile(r"[A-Za-z0-9:_.\\@-]{1,240}\.(service|socket|target|timer|mount|automount|path|swap|slice)")


def enable(tree: Tree, unit: str) -> None:
    """Enable a unit.

    Args:
        tree: The tree of the image.
        unit: Name of the unit. The default suffix is `.service`.

    Raises:
        ImageError: The unit does not exist, or it cannot be enabled.
    """
    _enable(tree, unit if "." in unit.rpartition("@")[2] and UNIT.fullmatch(unit) else f"{unit}.service", set())


def _enable(tree: Tree, unit: str, seen: set[str]) -> None:
    if unit in seen:
        return
    seen.add(unit)
    if not UNIT.fullmatch(unit):
        raise ImageError(f"{unit!r} is not a unit name.", "Use a name such as umtprd.service.")
    name, instance = _template(unit)
    path = _path(tree, unit) or _path(tree, name)
    if not path:
        raise ImageError(
            f"{unit} cannot be enabled: the image has no such unit.",
            f'Check the name, or add it: file({name!r}, "/etc/systemd/system/").',
        )
    text = tree.read(path)
    if not text:
        raise ImageError(f"{unit} cannot be enabled: it is masked or empty.", f"Check {path} in the image.")
    install = _install(text.decode("utf-8", "replace"), *_drop_ins(tree, dict.fromkeys((name, unit))))
    if not instance and "@." in name:
        instance = " ".join(install.get("DefaultInstance", ()))
        if not instance:
            raise ImageError(f"{unit} cannot be enabled: it is a template.", "Add an instance: getty@tty1.service.")
        unit = name.replace("@.", f"@{instance}.")
    wanted = [(how, by) for how in WANTED for by in install.get(how, ())]
    if not wanted and not install.get("Alias") and not install.get("Also"):
        raise ImageError(
            f"{unit} cannot be enabled: it has no [Install] section.",
            f"Add one to {path} in the image, for instance with WantedBy=multi-user.target.",
        )
    origin = f"enable {unit}"
    for how, by in wanted:
        by = _named(by, unit, instance, path)
        tree.symlink(f"{FOLDERS[0]}/{by}.{WANTED[how]}/{unit}", path, origin)
    for alias in install.get("Alias", ()):
        alias = _named(alias, unit, instance, path)
        if alias != unit:
            tree.symlink(f"{FOLDERS[0]}/{alias}", path, origin)
    for other in install.get("Also", ()):
        other = _named(other, unit, instance, path)
        if _path(tree, other) or _path(tree, _template(other)[0]):  # units of packages that are not installed
            _enable(tree, other, seen)


def _path(tree: Tree, name: str) -> str:
    """Return the path of a unit's file, or an empty string if there is none."""
    paths = (f"{folder}/{name}" for folder in FOLDERS)
    return next((path for path in paths if tree.mode(tree.resolve(path, path, last=False))), "")


def _drop_ins(tree: Tree, names: Iterable[str]) -> Iterator[str]:
    """Yield the texts of units' drop-in files. Of two files with the same name, the one in the first folder wins."""
    paths: dict[str, str] = {}
    for name in names:
        for folder in (f"{folder}/{name}.d" for folder in FOLDERS):
            for file in tree.names(folder):
                if file.endswith(".conf"):
                    paths.setdefault(file, f"{folder}/{file}")
    for _, path in sorted(paths.items()):
        yield (tree.read(path) or b"").decode("utf-8", "replace")


def _template(unit: str) -> tuple[str, str]:
    """Return the name of the file that defines a unit, and the unit's instance."""
    match = re.fullmatch(r"([^@]+@)(.*)(\.[a-z]+)", unit)
    return (f"{match[1]}{match[3]}", match[2]) if match else (unit, "")


def _named(text: str, unit: str, instance: str, path: str) -> str:
    """Return the unit that an [Install] section names, with its specifiers expanded.

    Raises:
        ImageError: The result is not a valid unit name.
    """
    full = unit.rpartition(".")[0]
    values = {"%i": instance, "%I": instance, "%n": unit, "%N": full, "%p": full.partition("@")[0], "%%": "%"}
    name = re.sub(r"%.", lambda match: values.get(match[0], match[0]), text)
    if not UNIT.fullmatch(name):
        raise ImageError(f"{unit} cannot be enabled: {text!r} in [Install] is not a unit name.", f"Fix {path}.")
    return name


def _install(*texts: str) -> dict[str, list[str]]:
    """Return the words of all [Install] sections by key. An empty value discards the preceding ones."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in re.sub(r"\\\n", " ", "\n[]\n".join(texts)).splitlines():
        line = line.strip()
        if line.startswith("["):
            section = line
        elif section == "[Install]" and "=" in line and line[0] not in "#;":
            key, _, value = line.partition("=")
            key = key.strip()
            found[key] = [*found.get(key, ()), *value.split()] if value.strip() else []
    return found
