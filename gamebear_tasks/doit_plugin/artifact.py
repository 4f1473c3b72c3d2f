"""`artifact()`: declare a build as a doit task dict."""

from __future__ import annotations

import inspect
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from ..client.cancellation import begin_run
from ..client.placement_marks import is_placed
from ..config import architecture, seconds, settings_of_this_run, variables_of_this_run
from ..errors import GamebearError, SettingsError
from ..jobspec.canonical_json import Json, canonical_json
from ..jobspec.module_finder import local_modules
from ..jobspec.plan import NONE, SAVED, Plan, check_choice, declare, read_lock
from ..records.run_journal import REPORT, up_to_date
from ..runner.util.atomic_files import is_file_name
from ..sources.declare import LOCK_FILE
from ..util.file_hashes import content_of
from ..util.locations import LOGS
from ..util.text import in_line
from .action import Build

if TYPE_CHECKING:  # imported where there are functions or sources
    from ..jobspec.function_digest import Function, PickledFunction
    from ..sources.alternatives import Declared, Source

Task: TypeAlias = dict[str, Any]

CLOCK_STEP = 60.0
"""Seconds by which this machine's clock may be put back before a result's age is asked for again."""

LOCK = Path(LOCK_FILE)
"""The lock file, beside `dodo.py`."""

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
    """Return a doit task that has a builder run a program in its containers and brings the outputs back.

    It is a plain task: `file_dep` has the program, the local modules which it imports and the inputs, `targets` the
    outputs, `uptodate` everything else in the job; edit it as any other.

    Args:
        program: a buildscript's path, or a function, which is sent with cloudpickle.
        outputs: the targets; the program leaves each in its folder under the target's file name.
        inputs: files for the program, which finds each in its folder under the file's own name, or under the key that
            a mapping gives it.
        sources: upstream trees, each a folder of that name in the program's folder.
        args: values for the program: a buildscript's `#| arg:` lines, a function's keywords. Plain JSON.
        arch: Debian's name of the architecture; by default that of the setting `arch`.
        time_limit: seconds after which the builder ends the job, 0 for never; by default the setting `time_limit`.

    Raises:
        SettingsError: an argument makes no sense; doit shows it and ends.
    """
    if not callable(program):
        program = _script(program) if isinstance(program, str | PurePath) else _no_program(program)
    targets = _named(outputs, "outputs")
    if not targets:
        raise SettingsError(f"artifact({_called(program)}) has no outputs.", 'Say outputs=["build/NAME"].')
    chosen = settings_of_this_run()
    upstream = _chosen_sources(sources, chosen.sources, targets.values())
    pickled = _pickled(program)
    modules = local_modules(pickled) if isinstance(pickled, Path) else pickled.modules
    plan = Plan(
        program=pickled,
        targets=targets,
        modules=modules,
        inputs=_named(inputs, "inputs") if inputs != () else NONE,
        sources=upstream,
        args=_checked_args(args, program) if args is not None else NO_ARGS,
        arch="" if arch is None else architecture("arch", arch, f"artifact({_called(program)})"),
        time_limit=None if time_limit is None else seconds("time_limit", time_limit, f"artifact({_called(program)})"),
        lock=LOCK,
    )
    _check_names(plan)
    if upstream:
        read_lock(plan.lock)  # a damaged one is to be told now
    files = [*map(str, modules.values()), *plan.inputs.values()]
    if isinstance(program, Path):
        files.insert(0, str(program))
    return {
        "actions": [Build(plan)],
        "file_dep": files,
        "targets": [*targets.values()],
        "uptodate": [_SameJob(plan, plan.arch or chosen.arch, chosen.sources)],
        "clean": [remove_targets],
        "verbosity": 2,
    }


