"""SSH authentication: agent keys, key files, certificates, passphrases and passwords.

Importing this module imports paramiko, so it is imported only when a connection is opened.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import copy
import getpass
import io
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from paramiko.pkey import PKey

from ....errors import BuilderLost, LogInError
from ....progress import events
from . import known_hosts
from .agent import AgentKey
from .agent import keys as agent_keys
from .config import Host
from .transport import Transport

AUTH_TIMEOUT = 60.0
"""Seconds within which a server must answer one key: PAM and reverse DNS lookups are slow on some."""
PATIENCE = 300.0
"""Seconds within which the user must answer a server's prompt."""

_KINDS: dict[str, type[PKey]] = {
    "ssh-ed25519": paramiko.Ed25519Key,
    "ssh-rsa": paramiko.RSAKey,
    **{f"ecdsa-sha2-nistp{size}": paramiko.ECDSAKey for size in (256, 384, 521)},
}
_PKCS8 = "PKCS #8"
"""Kind of a key file whose kind of key is unknown until it is decrypted."""

_TRIES = 3
"""Attempts at entering a passphrase."""


class _Refused(Exception):
    """The server disconnected during the log-in with a message, or no method is left to try."""


def log_in(transport: Transport, host: Host, place: str, starts: str) -> str:
    """Log in with the methods that the configuration and the server permit, in the same order as `ssh`.

    Args:
        transport: transport after the key exchange, with a verified host key.
        host: the host.
        place: the host's name in error messages.
        starts: command to start first; its request is pipelined behind the first key, if the server permits.

    Returns:
        The method that succeeded.

    Raises:
        LogInError: the server rejects the log-in.
        BuilderLost: the connection broke.
    """
    transport.set_auth_timeout(AUTH_TIMEOUT)
    attempt = _Attempt(transport, host, starts)
    try:
        with _agent(host.agent) as agent:
            attempt.run(agent)
    except _Refused as refused:
        raise _error(attempt, place) from refused
    except (EOFError, OSError) as error:
        raise BuilderLost(
            f"{place} closed the connection during the log-in: {str(error) or 'no reason given'}.",
            _one_key(host) if len(attempt.tried) > 1 else f"Run `ssh {host.address.words} true`: it must succeed.",
        ) from error
    return attempt.tried[-1] if attempt.tried else "no authentication"


