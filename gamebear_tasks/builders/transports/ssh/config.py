"""Resolve a builder's `ssh://` URL with OpenSSH's configuration, as `ssh` does."""

from __future__ import annotations

import getpass
import hashlib
import os
import pwd
import re
import shutil
import socket
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....errors import SettingsError
from ....util.subprocesses import ProgramError, run
from ....util.urls import shown

CONNECT_TIMEOUT = 15.0
"""Seconds to wait for a connection if the configuration has no `ConnectTimeout`."""
ALIVE_INTERVAL = 15.0
"""Seconds of silence before a keepalive request if the configuration has no `ServerAliveInterval`."""

_HOST = re.compile(r"(?!-)[A-Za-z0-9_.+~=-]+\Z")
_ADDRESS_6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9_.-]+)?\Z")
_USER = re.compile(r"(?!-)[^\s\x00-\x1f'\"`$\\;&<>|(){}\[\]/:*?]+\Z")


@dataclass(frozen=True)
class Address:
    """A host as named by the user, before the configuration is read.

    Attributes:
        host: an alias in the configuration, a host name or a numeric address.
        user: None for the configured user.
        port: None for the configured port.
    """

    host: str
    user: str | None = None
    port: int | None = None

    @property
    def words(self) -> str:
        """Arguments with which `ssh` and `ssh-copy-id` reach the host."""
        port = f"-p {self.port} " if self.port else ""
        return f"{port}{f'{self.user}@' if self.user else ''}{self.host}"


@dataclass(frozen=True)
class Host:
    """Connection parameters of a host.

    Attributes:
        address: the address that the user specified.
        family: AF_UNSPEC, AF_INET or AF_INET6.
        alias: `HostKeyAlias`, or "".
        known_hosts: known_hosts files, the user's own first.
        revoked: file of `RevokedHostKeys`, if any.
        host_key_algorithms: permitted algorithms; empty for all. The same applies to ciphers and macs.
        identities: files of private keys, existing or not.
        agent: path of the agent's socket, if any.
        jumps: jump hosts, the nearest first.
        proxy_command: shell command that connects to the host, expanded, or "".
        methods: authentication methods that the configuration permits.
        may_ask: whether the user may be asked for a password.
        connect_timeout: seconds.
        alive_interval: seconds.
    """

    address: Address
    hostname: str
    user: str
    port: int
    family: socket.AddressFamily
    alias: str
    known_hosts: tuple[Path, ...]
    revoked: Path | None
    host_key_algorithms: frozenset[str]
    ciphers: frozenset[str]
    macs: frozenset[str]
    identities: tuple[Path, ...]
    certificates: tuple[Path, ...]
    only_identities: bool
    agent: str | None
    jumps: tuple[Address, ...]
    proxy_command: str
    methods: frozenset[str]
    may_ask: bool
    connect_timeout: float
    alive_interval: float
    alive_count: int

    @property
    def known_as(self) -> str:
        """Name of the host in known_hosts."""
        if self.alias:
            return self.alias
        name = self.hostname.lower()
        return name if self.port == 22 else f"[{name}]:{self.port}"


def parse_url(url: str) -> Address:
    """Parse a builder's URL, ssh://[user@]host[:port].

    Raises:
        SettingsError: the URL is invalid.
    """
    what = f"The builder {shown(url)!r}"
    # Match up to the last @, because a password in the URL may contain an unescaped `/`.
    match = re.match(r"ssh://(?:(.*)@)?([^/?#@]*)([^@]*)\Z", url, re.DOTALL)
    if match is None:
        raise SettingsError(
            f"{what} is not an SSH address.",
            "Write it as ssh://[user@]host[:port], as in ssh://pi@buildpi.",
        )
    user, place, rest = match.groups()
    user = None if user is None else urllib.parse.unquote(user)
    if user is not None and ":" in user:
        raise SettingsError(
            f"The builder ssh://…@{place} contains a password, which others can read.",
            "Remove the password: log in with a key (ssh-copy-id), or enter it when prompted.",
        )
    if rest not in ("", "/") or (user is not None and re.search("[/?#]", user)):
        raise SettingsError(
            f"{what} has a path, a query or a fragment.",
            "Write it as ssh://[user@]host[:port].",
        )
    return _address(place, user, what)


