"""`gamebear init`: what it detects, what it writes, and what it leaves alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from project import Project
from upstreams import call_git, commit

from gamebear_tasks.cli.init import project_files
from gamebear_tasks.cli.init.detection import DEPTH, KINDS, LIMIT, Recipe, Tree, detect
from gamebear_tasks.cli.main import COMMANDS

pytest_plugins = ("upstreams",)

GIT = "https://git.example/hello.git"


def tree(folder: Path, files: dict[str, str]) -> Tree:
    """Write files and return them as a tree."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Tree(folder)


def recipe_of(folder: Path, files: dict[str, str], arch: str = "amd64") -> Recipe:
    """Return the recipe of the most specific kind of a project with these files, which is called hello."""
    found = tree(folder, files)
    return detect(found)[0][0].recipe(found, "hello", arch)


# detection


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("CMakeLists.txt", "", "CMake"),
        ("meson.build", "", "Meson"),
        ("configure.ac", "", "autotools"),
        ("configure.in", "", "autotools"),
        ("configure", "", "autotools"),
        ("Makefile", "all:\n", "Make"),
        ("makefile", "all:\n", "Make"),
        ("GNUmakefile", "all:\n", "Make"),
        ("Cargo.toml", "", "Cargo"),
        ("go.mod", "", "Go"),
        ("pyproject.toml", "[project]\nname = 'x'\n", "Python wheel"),
        ("pyproject.toml", "[build-system]\nrequires = []\n", "Python wheel"),
        ("setup.py", "", "Python wheel"),
        ("debian/control", "", "Debian package"),
        ("Containerfile", "", "Containerfile"),
        ("Dockerfile", "", "Containerfile"),
        ("Makefile", "obj-m := hello.o\n", "kernel module"),
        ("Makefile", "ifneq ($(KERNELRELEASE),)\n  obj-m += hello.o\nendif\n", "kernel module"),
        ("Kbuild", "obj-m := hello.o\n", "kernel module"),
    ],
)
def test_a_file_shows_the_kind_of_a_project(tmp_path: Path, name: str, text: str, kind: str) -> None:
    ((found, file), *_) = detect(tree(tmp_path, {name: text}))
    assert (found.name, file) == (kind, name)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"hello.c": "", "README": ""},
        {"pyproject.toml": "[tool.gamebear]\nbuilder = 'local:'\n"},
        {"pyproject.toml": "[project"},
        {"sub/Makefile": "all:\n"},
        {"Kbuild": "obj-y := hello.o\n"},
        {"debian/rules": "", "control": ""},
    ],
)
def test_other_files_show_no_kind(tmp_path: Path, files: dict[str, str]) -> None:
    assert detect(tree(tmp_path, files)) == []


def test_the_most_specific_kind_comes_first(tmp_path: Path) -> None:
    names = ["Containerfile", "Makefile", "configure.ac", "CMakeLists.txt", "meson.build", "go.mod", "Cargo.toml"]
    files = {**dict.fromkeys([*names, "setup.py", "debian/control"], ""), "Kbuild": "obj-m := x.o\n"}
    found = [kind.name for kind, _ in detect(tree(tmp_path, files))]
    assert found == [kind.name for kind in KINDS]
    assert found[:4] == ["Debian package", "kernel module", "Python wheel", "Cargo"]
    assert found[-2:] == ["Make", "Containerfile"]


def test_a_tree_has_no_links_out_of_it_and_no_files_below_its_depth(tmp_path: Path) -> None:
    deep = "/".join("abcd"[:DEPTH])
    files = {f"{deep}/in": "", f"{deep}/e/out": "", "build/out": "", ".git/out": "", "large": "x" * (LIMIT + 1)}
    found = tree(tmp_path, files)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert found.names == [f"{deep}/in", "large"]
    assert found.text("large") == "" and found.text("missing") == ""


# recipes


