"""Detect the build systems of a source tree, and write a buildscript for each of them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

DEPTH = 3
"""Number of folder levels that are read."""

LIMIT = 1 << 20
"""Maximum size in bytes of a file that is read. Files of build systems are written by hand."""

STABLE = "debian:bookworm"
"""Base image of most buildscripts."""

NEWER = "debian:trixie"
"""Base image for Go and Cargo, whose projects often need a compiler from the last two years."""

RESERVED = ("logs", "src")
"""Names that an artifact cannot have: `build/logs` has the logs, and the source is called src."""

SKIPPED = {"build", "node_modules", "target", "vendor"}
"""Folders that have no files of this project's build system."""


class Tree:
    """Files of a source tree that may belong to a build system, down to `DEPTH` levels.

    Args:
        root: The tree, or an extract of it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._texts: dict[str, str] = {}

    @cached_property
    def names(self) -> Sequence[str]:
        """Paths of the regular files, relative to the tree and sorted."""
        found = []
        for folder, folders, files in os.walk(self._root):
            inner = Path(folder).relative_to(self._root)
            folders[:] = [
                name
                for name in folders
                if not name.startswith(".") and name not in SKIPPED and len(inner.parts) < DEPTH
            ]
            found += [(inner / name).as_posix() for name in files if (self._root / inner / name).is_file()]
        return sorted(found)

    def first(self, *names: str) -> str:
        """Return the first of these files that exists, or an empty string."""
        return next((name for name in names if name in self.names), "")

    def text(self, name: str) -> str:
        """Return the text of a file. It is empty if the file is missing, too large or unreadable."""
        if name not in self._texts:
            try:
                with (self._root / name).open("rb") as file:
                    data = file.read(LIMIT + 1)
            except OSError:
                data = b""
            self._texts[name] = data.decode("utf-8", "replace") if len(data) <= LIMIT else ""
        return self._texts[name]

    def table(self, name: str) -> dict[str, Any]:
        """Return the content of a TOML file. It is empty if the file is missing or invalid."""
        try:
            return parse_toml(self.text(name))
        except (ValueError, RecursionError):
            return {}

    def texts(self, name: str) -> str:
        """Return the texts of all files with a file name, joined."""
        return "\n".join(self.text(path) for path in self.names if Path(path).name == name)

    def has(self, *suffixes: str) -> bool:
        """Return whether a file has one of these suffixes."""
        return any(name.endswith(suffixes) for name in self.names)


@dataclass(frozen=True)
class Recipe:
    """How a kind of project is built.

    Attributes:
        outputs: The artifacts: file names, a folder `NAME/`, or a pattern `*.deb`.
        steps: Lines of the buildscript after the container's creation, without indentation.
        packages: Debian packages.
        base: Base image. Without a base there is no container, and `steps` are the whole script.
    """

    outputs: Sequence[str]
    steps: Sequence[str]
    packages: Sequence[str] = ()
    base: str = STABLE

    def script(self, title: str) -> str:
        """Return the buildscript.

        Args:
            title: Its docstring.
        """
        head = f'"""{title}"""'
        if not self.base:
            return "\n".join([head, "", *self.steps, ""])
        packages = sorted(dict.fromkeys(self.packages))
        return "\n".join(
            [
                head,
                "",
                "# Debian packages that the build needs",
                *_list("PACKAGES", packages),
                "",
                f"with Container(packages_image({json.dumps(self.base)}, PACKAGES)) as c:",
                *(f"    {step}" for step in self.steps),
                "",
            ]
        )


@dataclass(frozen=True)
class Kind:
    """A kind of project.

    Attributes:
        name: Its name for display.
        page: Name of its page in `docs/how-to/recipes`.
        evidence: Returns the file by which a tree is of this kind, or an empty string.
        recipe: Returns the recipe for a tree, given the project's name and Debian's name of the architecture.
    """

    name: str
    page: str
    evidence: Callable[[Tree], str]
    recipe: Callable[[Tree, str, str], Recipe]


def parse_toml(text: str) -> dict[str, Any]:
    """Return the content of a TOML file; raises ValueError, or RecursionError for deeply nested brackets."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    content: dict[str, Any] = tomllib.loads(text)
    return content


def detect(tree: Tree) -> list[tuple[Kind, str]]:
    """Return the kinds of a tree, the most specific first, each with the file that shows it."""
    return [(kind, found) for kind in KINDS if (found := kind.evidence(tree))]


def _list(name: str, items: Sequence[str]) -> list[str]:
    """Return the lines that assign a list, as ruff formats them."""
    line = f"{name} = [{', '.join(map(json.dumps, items))}]"
    return [line] if len(line) <= 100 else [f"{name} = [", *(f"    {json.dumps(item)}," for item in items), "]"]


