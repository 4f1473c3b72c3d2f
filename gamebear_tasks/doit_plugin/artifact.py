"""`artifact()`: declare a build as a doit task dict."""

from __future__ import annotations

import inspect
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import repeat
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from ..client.cancellation import begin_run
from ..client.placement_marks import is_placed
from ..config import Settings, architecture, seconds, settings_of_this_run, token_of_this_run, variables_of_this_run
from ..errors import GamebearError, SettingsError
from ..jobspec.canonical_json import Json, canonical_json
from ..jobspec.module_finder import local_modules
from ..jobspec.plan import NONE, SAVED, Plan, check_choice, declare, read_lock
from ..records.run_journal import REPORT, up_to_date
from ..runner.util.atomic_files import is_file_name
from ..sources.declare import LOCK_FILE
from ..util.file_hashes import content_of
from ..util.locations import LOGS
from .action import Build, RemoveTargets

if TYPE_CHECKING:  # imported where there are functions or sources
    from ..jobspec.function_digest import Function, PickledFunction
    from ..sources.alternatives import Declared, Source

Task: TypeAlias = dict[str, Any]

CLOCK_STEP = 60.0
"""Seconds by which this machine's clock may be set back before a result with a limited age counts as expired."""

LOCK = Path(LOCK_FILE)
"""Path of the lock file, relative to the folder of `dodo.py`."""

NO_ARGS = canonical_json({})


def _reject_special_database() -> None:
    """Reject a FIFO or device for doit's default database: doit would block when it opens it.

    doit opens the database after it has imported `dodo.py`, and before it calls a task's creator. So this runs when a
    `dodo.py` imports us. `gamebear` checks every database itself, also those of other names.

    Raises:
        SettingsError: it is neither a regular file nor a folder.
    """
    if variables_of_this_run() is None:  # not in a run of doit
        return
    for suffix in ("", ".db", ".dat", ".dir", ".pag"):  # of the implementations of dbm
        try:
            mode = os.stat(f".doit.db{suffix}").st_mode
        except OSError:
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise SettingsError(
                f"doit's database .doit.db{suffix} cannot be opened: it is not a regular file.",
                f"rm .doit.db{suffix}",
            )


_reject_special_database()


def artifact(
    program: str | Path | Function,
    *,
    outputs: Iterable[str | Path],
    inputs: Iterable[str | Path] | Mapping[str, str | Path] = (),
    sources: Mapping[str, Declared] | None = None,
    args: Mapping[str, Json] | None = None,
    arch: str | None = None,
    time_limit: float | None = None,
) -> Task:
    """Return a doit task that runs a program in containers on a builder and fetches its outputs.

    It is a plain task dict, which may be edited. `file_dep` lists the program, the local modules that it imports and
    the inputs; `targets` lists the outputs; `uptodate` covers everything else in the job.

    Args:
        program: Path of a buildscript, or a function, which is sent with cloudpickle.
        outputs: Paths of the targets. The program leaves each in its working directory under the target's file name.
            Empty for a program that only makes an image on the builder.
        inputs: Paths of files for the program. Each is in its working directory under its file name, or under its key
            in a mapping.
        sources: Upstream trees, by the name of their folder in the working directory.
        args: Arguments as plain JSON: a buildscript's `#| arg:` lines, a function's keyword arguments.
        arch: Debian's name of the architecture. Default: the setting `arch`.
        time_limit: Seconds after which the builder stops the job; 0 for never. Default: the setting `time_limit`.

    Raises:
        SettingsError: An argument is invalid. doit displays the error and exits.
    """
    if not callable(program):
        program = _script(program) if isinstance(program, str | PurePath) else _no_program(program)
    folders: list[str] = []
    unusual: list[tuple[object, str]] = []
    targets = _named(outputs, "outputs", unusual, folders)
    chosen = settings_of_this_run()
    upstream = _chosen_sources(sources, chosen.sources, targets.values())
    pickled = program if isinstance(program, Path) else _pickled(program)
    modules = _modules(pickled, chosen) if isinstance(pickled, Path) else pickled.modules
    plan = Plan(
        program=pickled,
        targets=targets,
        modules=modules,
        inputs=_named(inputs, "inputs", unusual) if inputs != () else NONE,
        sources=upstream,
        args=_checked_args(args, program) if args is not None else NO_ARGS,
        arch="" if arch is None else architecture("arch", arch, f"artifact({_called(program)})"),
        time_limit=None if time_limit is None else seconds("time_limit", time_limit, f"artifact({_called(program)})"),
        lock=LOCK,
        folders=tuple(folders),
    )
    _check_names(plan, unusual)
    if upstream:
        read_lock(plan.lock)  # raises an error now if the lock file is damaged
    files = [str(program)] if isinstance(program, Path) else []
    files += map(str, modules.values()) if modules else ()
    files += plan.inputs.values()
    return {
        "actions": [Build(plan)],
        "file_dep": files,
        "targets": [*targets.values()],
        "uptodate": [_SameJob(plan, plan.arch or chosen.arch, chosen)],
        "clean": [RemoveTargets()],
        "verbosity": 2,
    }


