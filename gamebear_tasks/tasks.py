"""What a `dodo.py` is written with: `artifact()`, and the tasks that sources and builders need."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from doit.task import clean_targets
from doit.tools import config_changed

from . import functions
from .action import Build, Plan, builder_of_this_run, read_lock
from .config import settings
from .errors import GamebearError, SettingsError, SourceError
from .functions import Function
from .imports import local_modules
from .job import FORMAT, Json, canonical_json
from .place import part_pattern
from .report import size
from .runner.files import is_file_name
from .sources import LOCK_FILE, Declared, Source, check_preference, choose

Task: TypeAlias = dict[str, Any]

_declared: dict[str, Declared] = {}
"""Every source that an `artifact()` of this dodo.py declares, by a text that tells it from the others."""


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
    targets = _named(outputs, "outputs")
    if not targets:
        raise SettingsError(f"artifact({_called(program)}) has no outputs.", "Say outputs=[\"build/NAME\"].")
    chosen = settings()
    lock_path = Path(LOCK_FILE)
    given = dict(sources or {})
    for name, source in given.items():
        if not is_file_name(name):
            raise SettingsError(f"{name!r} cannot be the name of a source's folder.")
        _declared.setdefault(repr(source), source)
    plan = Plan(
        program=Path(program) if isinstance(program, str | Path) else program,
        targets=targets,
        modules=local_modules(Path(program)) if isinstance(program, str | Path) else functions.modules(program),
        inputs={str(name): Path(path) for name, path in inputs.items()}
        if isinstance(inputs, Mapping)
        else _named(inputs, "inputs"),
        sources={name: choose(source, chosen.sources) for name, source in given.items()},
        args=_checked_args(args or {}, program),
        arch=arch or "",
        time_limit=time_limit,
        lock=lock_path,
    )
    _check_names(plan)
    files = [*plan.modules.values(), *plan.inputs.values()]
    if isinstance(plan.program, Path):
        files.insert(0, plan.program)
    return {
        "actions": [Build(plan)],
        "file_dep": [str(path) for path in files],
        "targets": [str(path) for path in targets.values()],
        "uptodate": [config_changed(_rest_of_job(plan, arch or chosen.arch))],
        "clean": [clean_targets, (_remove_parts, [list(targets.values())])],
        "verbosity": 2,
    }


def _rest_of_job(plan: Plan, arch: str) -> str:
    """Return a digest of everything in the job that is no `file_dep`."""
    lock = read_lock(plan.lock)
    rest: dict[str, Json] = {
        "gamebear": FORMAT,
        "arch": arch,
        "args": dict(plan.args),
        "program": plan.name if isinstance(plan.program, Path) else functions.identity(plan.program),
        "names": {name: str(path) for name, path in [*plan.inputs.items(), *plan.targets.items()]},
        "sources": {name: _pinned(source, lock) for name, source in plan.sources.items()},
    }
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def _pinned(source: Source, lock: Any) -> Json:
    try:
        return source.identity(lock)
    except SourceError:
        return None  # building it says what to do


def _named(paths: Iterable[str | Path], what: str) -> dict[str, Path]:
    """Return paths by their file names.

    Raises:
        SettingsError: it is a text instead of a list, or two have the same name.
    """
    if isinstance(paths, str | Path):
        raise SettingsError(f"{what}= is a list, and got the text {str(paths)!r}.", f"Say {what}=[{str(paths)!r}].")
    named: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.name in named:
            raise SettingsError(
                f"Two {what} have the name {path.name!r}: {named[path.name]} and {path}.",
                "In the program's folder they would be one file; give one another name.",
            )
        named[path.name] = path
    return named


def _check_names(plan: Plan) -> None:
    """Refuse names that would fall together in the program's folder."""
    taken = {plan.name: "the program"}
    groups = (("a module", plan.modules), ("an input", plan.inputs), ("a source", plan.sources))
    for what, names in groups:
        for name in names:
            if what != "a module" and not is_file_name(name):
                raise SettingsError(f"{name!r} cannot be the name of {what} of {plan.name}.")
            first = name.split("/")[0]
            if name in taken or (what != "a module" and first in taken):
                raise SettingsError(
                    f"{name!r} is {what} of {plan.name}, and {taken.get(name) or taken[first]} has that name too.",
                    "Give one of them another name.",
                )
            taken[name] = what
    for name in plan.targets:
        if not is_file_name(name):
            raise SettingsError(f"{name!r} cannot be the name of an output of {plan.name}.")


def _checked_args(args: Mapping[str, Json], program: str | Path | Function) -> dict[str, Json]:
    try:
        canonical_json(args)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"The args of artifact({_called(program)}) are not plain JSON: {error}.",
            "Give numbers, texts, lists and dicts of them.",
        ) from error
    return dict(args)


def _called(program: str | Path | Function) -> str:
    return repr(str(program)) if isinstance(program, str | Path) else functions.name_of(program)


def _remove_parts(targets: list[Path], dryrun: bool) -> None:
    """Remove what broken-off downloads left of targets; a `clean` action."""
    for target in targets:
        for part in target.parent.glob(part_pattern(target)):
            print(f"removing {part}")
            if not dryrun:
                part.unlink(missing_ok=True)


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
        "uptodate": [False],
        "verbosity": 2,
    }


def _lock(update: bool) -> bool:
    from .cache import sources_folder
    from .sources import resolve

    return _told(lambda: resolve(_declared.values(), Path(LOCK_FILE), sources_folder(), update=update))


def task_sources() -> Task:
    """fetch every pinned source into this machine's cache, to build without a network"""
    return {"actions": [(_fetch_sources,)], "uptodate": [False], "verbosity": 2}


def _fetch_sources() -> bool:
    from .cache import sources_folder

    preference = settings().sources

    def fetch() -> Iterator[str]:
        check_preference(preference, _declared.values())
        lock = read_lock(Path(LOCK_FILE))
        for source in [choose(declared, preference) for declared in _declared.values()]:
            yield f"{source}: {size(source.fetch(sources_folder(), lock).stat().st_size)}"

    return _told(fetch)


def task_builder() -> Task:
    """connect to the builder and say what it is"""
    return {"actions": [(_describe_builder,)], "uptodate": [False], "verbosity": 2}


def _describe_builder() -> bool:
    url = settings().builder

    def describe() -> Iterator[str]:
        yield f"{url}"
        for name, value in builder_of_this_run(url).describe().items():
            yield f"  {name}: {size(value) if name == 'free' else value}"

    return _told(describe)


def _told(work: Any) -> bool:
    """Print the lines that some work gives; where it fails, the paragraph that says why, and return False."""
    try:
        for line in work():
            print(line)
    except GamebearError as error:
        print(error)
        return False
    return True
