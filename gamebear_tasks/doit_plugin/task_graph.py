"""Dependency closure of the selected tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def with_dependencies(tasks: Mapping[str, Any], selected: Iterable[str]) -> list[str]:
    """Return the names of the selected tasks and of all tasks that they depend on, in order.

    Args:
        tasks: doit's tasks by name, after doit has resolved the dependencies between files and targets.
        selected: names; unknown ones are ignored.
    """
    todo = list(reversed([*selected]))
    found: dict[str, None] = {}
    while todo:
        name = todo.pop()
        task = tasks.get(name)
        if task is None or name in found:
            continue
        found[name] = None
        todo += [*task.task_dep, *task.setup_tasks, *task.calc_dep]
    return [*found]