def _address(place: str, user: str | None, what: str) -> Address:
    """Parse host[:port]; `what` begins the error message."""
    hint = "Write it as ssh://[user@]host[:port], an IPv6 address in brackets."
    if not place:
        raise SettingsError(f"{what} has no host.", hint)
    match = re.match(r"(\[[^\[\]]*\]|[^\[\]:]+)(?::(.*))?\Z", place, re.DOTALL)
    if match is None:
        raise SettingsError(f"{what} has an invalid host: {place!r}.", hint)
    host, port = match[1].strip("[]"), match[2]
    if not (_HOST.match(host) or _ADDRESS_6.match(host)):  # `ssh -G` also prints names and IPv4 addresses in brackets
        raise SettingsError(f"{what} has an invalid host: {host!r} is neither a name nor an address.", hint)
    if user is not None and not _USER.match(user):
        raise SettingsError(f"{what} has an invalid user: {user!r}.", hint)
    number = None
    if port is not None:
        if not re.match(r"[0-9]{1,5}\Z", port) or not 0 < int(port) < 65536:
            raise SettingsError(f"{what} has an invalid port: {port!r}.", "Use a number from 1 to 65535.")
        number = int(port)
    return Address(host, user, number)


def read(address: Address) -> Host:
    """Read OpenSSH's configuration for a host.

    `ssh -G` reads it if `ssh` is installed. Otherwise paramiko reads `~/.ssh/config`, without `Include`. Options that
    weaken the host key check are ignored: `StrictHostKeyChecking no` and `accept-new` are treated as `yes`. Not
    supported: `KexAlgorithms` (paramiko's own choice is used), `KnownHostsCommand`, `VerifyHostKeyDNS`,
    `PKCS11Provider`, host-based and Kerberos authentication. Hardware keys work through the agent.

    Raises:
        SettingsError: the configuration cannot be read.
    """
    ssh = shutil.which("ssh")
    return _host(address, _ask_ssh(ssh, address) if ssh else _ask_paramiko(address))


def home() -> Path:
    """Return the user's home folder ($HOME, as everywhere in this project)."""
    return Path(os.environ.get("HOME") or _account_home())


def _account_home() -> str:
    return pwd.getpwuid(os.getuid()).pw_dir


def _ask_ssh(ssh: str, address: Address) -> dict[str, list[str]]:
    """Return the values of each keyword, in lower case, from the output of `ssh -G`."""
    command = [ssh, "-G"]
    try:
        differs = not os.path.samefile(home(), _account_home())
    except (OSError, KeyError):
        differs = True
    if differs:  # ssh reads the home folder from the user database
        config = home() / ".ssh" / "config"
        command += ["-F", str(config) if config.exists() else "none"]
    if address.port:
        command += ["-p", str(address.port)]
    if address.user:
        command += ["-l", address.user]
    command += ["--", address.host]
    try:
        output = run(command, env=os.environ, silence=60)  # `Match exec` has the user's locale, as in ssh
    except ProgramError as error:
        raise SettingsError(
            f"The SSH configuration for {address.host} cannot be read: {' '.join(error.output.split())}",
            f"Correct ~/.ssh/config: `ssh -G {address.words}` must succeed.",
        ) from error
    options: dict[str, list[str]] = {}
    for line in os.fsdecode(output).splitlines():
        keyword, _, value = line.partition(" ")
        options.setdefault(keyword.lower(), []).append(value)
    return options


def _ask_paramiko(address: Address) -> dict[str, list[str]]:
    import paramiko

    path = home() / ".ssh" / "config"
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        text = ""
    except OSError as error:
        raise SettingsError(
            f"The SSH configuration {path} cannot be read: {error.strerror}.",
            f"Make it readable: chmod 600 {path}",
        ) from error
    if re.search(r"^\s*Include\b", text, re.IGNORECASE | re.MULTILINE):
        raise SettingsError(
            f"The SSH configuration {path} cannot be read: Include requires `ssh`, which is not installed.",
            "Install OpenSSH's client (Debian: openssh-client).",
        )
    try:
        found = paramiko.SSHConfig.from_text(text).lookup(address.host)
    except Exception as error:  # paramiko's errors and others, all caused by the file
        raise SettingsError(f"The SSH configuration {path} cannot be read: {error}.", "Correct the file.") from error
    options = {key: [value] if isinstance(value, str) else list(value) for key, value in found.items()}
    if address.port:
        options["port"] = [str(address.port)]
    if address.user:
        options["user"] = [address.user]
    return options


