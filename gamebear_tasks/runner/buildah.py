"""The one way to run buildah, and what this builder can do: storage, isolation, namespaces, processors.

Nothing is configured and nothing is guessed from versions: each way is tried with a container of the host's
own `/usr`, best first, and what worked is remembered until the next boot or until a program that matters has
changed.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from . import files, output
from .arch import ARCHITECTURES
from .emulation import PROBE_SECONDS, emulated, handlers
from .files import RunnerError, locked

REASON = 400
"""Characters that are told of why no container runs; buildah says many more."""

RECIPE = 2
"""Version of the probe; another number makes every builder probe again."""

IMAGES_IN_USE = "in-use.lock"
"""The file in `images/` whose lock is shared by all who look for an image; a prune of images holds it alone."""

FACTS_VARIABLE = "GAMEBEAR_FACTS"
"""Environment variable that carries the facts into the namespace, where they could not be found out again."""

SUBORDINATE_IDS = ("/etc/subuid", "/etc/subgid")

ENOUGH_IDS = 65536
"""Subordinate ids, of users and of groups, without which packages cannot be installed in a container."""

SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")

KEPT_VARIABLES = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TZ|LANG|LC_\w+|XDG_\w+|STORAGE_\w+|CONTAINERS_\w+|_CONTAINERS_\w+"
    r"|REGISTRY_AUTH_FILE|DBUS_SESSION_BUS_ADDRESS|(?:https?|ftp|all|no)_proxy|(?:HTTPS?|FTP|ALL|NO)_PROXY|SSL_CERT_(?:FILE|DIR)"
    r"|PYTHON(?:UNBUFFERED|DONTWRITEBYTECODE|UTF8)|GAMEBEAR_\w+"
)
"""What of our environment the programs we start may see; all else, tokens and keys among it, stays out."""


class BuildahError(RunnerError):
    """A buildah command failed.

    Args:
        command: what followed `buildah` and its storage options.
        status: exit status, negative for a signal.
        stderr: what it had to say, as much as was kept.
    """

    kind = "command"

    def __init__(self, command: Sequence[str], status: int, stderr: str, hint: str = "") -> None:
        said = last_lines(stderr)
        message = f"`buildah {shlex.join(command)}` ended with status {status}"
        message += f": {said}" if said else "."
        super().__init__(message, hint)
        self.command = list(command)
        self.status = status
        self.stderr = stderr


class ImageError(RunnerError):
    """An image cannot be had."""

    kind = "image"


class Facts(NamedTuple):  # a dataclass takes as long to import as all else that a supervisor needs of ours
    """What this builder can do.

    Attributes:
        version: buildah's version.
        rootless: whether an ordinary user's user namespace is needed.
        storage: buildah's global options that select the image store.
        driver: the store's driver: `overlay`, `vfs`, ...
        isolation: how `buildah run` works here: `oci`, `rootless` or `chroot`.
        pid_namespace: whether a build can be process 1 of a PID namespace, so that its end is the end of all.
        arch: Debian's name of the builder's architecture.
        emulated: Debian's names of other architectures whose programs run here, by emulation or by the CPU.
    """

    version: str
    rootless: bool
    storage: tuple[str, ...]
    driver: str
    isolation: str
    pid_namespace: bool
    arch: str
    emulated: tuple[str, ...]


def facts(root: Path) -> Facts:
    """Return what this builder can do; probed once, remembered in `root/facts.json`.

    Args:
        root: the versioned store folder.

    Raises:
        RunnerError: no container can be run here; the hint is the command that changes it.
    """
    if FACTS_VARIABLE in os.environ:
        return _from_json(json.loads(os.environ[FACTS_VARIABLE]))
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(root / "facts.lock"):
        key, foreign = _key(root), handlers()
        known = files.read_json(root / "facts.json")
        if isinstance(known, dict) and known.get("key") == key:
            with contextlib.suppress(KeyError, TypeError):
                found = _from_json(known["facts"])
                if foreign is not None and foreign == known.get("handlers"):
                    return found
                found = found._replace(emulated=emulated(found.arch))
                if foreign is not None:
                    _remember(root, key, foreign, found)
                return found
        found = _probe(root)
        _remember(root, key, foreign, found)
        _forget_other_boots(root, found)
        return found


def _remember(root: Path, key: dict[str, Any], foreign: list[str] | None, found: Facts) -> None:
    files.write_json(root / "facts.json", {"key": key, "handlers": foreign, "facts": found._asdict()})


def namespace(facts: Facts) -> list[str]:
    """Return the words before a command that put it where buildah can work (user, mount and PID namespace).

    With `facts.pid_namespace` the command is process 1 of its namespace: when it ends, however it ends, the
    kernel kills all that it started. Of the signals from outside, only SIGKILL and those it handles reach it.
    To kill it, start it in a session of its own and kill its process group: its parents don't pass SIGKILL on.
    """
    words: list[str] = []
    if facts.rootless:
        words += ["buildah", "unshare"]
    if facts.pid_namespace:
        words += ["unshare", "--fork", "--pid", "--kill-child", "--mount-proc", "--"]
    return words


def environment(root: Path, facts: Facts) -> dict[str, str]:
    """Return the whole environment for what runs on this builder: no secrets, TMPDIR in the store."""
    env = _environment(root, facts.rootless)
    env["BUILDAH_ISOLATION"] = facts.isolation
    env[FACTS_VARIABLE] = json.dumps(facts._asdict())
    return env


def stay_with(facts: Facts) -> None:
    """Have this process go by what it knows, whatever is changed meanwhile: its containers are where that says."""
    os.environ[FACTS_VARIABLE] = json.dumps(facts._asdict())


class Buildah:
    """Buildah with this builder's store and isolation, to be used inside the namespace.

    Args:
        root: the versioned store folder.
        facts: what the builder can do.
        prefix: what the names of containers that we make for ourselves start with.
        used: the file that notes the ids of the images which the job uses.
    """

    def __init__(self, root: Path, facts: Facts, prefix: str = "gamebear-", used: Path | None = None) -> None:
        self.root = root
        self.prefix = prefix
        self.used = used
        self.facts = facts
        self.environment = environment(root, facts)

    def command(self, *args: str) -> list[str]:
        """Return the command line for `buildah args...` on this builder's store."""
        return ["buildah", *self.facts.storage, *args]

    def __call__(
        self,
        *args: str,
        input: bytes | None = None,
        timeout: float | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """Run buildah quietly and return what it printed.

        Args:
            args: the command and its options.
            input: what it reads; nothing by default.
            timeout: seconds after which it is killed and counts as failed.
            variables: more of its environment; what it needs itself stays.

        Raises:
            BuildahError: it failed.
        """
        env = {**(variables or {}), **self.environment}
        status, stdout, stderr = _captured(self.command(*args), env, input, timeout)
        if status:
            raise BuildahError(args, status, stderr)
        return stdout

    def images(self, every: bool = False) -> list[dict[str, Any]]:
        """Return the local images as buildah lists them, with plain full ids and a list of names; raises BuildahError.

        Args:
            every: intermediate images too.
        """
        listed = json.loads(self("images", "--no-trunc", "--json", *(["--all"] if every else [])) or "null") or []
        return [
            {**entry, "id": str(entry["id"]).rpartition(":")[2], "names": list(entry.get("names") or ())}
            for entry in listed
        ]

    @contextlib.contextmanager
    def looking_for_image(self) -> Iterator[None]:
        """Keep every image for the length of the block, in which one is found or made and noted (see `prune`)."""
        folder = _folder(self.root / "images")
        with locked(folder / IMAGES_IN_USE, shared=True):
            yield

    def note_use(self, image: str) -> None:
        """Note that the job uses an image, by its full id."""
        with contextlib.suppress(OSError):
            (_folder(self.root / "images") / f"{image}.used").touch()
            if self.used is not None:
                with self.used.open("a") as file:
                    file.write(f"{image}\n")

    def run_in(
        self,
        container: str,
        words: Sequence[str],
        *options: str,
        stdin: int | IO[Any] = subprocess.DEVNULL,
        out: output.Sink,
        err: output.Sink | None = None,
    ) -> int:
        """Run a command in a container and return its exit status.

        Args:
            container: its name.
            words: the command.
            options: of `buildah run`.
            stdin: what the command reads.
            out: gets what it prints, as it comes.
            err: gets what it prints as errors; None: in order with the rest.
        """
        return output.run(
            lambda words: self.command("run", *options, container, "--", *words),
            words,
            self.environment,
            prefix=self.prefix,
            is_shared=self.facts.isolation == "chroot" and "--terminal" not in options,
            stdin=stdin,
            out=out,
            err=err,
        )

    def logged_in(self, container: str, words: Sequence[str], *options: str, kept: int = 1 << 16) -> tuple[int, str]:
        """Run a command in a container with its output going to the log; see `run_in` and `streamed`."""
        sys.stdout.flush()
        sys.stderr.flush()
        log, tail = output.descriptor(1), bytearray()

        def take(data: bytes) -> None:
            log(data)
            tail.extend(data)
            del tail[:-kept]

        status = self.run_in(container, words, *options, out=take)
        return status, tail.decode("utf-8", "replace")


def remove_containers(root: Path, facts: Facts, prefix: str, but: Collection[str] = ()) -> None:
    """Remove every container whose name starts with `prefix`, but some; to be called from outside the namespace.

    Raises:
        BuildahError: one of them stays.
    """
    output.remove_leftovers(prefix)
    before, store, env = namespace(facts), list(facts.storage), environment(root, facts)
    status, stdout, stderr = _captured([*before, "buildah", *store, "containers", "--all", "--json"], env)
    if status:
        raise BuildahError(["containers", "--all", "--json"], status, stderr)
    try:
        listed = json.loads(stdout or "null") or []
    except ValueError:
        raise BuildahError(["containers", "--all", "--json"], status, "its output is not JSON") from None
    for container in listed:
        if container["containername"].startswith(prefix) and container["containername"] not in but:
            args = ["rm", container["id"]]
            status, _, stderr = _captured([*before, "buildah", *store, *args], env)
            if status and "not known" not in stderr:
                raise BuildahError(args, status, stderr)


def remove_tree(root: Path, facts: Facts, path: Path) -> None:
    """Remove a file or folder, whichever of the namespace's users owns what is in it; a missing one is well.

    Raises:
        RunnerError: something of it is left.
    """
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not os.path.lexists(path):
        return
    command = [*namespace(facts), "rm", "-rf", "--", str(path)]
    status, _, stderr = _captured(command, environment(root, facts))
    if status or os.path.lexists(path):
        raise RunnerError(
            f"{path} cannot be removed: {last_lines(stderr)}",
            f"Remove it on the builder: buildah unshare rm -rf {path}",
        )


def outside(root: Path, facts: Facts, *args: str, timeout: float | None = None) -> str:
    """Run buildah from outside the namespace and return what it printed; raises BuildahError.

    Args:
        root: the versioned store folder.
        facts: what the builder can do.
        args: the command and its options.
        timeout: seconds after which it is killed and counts as failed.
    """
    command = [*namespace(facts), "buildah", *facts.storage, *args]
    status, stdout, stderr = _captured(command, environment(root, facts), timeout=timeout)
    if status:
        raise BuildahError(args, status, stderr)
    return stdout


def last_lines(text: str, count: int = 4) -> str:
    """Return the last few lines that say something, as one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-count:])


def streamed(
    command: Sequence[str],
    env: dict[str, str],
    *,
    cwd: Path | None = None,
    silence: Callable[[str], float] | None = None,
    kept: int = 1 << 16,
) -> tuple[int, str]:
    """Run a command with its output going to the log as it comes.

    Args:
        command: what to run.
        env: its whole environment.
        cwd: where it runs.
        silence: given what was said last, how many seconds it may say nothing before it is killed.
        kept: how many of the last bytes to return.

    Returns:
        Its exit status (negative for a signal) and the end of what it said.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer)
    except OSError as error:
        os.close(reader)
        return 127, str(error)
    finally:
        os.close(writer)
    log = output.descriptor(1)
    tail = bytearray()
    waited = 0.0
    try:
        while True:
            # A daemon that a command left behind may keep the pipe open: the command's own end counts.
            ready, _, _ = select.select([reader], [], [], 0.5)
            if ready:
                data = os.read(reader, 1 << 16)
                if not data:
                    break
                log(data)
                waited = 0.0
                tail += data
                del tail[:-kept]
            elif process.poll() is not None:
                break
            else:
                waited += 0.5
                if silence is not None and waited > silence(tail.decode("utf-8", "replace")):
                    tail += f"\nnothing was heard for {waited:.0f} seconds\n".encode()
                    silence = None
                    process.kill()
        return process.wait(), tail.decode("utf-8", "replace")
    finally:
        os.close(reader)
        if process.poll() is None:
            process.kill()
            process.wait()


