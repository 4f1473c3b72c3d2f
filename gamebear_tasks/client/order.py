"""Order: a plan's job with its current contents, and the uploads that it needs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..builders.base import Order
from ..config import Settings, token_of_this_run
from ..jobspec.plan import Contents, Plan, unreadable
from ..jobspec.spec import File, Job
from ..records import task_record
from ..runner.util.atomic_files import open_regular
from ..sources.lockfile import Lock

METADATA_NAME = b"__sources__"
"""Global of a program that holds the metadata of its sources. A job contains them only if the program mentions it."""


def order_of(plan: Plan, chosen: Settings, contents: Contents | None = None) -> Order:
    """Create the job of a plan, and the order that submits it.

    Args:
        plan: The plan.
        chosen: The settings.
        contents: The job's contents. Default: the result of `plan.read`.

    Raises:
        SettingsError, SourceError, JobError: As in `plan.read`.
    """
    made_of = plan.read(chosen.arch) if contents is None else contents
    program = plan.program
    paths = {name: Path(path) for name, path in plan.inputs.items()}
    files = {sha256: made_of.paths[name] for name, sha256 in made_of.modules.items()}
    files.update((sha256, paths[name]) for name, (sha256, _) in made_of.inputs.items())
    for source in plan.sources.values():
        files.update(source.files())
    python = ""
    if isinstance(program, Path):
        files[made_of.program] = program
    else:
        from ..jobspec.function_digest import python_version
        from ..sources.cache import keep

        python = python_version()
        files[made_of.program] = keep(program.data)
    job = Job(
        arch=made_of.arch,
        program=plan.name,
        identity=made_of.program,
        python=python,
        outputs=tuple(plan.targets),
        folders=plan.folders,
        modules={name: File(sha256) for name, sha256 in made_of.modules.items()},
        inputs={name: File(*content) for name, content in made_of.inputs.items()},
        sources=made_of.sources,
        args=json.loads(plan.args),
        metadata=made_of.metadata if made_of.metadata and _uses_metadata(plan, made_of.paths.values()) else {},
    )
    return Order(
        job=job,
        files=files,
        fetch_trees=lambda: _fetch_trees(plan, made_of.lock),
        time_limit=chosen.time_limit if plan.time_limit is None else plan.time_limit,
        base=chosen.base,
        keep_failed=chosen.keep_failed,
        fresh=token_of_this_run() if chosen.fresh else "",
        python=python or None,
    )


def _uses_metadata(plan: Plan, modules: Iterable[Path]) -> bool:
    """Return whether the program uses the metadata of its sources; if not, the job omits them, URLs included.

    The builder passes on exactly the job's metadata, so equal jobs see equal metadata.
    """
    own = _text(plan.program) if isinstance(plan.program, Path) else plan.program.data
    return METADATA_NAME in own or any(METADATA_NAME in _text(path) for path in modules)


def _fetch_trees(plan: Plan, lock: Lock | None) -> dict[str, tuple[str, Path]]:
    from ..sources.base import FetchedSource, sha256_of_tree
    from ..sources.cache import keep, sources_folder

    with task_record.phase("sources"):
        trees = {}
        for name, source in plan.sources.items():
            if lock and isinstance(source, FetchedSource):
                tree = source.fetch(sources_folder(), lock)
                trees[name] = sha256_of_tree(tree), tree
        if not isinstance(plan.program, Path):
            from ..jobspec.function_digest import cloudpickle_archive

            parts = {"/function.lines": plan.program.lines, "/cloudpickle.zip": cloudpickle_archive()}
            for name, data in parts.items():
                path = keep(data)
                trees[name] = path.name, path
    return trees


def _text(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise unreadable(path, error) from error
