"""Settings: precedence of their sources, and errors for invalid values."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
from doit import doit_cmd
from hypothesis import given
from hypothesis import strategies as st
from project import Project

from gamebear_tasks.config import Settings, own_architecture, seconds, settings, settings_of_this_run
from gamebear_tasks.errors import SettingsError
from gamebear_tasks.runner.host.arch import ARCHITECTURES
from gamebear_tasks.util.text import size_in

OTHER = {
    "builder": ("ssh://a@b", "ssh://c", "local:", "local:"),
    "arch": ("armhf", "arm64", "riscv64", own_architecture()),
    "sources": ("debian", "git", "mirror", ""),
    "base": ("registry", "bootstrap", "auto", "auto"),
    "patience": ("1", "2.5", 3, 600.0),
    "interrupt": ("detach", "cancel", "detach", "cancel"),
    "time_limit": ("0", "60", 61.5, 86400.0),
    "provenance": ("true", "0", True, False),
    "keep_failed": ("true", "0", True, False),
    "fresh": ("yes", "no", True, False),
}
"""For each setting: a doit variable, an environment variable, a value in pyproject.toml, and the default."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a dodo.py, while doit runs there without variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doit_cmd, "_CMDLINE_VARS", {})
    yield tmp_path


def pyproject(folder: Path, text: str) -> None:
    (folder / "pyproject.toml").write_text(text)


def value(name: str) -> object:
    return getattr(settings(), name)


def as_set(name: str, given: object) -> object:
    if isinstance(OTHER[name][3], bool):
        return str(given).lower() in ("1", "true", "yes")
    return float(str(given)) if name in ("patience", "time_limit") else given


def test_every_setting_has_a_test_value() -> None:
    assert set(OTHER) == set(Settings.__dataclass_fields__)


@pytest.mark.parametrize("name", OTHER)
def test_a_doit_variable_wins_then_the_environment_then_pyproject_then_the_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    variable, environment, project, default = OTHER[name]
    assert value(name) == default
    pyproject(folder, f"[tool.gamebear]\n{name} = {json.dumps(project)}\n")
    assert value(name) == as_set(name, project)
    monkeypatch.setenv(f"GAMEBEAR_{name.upper()}", str(environment))
    assert value(name) == as_set(name, environment)
    doit_cmd.set_var(name, str(variable))
    assert value(name) == as_set(name, variable)


def test_an_empty_environment_variable_counts_as_unset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject(folder, '[tool.gamebear]\nbuilder = "ssh://c"\n')
    monkeypatch.setenv("GAMEBEAR_BUILDER", "")
    assert value("builder") == "ssh://c"


def test_an_empty_architecture_is_the_machines_own(folder: Path) -> None:
    pyproject(folder, '[tool.gamebear]\narch = "armhf"\n')
    doit_cmd.set_var("arch", "")
    assert value("arch") == own_architecture()


def test_without_doit_settings_come_from_the_other_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doit_cmd, "_CMDLINE_VARS", None)
    monkeypatch.setenv("GAMEBEAR_ARCH", "armhf")
    assert value("arch") == "armhf"
    assert value("builder") == "local:"


def test_a_pyproject_without_our_table_and_one_that_changes_are_read(folder: Path) -> None:
    pyproject(folder, '[project]\nname = "x"\n')
    assert settings() == Settings(arch=own_architecture())
    pyproject(folder, '[tool.gamebear]\narch = "armhf"\n')
    assert value("arch") == "armhf"


def test_an_invalid_value_is_reported_with_its_origin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "arch: unknown architecture 'armv7l' (from {}).\n→ Use Debian's name for it: armhf"
    pyproject(folder, '[tool.gamebear]\narch = "armv7l"\n')
    assert refusal() == message.format("[tool.gamebear] in pyproject.toml")
    monkeypatch.setenv("GAMEBEAR_ARCH", "armv7l")
    assert refusal() == message.format("GAMEBEAR_ARCH")
    doit_cmd.set_var("arch", "armv7l")
    assert refusal() == message.format("the doit variable arch")


def refusal() -> str:
    with pytest.raises(SettingsError) as caught:
        settings()
    return str(caught.value)


def test_a_tool_entry_that_is_not_a_table_is_ignored(folder: Path) -> None:
    pyproject(folder, "tool = 5\n")
    assert value("builder") == "local:"


@pytest.mark.parametrize(("machine", "arch"), ARCHITECTURES.items())
def test_the_default_architecture_has_debians_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, machine: str, arch: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert value("arch") == arch


def test_a_machine_without_a_debian_architecture_needs_the_setting(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    assert all(
        part in refusal() for part in ("architecture 'vax'", "→ Set the target architecture, such as arch=armhf")
    )
    doit_cmd.set_var("arch", "armhf")
    assert value("arch") == "armhf"


@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers())))
def test_seconds_must_be_a_finite_number(given: object) -> None:
    try:
        count = seconds("patience", given, "a test")
    except SettingsError:
        return
    assert 0 <= count < float("inf")
    assert not isinstance(given, bool)