def _run(*words: str, **options: str) -> str:
    more = "".join(f", {name}={value}" for name, value in options.items())
    return f"c.run([{', '.join(map(json.dumps, words))}]{more})"


def _shell(line: str) -> str:
    return f"c.run({json.dumps(line)}, shell=True)"


def _copy_out(path: str, name: str) -> str:
    return f"c.copy_out({json.dumps(path)}, {json.dumps(name)})"


COPY_IN = 'c.copy_in("src", "/src")'
WORKDIR = 'c.workdir = "/src"'
COMPILER = ("gcc", "libc6-dev")


def _compiler(tree: Tree) -> tuple[str, ...]:
    return ("g++",) if tree.has(".cc", ".cpp", ".cxx") else COMPILER


def _matches(pattern: str, text: str) -> list[str]:
    """Return the distinct matches of a pattern's group that are file names."""
    return _file_names(re.findall(pattern, text, re.MULTILINE | re.IGNORECASE))


def _file_names(names: Iterable[str]) -> list[str]:
    """Return the distinct plain file names among untrusted names, without those that an output cannot have."""
    found = [name for name in dict.fromkeys(names) if re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name, re.ASCII)]
    return [name for name in found if name not in RESERVED]


# CMake


def _cmake(tree: Tree, name: str, arch: str) -> Recipe:
    text = tree.texts("CMakeLists.txt")
    is_c = re.search(r"^\s*project\s*\([^)]*\bC\s*\)", text, re.MULTILINE | re.IGNORECASE)
    packages = ["cmake", "make", *(_compiler(tree) if is_c else ["g++"])]
    packages += ["pkgconf"] if re.search(r"PkgConfig", text) else []
    build = [
        COPY_IN,
        _run(*["cmake", "-S", "/src", "-B", "/build", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_INSTALL_PREFIX=/usr"]),
    ]
    build.append(_shell("cmake --build /build --parallel $(nproc)"))
    programs = _matches(r"^\s*add_executable\s*\(\s*([^\s)]+)", tree.text("CMakeLists.txt"))
    if programs and not re.search(r"^\s*install\s*\(", text, re.MULTILINE | re.IGNORECASE):
        return Recipe(programs, [*build, *(_copy_out(f"/build/{program}", program) for program in programs)], packages)
    install = _run("cmake", "--install", "/build", env='{"DESTDIR": "/out"}')
    return Recipe([f"{name}/"], [*build, install, _copy_out("/out", name)], packages)


# Meson


def _meson(tree: Tree, name: str, arch: str) -> Recipe:
    text = tree.texts("meson.build")
    is_cpp = re.search(r"^\s*project\([^)]*'cpp'", text, re.MULTILINE)
    packages = ["meson", "pkgconf", *(["g++"] if is_cpp else COMPILER)]
    build = [
        COPY_IN,
        _run(*["meson", "setup", "--buildtype=release", "--prefix=/usr", "/build", "/src"]),
        _run("meson", "compile", "-C", "/build"),
    ]
    programs = _matches(r"\bexecutable\(\s*'([^']+)'", tree.text("meson.build"))
    if programs and not re.search(r"\binstall\s*:\s*true|\binstall_\w+\(", text):
        return Recipe(programs, [*build, *(_copy_out(f"/build/{program}", program) for program in programs)], packages)
    install = _run(*["meson", "install", "-C", "/build", "--destdir", "/out"])
    return Recipe([f"{name}/"], [*build, install, _copy_out("/out", name)], packages)


# autotools


def _autotools(tree: Tree, name: str, arch: str) -> Recipe:
    steps = [COPY_IN, WORKDIR]
    packages = ["make", "pkgconf", *_compiler(tree)]
    if not tree.first("configure"):
        steps.append(_run("autoreconf", "--install"))
        packages += ["autoconf", "automake", "libtool"]
        packages += ["autopoint", "gettext"] if "AM_GNU_GETTEXT" in tree.texts("configure.ac") else []
    steps += [
        _run("./configure", "--prefix=/usr"),
        _shell("make clean && make -j$(nproc)"),  # a local build may have left its files
        _run("make", "install", "DESTDIR=/out"),
        _copy_out("/out", name),
    ]
    return Recipe([f"{name}/"], steps, packages)


# Make


MAKEFILES = ("GNUmakefile", "makefile", "Makefile")


def _make(tree: Tree, name: str, arch: str) -> Recipe:
    text = tree.text(tree.first(*MAKEFILES))
    packages = ["make", *_compiler(tree), *(["pkgconf"] if "pkg-config" in text else [])]
    steps = [COPY_IN, WORKDIR, _shell("make --always-make -j$(nproc)")]  # a local build may have left its files
    if re.search(r"^install\s*:", text, re.MULTILINE) and "DESTDIR" in text:
        steps += [_run("make", "install", "DESTDIR=/out", "PREFIX=/usr"), _copy_out("/out", name)]
        return Recipe([f"{name}/"], steps, packages)
    paths = {path.rpartition("/")[2]: path for path in _default_goals(text)}
    programs = _file_names(paths) or [name]
    steps += [_copy_out(f"/src/{paths.get(program, program)}", program) for program in programs]
    return Recipe(programs, steps, packages)


def _default_goals(makefile: str) -> list[str]:
    """Return the files that `make` creates: the first target, or its prerequisites if it is phony."""
    variables = dict(re.findall(r"^(\w+)[ \t]*[:?]?=[ \t]*(.*?)[ \t]*$", makefile, re.MULTILINE))
    phony = " ".join(re.findall(r"^\.PHONY[ \t]*:(.*)$", makefile, re.MULTILINE)).split()

    def expanded(text: str) -> list[str]:
        for _ in range(4):  # variables that refer to variables
            text = re.sub(r"\$[({](\w+)[)}]", lambda match: variables.get(match[1], ""), text)
        return re.sub(r"\$[({][^)}]*[)}]?", "", text).split()

    for targets, needed in re.findall(r"^([^\s.#:=][^#:=\n]*):(?!=)[ \t]*([^#;\n]*)", makefile, re.MULTILINE):
        first = next(iter(expanded(targets)), "%")
        if "%" in first:  # a pattern rule is no goal
            continue
        goals = expanded(needed) if first in phony or first in ("all", "default", "build") else [first]
        return [goal for goal in goals if goal not in phony and not goal.startswith(("/", "."))]
    return []


# Cargo


def _cargo(tree: Tree, name: str, arch: str) -> Recipe:
    programs = list(dict.fromkeys(_cargo_programs(tree))) or [name]
    locked = ["--locked"] if tree.first("Cargo.lock") else []
    steps = [COPY_IN, WORKDIR, _run("cargo", "build", "--release", "--target-dir=/target", *locked)]
    steps += [_copy_out(f"/target/release/{program}", program) for program in programs]
    return Recipe(programs, steps, ["ca-certificates", "cargo"], NEWER)


def _cargo_programs(tree: Tree) -> Iterator[str]:
    for path in tree.names:
        if Path(path).name != "Cargo.toml":
            continue
        manifest, folder = tree.table(path), path.removesuffix("Cargo.toml")
        package = manifest.get("package")
        names = [item.get("name") for item in _dicts(manifest.get("bin"))]
        if isinstance(package, dict) and not names and f"{folder}src/main.rs" in tree.names:
            names = [package.get("name")]
        names += _matches(rf"^{re.escape(folder)}src/bin/([^/\n]+)\.rs$", "\n".join(tree.names))
        yield from _file_names(name for name in names if isinstance(name, str))


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


# Go


def _go(tree: Tree, name: str, arch: str) -> Recipe:
    steps = [COPY_IN, WORKDIR, 'c.environ["CGO_ENABLED"] = "0"']
    packages = ["ca-certificates", "golang-go"]
    if any(re.search(r"^package main$", tree.text(path), re.MULTILINE) for path in tree.names if _is_root_go(path)):
        steps += [_run("go", "build", "-o", f"/out/{name}", "."), _copy_out(f"/out/{name}", name)]
        return Recipe([name], steps, packages, NEWER)
    steps += [_run("mkdir", "/out"), _run("go", "build", "-o", "/out/", "./..."), _copy_out("/out", name)]
    return Recipe([f"{name}/"], steps, packages, NEWER)


def _is_root_go(path: str) -> bool:
    return "/" not in path and path.endswith(".go") and not path.endswith("_test.go")


# Python wheel


BACKENDS = {
    "cython": "cython3",
    "flit-core": "flit",
    "hatch-vcs": "python3-hatch-vcs",
    "hatchling": "python3-hatchling",
    "poetry-core": "python3-poetry-core",
    "setuptools": "python3-setuptools",
    "setuptools-scm": "python3-setuptools-scm",
    "wheel": "python3-wheel",
}
"""Debian packages of build requirements."""


def _wheel_evidence(tree: Tree) -> str:
    table = tree.table("pyproject.toml")
    return "pyproject.toml" if "build-system" in table or "project" in table else tree.first("setup.py")


def _wheel(tree: Tree, name: str, arch: str) -> Recipe:
    system = tree.table("pyproject.toml").get("build-system")
    required = system.get("requires") if isinstance(system, dict) else None
    required = required if isinstance(required, list) else ["setuptools"]
    native = [BACKENDS.get(re.sub("[-_.]+", "-", str(item)).lower(), "") for item in required]
    packages = ["python3-pip"]
    words = ["pip", "wheel", "--no-deps", "--wheel-dir=/wheels"]
    if native and all(native):  # no version is required: Debian's packages will do, without a network
        words.append("--no-build-isolation")
        packages += [*native, *(["python3-wheel"] if "python3-setuptools" in native else [])]
    else:
        packages += ["ca-certificates", "python3-venv"]
    if tree.has(".c", ".pyx", ".cc", ".cpp"):
        packages += ["g++", "python3-dev"]
    return Recipe(["*.whl"], [COPY_IN, _run(*words, "/src"), _copy_out("/wheels", ".")], packages)


# Debian package


def _debian(tree: Tree, name: str, arch: str) -> Recipe:
    steps = [
        'c.copy_in("src", "/build/src")',
        'c.workdir = "/build/src"',
        _run(*["dpkg-buildpackage", "--build=binary", "--unsigned-source", "--unsigned-changes"]),
        _shell("mkdir /debs && mv ../*.deb /debs"),
        _copy_out("/debs", "."),
    ]
    return Recipe(["*.deb"], steps, ["build-essential", *_build_depends(tree.text("debian/control"))])


def _build_depends(control: str) -> list[str]:
    """Return the packages in the Build-Depends fields of a source package (deb-src-control(5))."""
    source = re.split(r"\n\s*\n", "\n".join(line for line in control.splitlines() if not line.startswith("#")).strip())[
        0
    ]
    fields = re.findall(r"^Build-Depends(?:-Arch|-Indep)?[ \t]*:(.*(?:\n[ \t].*)*)", source, re.MULTILINE)
    names = []
    for item in ",".join(fields).split(","):
        match = re.match(r"\s*([a-z0-9][a-z0-9+.-]+)", item)  # of alternatives the first; versions are left to dpkg
        if match:
            names.append("debhelper" if match[1] == "debhelper-compat" else match[1])
    return names


# kernel module


KERNELS = {"amd64": "amd64", "arm64": "arm64", "armhf": "armmp", "i386": "686", "ppc64el": "powerpc64le"}
"""Debian's flavour of the kernel for an architecture, if it differs from the architecture's name."""


def _module_evidence(tree: Tree) -> str:
    return next(
        (name for name in ("Kbuild", *MAKEFILES) if re.search(r"^\s*obj-m\b", tree.text(name), re.MULTILINE)), ""
    )


def _module(tree: Tree, name: str, arch: str) -> Recipe:
    flavour = KERNELS.get(arch, arch)
    steps = [
        COPY_IN,
        _shell(f"make -C /lib/modules/*-{flavour}/build M=/src clean modules"),
        _shell("mkdir /modules && find /src -name '*.ko' -exec cp {} /modules ';'"),
        _copy_out("/modules", "."),
    ]
    return Recipe(["*.ko"], steps, [f"linux-headers-{flavour}", "make"])


# Containerfile


CONTAINERFILES = ("Containerfile", "Dockerfile")


def _containerfile(tree: Tree, name: str, arch: str) -> Recipe:
    file = tree.first(*CONTAINERFILES)
    steps = [f'image = Image.build("src/{file}", context="src")', f"image.save({json.dumps(f'{name}.tar')})"]
    return Recipe([f"{name}.tar"], steps, base="")


KINDS = (
    Kind("Debian package", "debian-package", lambda tree: tree.first("debian/control"), _debian),
    Kind("kernel module", "kernel-module", _module_evidence, _module),
    Kind("Python wheel", "python-wheel", _wheel_evidence, _wheel),
    Kind("Cargo", "cargo", lambda tree: tree.first("Cargo.toml"), _cargo),
    Kind("Go", "go", lambda tree: tree.first("go.mod"), _go),
    Kind("Meson", "meson", lambda tree: tree.first("meson.build"), _meson),
    Kind("CMake", "cmake", lambda tree: tree.first("CMakeLists.txt"), _cmake),
    Kind("autotools", "autotools", lambda tree: tree.first("configure.ac", "configure.in", "configure"), _autotools),
    Kind("Make", "make", lambda tree: tree.first(*MAKEFILES), _make),
    Kind("Containerfile", "containerfile", lambda tree: tree.first(*CONTAINERFILES), _containerfile),
)
"""All kinds, the most specific first: a package's metadata wraps a build system, which may generate another's files."""
