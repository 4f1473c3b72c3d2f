"""Settings: doit variable, environment, `[tool.gamebear]` in `pyproject.toml`, default, in order of precedence."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from doit import doit_cmd, get_var

from .errors import SettingsError
from .runner.host.arch import ARCHITECTURES
from .runner.util.atomic_files import open_regular
from .util.file_hashes import version
from .util.messages import notice

SIMILARITY = 0.8
"""Minimum similarity, from 0 to 1 (difflib), at which a variable's name counts as a misspelled setting."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        builder: URL of the builder, such as `ssh://pi@buildpi`; or one URL per architecture, such as
            `armhf=ssh://pi@buildpi,arm64=ssh://pi@pi5`, so that each job runs on the builder of its architecture.
        arch: Target architecture, as Debian names it: `amd64`, `arm64`, `armhf`.
        sources: Alternative to use for sources that are declared with `either()`, such as `debian`.
        base: Origin of Debian base images: `registry`, `bootstrap` (created on the builder), or `auto`:
            the registry, else bootstrap.
        patience: Seconds to retry a lost connection before doit exits. The job continues on the builder.
        interrupt: Effect of Ctrl-C, SIGTERM and SIGHUP on jobs on the builder: `cancel` or `detach`.
        time_limit: Seconds after which the builder stops a job, unless its task sets its own limit; 0 for no limit.
        provenance: Whether every build writes a provenance statement next to each artifact.
        keep_failed: Whether the containers of a failed job are retained, for `gamebear shell`.
        fresh: Whether all selected tasks and their dependencies are rebuilt, although results exist.
    """

    builder: str = "local:"
    arch: str = ""
    sources: str = ""
    base: str = "auto"
    patience: float = 600.0
    interrupt: str = "cancel"
    time_limit: float = 86400.0
    provenance: bool = False
    keep_failed: bool = False
    fresh: bool = False

    @property
    def builders(self) -> tuple[str, ...]:
        """URLs of all builders that are set."""
        return tuple(dict.fromkeys(_by_architecture(self.builder).values()))

    def architectures_of(self, url: str) -> tuple[str, ...]:
        """Return the architectures that a builder is set for, or the run's architecture if it is set for all."""
        return tuple(arch or self.arch for arch, other in _by_architecture(self.builder).items() if other == url)

    def builder_for(self, arch: str) -> str:
        """Return the URL of the builder for an architecture.

        Raises:
            SettingsError: No builder is set for it.
        """
        builders = _by_architecture(self.builder)
        if found := builders.get(arch, builders.get("")):
            return found
        from .util.urls import shown

        more = f"{shown(self.builder)},{arch}=ssh://user@host"
        raise SettingsError(
            f"No builder is set for {arch}, only for {', '.join(builders)} (from {origin('builder')}).",
            f"Add one: builder={more}",
        )


@contextmanager
def origin_in_errors(name: str) -> Iterator[None]:
    """Add where a setting was set to each SettingsError of the block.

    Args:
        name: Name of the setting.
    """
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{error.message.rstrip('.')} (from {origin(name)}).", error.hint) from error


def own_architecture() -> str:
    """Return Debian's name of this machine's architecture.

    Raises:
        SettingsError: Debian has no such architecture.
    """
    machine = platform.machine().lower()
    if machine not in ARCHITECTURES:
        raise SettingsError(
            f"This machine's architecture {machine!r} has no Debian name.",
            "Set the target architecture, such as arch=armhf.",
        )
    return ARCHITECTURES[machine]


def settings() -> Settings:
    """Return the settings of this run.

    Raises:
        SettingsError: A setting is invalid. The error states where it was set.
    """
    _check_home(os.environ.get("HOME"))
    project = _project_settings(Path.cwd() / "pyproject.toml")
    values: dict[str, Any] = {}
    for item in fields(Settings):
        value, where = _look_up(item.name, project)
        if value is None:
            continue
        check: Callable[[str, object, str], object] = _CHECKS.get(item.name, _text)
        values[item.name] = check(item.name, value, where)
    if not values.get("arch"):
        values["arch"] = own_architecture()
    return Settings(**values)


def settings_of_this_run() -> Settings:
    """Return the settings at the time of this run's first call. Outside of a doit run, return the current settings.

    Raises:
        SettingsError: A setting is invalid, see `settings`.
    """
    global _of_this_run
    variables = variables_of_this_run()
    if variables is None:
        return settings()
    if _of_this_run is None or _of_this_run[0] is not variables:
        _of_this_run = variables, settings()
        _warn_about_misspellings(variables)
    return _of_this_run[1]


