"""A real sshd on the loopback address, an account on it, and a client's home folder. Tests that use it run as root.

No host key is accepted automatically: `client_home` writes the server's key to `known_hosts`, as a careful user would.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SSHD = "/usr/sbin/sshd"


@dataclass(frozen=True)
class Account:
    """An unprivileged user of this machine, created for the tests."""

    name: str
    uid: int
    home: Path


@contextlib.contextmanager
def new_account(name: str) -> Iterator[Account]:
    """Create an account with key login only (its password is `*`). Remove it, its files and processes at the end."""
    _run("useradd", "--create-home", "--password", "*", "--shell", "/bin/bash", name)
    try:
        entry = pwd.getpwnam(name)
        yield Account(name, entry.pw_uid, Path(entry.pw_dir))
    finally:
        _kill(_owned_by(entry.pw_uid))
        subprocess.run(["userdel", "--remove", name], capture_output=True, check=False)


def new_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """Create the key pair `path` and `path`.pub. `kind` is ed25519, ecdsa or rsa."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _run(
        "ssh-keygen",
        "-q",
        "-t",
        kind,
        *(["-b", "2048"] if kind == "rsa" else []),
        "-N",
        passphrase,
        "-C",
        path.name,
        "-f",
        str(path),
    )
    return path


def public(key: Path) -> str:
    """Return type and base64 data of a public key, as in known_hosts."""
    return " ".join(key.with_name(key.name + ".pub").read_text().split()[:2])


def fingerprint(key: Path) -> str:
    """Return the SHA256:… fingerprint of a key."""
    return _run("ssh-keygen", "-l", "-f", str(key)).split()[1]


class Sshd:
    """An sshd with its own host keys, options and log.

    Args:
        folder: Folder for its files.
        account: Account that can log in.
        kinds: Types of its host keys.
        options: Additional lines of sshd_config by keyword, such as MaxSessions=1.
    """

    def __init__(self, folder: Path, account: Account, kinds: Sequence[str] = ("ed25519",), **options: object) -> None:
        self.folder = folder
        self.account = account
        self.options = dict(options)
        self.port = _free_port()
        self.host_keys = {kind: new_key(folder / f"ssh_host_{kind}_key", kind) for kind in kinds}
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "log"

    def __enter__(self) -> Sshd:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._authorized_keys().unlink(missing_ok=True)

    @property
    def url(self) -> str:
        """URL of the builder."""
        return f"ssh://{self.account.name}@127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Log since the object was created, including restarts."""
        return self._log.read_text(errors="replace")

    @property
    def connections(self) -> int:
        """Number of accepted connections."""
        return self.log.count("Connection from ")

    @property
    def known_hosts(self) -> str:
        """Lines for known_hosts, one per host key."""
        return "".join(f"[127.0.0.1]:{self.port} {public(key)}\n" for key in self.host_keys.values())

    def start(self) -> None:
        """Start sshd on its port, and wait until it listens."""
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        config = self.folder / "sshd_config"
        config.write_text(self._config())
        before = len(self.log) if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        until = time.monotonic() + 10
        while "Server listening on" not in self.log[before:]:
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"sshd did not start: {self.log[before:]}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Kill sshd immediately with all its sessions, like a reboot."""
        if self._process is None:
            return
        family = _descendants(self._process.pid)
        self._process.kill()
        self._process.wait()
        self._process = None
        _kill(family)

    def hang_up(self) -> None:
        """Kill sshd with all its connections. Programs that the sessions started continue."""
        if self._process is None:
            return
        family = {pid for pid in _descendants(self._process.pid) if _name(pid).startswith("sshd")}
        self._process.kill()
        self._process.wait()
        self._process = None
        _kill(family)

    def restart(self) -> None:
        """Restart sshd on the same port with the current options."""
        self.stop()
        self.start()

    def authorize(self, *keys: Path) -> None:
        """Replace the authorized keys."""
        lines = [public(key) for key in keys]
        self._authorized_keys().parent.mkdir(mode=0o755, exist_ok=True)
        self._authorized_keys().write_text("".join(f"{line}\n" for line in lines))

    def sessions(self) -> int:
        """Return the number of processes that serve connections or were started by them."""
        return len(_descendants(self._process.pid)) if self._process else 0

    def freeze(self) -> contextlib.AbstractContextManager[None]:
        """Suspend all processes of its sessions for a block, to simulate a peer that does not respond."""
        return _frozen(_descendants(self._process.pid) if self._process else set())

    def _authorized_keys(self) -> Path:
        return self.account.home / ".ssh" / f"authorized_keys_{self.port}"

    def _config(self) -> str:
        options: dict[str, object] = {
            "ListenAddress": f"127.0.0.1:{self.port}",
            "PidFile": "none",
            "LogLevel": "VERBOSE",
            "AuthorizedKeysFile": self._authorized_keys(),
            "AllowUsers": self.account.name,
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "UsePAM": "no",
            "Subsystem": "sftp internal-sftp",
            **self.options,
        }
        keys = "".join(f"HostKey {key}\n" for key in self.host_keys.values())
        return keys + "".join(f"{name} {value}\n" for name, value in options.items())


def client_home(folder: Path, *servers: Sshd) -> Path:
    """Create a home folder with a key that the servers accept, an empty config, and their host keys in known_hosts."""
    home = folder / "home"
    key = new_key(home / ".ssh" / "id_ed25519")
    (home / ".ssh" / "config").touch(mode=0o600)
    (home / ".ssh" / "known_hosts").write_text("".join(server.known_hosts for server in servers))
    for server in servers:
        server.authorize(key)
    return home


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _processes() -> Iterator[Path]:
    return (folder for folder in Path("/proc").iterdir() if folder.name.isdigit())


def _descendants(pid: int) -> set[int]:
    """Return the descendants of a process."""
    parents = {}
    for process in _processes():
        with contextlib.suppress(OSError):
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family - {pid}


def _owned_by(uid: int) -> set[int]:
    found = set()
    for process in _processes():
        with contextlib.suppress(OSError):
            if process.stat().st_uid == uid:
                found.add(int(process.name))
    return found


def _kill(family: set[int]) -> None:
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 5
    while any(_alive(pid) for pid in family) and time.monotonic() < until:
        time.sleep(0.01)


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def _frozen(family: set[int]) -> Iterator[None]:
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
