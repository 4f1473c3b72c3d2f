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
        tasks: doit's, by name.

    Yields:
        For each creator that fails, a line that says why: it may need files that another task makes.
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
            why = error.message if isinstance(error, GamebearError) else f"{type(error).__name__}: {error}"
            hint = f"run: doit {loader.task_dep}, then gamebear lock" if loader.task_dep else "mend it in dodo.py"
            yield f"not all sources of the task {name} are known, as it cannot be created yet: {why} ({hint})"


def _exhaust(tasks: Any) -> None:
    """Run a creator to its end; generators may yield generators."""
    if inspect.isgenerator(tasks):
        for each in tasks:
            _exhaust(each)