def _captured(
    command: Sequence[str], env: dict[str, str], input: bytes | None = None, timeout: float | None = None
) -> tuple[int, str, str]:
    """Run a command; return its status, its output and its errors."""
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    try:
        done = subprocess.run(command, env=env, check=False, capture_output=True, timeout=timeout, **given)
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {timeout:.0f} seconds"
    except OSError as error:
        return 127, "", str(error)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def search_path() -> str:
    """Return where programs are looked for: our own `PATH`, and where Debian has those of root."""
    folders = [folder for folder in os.environ.get("PATH", "").split(":") if folder]
    return ":".join([*folders, *(folder for folder in SYSTEM_FOLDERS if folder not in folders)])


def _environment(root: Path, rootless: bool) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if KEPT_VARIABLES.fullmatch(name)}
    env["PATH"] = search_path()
    env["LC_ALL"] = "C.UTF-8"
    env["DEBIAN_FRONTEND"] = "noninteractive"
    given = os.environ.get("TMPDIR", "")  # a job's own, which goes with it
    env["TMPDIR"] = str(_folder(Path(given) if Path(given).parent == root / "tmp" else root / "tmp"))
    if rootless or os.geteuid():
        # The session's own folder goes away when its last connection closes; a build outlives that.
        session = env.get("XDG_RUNTIME_DIR")
        login = Path(session or "/nonexistent", "containers", "auth.json")
        with contextlib.suppress(OSError):
            if login.exists() and session != str(_runtime(root)):
                env.setdefault("REGISTRY_AUTH_FILE", str(login))
        env["XDG_RUNTIME_DIR"] = str(_folder(_runtime(root)))
    return env