@pytest.mark.parametrize(
    ("makefile", "outputs"),
    [
        ("hello: hello.o\n\tcc -o $@ $<\n", ["hello"]),
        ("all: one two\none:\ntwo:\n", ["one", "two"]),
        (".PHONY: everything\neverything: tool\ntool: tool.o\n", ["tool"]),
        ("PROG = tool\nall: $(PROG)\n", ["tool"]),
        ("OUT := bin\nPROG = $(OUT)/tool\nall: $(PROG)\n", ["tool"]),
        ("CC := gcc\nCFLAGS ?= -O2\n%.o: %.c\n\tcc\nfirst: a\nsecond: b\n", ["first"]),
        (".SUFFIXES: .c .o\n.c.o:\n\tcc\ntool: a\n", ["tool"]),
        ("all: tool # comment\n", ["tool"]),
        (".PHONY: all lib\nall: lib tool\n", ["tool"]),
        ("install:\n\tcp x $(DESTDIR)/bin\n", ["hello/"]),
        ("tool:\ninstall:\n\tcp x /usr/bin\n", ["tool"]),
        ("", ["hello"]),
        ("all: $(shell rm -rf /) ../x /etc/passwd -o\n", ["hello"]),
    ],
)
def test_the_outputs_of_a_makefile(tmp_path: Path, makefile: str, outputs: list[str]) -> None:
    assert list(recipe_of(tmp_path, {"Makefile": makefile}).outputs) == outputs


@pytest.mark.parametrize(
    ("files", "outputs"),
    [
        ({"CMakeLists.txt": "project(x)\nadd_executable(tool a.c)\n"}, ["tool"]),
        ({"CMakeLists.txt": "add_executable(src a.c)\nadd_executable(logs b.c)\n"}, ["hello/"]),
        ({"CMakeLists.txt": "add_executable(${NAME} a.c)\n"}, ["hello/"]),
        ({"CMakeLists.txt": "add_executable(tool a.c)\nINSTALL (TARGETS tool)\n"}, ["hello/"]),
        ({"CMakeLists.txt": "add_executable(tool a.c)\n", "lib/CMakeLists.txt": "install(FILES x)\n"}, ["hello/"]),
        ({"meson.build": "executable('tool', 'a.c')\n"}, ["tool"]),
        ({"meson.build": "executable('tool', 'a.c', install : true)\n"}, ["hello/"]),
        ({"meson.build": "executable('tool', 'a.c')\ninstall_headers('x.h')\n"}, ["hello/"]),
        ({"configure": ""}, ["hello/"]),
        ({"Cargo.toml": '[package]\nname = "tool"\n', "src/main.rs": ""}, ["tool"]),
        ({"Cargo.toml": '[package]\nname = "x"\n[[bin]]\nname = "one"\n[[bin]]\nname = "two"\n'}, ["one", "two"]),
        ({"Cargo.toml": '[package]\nname = "x"\n', "src/bin/one.rs": "", "src/bin/two.rs": ""}, ["one", "two"]),
        (
            {"Cargo.toml": "[workspace]\n", "a/Cargo.toml": '[package]\nname = "tool"\n', "a/src/main.rs": ""},
            ["tool"],
        ),
        ({"Cargo.toml": '[package]\nname = "x"\n'}, ["hello"]),
        ({"Cargo.toml": "package = 5\nbin = [1]\n"}, ["hello"]),
        ({"go.mod": "", "x.go": "package main\n"}, ["hello"]),
        (
            {"go.mod": "", "x.go": "package x\n", "x_test.go": "package main\n", "cmd/y.go": "package main\n"},
            ["hello/"],
        ),
        ({"setup.py": ""}, ["*.whl"]),
        ({"debian/control": ""}, ["*.deb"]),
        ({"Kbuild": "obj-m := x.o\n"}, ["*.ko"]),
        ({"Dockerfile": ""}, ["hello.tar"]),
    ],
)
def test_the_outputs_of_a_project(tmp_path: Path, files: dict[str, str], outputs: list[str]) -> None:
    recipe = recipe_of(tmp_path, files)
    assert list(recipe.outputs) == outputs
    compile(recipe.script("Build hello."), "script", "exec")
    assert 2 <= len(recipe.steps) <= 9