# output of doit

TELLING = """
from gamebear_tasks.config import settings

def task_tell():
    return {"actions": [lambda: print(settings().builder, settings().arch)], "verbosity": 2}
"""


def test_doit_uses_the_setting_with_the_highest_precedence(tmp_path: Path) -> None:
    project = Project(tmp_path / "project", home=tmp_path / "home", GAMEBEAR_BUILDER="ssh://two", GAMEBEAR_ARCH="i386")
    project.write("dodo.py", TELLING)
    project.write("pyproject.toml", '[tool.gamebear]\nbuilder = "ssh://three"\n')
    assert "ssh://two i386\n" in project.doit().ok().out
    assert "ssh://one i386\n" in project.doit("tell", "builder=ssh://one").ok().out
    assert "ssh://three i386\n" in project.doit(GAMEBEAR_BUILDER="").ok().out


def test_doit_shows_the_error_and_exits_with_status_3(tmp_path: Path) -> None:
    project = Project(tmp_path / "project", home=tmp_path / "home")
    project.write(
        "dodo.py", "from gamebear_tasks import artifact\ndef task_x(): return artifact('x.py', outputs=['x'])"
    )
    project.write("x.py", "")
    run = project.doit("arch=armv7l")
    error = "ERROR: arch: unknown architecture 'armv7l' (from the doit variable arch).\n"
    assert (run.status, run.out, run.err) == (3, "", f"{error}→ Use Debian's name for it: armhf\n")


def test_a_damaged_pyproject_beside_another_dodo_is_reported(tmp_path: Path) -> None:
    project = Project(tmp_path / "project", home=tmp_path / "home")
    project.write(
        "sub/dodo.py", "from gamebear_tasks import artifact\ndef task_x(): return artifact('x.py', outputs=['x'])"
    )
    project.write("sub/x.py", "")
    project.write("sub/pyproject.toml", "[tool.gamebear\n")  # doit reads pyproject.toml in its working folder
    project.doit("-f", "sub/dodo.py").failed("ERROR: pyproject.toml cannot be read: Expected ")


@pytest.mark.parametrize(("given", "meant"), [("ach", "arch"), ("bulider", "builder"), ("timelimit", "time_limit")])
def test_a_misspelt_setting_is_reported(project: Project, given: str, meant: str) -> None:
    project.write("x.py", "")
    project.write(
        "dodo.py", "from gamebear_tasks import artifact\ndef task_x(): return artifact('x.py', outputs=['x'])"
    )
    message = project.doit("list", f"{given}=x", "colour=red", "arch=armhf").ok().err
    assert message == f"gamebear: {given}= is not a setting; did you mean {meant}=?\n"


def test_a_run_reads_its_settings_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    doit_cmd.set_var("arch", "armhf")
    assert settings_of_this_run().arch == "armhf"
    monkeypatch.setenv("GAMEBEAR_BUILDER", "ssh://pi@buildpi")
    assert settings_of_this_run().builder == "local:"
    doit_cmd.reset_vars()
    assert settings_of_this_run() == Settings(arch=own_architecture(), builder="ssh://pi@buildpi")
    monkeypatch.setattr(doit_cmd, "_CMDLINE_VARS", None)
    monkeypatch.setenv("GAMEBEAR_BUILDER", "ssh://pi@elsewhere")
    assert settings_of_this_run().builder == "ssh://pi@elsewhere"


@pytest.mark.parametrize(
    ("text", "armhf", "arm64", "all_"),
    [
        ("local:", "local:", "local:", ("local:",)),
        ("armhf=ssh://pi@a,arm64=dask://b:1", "ssh://pi@a", "dask://b:1", ("ssh://pi@a", "dask://b:1")),
        ("armhf=ssh://a,arm64=ssh://a", "ssh://a", "ssh://a", ("ssh://a",)),
        ("spool:/a,b=c", "spool:/a,b=c", "spool:/a,b=c", ("spool:/a,b=c",)),
        (" armhf = ssh://a ,\tarm64=ssh://b ", "ssh://a", "ssh://b", ("ssh://a", "ssh://b")),
        ("armhf=spool:/a,b,arm64=local:", "spool:/a,b", "local:", ("spool:/a,b", "local:")),
    ],
)
def test_each_architecture_may_have_a_builder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, armhf: str, arm64: str, all_: tuple[str, ...]
) -> None:
    monkeypatch.setenv("GAMEBEAR_BUILDER", text)
    chosen = settings()
    assert (chosen.builder_for("armhf"), chosen.builder_for("arm64"), chosen.builders) == (armhf, arm64, all_)