def _host(address: Address, options: Mapping[str, list[str]]) -> Host:
    def one(keyword: str, default: str = "") -> str:
        return options.get(keyword, [default])[0]

    def path(text: str) -> Path:
        return Path(_untilde(_variables(_tokens(text, tokens))))

    def paths(keyword: str, default: str) -> list[Path]:
        # Replace the home folder first: its name may contain a space, which separates files here.
        text = one(keyword, default)
        for folder in {str(home()), _account_home()}:
            text = text.replace(folder.rstrip("/") + "/.", "~/.")
        return [path(word.strip('"')) for word in text.split() if word != "none"]

    def names(keyword: str) -> frozenset[str]:
        text = one(keyword)
        return frozenset() if text[:1] in ("", "+", "-", "^") else frozenset(text.split(","))

    def number(keyword: str, default: int, most: int) -> int:
        text = one(keyword, str(default))
        if not re.match(r"[0-9]{1,10}\Z", text) or not 0 <= int(text) <= most:
            raise SettingsError(
                f"The SSH configuration for {address.host} has an invalid {keyword}: {text!r} is not a number up to "
                f"{most}.",
                "Write a number in ~/.ssh/config, or install OpenSSH's client (Debian: openssh-client).",
            )
        return int(text)

    def yes(keyword: str, default: str) -> bool:
        return one(keyword, default).lower() in ("yes", "true")

    hostname = one("hostname", address.host)
    user = one("user") or _login()
    port = number("port", 22, 65535)
    local = socket.gethostname()
    jump = one("proxyjump", "none")
    alias = one("hostkeyalias")
    tokens = {
        "d": str(home()),
        "h": hostname,
        "i": str(os.getuid()),
        "j": "" if jump == "none" else jump,
        "k": alias or address.host,
        "L": local.partition(".")[0],
        "l": local,
        "n": address.host,
        "p": str(port),
        "r": user,
        "u": _login(),
    }
    seed = "".join(tokens[name] for name in "lhprj")
    tokens["C"] = hashlib.sha1(seed.encode(), usedforsecurity=False).hexdigest()
    command = one("proxycommand", "none")
    revoked = one("revokedhostkeys", "none")
    agent: str | None = one("identityagent", "SSH_AUTH_SOCK")
    if agent == "SSH_AUTH_SOCK":
        agent = os.environ.get("SSH_AUTH_SOCK") or None
    elif agent == "none":
        agent = None
    elif agent is not None:
        agent = os.environ.get(agent[1:]) if re.match(r"\$\w+\Z", agent) else str(path(agent))
    methods = {
        "publickey": yes("pubkeyauthentication", "yes") or one("pubkeyauthentication") in ("unbound", "host-bound"),
        "password": yes("passwordauthentication", "yes"),
        "keyboard-interactive": yes("kbdinteractiveauthentication", "yes"),
    }
    default_keys = ["~/.ssh/id_rsa", "~/.ssh/id_ecdsa", "~/.ssh/id_ed25519"]
    return Host(
        address=address,
        hostname=hostname,
        user=user,
        port=port,
        family={"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get(one("addressfamily"), socket.AF_UNSPEC),
        alias=alias,
        known_hosts=(
            *paths("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2"),
            *paths("globalknownhostsfile", "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"),
        ),
        revoked=None if revoked == "none" else path(revoked),
        host_key_algorithms=names("hostkeyalgorithms"),
        ciphers=names("ciphers"),
        macs=names("macs"),
        identities=tuple(path(text) for text in options.get("identityfile", default_keys) if text != "none"),
        certificates=tuple(path(text) for text in options.get("certificatefile", []) if text != "none"),
        only_identities=yes("identitiesonly", "no"),
        agent=agent,
        jumps=() if jump == "none" else tuple(_jump(word, address) for word in jump.split(",")),
        proxy_command="" if command == "none" or jump != "none" else _tokens(command, tokens),
        methods=frozenset(name for name, left in methods.items() if left),
        may_ask=not yes("batchmode", "no"),
        connect_timeout=_seconds(one("connecttimeout"), CONNECT_TIMEOUT),
        alive_interval=_seconds(one("serveraliveinterval"), ALIVE_INTERVAL),
        alive_count=max(1, number("serveralivecountmax", 3, 2**31 - 1)),
    )


def _jump(word: str, address: Address) -> Address:
    word = word.strip().removeprefix("ssh://")
    user, at, place = word.rpartition("@")
    return _address(place, user if at else None, f"The ProxyJump of {address.host} in the SSH configuration, {word!r},")


def _seconds(text: str, default: float) -> float:
    """Parse a number of seconds; return the default for an empty text, `none`, 0 or an invalid number."""
    return float(text) if re.match(r"0*[1-9][0-9]*\Z", text) else default


def _login() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return getpass.getuser()


def _tokens(text: str, tokens: Mapping[str, str]) -> str:
    """Expand tokens such as %h; ssh_config(5), TOKENS."""

    def expand(match: re.Match[str]) -> str:
        name = match[1]
        return "%" if name == "%" else tokens.get(name, match[0])

    return re.sub(r"%(.)", expand, text)


def _variables(text: str) -> str:
    """Expand ${NAME}; ssh_config(5), ENVIRONMENT VARIABLES."""
    return re.sub(r"\$\{(\w+)\}", lambda match: os.environ.get(match[1], match[0]), text)


def _untilde(text: str) -> str:
    return str(home() / text[2:]) if text.startswith("~/") else os.path.expanduser(text)