@pytest.mark.parametrize(
    ("files", "packages"),
    [
        ({"CMakeLists.txt": "project(x LANGUAGES C)\n"}, {"cmake", "gcc", "libc6-dev", "make"}),
        ({"CMakeLists.txt": "project(x)\nfind_package(PkgConfig)\n"}, {"cmake", "g++", "make", "pkgconf"}),
        ({"meson.build": "project('x', 'c', 'cpp')\n"}, {"g++", "meson", "pkgconf"}),
        ({"Makefile": "x:\n", "x.cpp": ""}, {"g++", "make"}),
        ({"Makefile": "x:\n\tpkg-config\n"}, {"gcc", "libc6-dev", "make", "pkgconf"}),
        ({"configure": "", "configure.ac": ""}, {"gcc", "libc6-dev", "make", "pkgconf"}),
        ({"setup.py": ""}, {"python3-pip", "python3-setuptools", "python3-wheel"}),
        (
            {"pyproject.toml": '[build-system]\nrequires = ["Flit_Core"]\n'},
            {"flit", "python3-pip"},
        ),
        (
            {"pyproject.toml": '[build-system]\nrequires = ["setuptools>=77"]\n', "x.pyx": ""},
            {"ca-certificates", "g++", "python3-dev", "python3-pip", "python3-venv"},
        ),
        ({"Kbuild": "obj-m := x.o\n"}, {"linux-headers-amd64", "make"}),
        (
            {
                "debian/control": "Source: x\nBuild-Depends: debhelper-compat (= 13),\n cmake (>= 3) | make,\n# no\n"
                " libfoo-dev <!nocheck>\nBuild-Depends-Indep: doxygen [amd64]\n\nPackage: y\nDepends: z\n"
            },
            {"build-essential", "cmake", "debhelper", "doxygen", "libfoo-dev"},
        ),
    ],
)
def test_the_packages_of_a_project(tmp_path: Path, files: dict[str, str], packages: set[str]) -> None:
    assert set(recipe_of(tmp_path, files).packages) == packages


def test_a_kernel_module_is_for_the_kernel_of_the_architecture(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"Kbuild": "obj-m := x.o\n"}, arch="armhf")
    assert "linux-headers-armmp" in recipe.packages and "*-armmp/build" in recipe.script("")


@pytest.mark.parametrize("text", ['tool";import os#', "$(x)", "a b", "\\", "é"])
def test_names_in_a_project_are_no_code(tmp_path: Path, text: str) -> None:
    """Names that no program has are not used; the project may be a stranger's."""
    files = {"CMakeLists.txt": f"add_executable({text} a.c)\n"}
    assert list(recipe_of(tmp_path, files).outputs) in (["hello/"], ["a"])


# names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hello", "hello"),
        ("uMTP-Responder", "umtp_responder"),
        ("7zip", "build_7zip"),
        ("gt.git", "gt_git"),
        ("_x_", "x"),
        ("häßlich", "h_lich"),
        ("", "project"),
        ("...", "project"),
        ("Run", "build_run"),
        ("list", "build_list"),
        ("jobs", "build_jobs"),
    ],
)
def test_the_name_of_a_task_is_valid_and_no_command(text: str, name: str) -> None:
    assert project_files.task_name(text, {"run", "list", *COMMANDS}) == name


@pytest.mark.parametrize("folder", ["list", "reset-dep", "init", "lock", "logs", "src", "class", "2048"])
def test_a_task_whose_folder_has_an_awkward_name_can_be_run(tmp_path: Path, folder: str) -> None:
    project = Project(tmp_path / folder, home=tmp_path / "home")
    project.write("CMakeLists.txt", "install(FILES x)\n")
    project.gamebear("init").ok()
    name = project.doit("list").ok().out.split()[0]
    assert name not in COMMANDS
    project.gamebear("clean", "--dry-run", name).ok()


# files


