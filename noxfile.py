"""Test sessions: the oldest and the newest supported dependencies, on the oldest and the newest Python.

`nox` runs the unit tests. Arguments after `--` go to pytest: `nox -- -m "not slow"` adds the system tests, which need
what `tests/run` installs.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.error_on_missing_interpreters = True

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
PYTHONS = ["3.10", "3.13"]


def lower_bounds() -> str:
    """Constraints that pin each run-time dependency to its lower bound."""
    requirements = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dask"]]
    return "".join(f"{requirement.replace('>=', '==')}\n" for requirement in requirements)


@nox.session(python=PYTHONS)
@nox.parametrize("dependencies", ["oldest", "newest"])
def tests(session: nox.Session, dependencies: str) -> None:
    """Run the unit tests."""
    constraints = Path(session.virtualenv.location, "constraints.txt")
    constraints.write_text(lower_bounds() if dependencies == "oldest" else "")
    session.install("--upgrade", "--editable", ".[test]", "--constraint", str(constraints))
    session.run("python", "-m", "pip", "freeze", "--exclude-editable")
    session.run("pytest", *session.posargs)
