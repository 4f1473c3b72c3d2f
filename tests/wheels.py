"""Packages that are built and installed by pip, as by a user.

A pytest plug-in that test modules also import from, hence PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from project import ROOT


def pip(*arguments: str | Path) -> None:
    """Run pip and assert success. The assertion shows its output."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def build(*sources: Path, into: Path) -> None:
    """Build the wheels of packages. pip downloads hatchling unless it is installed."""
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    pip("wheel", *isolation, "--no-deps", "--wheel-dir", into, *sources)


@pytest.fixture(scope="session")
def wheel(system: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel of gamebear-tasks, as published."""
    folder = tmp_path_factory.mktemp("wheel")
    build(ROOT, into=folder)
    (made,) = folder.glob("*.whl")
    return made