class _SameJob:
    """An `uptodate` callable: whether the targets contain the result of the current job, and the result is valid.

    It compares the saved state of the last build (see `Plan.state`) with the current state of the files. doit calls it
    after the tasks that this one depends on. A result may expire: a package image of its job grows too old.
    """

    __signature__ = inspect.signature(lambda task, values: None)  # doit requests it at each call: computed once

    def __init__(self, plan: Plan, arch: str, chosen: Settings) -> None:
        self._plan = plan
        self._arch = arch
        self._preference = chosen.sources
        self._is_forced = chosen.fresh

    _is_too_old = False

    def __call__(self, task: Any, values: Mapping[str, Any]) -> bool:
        """Return whether nothing has changed since the task's last success."""
        if self._is_same(task, values):
            up_to_date.append(task.name)
            return True
        begin_run()  # here, because doit calls this in the main thread, before it starts threads or processes
        return False

    def _is_same(self, task: Any, values: Mapping[str, Any]) -> bool:
        if self._is_forced:
            token_of_this_run()  # here, so that the processes of doit -n inherit it
            return False
        built = values.get(SAVED)
        if built is None:
            return False
        try:
            check_choice(self._preference)
            contents = self._plan.read(self._arch, content_of, search=bool(task.task_dep))
        except GamebearError:
            return False  # building the task reports the error
        if built != self._plan.state(contents) or not is_placed(self._plan.targets.values(), built):
            return False
        if self._plan.folders and not self._has_all_files():
            return False
        valid = values.get("valid")
        self._is_too_old = valid is not None and not _still_holds(valid)
        return not self._is_too_old

    def _has_all_files(self) -> bool:
        """Return whether no file of a folder output is missing."""
        from ..client.installed_folders import is_complete

        return all(is_complete(self._plan.targets[name]) for name in self._plan.folders)

    def __repr__(self) -> str:
        if self._is_forced:
            return "the setting fresh"
        if self._is_too_old:
            return f"the age of the package images that {self._plan.name} was built with, or a clock that was set back"
        return f"the job of {self._plan.name}: its files, arguments, sources, architecture, names, or the function"


def _still_holds(valid: Mapping[str, float]) -> bool:
    """Return whether a result has not expired, by this machine's clock; after the clock was set back, it has."""
    return -CLOCK_STEP <= time.time() - valid["since"] < valid["seconds"]


@lru_cache(maxsize=4096)
def _script(path: str | PurePath) -> Path:
    """Return a buildscript's path, the same object for equal arguments; raises SettingsError."""
    return Path(path) if _is_path(path) else _no_program(path)


def _modules(script: Path, run: Settings) -> Mapping[str, Path]:
    """Return the local modules of a script, found once per run: 3 % of an up-to-date run of 2,000 tasks.

    The result may be stale if a task changes the script and doit creates others only then (`create_after`). Nothing is
    up to date by mistake: the saved state covers the content of the script, which determines the modules' names.

    Args:
        script: The script.
        run: The settings, a new object in every run.
    """
    global _found
    if _found[0] is not run:
        _found = run, {}
    modules = _found[1].get(script)
    if modules is None:
        modules = _found[1][script] = local_modules(script)
    return modules


