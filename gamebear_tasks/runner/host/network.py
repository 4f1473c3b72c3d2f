"""Commands without network: buildah in a new network namespace, which has only a loopback interface.

A container shares the namespace of the buildah that runs it: with chroot isolation always, otherwise with `--network
host`. So the command has no network with any isolation, and also no abstract Unix sockets of the builder.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from ..util.errors import RunnerError
from .subprocesses import captured, last_lines

# SIOCSIFFLAGS with IFF_UP, see netdevice(7). If anything fails, the command does not run.
_LOOPBACK = """\
import fcntl, os, socket, struct, sys
with socket.socket() as some:
    fcntl.ioctl(some, 0x8914, struct.pack("16sH22x", b"lo", 1))
os.execvp(sys.argv[1], sys.argv[1:])
"""

WITHOUT_NETWORK = ("unshare", "--net", "--", sys.executable, "-I", "-S", "-c", _LOOPBACK)
"""Command prefix that runs a program without network, or not at all; for use inside the namespace."""


class NetworkError(RunnerError):
    """The builder cannot run a command without network."""

    kind = "script"


def check(environment: Mapping[str, str]) -> None:
    """Verify that `WITHOUT_NETWORK` works on this builder.

    Raises:
        NetworkError: It does not.
    """
    status, _, stderr = captured([*WITHOUT_NETWORK, "true"], dict(environment))
    if status:
        raise NetworkError(
            "run(network=False) failed: the builder cannot create a network namespace "
            f"({last_lines(stderr, 1) or f'status {status}'}).",
            "Check there that `unshare --user --map-root-user --net true` works and sysctl user.max_net_namespaces, "
            "or remove network=False.",
        )
