"""Command line of the runner: `serve` for a client; `supervise`, `build`, `materials` and `enter` for a job."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run one of the runner's commands and return its exit status.

    Each branch imports only its own command, because Python's start is most of a short command's cost on a small
    machine.
    """
    command, *rest = argv
    if command == "serve":
        from .server import session

        return session.main()
    if command == "supervise":
        from .executor import supervisor

        digest, attempt, lock, alive = rest
        return supervisor.main(digest, attempt, int(lock), int(alive))
    if command == "build":
        from .executor import worker

        return worker.main(*rest)
    if command == "materials":
        from .server import materials

        return materials.main(*rest)
    if command == "enter":
        from .maintenance import retained_containers

        return retained_containers.main(*rest)
    print(f"unknown command of the runner: {command!r}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
