"""The doit action of `artifact()`. It imports `client.build` only when the task runs."""

from __future__ import annotations

from typing import Any, TextIO

from doit.action import BaseAction
from doit.exceptions import BaseFail, TaskError, TaskFailed

from ..client.cancellation import end_with_parent, running
from ..errors import GamebearError, JobError, remedy
from ..jobspec.plan import Plan


class Build(BaseAction):  # type: ignore[misc]  # doit has no types
    """Builds a plan's job and places its outputs."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.task: Any = None
        self.out: str | None = None
        self.err: str | None = None
        self.result: Any = None
        self.values: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        end_with_parent()  # doit has started this process, and pickled its tasks for it

    def __str__(self) -> str:
        return f"Build: {self.plan.name} -> {', '.join(self.plan.targets.values())}"

    def __repr__(self) -> str:
        return f"<{self}>"

    def execute(self, out: TextIO | None = None, err: TextIO | None = None) -> BaseFail | None:
        """Build.

        Args:
            out: where the log is shown live; None for nowhere (doit's verbosity 0 and 1).
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
            hint = "See that it is there and yours, and that the disk has room; then run doit again."
            return TaskError(str(JobError(f"{what}.", remedy(error) or hint)))
