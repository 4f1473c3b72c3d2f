"""Verification of host keys: known_hosts, revoked keys, host certificates.

The format is that of sshd(8), SSH_KNOWN_HOSTS FILE FORMAT; certificates follow OpenSSH's PROTOCOL.certkeys. Paramiko's
own reader supports neither markers nor patterns, and paramiko does not verify certificates.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ....util.subprocesses import ProgramError, run
from .config import Host

ALGORITHMS = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}
"""Signature algorithms of each kind of host key, best first; SHA-1 is excluded."""

_CERTIFICATE = "-cert-v01@openssh.com"
_FOR_HOSTS = 2


class HostKeyRefused(Exception):
    """A host key is not trusted.

    Args:
        reason: unknown, other (keys of another kind are known), changed, revoked or certificate.
        detail: further explanation.
        lines: conflicting lines of known_hosts.
    """

    def __init__(self, reason: str, detail: str = "", lines: Sequence[Line] = ()) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.lines = tuple(lines)


@dataclass(frozen=True)
class Line:
    """One line of a known_hosts file.

    Attributes:
        marker: "", "@revoked" or "@cert-authority".
        hosts: names, patterns or a hashed name, as written in the file.
        kind: kind of the key, such as ssh-ed25519.
        blob: the key.
        place: file and line number.
    """

    marker: str
    hosts: str
    kind: str
    blob: bytes
    place: str


@dataclass(frozen=True)
class Known:
    """Entries of known_hosts for one host: trusted keys, revoked keys, certificate authorities."""

    trusted: tuple[Line, ...]
    revoked: tuple[Line, ...]
    authorities: tuple[Line, ...]


def known(host: Host) -> Known:
    """Read the entries for a host from all of its known_hosts files; damaged lines are skipped, as by ssh."""
    names = [host.known_as]
    if not host.alias and host.port != 22:
        names.append(host.hostname.lower())  # as ssh: a port without keys uses those of the plain name
    lines = [line for path in host.known_hosts for line in _read(path)]
    found = [line for line in lines if any(matches(line.hosts, name) for name in names)]
    exact = [line for line in found if matches(line.hosts, names[0])]
    return Known(
        trusted=tuple(line for line in (exact + [line for line in found if line not in exact]) if not line.marker),
        revoked=tuple(line for line in found if line.marker == "@revoked"),
        authorities=tuple(line for line in found if line.marker == "@cert-authority"),
    )


def algorithms(host: Host, known: Known) -> list[str]:
    """Return the host key algorithms to request, those that can be verified first.

    So a server with several keys presents the known one. Certificates are requested if there is an authority for them.
    """
    kinds = [line.kind for line in known.trusted] + list(ALGORITHMS)
    plain = [name for kind in dict.fromkeys(kinds) for name in ALGORITHMS.get(kind, ())]
    certified = [name + _CERTIFICATE for name in plain] if known.authorities else []
    allowed = [name for name in certified + plain if name in host.host_key_algorithms]
    return allowed or certified + plain


def check(host: Host, known: Known, blob: bytes) -> None:
    """Verify the key or certificate with which a server has identified itself.

    Raises:
        HostKeyRefused: the key is not trusted.
    """
    kind = split_string(blob)[0].decode("ascii", "replace")
    certificate = _Certificate.parse(blob) if kind.endswith(_CERTIFICATE) else None
    key = certificate.key if certificate else blob
    bad = {line.blob for line in known.revoked}
    if bad & {key, blob} or (certificate and certificate.authority in bad):
        raise HostKeyRefused("revoked", lines=known.revoked)
    if host.revoked:
        _check_revoked(host.revoked, blob)
    if certificate and certificate.authority in {line.blob for line in known.authorities}:
        certificate.check(host.alias or host.hostname.lower())
        return
    plain = kind.removesuffix(_CERTIFICATE)
    exact = [line for line in known.trusted if matches(line.hosts, host.known_as)]
    same = [line for line in exact if line.kind == plain]
    if any(line.blob == key for line in same):
        return
    if same:
        raise HostKeyRefused("changed", lines=same)
    if any(line.blob == key for line in known.trusted):  # last: keys of the plain name, whatever its port
        return
    raise HostKeyRefused("other" if exact else "unknown", lines=exact)


def fingerprint(blob: bytes) -> str:
    """Return fingerprint and kind of a key as OpenSSH prints them, SHA256:…; for a certificate, those of its key."""
    kind = split_string(blob)[0].decode("ascii", "replace")
    key = _Certificate.parse(blob).key if kind.endswith(_CERTIFICATE) else blob
    digest = base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")
    name = kind.removesuffix(_CERTIFICATE).removeprefix("ssh-").partition("-")[0].upper()
    return f"SHA256:{digest} ({name})"


def certified_key(blob: bytes) -> bytes:
    """Return the key in a certificate; raises HostKeyRefused if the certificate is damaged."""
    return _Certificate.parse(blob).key


def matches(hosts: str, name: str) -> bool:
    """Return whether the first field of a known_hosts line matches a host."""
    if hosts.startswith("|1|"):
        try:
            salt, digest = (base64.b64decode(part, validate=True) for part in hosts[3:].split("|"))
        except (ValueError, binascii.Error):
            return False
        return hmac.compare_digest(hmac.new(salt, name.encode(), hashlib.sha1).digest(), digest)
    return _listed(hosts.split(","), name)


def _listed(patterns: Iterable[str], name: str) -> bool:
    found = False
    for pattern in patterns:
        bare = pattern.removeprefix("!").lower()
        wild = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in bare)
        if re.fullmatch(wild, name.lower(), re.DOTALL):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def _read(path: Path) -> list[Line]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for number, row in enumerate(text.splitlines(), 1):
        words = row.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        if len(words) < 3 or words[0].startswith("#") or marker not in ("", "@revoked", "@cert-authority"):
            continue
        try:
            blob = base64.b64decode(words[2], validate=True)
            if split_string(blob)[0].decode() != words[1]:
                continue
        except (ValueError, binascii.Error, struct.error):
            continue
        lines.append(Line(marker, words[0], words[1], blob, f"{path}:{number}"))
    return lines


def _check_revoked(path: Path, blob: bytes) -> None:
    """Look up a key in `RevokedHostKeys`, a list or a KRL; as with ssh, an unreadable file rejects all keys."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise HostKeyRefused("revoked", f"{path} (RevokedHostKeys) cannot be read without ssh-keygen")
    with tempfile.NamedTemporaryFile("w", suffix=".pub") as file:
        file.write(f"{split_string(blob)[0].decode()} {base64.b64encode(blob).decode()}\n")
        file.flush()
        command = [program, "-Q", "-f", str(path), file.name]
        try:
            run(command, merged=True)
        except ProgramError as error:
            output = " ".join(error.output.replace(file.name, "host key").split())
            raise HostKeyRefused("revoked", f"{path} (RevokedHostKeys): {output}") from error


