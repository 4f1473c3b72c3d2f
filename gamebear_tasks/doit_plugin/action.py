"""The doit actions of `artifact()`. They import what they need only when they run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

from doit.action import BaseAction, PythonAction
from doit.exceptions import BaseFail, TaskError, TaskFailed

from ..client.cancellation import end_with_parent, running
from ..errors import GamebearError, JobError, remedy
from ..jobspec.plan import Plan
from ..util.text import in_line


class Build(BaseAction):  # type: ignore[misc]  # doit has no types
    """Build a plan's job and install its outputs."""

    task: Any = None
    out: str | None = None
    err: str | None = None
    result: Any = None
    values: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        end_with_parent()  # unpickled: this is a worker process of doit -n

    def __str__(self) -> str:
        return f"Build: {self.plan.name} -> {', '.join(self.plan.targets.values())}"

    def __repr__(self) -> str:
        return f"<{self}>"

    def execute(self, out: TextIO | None = None, err: TextIO | None = None) -> BaseFail | None:
        """Build.

        Args:
            out: stream for the live log; None to hide it (doit's verbosity 0 and 1).
            err: unused; the log is one stream.
        """
        try:
            with running():
                from ..client.build import Building

                building = Building(self.plan, self.task.name if self.task else self.plan.name, out)
                self.values = building.run()
                self.result = building.result
                return None
        except JobError as error:
            return TaskFailed(str(error))
        except GamebearError as error:
            return TaskError(str(error))
        except OSError as error:
            what = f"{error.filename}: {error.strerror or error}" if error.filename else str(error)
            hint = "Check that it exists, its permissions and the free disk space; then run doit again."
            return TaskError(str(JobError(f"{what}.", remedy(error) or hint)))


class RemoveTargets(PythonAction):  # type: ignore[misc]  # doit has no types
    """Clean action: remove a task's targets, their provenance statements and partial downloads.

    doit would wrap a function in an action that refers to its task, which refers to the action. Such cycles make the
    garbage collector traverse all tasks at exit: a twentieth of an up-to-date run with 2,000 tasks.
    """

    args = ()

    def __init__(self) -> None:  # without PythonAction's, which requires the function
        pass

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the function. doit sets `dryrun`."""
        return {}

    @property
    def task(self) -> None:
        """None, see the class."""

    @task.setter
    def task(self, task: Any) -> None:
        self._name, self._targets = task.name, task.targets

    @property
    def py_callable(self) -> Any:
        """The function to call."""
        return self._remove

    def _remove(self, dryrun: bool = False) -> None:
        from ..client import installed_folders
        from ..client.install_outputs import leftovers, remove_leftover, statement_of

        for target in map(Path, self._targets):
            if os.path.isdir(target) and not os.path.islink(target):
                print(in_line(f"{self._name} - removing installed files from folder '{target}'"))
                if not dryrun:
                    installed_folders.remove(target)
            for path in (target, statement_of(target)):
                if os.path.isfile(path) or os.path.islink(path):  # neither raises an error for an overlong name
                    print(in_line(f"{self._name} - removing file '{path}'"))
                    if not dryrun:
                        path.unlink(missing_ok=True)
            for path in leftovers(target):
                print(in_line(f"{self._name} - removing '{path}'"))
                if not dryrun:
                    remove_leftover(path)

    def __str__(self) -> str:
        return "remove targets"

    def __repr__(self) -> str:
        return f"<{self}>"
