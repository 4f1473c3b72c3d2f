"""SSH connections to a real sshd."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from sshd import Account, Sshd, client_home, fingerprint, new_key, public

from gamebear_tasks.builders import registry
from gamebear_tasks.builders.transports import local
from gamebear_tasks.builders.transports.ssh import config, known_hosts, paramiko_internals, transport
from gamebear_tasks.builders.transports.ssh import connection as ssh
from gamebear_tasks.builders.transports.ssh.config import Address
from gamebear_tasks.builders.transports.ssh.connection import SSHChannel, SSHConnection
from gamebear_tasks.errors import BuilderBusy, BuilderError, BuilderLost, SettingsError

MIB = 1 << 20

Serve = Callable[..., Sshd]


@pytest.fixture(params=["accelerated", "public"])
def paramiko_api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use paramiko's internals, or only its public API, regardless of its version."""
    versions = ((0,), (999,)) if request.param == "accelerated" else ((999,), (999,))
    monkeypatch.setattr(transport, "TESTED", versions)
    return str(request.param)


accelerated_only = pytest.mark.parametrize("paramiko_api", ["accelerated"], indirect=True)
"""Guarantees that paramiko's public API cannot provide."""


@pytest.fixture
def serve(tmp_path: Path, account: Account, paramiko_api: str) -> Iterator[Serve]:
    """Start an sshd with options of sshd_config."""
    with contextlib.ExitStack() as stack:
        count = 0

        def start(*kinds: str, **options: object) -> Sshd:
            nonlocal count
            count += 1
            return stack.enter_context(Sshd(tmp_path / f"sshd{count}", account, kinds or ("ed25519",), **options))

        yield start


@pytest.fixture
def server(serve: Serve) -> Sshd:
    return serve()