@pytest.fixture
def hello(tmp_path: Path) -> Project:
    """A project with a Makefile and a Containerfile."""
    project = Project(tmp_path / "hello", home=tmp_path / "home")
    project.write("Makefile", "hello: hello.c\n")
    project.write("Containerfile", "FROM debian\n")
    return project


def test_it_says_what_was_found_and_what_was_written(hello: Project) -> None:
    run = hello.gamebear("init").ok()
    lines = run.out.splitlines()
    assert lines[0] == "Make found (Makefile); not used: Containerfile (Containerfile)"
    for name in ("buildscripts/hello.py", "pyproject.toml", "dodo.py"):
        assert f"{name} created" in lines
    assert ".gitignore: build/, .doit.db* added" in lines
    assert (hello.folder / "pyproject.toml").read_text() == '[tool.gamebear]\nbuilder = "local:"\n'
    assert "hello" in hello.doit("list").ok().out


def test_a_folder_is_set_up_from_another_one(hello: Project) -> None:
    other = Project(hello.folder.parent, home=hello.home)
    other.gamebear("init", "hello").ok()
    assert (hello.folder / "dodo.py").exists() and not (other.folder / "dodo.py").exists()


def test_it_stops_if_there_is_a_dodo(hello: Project) -> None:
    hello.write("dodo.py", "broken(")
    before = sorted(hello.folder.rglob("*"))
    run = hello.gamebear("init").failed("dodo.py", "exists")
    assert run.status == 2 and len(run.err.splitlines()) == 2
    assert sorted(hello.folder.rglob("*")) == before
    assert (hello.folder / "dodo.py").read_text() == "broken("


def test_existing_files_stay_as_they_are(hello: Project) -> None:
    kept = {
        "buildscripts/hello.py": "mine\n",
        "pyproject.toml": '[tool.gamebear]\narch = "armhf"\n',
        ".gitignore": "/build\n.doit.db*\n",
    }
    for name, text in kept.items():
        hello.write(name, text)
    run = hello.gamebear("init").ok()
    assert run.out.count("left as it is") == 3
    assert {name: (hello.folder / name).read_text() for name in kept} == kept
    assert (hello.folder / "dodo.py").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b"build/\n.doit.db*\n"),
        (b"*.o\n", b"*.o\nbuild/\n.doit.db*\n"),
        (b"*.o", b"*.o\nbuild/\n.doit.db*\n"),
        (b"/build/\n", b"/build/\n.doit.db*\n"),
        (b"*.o\r\n", b"*.o\r\nbuild/\r\n.doit.db*\r\n"),
        (b"\xff\n", b"\xff\nbuild/\n.doit.db*\n"),
    ],
)
def test_lines_of_gitignore_are_appended_once(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / ".gitignore"
    path.write_bytes(before)
    project_files.ignore(path)
    project_files.ignore(path)
    assert path.read_bytes() == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b'[tool.gamebear]\nbuilder = "x"\n'),
        (b"# odd  \n[tool.x]\na=1", b'# odd  \n[tool.x]\na=1\n\n[tool.gamebear]\nbuilder = "x"\n'),
        (b"[tool.x]\r\na=1\r\n", b'[tool.x]\r\na=1\r\n\r\n[tool.gamebear]\r\nbuilder = "x"\r\n'),
        (b"tool.gamebear = {}\n", b"tool.gamebear = {}\n"),
    ],
)
def test_the_table_is_appended_once(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_bytes(before)
    project_files.add_settings(path, {"builder": "x"})
    project_files.add_settings(path, {"builder": "y"})
    assert path.read_bytes() == after


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[tool", "end of a table declaration"),
        ("tool = {x = 1}\n", "line 3"),
        ("tool = 5\n", "a table"),
        ("tool.doit = 5\n", "a table"),
    ],
)
def test_a_table_that_cannot_be_appended_changes_nothing(hello: Project, text: str, cause: str) -> None:
    hello.write("pyproject.toml", text)
    run = hello.gamebear("init").failed("pyproject.toml", cause)
    assert len(run.err.splitlines()) == 2
    assert (hello.folder / "pyproject.toml").read_text() == text
    assert not (hello.folder / "dodo.py").exists()