class _SameJob:
    """Tells doit whether the targets hold what the job would make now, and that still holds; an `uptodate`.

    It compares the state that the action has built (see `Plan.state`) with that of the files now, when doit asks: by
    then the tasks that this one depends on have run. The builder has said for how long a result holds: a package image
    of the job may grow too old.
    """

    __signature__ = inspect.signature(lambda task, values: None)  # for doit, which asks every time what we take

    def __init__(self, plan: Plan, arch: str, preference: str) -> None:
        self._plan = plan
        self._arch = arch
        self._preference = preference
        self._is_too_old = False

    def __call__(self, task: Any, values: Mapping[str, Any]) -> bool:
        """Say whether nothing has changed since the task's last success."""
        is_same = self._is_same(task, values)
        if not is_same:
            begin_run()  # here, because it is the main thread that asks, before doit starts others or processes
        return is_same

    def _is_same(self, task: Any, values: Mapping[str, Any]) -> bool:
        built = values.get(SAVED)
        if built is None:
            return False
        try:
            check_choice(self._preference)
            contents = self._plan.read(self._arch, content_of, search=bool(task.task_dep))
            if built != self._plan.state(contents):
                return False
        except GamebearError:
            return False  # building it says what is wrong
        if not is_placed(self._plan.targets.values(), built):
            return False
        self._is_too_old = not _still_holds(values.get("valid"))
        if self._is_too_old:
            return False
        up_to_date.append(task.name)
        return True

    def __repr__(self) -> str:
        if self._is_too_old:
            return f"the age of the package images that {self._plan.name} was built with, or a clock that was put back"
        return f"the job of {self._plan.name}: its files, arguments, sources, architecture, names, or the function"


def _still_holds(valid: Mapping[str, float] | None) -> bool:
    """Say whether a result's time is not up, by this machine's clock; one that was put back says nothing."""
    return valid is None or -CLOCK_STEP <= time.time() - valid["since"] < valid["seconds"]


@lru_cache(maxsize=4096)
def _script(path: str | PurePath) -> Path:
    """Return a buildscript's path, the same object for the same text; raises SettingsError."""
    return Path(path) if _is_path(path) else _no_program(path)


def _no_program(program: object) -> NoReturn:
    raise SettingsError(
        f"artifact({program!r}): that is neither a buildscript nor a function.",
        'Say artifact("buildscripts/NAME.py", …), or give it a function.',
    )


def _pickled(program: Path | Function) -> Path | PickledFunction:
    """Return a program as it is sent; raises SettingsError."""
    if isinstance(program, Path):
        return program
    from ..jobspec.function_digest import pickled

    return pickled(program)


def _is_path(path: object) -> bool:
    """Say whether something can be a path in this locale."""
    if type(path) is str and path.isascii():
        return "\0" not in path
    try:
        return isinstance(path, str | PurePath) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _named(paths: object, what: str) -> dict[str, str]:
    """Return paths by the names that the program knows them under: their own, or those that a mapping gives inputs.

    Raises:
        SettingsError: it is a text instead of a list, holds something else than paths, or two have the same name.
    """
    if isinstance(paths, str | PurePath):
        raise SettingsError(f"{what}= is a list, and got the text {str(paths)!r}.", f"Say {what}=[{str(paths)!r}].")
    if not isinstance(paths, Iterable) or (isinstance(paths, Mapping) and what == "outputs"):
        raise SettingsError(f"{what}= is a list of paths, not {paths!r}.", f'Say {what}=["PATH"].')
    given = list(paths.items()) if isinstance(paths, Mapping) else [(None, path) for path in paths]
    named: dict[str, str] = {}
    for name, path in given:
        if not _is_path(path):
            raise SettingsError(f"{what}= is a list of paths, and {path!r} is none.", f'Say {what}=["PATH"].')
        place, own = _place(path)
        name = own if name is None else name
        if name in named:
            raise SettingsError(
                f"Two {what} have the name {name!r}: {named[name]!r} and {str(path)!r}.",
                "In the program's folder they would be one file; give one another name.",
            )
        named[name] = place
    return named


_ODD = re.compile(r"//|(\A|/)\.(/|\Z)|/\Z")
"""What pathlib leaves out of a path."""


