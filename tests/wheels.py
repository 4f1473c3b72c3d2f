"""Packages, built and installed as a person would: by pip.

A pytest plug-in that test modules import from as well, hence PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from project import ROOT


def pip(*arguments: str | Path) -> None:
    """Run pip; what it says is shown where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def build(*sources: Path, into: Path) -> None:
    """Build the wheels of packages; hatchling is fetched where it is not installed."""
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    pip("wheel", *isolation, "--no-deps", "--wheel-dir", into, *sources)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, as it would be published."""
    folder = tmp_path_factory.mktemp("wheel")
    build(ROOT, into=folder)
    (made,) = folder.glob("*.whl")
    return made