def _folder(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def boot() -> str:
    """Return what tells this boot of the machine from others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _runtime(root: Path) -> Path:
    """Where state lives that must not outlive a reboot: what is mounted, above all."""
    return root / "run" / boot()


def _forget_other_boots(root: Path, facts: Facts) -> None:
    with contextlib.suppress(OSError, RunnerError):
        for folder in (root / "run").iterdir():
            if folder != _runtime(root):
                remove_tree(root, facts, folder)


def _from_json(value: Any) -> Facts:
    value = dict(value)
    for name in ("storage", "emulated"):
        value[name] = tuple(value[name])
    return Facts(**value)


def _key(root: Path) -> dict[str, Any]:
    """Everything that the probe's outcome hangs on."""
    path = _environment(root, False)["PATH"]
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser(), "containers")
    programs = ("buildah", "crun", "runc", "fuse-overlayfs", "newuidmap", "newgidmap", "unshare")
    watched = [shutil.which(program, path=path) or program for program in programs]
    watched += SUBORDINATE_IDS
    for name in ("storage.conf", "containers.conf"):
        watched += [f"{folder}/{name}" for folder in ("/usr/share/containers", "/etc/containers", home)]
    chosen = ("STORAGE_", "CONTAINERS_", "XDG_DATA")
    return {
        "recipe": RECIPE,
        "root": str(root),
        "boot": boot(),
        "kernel": os.uname().release,
        "uid": os.geteuid(),
        "home": str(Path("~").expanduser()),
        "variables": {name: value for name, value in os.environ.items() if name.startswith(chosen)},
        "files": {name: _stamp(name) for name in watched},
    }