@pytest.fixture
def home(tmp_path: Path, server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a home folder with a key that `server` accepts, and with its host key."""
    return come_from(client_home(tmp_path, server), monkeypatch)


def come_from(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


@pytest.fixture
def connect() -> Iterator[Callable[..., SSHConnection]]:
    """Open a connection that is closed after the test."""
    with contextlib.ExitStack() as stack:

        def opened(url: str, first: str = "") -> SSHConnection:
            connection = SSHConnection(url, first)
            stack.callback(connection.close)
            return connection

        yield opened


Connect = Callable[..., SSHConnection]


def output(channel: SSHChannel, timeout: float = 60.0) -> bytes:
    data = b""
    while more := channel.receive(1 << 18, timeout):
        data += more
    return data


def run(connection: SSHConnection, command: str) -> str:
    channel = connection.start(command)
    try:
        return output(channel).decode()
    finally:
        channel.close()


def configure(home: Path, text: str) -> None:
    (home / ".ssh" / "config").write_text(text)


def refusal(url: str, kind: type[Exception] = BuilderError) -> str:
    with pytest.raises(kind) as caught:
        SSHConnection(url)
    if kind is BuilderError:
        assert not isinstance(caught.value, BuilderLost), "it would be tried again"
    text = str(caught.value)
    assert text.count("\n") == 1, "what failed, and the fix"
    assert "Traceback" not in text
    return text


# URLs


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("ssh://buildpi", Address("buildpi")),
        ("ssh://buildpi/", Address("buildpi")),
        ("ssh://pi@buildpi:2222", Address("buildpi", "pi", 2222)),
        ("ssh://pi@[fe80::1%eth0]:22", Address("fe80::1%eth0", "pi", 22)),
        ("ssh://[::1]", Address("::1")),
        ("ssh://me%40corp@host", Address("host", "me@corp")),
    ],
)
def test_a_url_names_a_user_a_host_and_a_port(url: str, address: Address) -> None:
    if address.user == "me@corp":
        assert config.parse_url(url).user == "me@corp"
    assert config.parse_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "ssh://pi:secret@host",
        "ssh://pi:s/secret@host",
        "ssh://pi:secret#t@host",
        "ssh://pi:secret?t@host",
        "ssh://pi:secret@t@host",
        "ssh://pi%3Asecret@host",
        "ssh://pi:secret@host/srv",
        "ssh:/pi:secret@host",
        "shs://pi:secret@host",
        "shs://pi:s/secret@host",
        "pi:secret@host",
        "://pi:secret@host",
        "local:pi:secret@host",
    ],
)
def test_a_password_in_a_url_is_not_shown(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        registry.open_builder(url)
    assert "secret" not in str(caught.value)
    assert "@host" in str(caught.value)


def test_paramiko_is_not_imported_before_a_connection_is_opened() -> None:
    program = (
        "import sys; from gamebear_tasks.builders.transports.ssh.connection import open_builder; open_builder('ssh://host');"
        "sys.exit('paramiko' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# configuration


@pytest.mark.system
def test_the_configuration_is_read_as_ssh_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = come_from(client_home(tmp_path), monkeypatch)
    (home / ".ssh" / "more").write_text("Host *.lan\n ServerAliveInterval 7\n")
    configure(
        home,
        f"Include {home}/.ssh/more\n"
        "Match originalhost pi.lan\n HostName 10.1.2.3\n"
        "Host pi.lan\n Port 2200\n User build\n IdentityFile ~/.ssh/%r_%n\n IdentitiesOnly yes\n ProxyJump me@gate:24\n"
        " HostKeyAlias pie\n UserKnownHostsFile ~/.ssh/pies ~/.ssh/others\n ConnectTimeout 4\n",
    )
    host = config.read(Address("pi.lan", port=2222))
    assert (host.hostname, host.port, host.user) == ("10.1.2.3", 2222, "build")
    assert host.identities == (home / ".ssh" / "build_pi.lan",)
    assert host.only_identities
    assert host.jumps == (Address("gate", "me", 24),)
    assert host.known_as == "pie"
    assert host.known_hosts[:2] == (home / ".ssh" / "pies", home / ".ssh" / "others")
    assert (host.connect_timeout, host.alive_interval, host.alive_count) == (4, 7, 3)


def without_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))


def test_without_ssh_the_configuration_is_read_too(
    server: Sshd, home: Path, tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(home, f"Host pi\n HostName 127.0.0.1\n Port {server.port}\n User {server.account.name}\n")
    without_ssh(tmp_path, monkeypatch)
    assert run(connect("ssh://pi"), "echo hello") == "hello\n"


@pytest.mark.system
def test_without_ssh_an_include_is_rejected_and_not_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = come_from(client_home(tmp_path), monkeypatch)
    configure(home, "Host *\n Include more\n")
    without_ssh(tmp_path, monkeypatch)
    assert "Include requires `ssh`" in refusal("ssh://pi", SettingsError)


@pytest.mark.system
@pytest.mark.parametrize("line", ["Port ssh", "Port 65536", "ServerAliveCountMax many", "ServerAliveCountMax -1"])
def test_without_ssh_an_invalid_number_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    configure(come_from(client_home(tmp_path), monkeypatch), f"Host pi\n {line}\n")
    without_ssh(tmp_path, monkeypatch)
    keyword, value = line.lower().split()
    assert f"has an invalid {keyword}: '{value}' is not a number" in refusal("ssh://pi", SettingsError)


def test_an_alias_is_resolved_by_the_configuration(server: Sshd, home: Path, connect: Connect) -> None:
    key = new_key(home / "keys" / "build key")
    server.authorize(key)
    configure(
        home,
        f"Host pi\n HostName 127.0.0.1\n Port {server.port}\n User {server.account.name}\n"
        f' IdentityFile "{key}"\n IdentitiesOnly yes\n',
    )
    assert run(connect("ssh://pi"), "id -un") == f"{server.account.name}\n"


# versions of paramiko


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.4.0", False), ("3.4.1", True), ("4.0.0", True), ("5.1.7", True), ("5.2.0", False), ("6", False)],
)
def test_internals_of_paramiko_are_used_with_tested_releases_only(version: str, expected: bool) -> None:
    assert transport.is_tested(version) is expected


def test_the_installed_paramiko_is_tested() -> None:
    assert transport.uses_internals()


def test_private_names_of_paramiko_are_in_one_module() -> None:
    folder = Path(transport.__file__).parent
    users = {
        path.name for path in folder.glob("*.py") if re.search(r"type: ignore\[(attr-defined|misc)\]", path.read_text())
    }
    assert users == {"paramiko_internals.py"}


# programs


def test_a_program_receives_input_and_its_output_errors_and_status_are_returned(
    server: Sshd, home: Path, connect: Connect
) -> None:
    channel = connect(server.url).start("'sh' '-c' 'head -c 5; echo oops >&2; exit 3'")
    channel.send(memoryview(bytearray(b"hello")))
    assert output(channel) == b"hello"
    assert channel.exit_status(5.0) == 3
    assert channel.errors() == b"oops\n"


def test_closing_a_channel_closes_the_input_of_the_program(server: Sshd, home: Path, connect: Connect) -> None:
    connection = connect(server.url)
    channel = connection.start("cat; touch ~/ended")
    channel.close()
    channel.close()
    assert "ended" in run(
        connection, "for i in $(seq 50); do test -e ~/ended && break; sleep 0.1; done; ls ~; rm ~/ended"
    )


def test_a_running_program_has_no_status(server: Sshd, home: Path, connect: Connect) -> None:
    assert connect(server.url).start("sleep 60").exit_status(0.1) is None


def test_a_silent_program_counts_as_lost_after_a_timeout(server: Sshd, home: Path, connect: Connect) -> None:
    channel = connect(server.url).start("sleep 60")
    with pytest.raises(BuilderLost, match=r"sends no data: timeout after 0\.2 seconds"):
        channel.receive(1, 0.2)


def test_a_program_that_does_not_read_counts_as_lost_after_a_timeout(
    server: Sshd, home: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "SEND_SILENCE", 1.0)
    monkeypatch.setattr(local, "SEND_SILENCE", 1.0)
    here = local.ProcessConnection().start("exec sleep 10")
    for channel in (connect(server.url).start("sleep 10"), here):
        with pytest.raises(BuilderLost, match=r"accepts no data: timeout after 1 seconds"):
            channel.send(bytes(16 * MIB))
        channel.close()


def test_a_program_that_reads_slowly_does_not_time_out(
    server: Sshd, home: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "SEND_SILENCE", 1.0)
    monkeypatch.setattr(local, "SEND_SILENCE", 1.0)
    slow = "for i in 1 2 3 4 5; do sleep 0.4; head -c 1000000 >/dev/null; done; exec cat >/dev/null"
    for connection in (connect(server.url), local.ProcessConnection()):
        channel = connection.start(slow)
        start = time.monotonic()
        channel.send(bytes(8 * MIB))
        assert time.monotonic() - start > 1.0
        channel.close()


@pytest.mark.usefixtures("home")
def test_a_refused_exec_request_is_detected_when_its_reply_is_read(
    server: Sshd, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paramiko

    connection = connect(server.url)
    refused = paramiko.Channel._request_failed  # type: ignore[attr-defined]
    handlers = {**paramiko.Transport._channel_handler_table, paramiko.common.MSG_CHANNEL_SUCCESS: refused}  # type: ignore[attr-defined]
    monkeypatch.setattr(paramiko.Transport, "_channel_handler_table", handlers)
    with pytest.raises(BuilderError, match="refuses to run programs"):
        connection.start("sleep 10").receive(1, 10.0)
    assert connection.is_alive


@accelerated_only
def test_a_server_that_exceeds_its_window_does_not_fill_the_memory(server: Sshd, home: Path, connect: Connect) -> None:
    import paramiko

    session = connect(server.url).start("sleep 10")._channel
    assert isinstance(session, paramiko_internals.InternalsSession)
    with pytest.raises(paramiko.SSHException, match="more than its window permits"):
        for _ in range(64):
            session._channel.in_buffer.feed(bytes(MIB))


def test_a_rejected_key_does_not_lose_the_session(server: Sshd, home: Path, connect: Connect) -> None:
    other = new_key(home / ".ssh" / "other")
    configure(home, f"Host *\n    IdentityFile {other}\n    IdentityFile {home}/.ssh/id_ed25519\n")
    connection = connect(server.url, "echo one")
    assert run(connection, "echo one") + run(connection, "echo two") == "one\ntwo\n"


def test_a_program_requested_with_the_login_is_not_mistaken_for_another(
    server: Sshd, home: Path, connect: Connect
) -> None:
    channel = connect(server.url, "cat").start("cat")
    channel.send(b"it is there")
    assert channel.receive(100, 5.0) == b"it is there"
    assert run(connect(server.url, "cat"), "echo another") == "another\n"


@accelerated_only
def test_a_server_that_rejects_pipelined_requests_is_reconnected_without_them(
    server: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paramiko_internals, "FIRST_SESSION", 7)  # sshd disconnects on unknown channels
    builder = registry.open_builder(server.url)
    try:
        assert builder.describe()["python"]
    finally:
        builder.close()
    assert server.connections == 2


def test_writing_to_an_ended_program_does_not_break_the_connection(server: Sshd, home: Path, connect: Connect) -> None:
    connection = connect(server.url)
    channel = connection.start("true")
    with pytest.raises(BuilderLost, match="the runner has ended"):
        while True:
            channel.send(bytes(MIB))
    assert run(connection, "echo still here") == "still here\n"


def test_100_mb_of_errors_do_not_hold_up_the_output(server: Sshd, home: Path, connect: Connect) -> None:
    channel = connect(server.url).start("head -c 100000000 /dev/zero >&2; echo last >&2; echo done")
    assert output(channel) == b"done\n"
    assert channel.exit_status(5.0) == 0
    assert len(channel.errors()) == 64 * 1024
    assert channel.errors().endswith(b"last\n")


def test_32_threads_share_one_connection(server: Sshd, home: Path, connect: Connect) -> None:
    connection = connect(server.url)
    places = threading.Semaphore(10)
    message: list[str] = []

    def work(number: int) -> None:
        with places:
            for _ in range(50):
                with contextlib.suppress(BuilderBusy):
                    message.append(run(connection, f"echo {number}"))
                    return
                time.sleep(0.1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, message)) == list(range(32))
    assert server.connections == 1


# log-in


@contextlib.contextmanager
def agent(*keys: Path) -> Iterator[str]:
    """Run an ssh-agent with keys. Yield its socket."""
    folder = keys[0].parent
    path = folder / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        while not path.exists():
            time.sleep(0.01)
        environment = {**os.environ, "SSH_AUTH_SOCK": str(path)}
        subprocess.run(["ssh-add", "-q", *map(str, keys)], env=environment, check=True, capture_output=True)
        yield str(path)
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_a_key_of_any_type_authenticates(server: Sshd, home: Path, connect: Connect, kind: str) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    (home / ".ssh" / "id_ed25519.pub").unlink()
    server.authorize(new_key(home / ".ssh" / f"id_{kind}", kind))
    assert run(connect(server.url), "echo in") == "in\n"


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_a_key_of_the_agent_authenticates(
    server: Sshd, home: Path, tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    key = new_key(tmp_path / "elsewhere" / "key", kind)
    server.authorize(key)
    with agent(key) as path:
        monkeypatch.setenv("SSH_AUTH_SOCK", path)
        assert run(connect(server.url), "echo in") == "in\n"


def test_the_configured_agent_socket_is_used(server: Sshd, home: Path, tmp_path: Path, connect: Connect) -> None:
    key = new_key(tmp_path / "elsewhere" / "key")
    server.authorize(key)
    with agent(key) as path:
        configure(home, f"IdentityAgent {path}\n")
        assert run(connect(server.url), "echo in") == "in\n"


def test_too_many_agent_keys_are_an_error_that_suggests_identitiesonly(
    server: Sshd, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paramiko_api: str
) -> None:
    keys = [new_key(tmp_path / "elsewhere" / f"key{number}") for number in range(7)]
    server.authorize(keys[-1])
    with agent(*keys) as path:
        monkeypatch.setenv("SSH_AUTH_SOCK", path)
        if paramiko_api == "accelerated":
            text = refusal(server.url)
            assert "Too many authentication failures" in text
        else:  # the server's reason is unknown
            text = refusal(server.url, BuilderLost)
        assert "IdentitiesOnly yes" in text
        configure(home, f"Host 127.0.0.1\n IdentityFile {keys[-1]}.pub\n IdentitiesOnly yes\n")
        connection = SSHConnection(server.url)
        connection.close()


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_a_certificate_authenticates(server: Sshd, home: Path, tmp_path: Path, connect: Connect, kind: str) -> None:
    authority = new_key(tmp_path / "authority")
    server.options["TrustedUserCAKeys"] = f"{authority}.pub"
    server.restart()
    server.authorize()
    (home / ".ssh" / "id_ed25519").unlink()
    key = new_key(home / ".ssh" / f"id_{kind}x", kind)
    configure(home, f"IdentityFile {key}\n")
    certify(authority, key, server.account.name)
    assert run(connect(server.url), "echo in") == "in\n"


def certify(authority: Path, key: Path, principal: str, *options: str) -> Path:
    command = ["ssh-keygen", "-q", "-s", str(authority), "-I", "test", "-n", principal, *options, f"{key}.pub"]
    subprocess.run(command, check=True, capture_output=True)
    return key.with_name(key.name + "-cert.pub")


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    """Simulate a user at a terminal who enters these answers. Return the prompts."""
    from gamebear_tasks.builders.transports.ssh import authentication

    asked: list[str] = []
    replies = iter(answers)

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return next(replies)

    monkeypatch.setattr(authentication, "_has_terminal", lambda: True)
    monkeypatch.setattr(getpass, "getpass", answer)
    monkeypatch.setattr(authentication, "_secrets", {})
    return asked


def test_the_user_is_prompted_once_for_a_passphrase(
    server: Sshd, home: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = home / ".ssh" / "id_ed25519"
    key.unlink()
    server.authorize(new_key(home / ".ssh" / "id_rsa", "rsa", passphrase="secret"))
    asked = at_a_terminal(monkeypatch, "mistyped", "secret")
    for _ in range(2):
        assert run(connect(server.url), "echo in") == "in\n"
    assert asked == [f"Passphrase for {home}/.ssh/id_rsa: "] * 2


ALGORITHMS = {
    "rsa": ["RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
    "ecdsa": ["EC", "-pkeyopt", "ec_paramgen_curve:P-384", "-pkeyopt", "ec_param_enc:named_curve"],
    "ed25519": ["ED25519"],
}


def new_pkcs8_key(path: Path, kind: str, passphrase: str = "") -> Path:
    """Create a key in PKCS #8 with OpenSSL, and its public key in OpenSSH's format."""
    encryption = ["-aes-256-cbc", "-pass", f"pass:{passphrase}"] if passphrase else []
    command = ["openssl", "genpkey", "-algorithm", *ALGORITHMS[kind], *encryption, "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    path.chmod(0o600)
    password = passphrase.encode() or None
    key = serialization.load_pem_private_key(path.read_bytes(), password)
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(line + b" made by openssl\n")
    return path


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_a_key_in_pkcs8_authenticates(server: Sshd, home: Path, connect: Connect, kind: str) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    key = new_pkcs8_key(home / ".ssh" / "id_own", kind)
    assert key.read_text().startswith("-----BEGIN PRIVATE KEY-----")
    server.authorize(key)
    key.with_name("id_own.pub").unlink()
    configure(home, f"IdentityFile {key}\n")
    assert run(connect(server.url), "echo in") == "in\n"


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_the_user_is_prompted_for_the_passphrase_of_a_key_in_pkcs8(
    server: Sshd, home: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    key = new_pkcs8_key(home / ".ssh" / "id_own", kind, "secret")
    assert key.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    server.authorize(key)
    configure(home, f"IdentityFile {key}\n")
    assert f"ssh-add {key}" in refusal(server.url)
    asked = at_a_terminal(monkeypatch, "mistyped", "", "secret")
    assert run(connect(server.url), "echo in") == "in\n"
    assert asked == [f"Passphrase for {key}: "] * 3


@pytest.mark.parametrize("encrypted", [False, True])
def test_an_unsupported_key_in_pkcs8_is_named(
    server: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch, encrypted: bool
) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    key = home / ".ssh" / "id_own"
    encryption = serialization.BestAvailableEncryption(b"secret") if encrypted else serialization.NoEncryption()
    for made in (x25519.X25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1())):
        pem = made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        key.write_bytes(pem)
        key.chmod(0o600)
        configure(home, f"IdentityFile {key}\n")
        asked = at_a_terminal(monkeypatch, "secret")
        assert f"{key} (a key of a kind or format that cannot be read here" in refusal(server.url)
        assert len(asked) == encrypted
    key.write_text("-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n-----END PRIVATE KEY-----\n")
    assert f"{key} (a key of a kind or format that cannot be read here" in refusal(server.url)


def test_the_user_is_prompted_once_for_a_password(
    server: Sshd, home: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.authorize()
    server.options["PasswordAuthentication"] = "yes"
    server.restart()
    asked = at_a_terminal(monkeypatch, "open sesame")
    with password(server.account, "open sesame"):
        for _ in range(2):
            assert run(connect(server.url), "echo in") == "in\n"
    assert asked == [f"{server.account.name}@127.0.0.1's password: "]


def test_prompts_of_a_server_need_a_terminal(
    server: Sshd, home: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.authorize()
    server.options.update(UsePAM="yes", KbdInteractiveAuthentication="yes")
    server.restart()
    assert f"rejects the log-in of {server.account.name}" in refusal(server.url)
    asked = at_a_terminal(monkeypatch, "open sesame")
    with password(server.account, "open sesame"):
        assert run(connect(server.url), "echo in") == "in\n"
    assert len(asked) == 1
    assert "Password:" in asked[0]


@contextlib.contextmanager
def password(account: Account, text: str) -> Iterator[None]:
    done = subprocess.run(["chpasswd"], input=f"{account.name}:{text}\n", text=True, check=True, capture_output=True)
    assert not done.returncode
    try:
        yield
    finally:
        set_password_field(account, "*")


def set_password_field(account: Account, field: str) -> None:
    subprocess.run(["usermod", "-p", field, account.name], check=True, capture_output=True)


def test_the_error_for_a_failed_login_mentions_locked_accounts(server: Sshd, home: Path) -> None:
    set_password_field(server.account, "!")
    try:
        assert "check that the account is not locked" in refusal(server.url)
    finally:
        set_password_field(server.account, "*")


# host keys


def test_an_unknown_host_key_is_rejected_with_its_fingerprint_and_the_fix(server: Sshd, home: Path) -> None:
    known = home / ".ssh" / "known_hosts"
    known.unlink()
    configure(home, "StrictHostKeyChecking no\n")
    text = refusal(server.url)
    assert fingerprint(server.host_keys["ed25519"]) in text
    assert "is unknown" in text
    assert f"`ssh -p {server.port} {server.account.name}@127.0.0.1`" in text
    assert f"`ssh-keyscan -p {server.port} 127.0.0.1 >> {known}`" in text
    assert not known.exists()
    assert "Accepted" not in server.log


def test_keys_of_the_plain_name_apply_to_a_port_without_keys_of_that_type(
    server: Sshd, home: Path, tmp_path: Path, connect: Connect
) -> None:
    known = home / ".ssh" / "known_hosts"
    plain = f"127.0.0.1 {public(server.host_keys['ed25519'])}\n"
    known.write_text(plain)
    assert run(connect(server.url), "echo in") == "in\n"
    known.write_text(f"{plain}[127.0.0.1]:{server.port} {public(new_key(tmp_path / 'ecdsa', 'ecdsa'))}\n")
    configure(home, "HostKeyAlgorithms ssh-ed25519\n")
    assert run(connect(server.url), "echo in") == "in\n"
    known.write_text(f"{plain}[127.0.0.1]:{server.port} {public(new_key(tmp_path / 'own'))}\n")
    text = refusal(server.url)
    assert "its host key has changed" in text
    assert f"{known}:2" in text


def test_hashed_names_are_supported(server: Sshd, home: Path, connect: Connect) -> None:
    known = home / ".ssh" / "known_hosts"
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True)
    assert "127.0.0.1" not in known.read_text()
    assert run(connect(server.url), "echo in") == "in\n"


def test_hostkeyalias_is_supported(server: Sshd, home: Path, connect: Connect) -> None:
    (home / ".ssh" / "pies").write_text(f"pie,*.lan {public(server.host_keys['ed25519'])}\n")
    configure(home, "HostKeyAlias pie\nUserKnownHostsFile ~/.ssh/none ~/.ssh/pies\n")
    assert run(connect(server.url), "echo in") == "in\n"


@pytest.mark.parametrize("kind", ["ecdsa", "rsa"])
def test_the_known_type_of_host_key_is_negotiated(
    serve: Serve, tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    server = serve("ed25519", "ecdsa", "rsa")
    home = come_from(client_home(tmp_path, server), monkeypatch)
    only = f"[127.0.0.1]:{server.port} {public(server.host_keys[kind])}\n"
    (home / ".ssh" / "known_hosts").write_text(only)
    assert run(connect(server.url), "echo in") == "in\n"


@pytest.fixture
def certified(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sshd]:
    """Start an sshd with a host certificate. Only its authority is known."""

    def start(principal: str, *options: str, kind: str = "ed25519", authority: str = "ecdsa") -> Sshd:
        key = new_key(tmp_path / "authority", authority)
        server = serve(kind)
        server.options["HostCertificate"] = certify(key, server.host_keys[kind], principal, "-h", *options)
        server.restart()
        home = come_from(client_home(tmp_path, server), monkeypatch)
        (home / ".ssh" / "known_hosts").write_text(f"@cert-authority *127.0.0.1* {public(key)}\n")
        return server

    return start


@pytest.mark.parametrize(("kind", "authority"), [("ed25519", "ecdsa"), ("rsa", "rsa"), ("ecdsa", "ed25519")])
def test_a_host_certificate_of_a_known_authority_is_accepted(
    certified: Callable[..., Sshd], connect: Connect, kind: str, authority: str
) -> None:
    server = certified("127.0.0.1", kind=kind, authority=authority)
    assert run(connect(server.url), "echo in") == "in\n"


def test_a_host_certificate_for_another_name_is_rejected(certified: Callable[..., Sshd]) -> None:
    assert "it is for other, not for 127.0.0.1" in refusal(certified("other").url)


def test_an_expired_host_certificate_is_rejected(certified: Callable[..., Sshd]) -> None:
    server = certified("127.0.0.1", "-V", "20200101:20210101")
    assert "not valid now" in refusal(server.url)


def test_a_host_certificate_of_an_unknown_authority_is_rejected(certified: Callable[..., Sshd], tmp_path: Path) -> None:
    server = certified("127.0.0.1")
    other = new_key(tmp_path / "other")
    (tmp_path / "home" / ".ssh" / "known_hosts").write_text(f"@cert-authority * {public(other)}\n")
    assert "is unknown" in refusal(server.url)


@pytest.mark.parametrize(
    ("hosts", "name", "expected"),
    [
        ("buildpi,10.0.0.2", "10.0.0.2", True),
        ("*.lan,!bad.lan", "good.lan", True),
        ("*.lan,!bad.lan", "bad.lan", False),
        ("[pi]:2222", "pi", False),
        ("[pi]:2222", "[pi]:2222", True),
        ("BuildPi", "buildpi", True),
        ("p?", "pi", True),
        ("|1|bad", "pi", False),
    ],
)
def test_names_in_known_hosts_match_as_documented_in_sshd_8(hosts: str, name: str, expected: bool) -> None:
    assert known_hosts.matches(hosts, name) is expected


# jump hosts and proxies


def test_a_builder_behind_a_jump_host_is_reached_and_both_host_keys_are_checked(
    serve: Serve, tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, middle, server = serve(), serve(), serve()
    home = come_from(client_home(tmp_path, gate, middle, server), monkeypatch)
    user = server.account.name
    configure(
        home,
        f"Host gate\n HostName 127.0.0.1\n Port {gate.port}\n User {user}\n"
        f"Host pi\n HostName 127.0.0.1\n Port {server.port}\n ProxyJump gate,{user}@127.0.0.1:{middle.port}\n",
    )
    connection = connect(f"ssh://{user}@pi")
    channel = connection.start("cat")
    channel.send(bytes(4 * MIB) + b"end")
    got = 0
    while got < 4 * MIB + 3:
        got += len(channel.receive(MIB, 5.0))
    assert (gate.connections, middle.connections, server.connections) == (1, 1, 1)

    known = home / ".ssh" / "known_hosts"
    known.write_text(middle.known_hosts + server.known_hosts)
    text = refusal(f"ssh://{user}@pi")
    assert "its jump host gate is rejected: its host key" in text
    assert server.connections == 1


PIPE = """
import os, socket, sys, threading
there = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def forth():
    while data := os.read(0, 65536):
        there.sendall(data)
    os._exit(0)
threading.Thread(target=forth, daemon=True).start()
while data := there.recv(65536):
    os.write(1, data)
"""


def test_a_builder_behind_a_proxy_command_is_reached(server: Sshd, home: Path, connect: Connect) -> None:
    (home / "pipe.py").write_text(PIPE)
    configure(
        home,
        f"Host pi\n HostName 127.0.0.1\n Port {server.port}\n User {server.account.name}\n"
        f" ProxyCommand {sys.executable} {home}/pipe.py %h %p\n",
    )
    connection = connect("ssh://pi")
    assert len(run(connection, "head -c 4000000 /dev/zero")) == 4_000_000
    connection.close()


def test_the_error_output_of_a_failed_proxy_command_is_shown(home: Path) -> None:
    configure(home, "Host pi\n ProxyCommand echo no way to %h >&2; exit 1\n")
    assert "ProxyCommand says: no way to pi" in refusal("ssh://pi", BuilderLost)


def test_an_unreachable_builder_is_a_temporary_error(home: Path, server: Sshd) -> None:
    server.stop()
    assert f"127.0.0.1 port {server.port}: connection refused" in refusal(server.url, BuilderLost)
    server.start()
    SSHConnection(server.url).close()


def test_a_builder_without_an_ssh_banner_times_out(home: Path) -> None:
    configure(home, "ConnectTimeout 1\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        text = refusal(f"ssh://pi@127.0.0.1:{listener.getsockname()[1]}", BuilderLost)
        assert time.monotonic() - start < config.CONNECT_TIMEOUT, "it was to wait for a second"
    assert "timeout" in text


def test_too_many_connections_are_a_temporary_error(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(MaxStartups="1:100:1")
    come_from(client_home(tmp_path, server), monkeypatch)
    with socket.create_connection(("127.0.0.1", server.port)) as first:
        first.recv(100)
        assert "above its MaxStartups" in refusal(server.url, BuilderLost)


def test_with_one_session_allowed_a_second_one_is_refused_and_the_first_works(
    serve: Serve, tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(MaxSessions=1)
    come_from(client_home(tmp_path, server), monkeypatch)
    connection = connect(server.url)
    first = connection.start("cat")
    with pytest.raises(BuilderBusy, match="rejects another session"):
        connection.start("true")
    first.send(b"on")
    assert first.receive(10, 5.0) == b"on"
    first.close()
    for _ in range(50):
        with contextlib.suppress(BuilderBusy):
            assert run(connection, "echo next") == "next\n"
            break
        time.sleep(0.1)
    else:
        pytest.fail("the session never came free")


def test_a_builder_that_allows_no_sessions_is_an_error(
    serve: Serve, tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(MaxSessions=0)
    come_from(client_home(tmp_path, server), monkeypatch)
    with pytest.raises(BuilderError, match="rejects every session") as caught:
        connect(server.url, "true").start("true")
    assert not isinstance(caught.value, BuilderBusy | BuilderLost)


# broken connections


def sockets() -> int:
    """Return the number of this process's sockets."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of the folder itself is already closed
            count += os.readlink(entry).startswith("socket:")
    return count


@pytest.mark.parametrize("failure", ["silent", "not SSH", "host key", "known_hosts", "log-in"])
def test_a_failed_connection_leaves_no_socket(
    server: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch, paramiko_api: str, failure: str
) -> None:
    configure(home, "ConnectTimeout 1\n")
    url, error = server.url, BuilderError
    with socket.create_server(("127.0.0.1", 0)) as other:
        if failure in ("silent", "not SSH"):
            url = f"ssh://pi@127.0.0.1:{other.getsockname()[1]}"
        elif failure == "host key":
            (home / ".ssh" / "known_hosts").write_text("")
        elif failure == "log-in":
            server.authorize()
        else:
            monkeypatch.setattr(known_hosts, "known", lambda host: 1 // 0)
            error = ZeroDivisionError  # type: ignore[assignment]
        if failure == "not SSH":
            threading.Thread(target=lambda: other.accept()[0].sendall(b"no\r\n" * 200), daemon=True).start()
        before = sockets()
        with pytest.raises(error) as caught:
            SSHConnection(url)
        assert sockets() == before, caught
        if failure == "not SSH" and paramiko_api == "accelerated":
            assert "is not an SSH server" in str(caught.value)


def test_a_lost_connection_is_detected_by_all_users_and_prints_nothing(
    server: Sshd, home: Path, connect: Connect, capfd: pytest.CaptureFixture[str]
) -> None:
    connection = connect(server.url)
    reader, writer = connection.start("sleep 60"), connection.start("cat >/dev/null")
    threading.Timer(0.3, server.stop).start()
    with pytest.raises(BuilderLost, match="is disconnected"):
        while True:
            writer.send(bytes(MIB))
    with pytest.raises(BuilderLost, match="is disconnected"):
        reader.receive(1, 300.0)
    with pytest.raises(BuilderLost, match="is disconnected"):
        reader.exit_status(300.0)
    with pytest.raises(BuilderLost, match="is disconnected"):
        connection.start("true")
    reader.close()
    connection.close()
    connection.close()
    assert capfd.readouterr() == ("", "")


@accelerated_only
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "sending"])
def test_a_frozen_builder_is_detected(server: Sshd, home: Path, connect: Connect, busy: bool) -> None:
    configure(home, "ServerAliveInterval 1\nServerAliveCountMax 1\n")
    connection = connect(server.url)
    channel = connection.start("cat >/dev/null")
    with (
        server.freeze(),
        pytest.raises(BuilderLost, match=r"is disconnected: it has answered nothing for 2 seconds"),
    ):
        if busy:
            while True:
                channel.send(bytes(MIB))
        channel.receive(1, 300.0)


def test_a_silent_but_live_builder_does_not_time_out(server: Sshd, home: Path, connect: Connect) -> None:
    configure(home, "ServerAliveInterval 1\nServerAliveCountMax 1\n")
    assert output(connect(server.url).start("sleep 3; echo done")) == b"done\n"


def test_a_forked_process_does_not_use_its_parents_connection(server: Sshd, home: Path, connect: Connect) -> None:
    connection = connect(server.url)
    channel = connection.start("cat")
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            channel.close()
            connection.close()
            del channel, connection
            import gc

            gc.collect()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    channel.send(b"still ours")
    assert channel.receive(100, 5.0) == b"still ours"
    assert run(connection, "echo new") == "new\n"
    assert server.connections == 1


# re-keying


def rekey_after(connection: SSHConnection, size: int) -> None:
    assert isinstance(connection._transport, paramiko_internals.InternalsTransport)
    connection._transport.packetizer.REKEY_BYTES = size


def there_and_back(connection: SSHConnection, size: int) -> None:
    """Send `size` bytes to a program that returns them, and compare."""
    block = os.urandom(MIB)
    channel = connection.start("cat")

    def send() -> None:
        for _ in range(size // MIB):
            channel.send(block)

    sender = threading.Thread(target=send)
    sender.start()
    for _ in range(size // MIB):
        data = b""
        while len(data) < MIB:
            more = channel.receive(MIB - len(data), 20.0)
            assert more
            data += more
        assert data == block
    sender.join()
    channel.close()


@accelerated_only
def test_frequent_re_keying_corrupts_no_byte(
    serve: Serve, tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(RekeyLimit="1M", LogLevel="DEBUG1")
    come_from(client_home(tmp_path, server), monkeypatch)
    connection = connect(server.url)
    rekey_after(connection, 700_000)
    there_and_back(connection, 64 * MIB)
    assert server.log.count("rekeying out") > 50 or server.log.count("SSH2_MSG_NEWKEYS received") > 50


@accelerated_only
def test_programs_may_end_in_the_middle_of_a_key_exchange(server: Sshd, home: Path, connect: Connect) -> None:
    connection = connect(server.url)
    rekey_after(connection, 100_000)
    failures: list[BaseException] = []

    def work(command: str, until: float) -> None:
        try:
            while time.monotonic() < until:
                channel = connection.start(command)
                with contextlib.suppress(BuilderLost):
                    channel.send(bytes(50_000))
                with contextlib.suppress(BuilderLost):
                    output(channel)
                channel.close()
        except BuilderBusy:
            pass
        except BuilderError as error:
            failures.append(error)

    until = time.monotonic() + 2
    commands = ["head -c 60000 /dev/zero", "true", "head -c 100 >&2", "head -c 60000 /dev/zero", "exec >&-; cat"]
    threads = [threading.Thread(target=work, args=(command, until)) for command in commands[:4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert run(connection, "echo alive") == "alive\n"


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["default", "64M"])
def test_more_than_a_gibibyte_each_way_on_one_connection(
    serve: Serve, tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    server = serve(RekeyLimit=limit)
    come_from(client_home(tmp_path, server), monkeypatch)
    size = 1200 * MIB
    connection = connect(server.url)
    block = memoryview(bytes(MIB))

    channel = connection.start("wc -c >count; mv count done")
    for _ in range(size // MIB):
        channel.send(block)
    channel.close()
    assert int(run(connection, "until test -e done; do sleep 0.1; done; cat done; rm done")) == size

    channel = connection.start(f"head -c {size} /dev/zero")
    got = 0
    while data := channel.receive(1 << 18, 20.0):
        got += len(data)
    assert got == size
    there_and_back(connection, size)
