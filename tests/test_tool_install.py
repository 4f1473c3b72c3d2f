"""`pipx install .` and `uv tool install .` of the checkout yield a working `gamebear`. They download dependencies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

pytestmark = pytest.mark.system

DODO = """
from gamebear_tasks import artifact

def task_hello():
    return artifact("hello.py", outputs=["build/hello"])
"""


def test_pipx_and_uv_install_a_gamebear_that_builds(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "tools"], check=True)
    tools = tmp_path / "tools" / "bin"
    subprocess.run([tools / "pip", "--quiet", "--no-input", "install", "pipx", "uv"], check=True)
    environment = {
        **os.environ,
        "HOME": str(tmp_path / "home"),
        "PIPX_HOME": str(tmp_path / "pipx"),
        "PIPX_BIN_DIR": str(tmp_path / "pipx-bin"),
        "UV_CACHE_DIR": str(tmp_path / "uv-cache"),
        "UV_TOOL_DIR": str(tmp_path / "uv"),
        "UV_TOOL_BIN_DIR": str(tmp_path / "uv-bin"),
        "UV_PYTHON": sys.executable,
    }
    for name, words in {"pipx": ["install"], "uv": ["tool", "install"]}.items():
        command = [str(tools / name), *words, str(ROOT), "--python", sys.executable]
        subprocess.run(command, env=environment, check=True)
        folder = tmp_path / f"project-{name}"
        folder.mkdir()
        (folder / "dodo.py").write_text(DODO)
        (folder / "hello.py").write_text("open('hello', 'w').write('hello')")
        program = tmp_path / f"{name}-bin" / "gamebear"
        subprocess.run([program], cwd=folder, env=environment, check=True)
        assert (folder / "build" / "hello").read_text() == "hello"
        output = subprocess.run([program, "--version"], env=environment, check=True, capture_output=True, text=True)
        assert output.stdout.startswith("gamebear-tasks 0.") and "\ndoit 0." in output.stdout