def _stamp(path: str) -> list[int]:
    try:
        found = Path(path).stat()
    except OSError:
        return []
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _probe(root: Path) -> Facts:
    """Find out what works here, best first; raises RunnerError when nothing does."""
    rootless = os.geteuid() != 0
    env = _environment(root, rootless)
    env["BUILDAH_ISOLATION"] = "chroot"
    if not shutil.which("buildah", path=env["PATH"]):
        raise RunnerError("The builder has no buildah.", "Install it there: sudo apt install buildah")
    status, stdout, stderr = _captured(["buildah", "--version"], env, timeout=PROBE_SECONDS)
    words = stdout.split()
    if status or words[:2] != ["buildah", "version"] or len(words) < 3:
        raise RunnerError(
            f"The builder's buildah does not run: {last_lines(stderr or stdout)}.",
            "Install it again: sudo apt install --reinstall buildah",
        )
    if rootless:
        _check_user_namespace(env)
    arch = _debian_arch(env)
    found = Facts(
        version=words[2],
        rootless=rootless,
        storage=(),
        driver="",
        isolation="",
        pid_namespace=False,
        arch=arch,
        emulated=emulated(arch),
    )
    failures: list[str] = []
    for driver, storage in _stores(root, rootless, env):
        for pid_namespace in (True, False):
            for isolation in ("rootless", "chroot") if rootless else ("oci", "chroot"):
                tried = found._replace(storage=storage, driver=driver, isolation=isolation, pid_namespace=pid_namespace)
                failure = _try(root, tried)
                if not failure:
                    return tried
                failures.append(f"{driver}, {isolation}{', own PIDs' if pid_namespace else ''}: {failure}")
    if all("netavark" in failure for failure in failures):
        raise RunnerError(
            "The builder's buildah does not start without netavark, not even for containers without a network.",
            "Install it there: sudo apt install netavark",
        )
    raise RunnerError(
        f"No container can be run on the builder, in {len(failures)} ways; the plainest is {failures[-1][:REASON]}.",
        "Inside another container, that one must be allowed to mount and to make namespaces "
        "(for example --privileged); on a machine of its own, see that `buildah unshare true` works.",
    )


