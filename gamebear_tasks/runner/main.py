"""The runner's command line: `serve` for a client; `supervise`, `build`, `materials` and `enter` for a job."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run one of the runner's commands and return its exit status.

    Each imports only what it needs: starting Python is most of what a short command costs on a small machine.
    """
    command, *rest = argv
    if command == "serve":
        from . import serve

        return serve.main()
    if command == "supervise":
        from . import supervise

        digest, attempt, lock, alive = rest
        return supervise.main(digest, attempt, int(lock), int(alive))
    if command == "build":
        from . import build

        return build.main(*rest)
    if command == "materials":
        from . import materials

        return materials.main(*rest)
    if command == "enter":
        from . import kept

        return kept.main(*rest)
    print(f"the runner has no command {command!r}", file=sys.stderr)
    return 2
