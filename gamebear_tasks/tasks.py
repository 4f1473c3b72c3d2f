"""What a `dodo.py` is written with: `artifact()`."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from . import functions
from .action import Build
from .config import architecture, seconds, settings
from .errors import GamebearError, SettingsError, SourceError
from .functions import Function
from .imports import local_modules
from .job import FORMAT, Json, canonical_json
from .place import part_pattern
from .plan import Plan, check_choice, declared, read_lock
from .report import printable
from .runner.files import is_file_name
from .sources import LOCK_FILE, Declared, Lock, Source, choose

Task: TypeAlias = dict[str, Any]

CLOCK_STEP = 60.0
"""Seconds by which this machine's clock may be put back before a result's age is asked for again."""


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
    program = _checked_program(program)
    targets = _named(outputs, "outputs")
    if not targets:
        raise SettingsError(f"artifact({_called(program)}) has no outputs.", 'Say outputs=["build/NAME"].')
    chosen = settings()
    where = f"artifact({_called(program)})"
    upstream = _checked_sources({} if sources is None else sources)
    plan = Plan(
        program=program,
        identity="" if isinstance(program, Path) else functions.identity(program),
        targets=targets,
        modules=local_modules(program) if isinstance(program, Path) else functions.modules(program),
        inputs=_named(inputs, "inputs"),
        sources={name: choose(source, chosen.sources) for name, source in upstream.items()},
        args=_checked_args({} if args is None else args, program),
        arch=architecture("arch", arch, where) if arch is not None else "",
        time_limit=seconds("time_limit", time_limit, where) if time_limit is not None else None,
        lock=Path(LOCK_FILE),
    )
    _check_names(plan)
    if upstream:
        read_lock(plan.lock)  # a damaged one is to be told now
    declared.update({repr(source): source for source in upstream.values()})
    files = [*plan.modules.values(), *plan.inputs.values()]
    if isinstance(program, Path):
        files.insert(0, program)
    return {
        "actions": [Build(plan)],
        "file_dep": [str(path) for path in files],
        "targets": [str(path) for path in targets.values()],
        "uptodate": [_SameJob(plan, plan.arch or chosen.arch, chosen.sources), _StillValid(plan)],
        "clean": [remove_targets],
        "verbosity": 2,
    }


class _SameJob:
    """Tells doit whether all of the job that is no `file_dep` is as it was; an `uptodate` of a task.

    It looks when doit asks and not before: by then the tasks that this one depends on have run, and so has `doit lock`.
    """

    def __init__(self, plan: Plan, arch: str, preference: str) -> None:
        self._plan = plan
        self._arch = arch
        self._preference = preference
        self._digest = ""

    def configure_task(self, task: Any) -> None:
        """Have doit save what we compare with, with the task's success."""
        task.value_savers.append(lambda: {"gamebear": self._digest})

    def __call__(self, task: Any, values: Mapping[str, Any]) -> bool:
        """Say whether nothing has changed since the task's last success."""
        try:
            check_choice(self._preference)
            self._digest = self._rest_of_job(read_lock(self._plan.lock))
        except GamebearError:
            return False  # building it says what is wrong
        return values.get("gamebear") == self._digest

    def __repr__(self) -> str:
        return f"the job of {self._plan.name}: its arguments, sources, architecture, names, or the function"

    def _rest_of_job(self, lock: Lock) -> str:
        plan = self._plan
        rest: dict[str, Json] = {
            "gamebear": FORMAT,
            "arch": self._arch,
            "args": dict(plan.args),
            "program": plan.identity or plan.name,
            "inputs": {name: [str(path), _is_executable(path)] for name, path in plan.inputs.items()},
            "outputs": {name: str(path) for name, path in plan.targets.items()},
            "sources": {name: _pinned(source, lock) for name, source in plan.sources.items()},
        }
        return hashlib.sha256(canonical_json(rest)).hexdigest()