_of_this_run: tuple[Mapping[str, str], Settings] | None = None


def token_of_this_run() -> str:
    """Return a random token: the same within a run of doit, also in processes forked after the first call."""
    global _token
    variables = variables_of_this_run()
    if _token is None or _token[0] is not variables:
        _token = variables, os.urandom(8).hex()
    return _token[1]


_token: tuple[Mapping[str, str] | None, str] | None = None


def variables_of_this_run() -> Mapping[str, str] | None:
    """Return the variables of doit's command line, a new object in every run, or None outside of a run."""
    return getattr(doit_cmd, "_CMDLINE_VARS", None)  # `get_var` only returns single variables, by name


def _warn_about_misspellings(variables: Iterable[str]) -> None:
    """Warn about doit variables that may be misspelled settings. No error, because dodo.py may use them itself."""
    known = [item.name for item in fields(Settings)]
    for name in set(variables).difference(known):
        import difflib

        if similar := difflib.get_close_matches(name.lower(), known, 1, SIMILARITY):
            notice(f"{name}= is not a setting; did you mean {similar[0]}=?")


def _check_home(home: str | None) -> None:
    """Reject a relative home folder: it would depend on the working folder of each program.

    Raises:
        SettingsError: The path is relative.
    """
    if home is not None and not os.path.isabs(home):
        raise SettingsError(
            f"HOME must be an absolute path, got {home!r}.", "Set it to your home folder, such as HOME=/home/you."
        )


def _look_up(name: str, project: dict[str, Any]) -> tuple[object, str]:
    value = get_var(name, None)
    if value is not None:
        return value, f"the doit variable {name}"
    variable = f"GAMEBEAR_{name.upper()}"
    if os.environ.get(variable):
        return os.environ[variable], variable
    return project.get(name), "[tool.gamebear] in pyproject.toml"


def origin(name: str) -> str:
    """Return where a setting is set, for errors."""
    return _look_up(name, _project_settings(Path.cwd() / "pyproject.toml"))[1]


def _project_settings(path: Path) -> dict[str, Any]:
    try:
        about = path.stat()
    except OSError:
        return {}
    return _read_project(str(path), version(about))