@dataclass(frozen=True)
class _Certificate:
    """A host certificate; times are in seconds since 1970."""

    key: bytes
    type: int
    principals: tuple[str, ...]
    valid_after: int
    valid_before: int
    critical: bytes
    authority: bytes
    signed: bytes
    signature: bytes

    @classmethod
    def parse(cls, blob: bytes) -> _Certificate:
        """Parse a certificate; raises HostKeyRefused if it is damaged."""
        try:
            kind, rest = split_string(blob)
            plain = kind.decode().removesuffix(_CERTIFICATE).encode()
            _nonce, rest = split_string(rest)
            key = _packed(plain)
            for _ in range(1 if plain == b"ssh-ed25519" else 2):
                part, rest = split_string(rest)
                key += _packed(part)
            type_ = struct.unpack_from(">QI", rest)[1]
            _name, rest = split_string(rest[12:])
            principals, rest = split_string(rest)
            names = []
            while principals:
                name, principals = split_string(principals)
                names.append(name.decode())
            after, before = struct.unpack_from(">QQ", rest)
            critical, rest = split_string(rest[16:])
            _extensions, rest = split_string(rest)
            _reserved, rest = split_string(rest)
            authority, rest = split_string(rest)
            signed = blob[: len(blob) - len(rest)]
            signature, rest = split_string(rest)
        except (struct.error, UnicodeDecodeError) as error:
            raise HostKeyRefused("certificate", "it is damaged") from error
        return cls(key, type_, tuple(names), after, before, critical, authority, signed, signature)

    def check(self, name: str) -> None:
        """Verify that the authority certified the key for the host, and the validity; raises HostKeyRefused."""
        from paramiko.message import Message
        from paramiko.pkey import PKey

        if self.type != _FOR_HOSTS:
            raise HostKeyRefused("certificate", "it is a user certificate")
        if not _listed(self.principals, name):
            raise HostKeyRefused("certificate", f"it is for {', '.join(self.principals) or 'no host'}, not for {name}")
        if not self.valid_after <= time.time() < self.valid_before:
            raise HostKeyRefused("certificate", "it is not valid now, or the clock of this machine is wrong")
        if self.critical:
            raise HostKeyRefused("certificate", "it has unknown critical options")
        kind = split_string(self.authority)[0].decode("ascii", "replace")
        if split_string(self.signature)[0].decode("ascii", "replace") not in ALGORITHMS.get(kind, ()):
            raise HostKeyRefused("certificate", "its signature algorithm is not trusted")
        authority = PKey.from_type_string(kind, self.authority)
        if not authority.verify_ssh_sig(self.signed, Message(self.signature)):
            raise HostKeyRefused("certificate", "its signature is wrong")


def _packed(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def split_string(data: bytes) -> tuple[bytes, bytes]:
    """Split off an SSH `string` (RFC 4251, section 5); raises struct.error if the data is too short."""
    (size,) = struct.unpack_from(">I", data)
    if len(data) < 4 + size:
        raise struct.error("cut short")
    return data[4 : 4 + size], data[4 + size :]