class _StillValid:
    """Tells doit whether the result still holds, by this machine's clock alone; an `uptodate` of a task.

    For how long it does is what the builder said with it: where a package image of the job may grow too old. A clock
    that was put back says nothing; then the builder is asked.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __call__(self, task: Any, values: Mapping[str, Any]) -> bool | None:
        """Say whether the time is not up yet; None where there is none."""
        valid = values.get("valid")
        if valid is None:
            return None
        age = time.time() - valid["since"]
        return bool(-CLOCK_STEP <= age < valid["seconds"])

    def __repr__(self) -> str:
        return f"the age of the package images that {self._plan.name} was built with, or a clock that was put back"


def _is_executable(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & 0o100)
    except OSError:
        return False  # another task is to make it


def _pinned(source: Source, lock: Lock) -> Json:
    try:
        return source.identity(lock)
    except SourceError:
        return None  # building it says what to do


def _checked_program(program: object) -> Path | Function:
    if isinstance(program, str | PurePath) and _is_path(program):
        return Path(program)
    if callable(program):
        return program
    raise SettingsError(
        f"artifact({program!r}): that is neither a buildscript nor a function.",
        'Say artifact("buildscripts/NAME.py", …), or give it a function.',
    )


def _is_path(path: object) -> bool:
    """Say whether something can be a path in this locale."""
    try:
        return isinstance(path, str | PurePath) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _named(paths: object, what: str) -> dict[str, Path]:
    """Return paths by the names that the program knows them under: their own, or those that a mapping gives inputs.

    Raises:
        SettingsError: it is a text instead of a list, holds something else than paths, or two have the same name.
    """
    if isinstance(paths, str | PurePath):
        raise SettingsError(f"{what}= is a list, and got the text {str(paths)!r}.", f"Say {what}=[{str(paths)!r}].")
    if not isinstance(paths, Iterable) or (isinstance(paths, Mapping) and what == "outputs"):
        raise SettingsError(f"{what}= is a list of paths, not {paths!r}.")
    given = list(paths.items()) if isinstance(paths, Mapping) else [(None, path) for path in paths]
    named: dict[str, Path] = {}
    for name, path in given:
        if not _is_path(path):
            raise SettingsError(f"{what}= is a list of paths, and {path!r} is none.")
        name = Path(path).name if name is None else name
        if name in named:
            raise SettingsError(
                f"Two {what} have the name {name!r}: {str(named[name])!r} and {str(path)!r}.",
                "In the program's folder they would be one file; give one another name.",
            )
        named[name] = Path(path)
    return named


def _checked_sources(sources: object) -> dict[str, Declared]:
    if not isinstance(sources, Mapping):
        raise SettingsError(
            f"sources= gives each source the name of its folder, and got {sources!r}.", 'Say sources={"NAME": git(…)}.'
        )
    for name, source in sources.items():
        if not isinstance(source, Declared):
            raise SettingsError(
                f"The source {name!r} is {source!r}, which is no source.", "See git(), archive(), debian()."
            )
    return dict(sources)


def _check_names(plan: Plan) -> None:
    """Refuse names that no file can have, and those that would fall together in the program's folder."""
    taken = {plan.name: "the program"} if isinstance(plan.program, Path) else {}
    for path in plan.modules:
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
                continue  # a program may well work on a file of its folder
            if name in taken:
                raise SettingsError(
                    f"{name!r} is {what} of {plan.name}, and {taken[name]} has that name too.",
                    "Give one of them another name.",
                )
            taken[name] = what


def _checked_args(args: object, program: Path | Function) -> dict[str, Json]:
    try:
        if not isinstance(args, Mapping):
            raise TypeError(f"{args!r} is no dict")
        canonical_json(args)
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingsError(
            f"The args of artifact({_called(program)}) are not plain JSON: {error}.",
            "Give a dict of numbers, texts, lists and dicts.",
        ) from error
    return dict(args)


def _called(program: Path | Function) -> str:
    return repr(str(program)) if isinstance(program, Path) else functions.name_of(program)


def remove_targets(task: Any, dryrun: bool) -> None:
    """Remove a task's targets, and what broken-off downloads left of them; a `clean` action."""
    for target in map(Path, task.targets):
        for path in (target, *target.parent.glob(part_pattern(target))):
            if path.is_file() or path.is_symlink():
                print(f"{task.name} - removing file '{printable(str(path))}'")
                if not dryrun:
                    path.unlink(missing_ok=True)