@dataclass
class _Attempt:
    """State of a log-in, with the outcome of each key."""

    transport: Transport
    host: Host
    starts: str
    offered: frozenset[str] = frozenset()
    has_sent_request: bool = False
    is_listed: bool = False
    tried: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    locked: list[Path] = field(default_factory=list)
    done: bool = False
    timeout: float = AUTH_TIMEOUT

    def run(self, agent: Sequence[AgentKey]) -> None:
        """Try all methods; raises _Refused if none succeeds."""
        # Most servers accept keys, so the first key is sent without a query before it. A refusal lists the methods.
        self._offer(["publickey"])
        for label, key in self._keys(agent):
            if "rsa" in key.get_name() and not self.has_sent_request:
                self._ask()  # the server announces its RSA signature algorithms before it answers
            if self.done or "publickey" not in self.offered:
                break
            self.tried.append(label)
            self._show(key)
        if not (self.done or self.is_listed):
            self._ask()
        if not self.done and "keyboard-interactive" in self.offered and self.host.may_ask and _has_terminal():
            self.timeout = PATIENCE
            self.transport.set_auth_timeout(PATIENCE)
            self._try(lambda: self.transport.auth_interactive(self.host.user, self._answer))
        if not self.done and "password" in self.offered:
            password = _secret(f"{self.host.user}@{self.host.hostname}'s password: ", self.host.may_ask)
            if password is not None:
                self.tried.append("the password")
                self._try(lambda: self.transport.auth_secret(self.host.user, password))
                if not self.done:
                    _forget(f"{self.host.user}@{self.host.hostname}'s password: ")
        if not self.done:
            raise _Refused

    def _show(self, key: PKey) -> None:
        """Authenticate with a key; the request for the program may be pipelined behind the first one."""
        command = "" if self.has_sent_request else self.starts
        self._try(lambda: self.transport.auth_key(self.host.user, key, command))

    def _ask(self) -> None:
        """Query the server's methods with the method `none`, as ssh does first."""
        self._try(lambda: self.transport.auth_none(self.host.user))

    def _try(self, method: Callable[[], list[str]]) -> None:
        """Try a method; record whether it suffices, and the methods that the server permits next."""
        start = time.monotonic()
        self.has_sent_request = True
        try:
            further = method()
        except (paramiko.SSHException, EOFError, OSError, ValueError) as error:
            if self.transport.is_authenticated():  # it then disconnected because of the pipelined request
                self.done = True
                return
            if not self.transport.is_active():
                if self.transport.farewell:
                    raise _Refused from error
                raise EOFError from error
            if time.monotonic() - start >= self.timeout:
                raise TimeoutError(f"no answer within {self.timeout:.0f} seconds") from error
            if self.transport.permitted:
                self.is_listed = True
                self._offer(self.transport.permitted)
        else:
            self.done = not further
            if further:
                self.is_listed = True
                self._offer(further)

    def _offer(self, methods: list[str]) -> None:
        self.offered = frozenset(methods) & self.host.methods

    def _answer(self, title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
        """Prompt the user for the answers to a server's questions."""
        answers = []
        for prompt, _shown in prompts:
            words = "".join(char for char in f"({self.host.user}@{self.host.hostname}) {prompt}" if char.isprintable())
            answer = _secret(words, self.host.may_ask, keep=False)
            answers.append(answer or "")  # an exception would end paramiko's thread, and the connection
        if prompts:
            self.tried.append("what you typed")
        return answers

    def _keys(self, agent: Sequence[AgentKey]) -> Iterator[tuple[str, PKey]]:
        """Yield each key to try and its label: configured keys in the agent, the agent's other keys, files."""
        files = [file for path in dict.fromkeys(self.host.identities) if (file := _KeyFile.read(path)) is not None]
        # Each certificate, by the key that it certifies: CertificateFile first.
        paths = dict.fromkeys((*self.host.certificates, *(file.certificate for file in files)))
        certificates = [(path, blob) for path in paths if (blob := _public(path))]
        held: dict[bytes, AgentKey] = {key.blob: key for key in agent}
        chosen = [held.pop(file.blob) for file in files if file.blob in held]
        chosen += [held.pop(blob) for _, blob in certificates if blob in held]
        seen = {key.blob for key in chosen}
        for key in chosen + ([] if self.host.only_identities else list(held.values())):
            seen.add(key.blob)
            label = f"the agent's {key.comment or 'key'} {_fingerprint(key.blob)}"
            if any(file.blob == key.blob for file in files):
                yield from _certified(key, label, certificates)
            yield label, key
        for file in sorted(files, key=lambda file: file.encrypted):
            if file.blob and file.blob in seen:
                continue
            loaded = self._load(file)
            if loaded is not None:
                yield from _certified(loaded, str(file.path), certificates)
                yield f"{file.path} {_fingerprint(loaded.asbytes())}", loaded

    def _load(self, file: _KeyFile) -> PKey | None:
        if file.problem:
            self.unusable.append(f"{file.path} ({file.problem})")
            return None
        if not file.encrypted:
            try:
                return file.load(None)
            except (paramiko.SSHException, ValueError, OSError, UnsupportedAlgorithm):
                self.unusable.append(f"{file.path} (damaged)")
                return None
        if not self.has_sent_request:
            self._ask()  # no passphrase prompt if the server accepts no keys
        if self.done or "publickey" not in self.offered:
            return None
        prompt = f"Passphrase for {file.path}: "
        for _ in range(_TRIES):
            passphrase = _secret(prompt, self.host.may_ask)
            if passphrase is None:
                self.locked.append(file.path)
                return None
            try:
                return file.load(passphrase)
            except UnsupportedAlgorithm:
                self.unusable.append(f"{file.path} ({_unreadable(file.path)})")
                return None
            except (paramiko.SSHException, ValueError, OSError):
                _forget(prompt)
        self.unusable.append(f"{file.path} (wrong passphrase)")
        return None


def _error(attempt: _Attempt, place: str) -> LogInError:
    """Return an error with the reason, the keys that were tried, and the fix."""
    host = attempt.host
    words = host.address.words
    farewell = attempt.transport.farewell
    parts = [f"tried {'; '.join(attempt.tried) or 'no key, because none is usable'}"]
    if attempt.unusable:
        parts.append(f"not usable: {'; '.join(attempt.unusable)}")
    if attempt.locked:
        parts.append(f"{', '.join(map(str, attempt.locked))} has a passphrase, but there is no terminal to ask for it")
    if farewell:
        parts.append(f"the server says: {farewell}")
    message = f"{place} rejects the log-in of {host.user}: {'. '.join(parts)}."
    if farewell and len(attempt.tried) > 1:  # OpenSSH has no own disconnect code for MaxAuthTries
        return LogInError(message, _one_key(host))
    if attempt.locked:
        return LogInError(message, f"Run `ssh-add {' '.join(map(str, attempt.locked))}` first.")
    public = [path for path in host.identities if path.with_name(path.name + ".pub").exists()]
    if not attempt.tried and not public:
        return LogInError(message, f"Make a key with `ssh-keygen`, then run `ssh-copy-id {words}`.")
    key = f"-i {public[0]} " if public else ""
    return LogInError(
        message,
        f"Run `ssh-copy-id {key}{words}`. If the key is already there, check that the account is not locked: "
        f"`ssh {words} true` must succeed.",
    )


def _one_key(host: Host) -> str:
    return f"Name one key in ~/.ssh/config, under `Host {host.address.host}`: IdentityFile, IdentitiesOnly yes."


# keys


@dataclass(frozen=True)
class _KeyFile:
    """A file with a private key.

    Attributes:
        blob: the public half; b"" if it is unknown without the passphrase.
        problem: reason why the key cannot be used; "" if it can.
    """

    path: Path
    kind: str
    blob: bytes
    encrypted: bool
    problem: str = ""

    @property
    def certificate(self) -> Path:
        return self.path.with_name(self.path.name + "-cert.pub")

    @classmethod
    def read(cls, path: Path) -> _KeyFile | None:
        """Inspect a private key, or, as ssh does, a public key whose private half the agent has; None if missing."""
        try:
            data = path.read_bytes()
            status = path.stat()
        except FileNotFoundError:
            beside = _public(path.with_name(path.name + ".pub"))
            return cls(path, "", beside, False, "only its public half is here") if beside else None
        except OSError as error:
            return cls(path, "", b"", False, error.strerror or "unreadable")
        if public := _public(path):
            return cls(path, "", public, False, "only its public half is here")
        kind, blob, encrypted = _inspect(data)
        blob = blob or _public(path.with_name(path.name + ".pub"))
        problem = ""
        if kind not in _KINDS and kind != _PKCS8:
            problem = _unreadable(path)
        elif status.st_mode & 0o077 and status.st_uid == os.getuid():
            problem = f"others can read it; `chmod 600 {path}`"
        return cls(path, kind, blob, encrypted, problem)

    def load(self, passphrase: str | None) -> PKey:
        if self.kind == _PKCS8:
            return _pkcs8(self.path.read_bytes(), passphrase)
        return _KINDS[self.kind].from_private_key_file(str(self.path), passphrase)


def _unreadable(path: Path) -> str:
    return f"a key of a kind or format that cannot be read here; `ssh-add {path}` may"


def _pkcs8(data: bytes, passphrase: str | None) -> PKey:
    """Load a key in PKCS #8 (RFC 5958), which paramiko cannot read, through conversion to OpenSSH's format.

    Raises:
        ValueError: the key is damaged, or the passphrase is wrong.
        UnsupportedAlgorithm: SSH has no such keys, or the encryption is not supported.
    """
    try:
        key = serialization.load_pem_private_key(data, passphrase.encode() if passphrase is not None else None)
    except TypeError as error:  # an empty passphrase
        raise ValueError(str(error)) from error
    kind: type[PKey]
    if isinstance(key, rsa.RSAPrivateKey):
        kind = paramiko.RSAKey
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        kind = paramiko.ECDSAKey
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        kind = paramiko.Ed25519Key
    else:
        raise UnsupportedAlgorithm(type(key).__name__)
    try:
        text = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
    except ValueError as error:  # a curve for which SSH has no name
        raise UnsupportedAlgorithm(str(error)) from error
    return kind.from_private_key(io.StringIO(text.decode()))


def _inspect(data: bytes) -> tuple[str, bytes, bool]:
    """Return a private key's kind, its public half if it is not encrypted, and whether the key is encrypted.

    The format is OpenSSH's PROTOCOL.key; older keys are PEM, and those of other programs PKCS #8.
    """
    begin = re.search(rb"-----BEGIN (?:(RSA|EC|OPENSSH|ENCRYPTED) )?PRIVATE KEY-----(.*?)-----END", data, re.DOTALL)
    if begin is None:
        return "", b"", False
    if begin[1] == b"ENCRYPTED":
        return _PKCS8, b"", True
    if begin[1] is None:
        try:
            return _PKCS8, _pkcs8(data, None).asbytes(), False
        except (ValueError, UnsupportedAlgorithm, paramiko.SSHException):
            return "", b"", False
    if begin[1] == b"RSA":
        return "ssh-rsa", b"", b"ENCRYPTED" in begin[2]
    if begin[1] == b"EC":
        return "ecdsa-sha2-nistp256", b"", b"ENCRYPTED" in begin[2]
    try:
        rest = base64.b64decode(b"".join(begin[2].split())).removeprefix(b"openssh-key-v1\0")
        cipher, rest = known_hosts.split_string(rest)
        _kdf, rest = known_hosts.split_string(rest)
        _options, rest = known_hosts.split_string(rest)
        blob, _ = known_hosts.split_string(rest[4:])
        return known_hosts.split_string(blob)[0].decode(), blob, cipher != b"none"
    except (binascii.Error, struct.error, UnicodeDecodeError):
        return "", b"", False


def _public(path: Path) -> bytes:
    """Return the key in a file of one public key; b"" if there is none."""
    try:
        words = path.read_text(encoding="utf-8", errors="replace").split()
        blob = base64.b64decode(words[1], validate=True)
        return blob if known_hosts.split_string(blob)[0].decode() == words[0] else b""
    except (OSError, IndexError, ValueError, struct.error):
        return b""


def _certified(key: PKey, label: str, certificates: Sequence[tuple[Path, bytes]]) -> Iterator[tuple[str, PKey]]:
    """Yield a key with each of the certificates that belong to it, and a label for each."""
    for path, blob in certificates:
        if _plain(blob) == key.asbytes():
            certified = copy.copy(key)
            try:
                certified.load_certificate(str(path))
            except (OSError, ValueError, paramiko.SSHException):
                continue
            yield f"{label} with {path.name}", certified


def _plain(blob: bytes) -> bytes:
    """Return the key in a certificate; b"" if the certificate is damaged."""
    try:
        return known_hosts.certified_key(blob)
    except known_hosts.HostKeyRefused:
        return b""


def _fingerprint(blob: bytes) -> str:
    try:
        return known_hosts.fingerprint(blob)
    except (struct.error, known_hosts.HostKeyRefused):
        return "(of an unknown kind)"


@contextlib.contextmanager
def _agent(path: str | None) -> Iterator[Sequence[AgentKey]]:
    """Yield the keys of the agent at a socket; none if there is no agent or it does not speak the protocol."""
    if path is None:
        yield ()
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(AUTH_TIMEOUT)  # a hardware key may wait for a touch
        try:
            connection.connect(path)
            found = agent_keys(connection)
        except (OSError, paramiko.SSHException):
            found = ()
        yield found


# prompts

_asking = threading.Lock()
_secrets: dict[str, str | None] = {}


def _secret(prompt: str, may_ask: bool, keep: bool = True) -> str | None:
    """Prompt the user at the terminal, once per process and prompt; None if there is no terminal."""
    with _asking:
        if keep and prompt in _secrets:
            return _secrets[prompt]
        if not may_ask:
            return None
        with events.terminal():
            if not _has_terminal():
                return None
            try:
                answer = getpass.getpass(prompt)
            except (EOFError, OSError):
                answer = None
        if keep:
            _secrets[prompt] = answer
        return answer


def _forget(prompt: str) -> None:
    with _asking:
        _secrets.pop(prompt, None)


def _has_terminal() -> bool:
    """Return whether the user can be prompted: there is a terminal, and this process is in its foreground."""
    is_seen = sys.__stderr__ is not None and sys.__stderr__.isatty()
    if not is_seen and not events.is_elsewhere():
        return False
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