_found: tuple[Settings | None, dict[Path, Mapping[str, Path]]] = None, {}
"""The run for which modules were found, and the modules of each script."""


def _no_program(program: object) -> NoReturn:
    raise SettingsError(
        f"artifact({program!r}): the program is neither a buildscript nor a function.",
        'Use artifact("buildscripts/NAME.py", …), or pass a function.',
    )


def _pickled(function: Function) -> PickledFunction:
    """Return a function as it is sent; raises SettingsError."""
    from ..jobspec.function_digest import pickled

    return pickled(function)


def _is_path(path: object) -> bool:
    """Return whether a value can be a path in this locale."""
    if type(path) is str and path.isascii():
        return "\0" not in path
    try:
        return isinstance(path, str | PurePath) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _named(
    paths: Any, what: str, unusual: list[tuple[object, str]], folders: list[str] | None = None
) -> dict[str, str]:
    """Return paths by their names in the program's working directory: their file names, or the keys of a mapping.

    Args:
        paths: Collection of paths.
        what: Name of the argument, for errors.
        unusual: Each name that must be checked is appended, with `what`.
        folders: For outputs: the names of folders and patterns are appended.

    Raises:
        SettingsError: It is a string or not a collection of paths, or two paths have the same name.
    """
    keys: Iterable[Any] = repeat(None)
    if type(paths) is not list:
        if isinstance(paths, str | PurePath):
            raise SettingsError(f"{what}= is the string {str(paths)!r}, not a list.", f"Use {what}=[{str(paths)!r}].")
        if not isinstance(paths, Iterable) or (isinstance(paths, Mapping) and what == "outputs"):
            raise SettingsError(f"{what}= is {paths!r}, not a list of paths.", f'Use {what}=["PATH"].')
        if isinstance(paths, Mapping):
            keys, paths = paths.keys(), paths.values()
    named: dict[str, str] = {}
    for key, path in zip(keys, paths, strict=False):
        if type(path) is str and PLAIN_PATH.fullmatch(path):
            place, own = path, path.rpartition("/")[2]
            if key is not None:
                unusual.append((key, what))
        elif _is_path(path):
            from ..runner.executor.outputs import is_pattern  # here, because most paths are plain

            place, own = str(Path(path)), Path(path).name
            unusual.append((own if key is None else key, what))
            if folders is not None and is_pattern(own):
                place = os.path.dirname(place)
                folders.append(own)
            elif folders is not None and str(path).endswith("/"):
                folders.append(own)
        else:
            raise SettingsError(f"{what}= contains {path!r}, which is not a path.", f'Use {what}=["PATH"].')
        name = own if key is None else key
        if name in named:
            raise SettingsError(
                f"{what}= has two files with the name {name!r}: {named[name]!r} and {str(path)!r}.",
                "Give one another name: in the working directory they would be one file.",
            )
        named[name] = place
    return named


PLAIN_PATH = re.compile(r"/?([\w@+-][\w@+.-]{0,200}/)*[\w@+-][\w@+.-]{0,200}", re.ASCII)
"""Pattern of paths that need no further checks: pathlib writes them unchanged, and their names are valid.

Without it, an up-to-date run with 2,000 tasks takes a twentieth longer."""


def _chosen_sources(sources: object, preference: str, targets: Iterable[str]) -> dict[str, Source]:
    """Register the sources of an artifact, and return the selected option of each; raises SettingsError."""
    if sources is None or sources == {}:
        return {}
    from ..sources.alternatives import Either, choose
    from ..sources.base import BaseSource

    if not isinstance(sources, Mapping):
        raise SettingsError(
            f"sources= is {sources!r}, not a dict of sources by folder name.", 'Use sources={"NAME": git(…)}.'
        )
    for name, source in sources.items():
        if not isinstance(source, BaseSource | Either):
            is_local = _is_path(source) and "://" not in str(source)
            raise SettingsError(
                f"The source {name!r} is {source!r}, which is not a source.",
                f"Use folder({str(source)!r})." if is_local else "Use folder(), git(), archive() or debian().",
            )
        declare(source)
    chosen = {name: choose(source, preference) for name, source in sources.items()}
    return {name: source.without(targets) for name, source in chosen.items()}