@lru_cache(maxsize=8)
def _read_project(path: str, _version: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open_regular(path) as file:
            data = tomllib.loads(file.read().decode("utf-8"))
    except OSError as error:
        raise SettingsError(
            f"pyproject.toml cannot be read: {error.strerror}.",
            "Make it a regular file that you can read: ls -l pyproject.toml",
        ) from error
    except ValueError as error:  # includes TOMLDecodeError, and int()'s error for 5,000 digits
        raise SettingsError(f"pyproject.toml cannot be read: {error}.", "Fix its TOML syntax.") from error
    except (RecursionError, MemoryError) as error:
        raise SettingsError(
            "pyproject.toml cannot be read: its brackets are nested too deeply.", "Remove some nesting."
        ) from error
    table = data.get("tool", {})
    found = table.get("gamebear", {}) if isinstance(table, dict) else {}
    if not isinstance(found, dict):
        raise SettingsError(
            "[tool.gamebear] in pyproject.toml is not a table.",
            'Write the line [tool.gamebear], and the settings below it: arch = "armhf"',
        )
    known = {item.name for item in fields(Settings)}
    for name in found:
        if name not in known:
            raise SettingsError(
                f"[tool.gamebear] in pyproject.toml has an unknown setting {name!r}.",
                f"Use one of {', '.join(sorted(known))}.",
            )
    return found


def _text(name: str, value: object, where: str) -> str:
    if not isinstance(value, str) or "\n" in value:
        raise SettingsError(
            f"{name} must be a one-line string, got {value!r} (from {where}).",
            "Set it to a string, or remove it to use the default.",
        )
    return value.strip()


def architecture(name: str, value: object, where: str) -> str:
    """Validate Debian's name of an architecture. An empty string is valid.

    Raises:
        SettingsError: The architecture is unknown.
    """
    text = _text(name, value, where)
    known = sorted(set(ARCHITECTURES.values()))
    if text and text not in known:
        better = ARCHITECTURES.get(text)
        hint = f"Use Debian's name for it: {better}" if better else f"Use one of {', '.join(known)}."
        raise SettingsError(f"{name}: unknown architecture {text!r} (from {where}).", hint)
    return text


def _builder(name: str, value: object, where: str) -> str:
    """Return the URL of the builder, or `arch=URL,arch=URL` without spaces for several architectures.

    Raises:
        SettingsError: A URL is missing, or the value is ambiguous.
    """
    if isinstance(value, dict):
        pairs = [(str(arch).strip(), _text(f"{name}.{arch}", url, where)) for arch, url in value.items()]
    else:
        pairs = _pairs(_text(name, value, where))
    text = ",".join(f"{arch}={url}" if arch else url for arch, url in pairs)
    if not text:
        raise SettingsError(
            f"{name} is empty (from {where}).", "Set builder=local: or builder=ssh://user@host, or remove the setting."
        )
    for arch, url in pairs:
        architecture(name, arch, where)
        if not url:
            raise SettingsError(
                f"{name} has no URL for {arch} (from {where}).",
                f"Set {arch}=local: or {arch}=ssh://user@host, or remove {arch}.",
            )
        if _AMBIGUOUS.search(url) or (arch and _pairs(text) != pairs):  # no URL in the error: it may hold a password
            raise SettingsError(
                f"{name} has more than one URL{f' for {arch}' if arch else ''}, or a stray comma or space"
                f" (from {where}).",
                "Set one URL, or one per architecture: builder=armhf=ssh://a,arm64=ssh://b",
            )
        if [other for other, _ in pairs].count(arch) > 1:
            raise SettingsError(
                f"{name} has two URLs for {arch} (from {where}).",
                f"Set one URL for {arch}. For several machines of one architecture, use dask://HOST.",
            )
    return text


_AMBIGUOUS = re.compile(r"\A,|,\Z|[,;\s](?:\s*[\w-]+\s*=)?\s*(?:local:|[a-z][a-z0-9+.-]*://)")
"""Pattern that the URL of one builder does not contain. Other commas and spaces are left to the builder."""


def _by_architecture(text: str) -> dict[str, str]:
    """Return the URLs by architecture. A URL for all architectures has the key ""."""
    return dict(_pairs(text))


def _pairs(text: str) -> list[tuple[str, str]]:
    """Split `arch=URL, arch=URL` into pairs. A single URL yields one pair with an empty architecture.

    No URL begins with `word=`, because its scheme ends with a colon (RFC 3986, 3.1).
    """
    if not re.match(r"[\w-]+\s*=", text):
        return [("", text)]
    pairs = (part.partition("=") for part in re.split(r",\s*(?=[\w-]+\s*=)", text))
    return [(arch.strip(), url.strip()) for arch, _, url in pairs]


def seconds(name: str, value: object, where: str) -> float:
    """Return a number of seconds, which may be specified as a string.

    Raises:
        SettingsError: The value is not a non-negative, finite number.
    """
    try:
        count = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else -1.0
    except (ValueError, OverflowError):
        count = -1.0
    if not 0 <= count < float("inf"):
        raise SettingsError(
            f"{name} must be a number of seconds, got {value!r} (from {where}).",
            f"Set a finite number of seconds from 0, such as {name}=600.",
        )
    return count


def _boolean(name: str, value: object, where: str) -> bool:
    """Return a boolean, which may be specified as a string.

    Raises:
        SettingsError: The value is not a boolean.
    """
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else ""
    if word not in _BOOLEANS:
        raise SettingsError(
            f"{name} must be true or false, got {value!r} (from {where}).", f"Set {name}=true or {name}=false."
        )
    return _BOOLEANS[word]


_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _one_of(*choices: str) -> Callable[[str, object, str], str]:
    words = f"{', '.join(choices[:-1])} or {choices[-1]}"

    def check(name: str, value: object, where: str) -> str:
        value = value.strip() if isinstance(value, str) else value
        if value not in choices:
            raise SettingsError(f"{name} must be {words}, got {value!r} (from {where}).", f"Set {name} to {words}.")
        return str(value)

    return check


_CHECKS: dict[str, Callable[[str, object, str], object]] = {
    "arch": architecture,
    "builder": _builder,
    "base": _one_of("auto", "registry", "bootstrap"),
    "interrupt": _one_of("cancel", "detach"),
    "fresh": _boolean,
    "keep_failed": _boolean,
    "patience": seconds,
    "provenance": _boolean,
    "time_limit": seconds,
}
