"""What the project promises in time and memory, measured against what people would do without it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests' sshd, accounts, proxy and projects are ours too