def _stores(root: Path, rootless: bool, env: dict[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Give each image store to try, best first: driver, buildah's options."""
    runtime = ("--runroot", str(_folder(_runtime(root)) / "containers"))
    status, stdout, _ = _captured(["buildah", "info"], env, timeout=PROBE_SECONDS)
    try:
        default = json.loads(stdout)["store"]["GraphDriverName"] if not status else ""
    except (ValueError, KeyError, TypeError):
        default = ""
    if default and default != "vfs":
        yield default, runtime if rootless else ()
    own = ("--root", str(_folder(root / "storage")), *runtime, "--storage-driver")
    yield "overlay", (*own, "overlay")
    fuse = shutil.which("fuse-overlayfs", path=env["PATH"])
    if fuse:
        yield "overlay", (*own, "overlay", "--storage-opt", f"overlay.mount_program={fuse}")
    yield "vfs", (*own, "vfs")


def _try(root: Path, tried: Facts) -> str:
    """Run the host's own `true` in a container; return why that failed, nothing when it did not."""
    env = environment(root, tried)
    before = [*namespace(tried), "buildah", *tried.storage]
    name = f"gamebear-probe-{uuid.uuid4().hex[:12]}"
    true = shutil.which("true", path=":".join(SYSTEM_FOLDERS)) or "/bin/true"
    volumes: list[str] = []
    for folder in ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32"):
        if Path(folder).is_dir():
            volumes += ["--volume", f"{folder}:{folder}:ro"]
    network = [] if tried.isolation == "chroot" else ["--network", "host"]
    status, _, stderr = _captured([*before, "from", "--name", name, "scratch"], env, timeout=PROBE_SECONDS)
    if status:
        return last_lines(stderr, 1) or f"status {status}"
    try:
        status, _, stderr = _captured(
            [*before, "run", *network, *volumes, name, "--", true], env, timeout=PROBE_SECONDS
        )
        return (last_lines(stderr, 3) or f"status {status}") if status else ""
    finally:
        _captured([*before, "rm", name], env, timeout=PROBE_SECONDS)


def _check_user_namespace(env: dict[str, str]) -> None:
    """Raise RunnerError where an ordinary user gets no user namespace with at least 65536 user ids."""
    user = getpass.getuser()
    missing = [name for name in ("newuidmap", "newgidmap") if not shutil.which(name, path=env["PATH"])]
    if missing:
        raise RunnerError(
            f"The builder has no {' and no '.join(missing)}, without which {user} cannot run containers.",
            "Install it there: sudo apt install uidmap",
        )
    status, stdout, stderr = _captured(
        ["buildah", "unshare", "cat", "/proc/self/uid_map", "/proc/self/gid_map"], env, timeout=PROBE_SECONDS
    )
    maps = [line.split() for line in stdout.splitlines()]
    lengths = [int(words[2]) for words in maps if len(words) == 3 and words[2].isdigit()]
    if not status and sum(lengths) >= 2 * ENOUGH_IDS:
        return
    counts = subordinate_ids(user)
    if min(counts) < ENOUGH_IDS:
        raise RunnerError(
            f"On the builder, {user} has {counts[0]} subordinate user ids and {counts[1]} group ids (/etc/subuid, "
            "/etc/subgid); packages are installed in a container only with 65536 of each.",
            f"Give them: sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user} "
            "(another range where another user has that one).",
        )
    raise RunnerError(
        f"The builder gives {user} no user namespace: {last_lines(stderr)}.",
        "The kernel's settings may forbid it (sysctl user.max_user_namespaces, "
        "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns), or newuidmap is not "
        "set-uid root (sudo apt install --reinstall uidmap).",
    )


def subordinate_ids(user: str) -> tuple[int, int]:
    """Return how many subordinate user and group ids we have, as that user or as our number."""
    names = (user, str(os.geteuid()))
    uids, gids = (
        sum(count for name, _, count in subordinate_ranges(path) if name in names) for path in SUBORDINATE_IDS
    )
    return uids, gids


def subordinate_ranges(path: str) -> list[tuple[str, int, int]]:
    """Return the ranges in a file like /etc/subuid: whose, the first id, how many; see subuid(5)."""
    try:
        lines = [line.split(":") for line in Path(path).read_text(errors="replace").splitlines()]
    except OSError:
        return []
    return [(words[0], int(words[1]), int(words[2])) for words in lines if len(words) == 3 and _are_digits(words[1:])]


def _are_digits(words: Sequence[str]) -> bool:
    return all(word.isascii() and word.isdigit() and len(word) < 11 for word in words)


def _debian_arch(env: dict[str, str]) -> str:
    status, stdout, _ = _captured(["dpkg", "--print-architecture"], env, timeout=PROBE_SECONDS)
    if not status and stdout.strip():
        return stdout.strip()
    machine = os.uname().machine
    return ARCHITECTURES.get(machine, machine)
