"""Bake images in tests: run the task's action as doit does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from doit.exceptions import BaseFail
from doit.task import Task

from gamebear_tasks import sd_image


def bake(base: Path, output: Path, **arguments: Any) -> None:
    """Bake an image and assert success."""
    failure = baked(base, output, **arguments)
    assert failure is None, failure.message


def refused(base: Path, output: Path, *words: str, **arguments: Any) -> None:
    """Assert that baking fails with a message that contains the words, and leaves no output."""
    failure = baked(base, output, **arguments)
    assert failure is not None and not output.exists()
    for word in words:
        assert word in failure.message, failure.message
    assert len(failure.message.split("\n→ ")) == 2, "what failed, and the fix"


def baked(base: Path, output: Path, **arguments: Any) -> BaseFail | None:
    """Bake an image. Return the failure, or None."""
    task = sd_image(base, output=output, **{"arch": "armhf", **arguments})
    function, given = task["actions"][0]
    here = os.getcwd()
    os.chdir(output.parent)  # logs are written to the project's folder
    try:
        done = function(*given, Task("image", []))
    finally:
        os.chdir(here)
    assert not list(output.parent.glob(".*.bake")), "nothing that it worked on is left"
    return done if isinstance(done, BaseFail) else None
