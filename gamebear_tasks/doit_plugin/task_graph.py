"""Dependency closure of the selected tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def with_dependencies(tasks: Mapping[str, Any], selected: Iterable[str]) -> list[str]:
    """Return the names of tasks and of all that these depend on, in their order.

    Args:
        tasks: doit's, by name; it has found out already which of them make each other's files.
        selected: names; those of no task are left out.
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
