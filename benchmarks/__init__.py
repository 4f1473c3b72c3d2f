"""Benchmarks: time and memory of gamebear-tasks, compared with the manual alternatives."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""Root of the checkout."""

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the benchmarks reuse the tests' sshd, accounts, proxy and projects
