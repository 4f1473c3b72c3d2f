"""What a `dodo.py` is written with: `artifact()`, and the tasks that sources and builders need."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from doit.exceptions import TaskError

from . import functions
from .action import Build, Plan, builder_of_this_run, check_choice, declared, read_lock
from .config import architecture, seconds, settings
from .errors import GamebearError, SettingsError, SourceError
from .functions import Function
from .imports import local_modules
from .job import FORMAT, Json, canonical_json
from .place import part_pattern
from .report import printable, size
from .runner.files import is_file_name
from .sources import LOCK_FILE, Declared, Lock, Source, check_preference, choose, resolve

Task: TypeAlias = dict[str, Any]

DAY = 86400.0
"""Seconds."""


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
        "uptodate": [_SameJob(plan, plan.arch or chosen.arch, chosen.sources)],
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


def only_when_named(task: Any, values: Mapping[str, Any]) -> bool:
    """Keep a bare `doit` from running a task: an `uptodate` check that is false only where the task is asked for.

    doit gives options to the tasks that are named on its command line before it asks, and to others after.
    """
    return task.options is None


def task_lock() -> Task:
    """pin branches, tags and Debian packages in gamebear.lock (-u: again, all of them)"""
    return {
        "actions": [(_lock,)],
        "params": [
            {
                "name": "update",
                "short": "u",
                "long": "update",
                "type": bool,
                "default": False,
                "help": "look again for what is pinned already",
            }
        ],
        "uptodate": [only_when_named],
        "verbosity": 2,
    }


def _lock(update: bool) -> TaskError | None:
    from .cache import sources_folder

    return _told(lambda: resolve(declared.values(), Path(LOCK_FILE), sources_folder(), update=update))


def task_sources() -> Task:
    """fetch every pinned source into this machine's cache, to build without a network"""
    return {"actions": [(_fetch_sources,)], "uptodate": [only_when_named], "verbosity": 2}


def _fetch_sources() -> TaskError | None:
    from .cache import sources_folder

    preference = settings().sources

    def fetch() -> Iterator[str]:
        check_preference(preference, declared.values())
        lock = read_lock(Path(LOCK_FILE))
        for source in [choose(source, preference) for source in declared.values()]:
            yield f"{source}: {size(source.fetch(sources_folder(), lock).stat().st_size)}"

    return _told(fetch)


def task_builder() -> Task:
    """connect to the builder and say what it is"""
    return {"actions": [(_describe_builder,)], "uptodate": [only_when_named], "verbosity": 2}


def _describe_builder() -> TaskError | None:
    url = settings().builder

    def describe() -> Iterator[str]:
        yield f"{url}"
        for name, value in builder_of_this_run(url).describe().items():
            yield f"  {name}: {size(value) if name == 'free' else value}"

    return _told(describe)


def task_prune() -> Task:
    """remove from the builder what is no longer used (--older DAYS, --size 5G, --keep N, --images)"""
    return {
        "actions": [(_prune,)],
        "params": [
            {
                "name": "older",
                "long": "older",
                "type": str,
                "default": "",
                "help": "what was not used for so many days",
            },
            {
                "name": "limit",
                "long": "size",
                "type": str,
                "default": "",
                "help": "the least recently used, until results and inputs take no more than this, such as 5G",
            },
            {
                "name": "keep",
                "long": "keep",
                "type": str,
                "default": "",
                "help": "all but the last so many results of each target",
            },
            {
                "name": "images",
                "long": "images",
                "type": bool,
                "default": False,
                "help": "also images that no job which stays has used, and nobody for the days of --older",
            },
        ],
        "uptodate": [only_when_named],
        "verbosity": 2,
    }


def _prune(older: str, limit: str, keep: str, images: bool) -> TaskError | None:
    def prune() -> Iterator[str]:
        days = _number("--older", older, "a number of days, such as 30", r"\d+(\.\d+)?")
        count = _number("--keep", keep, "a number of results, such as 3", r"\d+")
        most = _number("--size", limit, "a number of bytes, such as 500M or 5G", r"\d+(\.\d+)?[KMGT]?(i?B)?")
        if days is None and count is None and most is None and not images:
            raise SettingsError(
                "doit prune does not say what may go.",
                "Say one or more of --older DAYS, --size BYTES (such as 5G), --keep RESULTS and --images.",
            )
        url = settings().builder
        pruned = builder_of_this_run(url).prune(
            None if days is None else days * DAY,
            None if most is None else int(most),
            None if count is None else int(count),
            images,
        )
        counts = (
            (pruned.jobs, "job"),
            (pruned.blobs, "input"),
            (pruned.images, "image"),
            (pruned.others, "other thing"),
        )
        went = ", ".join(f"{count} {name}{'s' if count != 1 else ''}" for count, name in counts if count)
        yield f"{url}: {went or 'nothing'} removed, {size(pruned.freed)} freed"
        for reason in pruned.left:
            yield f"  {printable(reason)}"

    return _told(prune)


def _number(option: str, text: str, what: str, pattern: str) -> float | None:
    """Return the number that an option gives, with the unit that may stand behind it; None where it is not given."""
    if not text:
        return None
    if not re.fullmatch(pattern, text, re.ASCII | re.IGNORECASE):
        raise SettingsError(f"{option} is {text!r}, and should be {what}.")
    digits = re.match(r"[\d.]+", text)
    assert digits
    unit = text[digits.end() :][:1].upper()
    return float(digits[0]) * 1024.0 ** ("KMGT".index(unit) + 1 if unit and unit in "KMGT" else 0)


def _told(work: Callable[[], Iterable[str]]) -> TaskError | None:
    """Print the lines that some work gives; where it fails, return the paragraph that says why."""
    try:
        for line in work():
            print(line)
    except GamebearError as error:
        return TaskError(printable(str(error)))
    return None