def test_builder_and_architecture_of_the_command_are_saved(hello: Project) -> None:
    hello.gamebear("init", "builder=ssh://pi@buildpi", "arch=armhf").ok()
    text = (hello.folder / "pyproject.toml").read_text()
    assert text == '[tool.gamebear]\nbuilder = "ssh://pi@buildpi"\narch = "armhf"\n'


def test_a_password_is_not_saved(hello: Project) -> None:
    hello.gamebear("init", "builder=ssh://pi:secret@buildpi")
    assert not any("secret" in path.read_text() for path in hello.folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["nowhere"], ["nowhere", "folder"]),
        (["Makefile"], ["Makefile", "folder"]),
        (["one", "two"], ["one", "two"]),
        (["https://user:secret@git.example/x.git"], ["password"]),
        (["arch=z80"], ["z80"]),
    ],
)
def test_a_wrong_argument_is_reported_in_two_lines(hello: Project, words: list[str], names: list[str]) -> None:
    run = hello.gamebear("init", *words).failed(*names)
    assert run.status == 2 and len(run.err.splitlines()) == 2 and "secret" not in run.text
    assert not (hello.folder / "dodo.py").exists()


def test_the_options_that_find_a_dodo_are_unknown(hello: Project) -> None:
    assert hello.gamebear("init", "--seek-file").failed("seek-file").status == 3


def test_a_folder_without_a_build_system_is_reported_in_two_lines(tmp_path: Path) -> None:
    project = Project(tmp_path / "empty", home=tmp_path / "home")
    run = project.gamebear("init").failed("no build system", "CMake", "Containerfile")
    assert run.status == 2 and len(run.err.splitlines()) == 2
    assert list(project.folder.iterdir()) == []


# repositories


@pytest.fixture
def upstream_of(tmp_path: Path, git_settings: Path) -> Callable[[dict[str, str]], tuple[str, str]]:
    """Create a repository with files; return its URL and its commit."""

    def create(files: dict[str, str]) -> tuple[str, str]:
        folder = tmp_path / "srv" / "Hello-World.git"
        folder.mkdir(parents=True)
        call_git(folder, "init", "--quiet")
        tree(folder, files)
        return f"file://{folder}", commit(folder)

    return create


def test_a_repository_is_pinned_at_its_commit(
    tmp_path: Path, upstream_of: Callable[[dict[str, str]], tuple[str, str]]
) -> None:
    url, rev = upstream_of({"Makefile": "tool: tool.c\n", "tool.c": "", "a/b/c/d/e.c": ""})
    project = Project(tmp_path / "elsewhere", home=tmp_path / "home")
    project.gamebear("init", url).ok()
    dodo = (project.folder / "dodo.py").read_text()
    assert f'git("{url}", rev="{rev}")' in dodo and 'outputs=["build/tool"]' in dodo
    assert (project.folder / "buildscripts/hello_world.py").exists()
    assert "hello_world" in project.doit("list").ok().out
    assert project.gamebear("sources").ok().out.count("git source") == 1


def test_a_repository_without_a_build_system_is_reported(
    tmp_path: Path, upstream_of: Callable[[dict[str, str]], tuple[str, str]]
) -> None:
    url, _ = upstream_of({"README": ""})
    project = Project(tmp_path / "elsewhere", home=tmp_path / "home")
    run = project.gamebear("init", url).failed(url, "no build system")
    assert len(run.err.splitlines()) == 2 and list(project.folder.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///nonexistent.git", "git://127.0.0.1:9/x.git", "host.invalid:x.git"])
@pytest.mark.system
def test_a_repository_that_cannot_be_reached_is_reported(tmp_path: Path, url: str) -> None:
    project = Project(tmp_path / "elsewhere", home=tmp_path / "home")
    run = project.gamebear("init", url).failed(url)
    assert run.status == 2 and len(run.err.splitlines()) == 2, run.err
    assert list(project.folder.iterdir()) == []