@pytest.mark.parametrize(
    "text",
    [
        "armhf=ssh://a arm64=ssh://b",
        "armhf=ssh://a;arm64=ssh://b c",
        "ssh://a,ssh://b",
        "ssh://a, arm64=ssh://b",
        "armhf=ssh://a,ssh://b",
        "armhf=ssh://a,local:",
        "armhf=ssh://a,",
        "armhf=,ssh://a",
        ",ssh://a",
        "armhf=ssh://a,armhf=ssh://b",
    ],
)
def test_ambiguous_builders_are_rejected(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GAMEBEAR_BUILDER", text)
    with pytest.raises(SettingsError, match=r"builder has more than one URL|two URLs for armhf|unknown architecture"):
        settings()


def test_a_builder_in_the_table_is_a_single_builder(folder: Path) -> None:
    table = folder / "pyproject.toml"
    table.write_text('[tool.gamebear.builder]\narmhf = "spool:/a,arm64=b"\n')
    with pytest.raises(SettingsError, match="builder has more than one URL for armhf"):
        settings()
    table.write_text('[tool.gamebear.builder]\narmhf = "spool:/a,b"\narm64 = " local: "\n')
    assert settings().builder == "armhf=spool:/a,b,arm64=local:"


def test_a_password_in_a_builder_url_is_not_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAMEBEAR_BUILDER", "armhf=dask://me:secret@a,")
    with pytest.raises(SettingsError) as caught:
        settings()
    assert "secret" not in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        Settings(builder="armhf=dask://me:secret@a").builder_for("arm64")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("512B", 512),
        ("1K", 1024),
        ("1.5 KiB", 1536),
        ("500M", 500 << 20),
        (" 5g ", 5 << 30),
        ("0.1T", (1 << 40) // 10),
        ("999999999999999T", 999999999999999 << 40),
    ],
)
def test_a_size_has_a_unit(text: str, count: int) -> None:
    assert size_in(text) == count


@pytest.mark.parametrize(
    "text", ["5", "1.5", "00.1", "5GB", "5iB", "-1G", "+1G", "", "G", "1e3G", "1_0G", "٣G", "5 G B", "1" * 16 + "G"]
)
def test_an_ambiguous_size_is_rejected(text: str) -> None:
    assert size_in(text) is None


def test_spaces_around_a_value_do_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("base", " registry "), ("provenance", " yes"), ("patience", " 5 "), ("arch", " armhf ")):
        monkeypatch.setenv(f"GAMEBEAR_{name.upper()}", value)
    chosen = settings()
    assert (chosen.base, chosen.provenance, chosen.patience, chosen.arch) == ("registry", True, 5.0, "armhf")


def test_builders_of_architectures_are_a_table_in_pyproject(folder: Path) -> None:
    (folder / "pyproject.toml").write_text('[tool.gamebear.builder]\narmhf = "ssh://pi@a"\nfoo = "local:"\n')
    with pytest.raises(SettingsError, match=r"builder: unknown architecture 'foo' .*pyproject"):
        settings()
    (folder / "pyproject.toml").write_text('[tool.gamebear.builder]\narmhf = "ssh://pi@a"\n')
    assert settings().builder_for("armhf") == "ssh://pi@a"
    with pytest.raises(SettingsError, match="No builder is set for arm64, only for armhf"):
        settings().builder_for("arm64")
    with pytest.raises(SettingsError, match="No builder is set for armhf"):
        Settings(builder="armhf=").builder_for("armhf")  # from Python, unvalidated


@pytest.mark.parametrize(
    ("variable", "value", "reporter"),
    [
        ("builder", "", "live"),
        ("builder", "loong64=local:", "live"),
        ("builder", "loong64=local:", "json"),
        ("builder", "moon:x", "console"),
        ("builder", "moon:x", "json"),
        ("builder", "ssh://", "error-only"),
        ("builder", "dask://", "live"),
        ("sources", "x", "live"),
        ("sources", "x", "json"),
        *((name, "x", "json") for name in OTHER if name not in ("builder", "sources")),
    ],
)
def test_an_invalid_setting_is_reported_once_with_its_origin_and_a_fix(
    project: Project, variable: str, value: str, reporter: str
) -> None:
    project.write(
        "dodo.py",
        "from gamebear_tasks import archive, artifact, either\n"
        "UP = either(web=archive('file:///up.tar', sha256='0' * 64))\n"
        "def task_x(): return artifact('x.py', sources={'up': UP}, outputs=['x'])\n",
    )
    project.write("x.py", "")
    run = project.gamebear("run", "-r", reporter, "x", f"{variable}={value}", GAMEBEAR_ARCH="amd64")
    assert run.status in (2, 3)
    assert run.text.count(f"(from the doit variable {variable}).") == 1, run.text
    assert run.text.count("→") + run.text.count(r"\u2192") == 1, run.text


@pytest.mark.parametrize("text", ["x = " + "[" * 100_000, "x = " + "9" * 5000, "\0", "x = 1e999999999"])
def test_a_hostile_pyproject_is_read_or_rejected(folder: Path, text: str) -> None:
    pyproject(folder, text)
    with contextlib.suppress(SettingsError):
        settings()


def test_a_pyproject_that_is_a_fifo_is_rejected(folder: Path) -> None:
    """Reading it would block, as doit's own read of a pyproject.toml beside dodo.py does."""
    os.mkfifo(folder / "pyproject.toml")
    with pytest.raises(SettingsError, match=r"pyproject\.toml cannot be read: it is not a regular file"):
        settings()