def _place(path: str | PurePath) -> tuple[str, str]:
    """Return a path as pathlib would write it, and its name; most are written so already."""
    if type(path) is str and path and not _ODD.search(path):
        return path, path.rpartition("/")[2]
    return str(Path(path)), Path(path).name


def _chosen_sources(sources: object, preference: str, targets: Iterable[str]) -> dict[str, Source]:
    """Note the sources of an artifact, and return which of each is to be had; raises SettingsError."""
    if sources is None or sources == {}:
        return {}
    from ..sources.alternatives import Either, choose
    from ..sources.base import BaseSource

    if not isinstance(sources, Mapping):
        raise SettingsError(
            f"sources= gives each source the name of its folder, and got {sources!r}.", 'Say sources={"NAME": git(…)}.'
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


def _check_names(plan: Plan) -> None:
    """Refuse names that no file can have, and those that would fall together in the program's folder."""
    taken = {plan.name: "the program"} if isinstance(plan.program, Path) else {}
    for path in plan.modules if plan.inputs or plan.sources else ():
        taken.setdefault(path, "a module")
        taken.setdefault(path.split("/")[0], "a package of modules")
    for what, names in (("an input", plan.inputs), ("a source", plan.sources), ("an output", plan.targets)):
        for name in names:
            if not _is_path(name) or not is_file_name(name):
                raise SettingsError(
                    f"{name!r} cannot be the name of {what} of {plan.name}.",
                    "It has to be a file's name, without a folder and at most 255 bytes long.",
                )
            if what == "an output":
                check_target(plan.targets[name], f"artifact({plan.name!r})")
                continue  # a program may well work on a file of its folder
            if name in taken:
                raise SettingsError(
                    f"{name!r} is {what} of {plan.name}, and {taken[name]} has that name too.",
                    "Give one of them another name.",
                )
            taken[name] = what


def check_target(path: str, where: str) -> None:
    """Refuse a target that is one of our own files: a log, a record, the report, the provenance of another target.

    Args:
        path: the target.
        where: what declares it, for the error.

    Raises:
        SettingsError: it is one of them.
    """
    if path.endswith(".json"):
        from ..client.install_outputs import STATEMENT

        if path.endswith(STATEMENT):
            raise SettingsError(
                f"{where}: the target {path!r} has the name of a provenance statement.",
                f"Give it another name: `gamebear provenance` writes *{STATEMENT}.",
            )
    if "logs" in path or path.endswith(".html"):
        place = os.path.relpath(path)
        if place == REPORT or place.startswith(f"{LOGS}/"):
            raise SettingsError(
                f"{where}: the target {path!r} is where logs and the report are written.", "Put it somewhere else."
            )


def _checked_args(args: object, program: Path | Function) -> bytes:
    """Return args as canonical JSON; raises SettingsError."""
    try:
        if not isinstance(args, Mapping):
            raise TypeError(f"{args!r} is no dict")
        return canonical_json(args)
    except (TypeError, ValueError, RecursionError) as error:  # of the last two each Python has its own words
        why = str(error) if isinstance(error, TypeError) else "one holds itself"
        if isinstance(error, ValueError):
            why = "a number is infinite, or none"
        raise SettingsError(
            f"The args of artifact({_called(program)}) are not plain JSON: {why}.",
            "Give a dict of numbers, texts, lists and dicts.",
        ) from error


def _called(program: Path | Function) -> str:
    if isinstance(program, Path):
        return repr(str(program))
    from ..jobspec.function_digest import name_of

    return name_of(program)


def remove_targets(task: Any, dryrun: bool) -> None:
    """Remove a task's targets, their provenance, and what broken-off downloads left of them; a `clean` action."""
    from ..client.install_outputs import part_pattern, statement_of

    for target in map(Path, task.targets):
        for path in (target, statement_of(target), *target.parent.glob(part_pattern(target))):
            if os.path.isfile(path) or os.path.islink(path):  # which too long a name is not
                print(in_line(f"{task.name} - removing file '{path}'"))
                if not dryrun:
                    path.unlink(missing_ok=True)
