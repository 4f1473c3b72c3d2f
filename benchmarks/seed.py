"""Baseline: the five steps over ssh and scp in the blog post that the project is based on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from project import ROOT

from .machine import Builder
from .measure import checked

STEPS = """\
set -e
ssh() { command ssh -F "$CONFIG" "$@"; }
scp() { command scp -q -F "$CONFIG" "$@"; }
folder=$(ssh builder mktemp -d)
scp buildscript.py "builder:$folder"
ssh builder buildahscript-py "$folder/buildscript.py"
scp "${@/#/builder:$folder/}" .
ssh builder rm -r "$folder"
"""
"""Five sequential connections without ControlMaster. scp opens one more for each output but the first."""


def install(builder: Builder, arch: str, facts: dict[str, object]) -> None:
    """Install the command `buildahscript-py` for an account.

    Args:
        builder: The account.
        arch: Debian's name of the architecture of the scripts' images.
        facts: Capabilities that the runner detected. The image store is replaced by the account's default.
    """
    runner = builder.bin / "gamebear_runner"
    shutil.rmtree(runner, ignore_errors=True)
    shutil.copytree(ROOT / "gamebear_tasks" / "runner", runner, ignore=shutil.ignore_patterns("__pycache__"))
    builder.write("bin/facts.json", json.dumps({**facts, "storage": [], "driver": ""}))
    builder.write("bin/arch.json", json.dumps(arch))
    builder.write("bin/buildahscript-py", Path(__file__).with_name("standin.py").read_text(), 0o755)
    checked(["chown", "--recursive", f"{builder.account.name}:", str(builder.bin)])  # Python writes bytecode there


def five_steps(folder: Path, script: str, outputs: Sequence[str], config: Path) -> None:
    """Build a script's outputs by the five steps, and copy them to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "buildscript.py").write_text(script)
    checked(
        ["bash", "-c", STEPS, "steps", *outputs],
        cwd=folder,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "CONFIG": str(config)},
    )
    for name in outputs:
        assert (folder / name).stat().st_size, f"{name} is empty"
