"""All sources that a project's tasks declare, including those of `@create_after` tasks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from doit.task import DelayedLoader

from ..errors import GamebearError


def create_delayed(tasks: Mapping[str, Any]) -> Iterator[str]:
    """Call the creators of the tasks that doit has not created yet, which declares their sources.

    Args:
        tasks: doit's tasks by name.

    Yields:
        A warning for each creator that fails, for example because it needs files of a task that has not run.
    """
    seen: list[Any] = []
    for name, task in tasks.items():
        loader = task.loader
        if not isinstance(loader, DelayedLoader) or loader.created or loader.creator in seen:
            continue
        seen.append(loader.creator)
        try:
            _exhaust(loader.creator(**(loader.kwargs or {})))
        except Exception as error:  # noqa: BLE001 - the author's code
            cause = error.message if isinstance(error, GamebearError) else f"{type(error).__name__}: {error}"
            fix = f"run doit {loader.task_dep}, then this command again" if loader.task_dep else "fix it in dodo.py"
            yield f"task {name} was skipped, because it cannot be created: {cause.rstrip('.')} ({fix})"


def _exhaust(tasks: Any) -> None:
    """Run a creator to its end; generators may yield generators."""
    if inspect.isgenerator(tasks):
        for each in tasks:
            _exhaust(each)
