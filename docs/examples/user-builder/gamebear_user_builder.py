"""The builder `user:NAME`: another account of this machine, for root. Its builds cannot access root's files."""

from __future__ import annotations

import os
import pwd

from gamebear_tasks.builders.protocol.client import RunnerBuilder
from gamebear_tasks.builders.transports.local import ProcessConnection
from gamebear_tasks.errors import BuilderError, SettingsError


def open_builder(url: str) -> RunnerBuilder:
    """Open `user:NAME`; the first request connects.

    Raises:
        SettingsError: no name follows the colon.
    """
    name = url.partition(":")[2]
    if not name:
        raise SettingsError(f"The builder {url!r} has no user name.", "Use builder=user:NAME.")
    return RunnerBuilder(url, f"{name}'s account", lambda: connect(name))


def connect(name: str) -> ProcessConnection:
    """Return a connection that starts programs as a user, in its home, with a clean environment.

    Raises:
        BuilderError: the user does not exist, or the caller is not root.
    """
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise BuilderError(
            f"This machine has no user {name!r}.", f"Create it: sudo useradd --create-home {name}"
        ) from None
    if os.geteuid() != 0:
        raise BuilderError(f"Only root may start programs as {user.pw_name}.", "Run doit as root, or use ssh://.")
    environment = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name, "PATH": os.defpath}
    return ProcessConnection(
        (
            *("runuser", "--user", user.pw_name, "--"),
            *("env", "--ignore-environment", f"--chdir={user.pw_dir}"),
            *(f"{variable}={value}" for variable, value in environment.items()),
        )
    )