def _check_names(plan: Plan, unusual: Iterable[tuple[object, str]]) -> None:
    """Reject invalid file names, and names that collide in the program's working directory.

    Args:
        plan: The plan.
        unusual: Names that may be invalid, each with its argument.
    """
    for other, argument in unusual:
        _check_name(other, f"an {argument[:-1]}", plan)
    for path in plan.targets.values():
        if "logs" in path or path.endswith((".json", ".html")):
            check_target(path, f"artifact({plan.name!r})")
    for name in plan.folders:
        _check_folder(name, plan)
    if not plan.inputs and not plan.sources:
        return
    for name in plan.sources:
        _check_name(name, "a source", plan)
    taken = {plan.name: "the program"} if isinstance(plan.program, Path) else {}
    for path in plan.modules:
        taken.setdefault(path, "a module")
        taken.setdefault(path.split("/")[0], "a package of modules")
    for what, names in (("an input", plan.inputs), ("a source", plan.sources)):
        for name in names:
            if what == "an input" and os.path.isdir(path := plan.inputs[name]):
                raise SettingsError(
                    f"The input {path!r} of {plan.name} is a folder.",
                    f"Make it a source: sources={{{name!r}: folder({path!r})}}.",
                )
            if name in taken:
                raise SettingsError(
                    f"{name!r} is the name of {what} of {plan.name}, and of {taken[name]}.",
                    "Give one of them another name.",
                )
            taken[name] = what


def _check_name(name: object, what: str, plan: Plan) -> None:
    if not _is_path(name) or not is_file_name(name):
        raise SettingsError(
            f"{name!r} cannot be the name of {what} of {plan.name}.",
            "Use a file name without a folder, of at most 255 bytes."
            + (" For a tree of files, use sources= and folder()." if what != "an output" else ""),
        )


def _check_folder(name: str, plan: Plan) -> None:
    """Reject the target of a folder output if it contains other files of the project; raises SettingsError."""
    from ..runner.executor.outputs import is_pattern

    place = os.path.relpath(plan.targets[name] or ".")
    others = [path for other, path in plan.targets.items() if other != name]
    if any(not os.path.relpath(path, place).startswith("..") for path in (".", str(LOGS), *others)):
        raise SettingsError(
            f"artifact({plan.name!r}): the target {place!r} of the output {name!r} has other files in it.",
            f'Give it a folder of its own: outputs=["build/NAME/{name if is_pattern(name) else ""}"].',
        )


def check_target(path: str, where: str) -> None:
    """Reject a target that is a file of this package: a log, a record, the report, the provenance of another target.

    Args:
        path: The target.
        where: The declaration, for the error.

    Raises:
        SettingsError: The target is such a file.
    """
    from ..client.install_outputs import STATEMENT

    if path.endswith(STATEMENT):
        raise SettingsError(
            f"{where}: the target {path!r} has the name of a provenance statement.",
            f"Give it another name: `gamebear provenance` writes *{STATEMENT}.",
        )
    place = os.path.relpath(path)
    if place == REPORT or place.startswith(f"{LOGS}/"):
        raise SettingsError(
            f"{where}: the target {path!r} is reserved for logs and the report.", "Put it somewhere else."
        )


def _checked_args(args: object, program: Path | Function) -> bytes:
    """Return args as canonical JSON; raises SettingsError."""
    try:
        if not isinstance(args, Mapping):
            raise TypeError(f"{args!r} is not a dict")
        return canonical_json(args)
    except (TypeError, ValueError, RecursionError) as error:  # the latter two have different texts in each Python
        why = str(error) if isinstance(error, TypeError) else "a value contains itself"
        if isinstance(error, ValueError):
            why = "a number is infinite or NaN"
        raise SettingsError(
            f"The args of artifact({_called(program)}) are not plain JSON: {why}.",
            "Use a dict of numbers, strings, lists and dicts.",
        ) from error


def _called(program: Path | Function) -> str:
    """Return a program's name for errors."""
    if isinstance(program, Path):
        return repr(str(program))
    from ..jobspec.function_digest import name_of

    return name_of(program)
