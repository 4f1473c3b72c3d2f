"""`Container` and `Image`, as a buildscript sees them.

A buildah command costs 30 to 150 ms on a PC and far more on a Pi, so there are as few as can be: settings are gathered
and go along with the next command, files are copied through one mount per container, an image's settings are read only
when the script asks for them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import posixpath
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Generic, TypeVar, cast, overload

from . import bases, packages
from .buildah import Buildah, BuildahError, Facts, last_lines
from .files import CHUNK
from .rootfs import Rootfs

T = TypeVar("T")

DOWNLOAD_SECONDS = 60.0
"""How long a server may be silent during `add_url`."""

RUN_TAKES_SETTINGS = (1, 22)
"""The first release whose `buildah run` has `--env` and `--workingdir`."""


class ImageNotFoundError(Exception):
    """There is no such image, or it cannot be had."""


class CommandError(subprocess.CalledProcessError):
    """A command in a container failed, or buildah itself did.

    Attributes:
        cmd: the command, as the script gave it.
        returncode: its exit status, negative for a signal.
        where: the container or image that it was about.
    """

    def __init__(
        self, returncode: int, cmd: Sequence[str], where: str = "", output: Any = None, stderr: Any = None
    ) -> None:
        super().__init__(returncode, list(cmd), output, stderr)
        self.where = where

    def __str__(self) -> str:
        number = self.returncode
        number = -number if number < 0 else number - 128
        killed = self.returncode != 255 and number in set(signal.Signals)
        how = f"was ended by {signal.Signals(number).name}" if killed else f"failed with status {self.returncode}"
        said = last_lines(self.stderr) if isinstance(self.stderr, str) else ""
        return f"`{shlex.join(self.cmd)}` {how}{self.where and f' in {self.where}'}{said and f': {said}'}"


class Job:
    """What the containers of this process belong to; there is one job for each process.

    Args:
        buildah: to run buildah with, inside the namespace.
        facts: what the builder can do.
        arch: Debian's name of the architecture that images are to have.
        prefix: what the names of the containers begin with.
    """

    def __init__(self, buildah: Buildah, facts: Facts, arch: str, prefix: str) -> None:
        self.buildah = buildah
        self.facts = facts
        self.arch = arch
        self.prefix = prefix
        self.count = 0
        self.open: dict[str, Container] = {}
        self.committed: list[str] = []

    def run_takes_settings(self) -> bool:
        """Say whether environment and working directory can be had for one command only."""
        numbers = [int(number) for number in re.findall(r"\d+", self.facts.version)[:2]]
        return tuple(numbers) >= RUN_TAKES_SETTINGS

    def close(self, keep: Image | None = None) -> None:
        """Remove the containers that are left, and the images that were committed and then neither named nor returned.

        Args:
            keep: the image that the script returned.

        Raises:
            BuildahError: a container stays.
        """
        for container in list(self.open.values()):
            container._let_go()
        if self.open:
            self.buildah("rm", *self.open)
            self.open.clear()
        left = [identity for identity in self.committed if keep is None or identity != keep.id]
        if left:
            with contextlib.suppress(BuildahError):
                named = {entry["id"] for entry in _images(self.buildah) if entry["names"]}
                for identity in reversed(left):
                    if identity not in named:
                        with contextlib.suppress(BuildahError):
                            self.buildah("rmi", identity)


_job: Job | None = None


def begin(job: Job | None) -> None:
    """Make a job the one that new containers and images belong to."""
    global _job
    _job = job


def current() -> Job:
    """Return the job of this process."""
    if _job is None:
        raise RuntimeError("There are containers and images only in a build.")
    return _job


def _run_buildah(where: str, *args: str) -> str:
    """Run buildah quietly; what fails is an error that a script can catch like that of a command."""
    try:
        return current().buildah(*args)
    except BuildahError as error:
        raise CommandError(error.status, ["buildah", *args], where, stderr=error.stderr) from None


# settings


class Setting(Generic[T]):
    """A setting of a container, read from its image when it is first looked at, applied when it is needed.

    Args:
        check: turns what the script assigns into the value, or raises TypeError or ValueError.
    """

    def __init__(self, check: Callable[[Any], T]) -> None:
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, container: None, owner: type) -> Setting[T]: ...

    @overload
    def __get__(self, container: Container, owner: type) -> T: ...

    def __get__(self, container: Container | None, owner: type) -> Setting[T] | T:
        if container is None:
            return self
        return cast(T, container._read(self.name))

    def __set__(self, container: Container, value: Any) -> None:
        container._now[self.name] = self.check(value)


class Table(MutableMapping[str, str]):
    """Environment variables or labels: the image's, and the script's changes over them.

    Args:
        applied: returns what buildah knows already.
    """

    def __init__(self, applied: Callable[[], dict[str, str]]) -> None:
        self._applied = applied
        self.changes: dict[str, str | None] = {}

    def _all(self) -> dict[str, str]:
        merged: dict[str, str | None] = {**self._applied(), **self.changes}
        return {key: value for key, value in merged.items() if value is not None}

    def __getitem__(self, key: str) -> str:
        value = self.changes[key] if key in self.changes else self._applied()[key]
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: object) -> None:
        if not key or "=" in key:
            raise ValueError(f"{key!r} cannot be the name of an environment variable or a label")
        self.changes[key] = str(value)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self.changes[key] = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return repr(self._all())

    def __or__(self, other: Mapping[str, object]) -> dict[str, str]:
        return {**self._all(), **{key: str(value) for key, value in other.items()}}

    def __ior__(self, other: Mapping[str, object]) -> Table:
        for key, value in other.items():
            self[key] = value
        return self

    def replace(self, values: Mapping[str, object]) -> None:
        """Make the table equal to `values`."""
        if values is self:
            return
        values = dict(values)
        for key in set(self) - set(values):
            del self[key]
        self |= values

    def applied(self) -> None:
        """Note that buildah knows the changes now."""
        known = self._all()
        self.changes.clear()
        base = self._applied()
        base.clear()
        base.update(known)


def _words(value: Any) -> list[str]:
    if isinstance(value, (str, bytes)):
        raise TypeError(f"a list of words is wanted, such as {shlex.split(os.fsdecode(value))}, not the text {value!r}")
    return [str(word) for word in value or ()]


def _check_health(value: Any) -> list[str] | None:
    """Return a health check as images have it: CMD and words, or CMD-SHELL and a line for the shell."""
    if not value:
        return None
    if isinstance(value, str):
        return ["CMD-SHELL", value]
    words = _words(value)
    return words if words[0] in ("CMD", "CMD-SHELL", "NONE") else ["CMD", *words]


def _duration(value: Any) -> str:
    """Return a duration in Go's notation (`5m`, `1.5s`); a number is seconds."""
    return value if isinstance(value, str) else f"{value:g}s"


def _paths(value: Any) -> set[str]:
    if isinstance(value, str):
        raise TypeError(f"a set of paths is wanted, such as {{{value!r}}}, not the text {value!r}")
    return {str(path) for path in value}


# containers


class Container:
    """A working container, there from its construction to the end of its with-block, of the job at the latest.

    Args:
        image: an `Image`, an image's name or id, or `scratch` for an empty container.
        mounts: what is mounted in it for as long as it lives: `(folder outside, folder inside, *options)` each.

    Raises:
        ImageNotFoundError: the image cannot be had.
        CommandError: buildah failed.

    Attributes:
        environ: environment variables.
        command: what a container of the image runs by default; list of words.
        entrypoint: what that is appended to; list of words.
        labels: the image's labels.
        volumes: folders that containers of the image keep outside of it.
        workdir: where commands run; where relative paths in the container start.
        user: whom commands run as.
        healthcheck_cmd: words of the command that checks a container's health, or one text for its shell.
        healthcheck_interval: time between checks, in Go's notation (`5m`), or seconds.
        healthcheck_timeout: how long a check may take.
        healthcheck_start_period: time after the start in which a failed check does not count.
        healthcheck_retries: failed checks after which the container is unhealthy.
    """

    command = Setting(_words)
    entrypoint = Setting(_words)
    volumes = Setting(_paths)
    workdir = Setting(lambda value: str(value or ""))
    user = Setting(lambda value: "" if value is None else str(value))
    healthcheck_cmd = Setting(_check_health)
    healthcheck_interval = Setting(_duration)
    healthcheck_timeout = Setting(_duration)
    healthcheck_start_period = Setting(_duration)
    healthcheck_retries = Setting(int)

    def __init__(self, image: str | Image, *, mounts: Iterable[Any] = ()) -> None:
        job = current()
        self._job = job
        self._now: dict[str, Any] = {}
        self._applied: dict[str, Any] = {}
        self._loaded = False
        self._environ = Table(lambda: self._live("environ"))
        self._labels = Table(lambda: self._live("labels"))
        self._rootfs: Rootfs | None = None
        self._path: Path | None = None
        command = ["from", "--quiet"]
        if str(image) == "scratch":
            architecture, variant = bases.PLATFORMS[job.arch]
            command += ["--arch", architecture, *(("--variant", variant) if variant else ())]
            identity = "scratch"
        else:
            identity = image.id if isinstance(image, Image) else _resolve(str(image))
            job.buildah.note_use(identity)
        for mount in mounts or ():
            command += ["--volume", _volume(mount)]
        job.count += 1
        self.name = f"{job.prefix}{job.count}"
        self._where = f"a container of {str(image)[:12] if isinstance(image, Image) else image}"
        _run_buildah(self._where, *command, "--name", self.name, identity)
        job.open[self.name] = self

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<Container {self.name}>"

    def __enter__(self) -> Container:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._let_go()
        try:
            self._buildah("rm", self.name)
        except CommandError as failed:
            if error is None:
                raise
            print(f"gamebear: {failed}", file=sys.stderr)  # what went wrong first matters more
        else:
            self._job.open.pop(self.name, None)

    def _let_go(self) -> None:
        if self._rootfs is not None:
            self._rootfs.close()
        self._rootfs = self._path = None

    def _buildah(self, *args: str) -> str:
        if self.name not in self._job.open:
            raise ValueError(f"the container {self.name} is removed: its with-block is over")
        return _run_buildah(self._where, *args)

    # settings

    @property
    def environ(self) -> Table:
        """Environment variables; what is assigned is made text."""
        return self._environ

    @environ.setter
    def environ(self, values: Mapping[str, object]) -> None:
        self._environ.replace(values)

    @property
    def labels(self) -> Table:
        """The image's labels; what is assigned is made text."""
        return self._labels

    @labels.setter
    def labels(self, values: Mapping[str, object]) -> None:
        self._labels.replace(values)

    def _live(self, name: str) -> Any:
        """Return what buildah knows of a setting."""
        if not self._loaded:
            self._load(json.loads(self._buildah("inspect", self.name)))
        return self._applied[name]

    def _load(self, inspected: dict[str, Any]) -> None:
        config = (inspected.get("OCIv1") or {}).get("config") or {}
        docker = (inspected.get("Docker") or {}).get("config") or {}
        health = docker.get("Healthcheck") or {}
        self._applied = {
            "environ": dict(line.partition("=")[::2] for line in config.get("Env") or ()),
            "labels": dict(config.get("Labels") or {}),
            "command": list(config.get("Cmd") or ()),
            "entrypoint": list(config.get("Entrypoint") or ()),
            "volumes": set(config.get("Volumes") or ()),
            "workdir": config.get("WorkingDir") or "",
            "user": config.get("User") or "",
            "healthcheck_cmd": health.get("Test") or None,
            "healthcheck_interval": _duration(health.get("Interval", 0) / 1e9),
            "healthcheck_timeout": _duration(health.get("Timeout", 0) / 1e9),
            "healthcheck_start_period": _duration(health.get("StartPeriod", 0) / 1e9),
            "healthcheck_retries": int(health.get("Retries", 0)),
        }
        self._loaded = True

    def _read(self, name: str) -> Any:
        if name not in self._now:
            self._now[name] = copy.copy(self._live(name))
        return self._now[name]

    def _pending(self) -> dict[str, Any]:
        """Return the settings that buildah does not know yet."""
        if "volumes" in self._now:
            self._live("volumes")
        unknown = object()
        return {name: value for name, value in self._now.items() if value != self._applied.get(name, unknown)}

    def _apply(self, *more: str) -> None:
        """Tell buildah all settings that it does not know, in one command; `more` are further options for it."""
        pending = self._pending()
        options = list(more)
        for key, value in self._environ.changes.items():
            # buildah expands $NAME in it, and makes $ of $$
            options += ["--env", f"{key}-" if value is None else f"{key}={value.replace('$', '$$')}"]
        for key, value in self._labels.changes.items():
            options += ["--label", f"{key}-" if value is None else f"{key}={value}"]
        for name, option in (("workdir", "--workingdir"), ("user", "--user")):
            if name in pending:
                options += [option, pending[name]]
        for name, option in (("entrypoint", "--entrypoint"), ("command", "--cmd")):
            if name in pending:
                options += [option, json.dumps(pending[name])]
        if "volumes" in pending:
            before, after = self._applied["volumes"], pending["volumes"]
            options += [word for path in sorted(after - before) for word in ("--volume", _quoted(path))]
            options += [word for path in sorted(before - after) for word in ("--volume", _quoted(f"{path}-"))]
        if any(name.startswith("healthcheck_") for name in pending):
            options += self._health()
        if not options:
            return
        self._buildah("config", *options, self.name)
        for name, value in pending.items():
            self._applied[name] = copy.copy(value)
        for table in (self._environ, self._labels):
            if self._loaded:
                table.applied()
            table.changes.clear()

    def _health(self) -> list[str]:
        """Return the options for the health check, all of them: buildah sets defaults for what is left out."""
        test = self.healthcheck_cmd
        if test is None:
            return ["--healthcheck", ""]
        options = ["--healthcheck", f"{test[0]} {shlex.join(test[1:])}".strip()]
        for name in ("interval", "timeout", "start-period"):
            value = self._read(f"healthcheck_{name.replace('-', '_')}")
            options += [f"--healthcheck-{name}", value] if value not in ("0s", "") else []
        retries = self.healthcheck_retries
        return options + (["--healthcheck-retries", str(retries)] if retries else [])

    # commands

    def run(
        self,
        cmd: str | Iterable[str | int | os.PathLike[str]],
        *,
        shell: bool = False,
        pwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, object] | None = None,
        user: str | int | None = None,
        volumes: Iterable[Any] = (),
        mounts: Iterable[Mapping[str, object]] = (),
        terminal: bool = False,
        stdin: int | IO[Any] | None = None,
        input: str | bytes | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool | None = None,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command in the container; what it prints goes to the log as it comes.

        Args:
            cmd: its words; with `shell`, one line for `/bin/sh`.
            shell: have the container's shell read the line.
            pwd: the folder that it runs in, instead of `workdir`.
            env: further environment variables, for this command only.
            user: whom it runs as, instead of the container's user: name, number, or `user:group`.
            volumes: mounted for this command only: `outside:inside[:options]`, or the three as a sequence.
            mounts: the same as mappings for `buildah run --mount`: `{"type": "bind", "src": …, "dst": …}`.
            terminal: give it a terminal.
            stdin: what it reads, as for `subprocess.run`; nothing by default.
            input: text or bytes that it reads.
            stdout: as for `subprocess.run`; `PIPE` to have it in the result.
            stderr: the same.
            text: False to have bytes and not text in the result.

        Returns:
            The finished process, with the command, status 0, and what was asked for of its output.

        Raises:
            CommandError: it failed.
        """
        words = _command(cmd, shell)
        if self.name not in self._job.open:
            raise ValueError(f"the container {self.name} is removed: its with-block is over")
        further = {key: str(value) for key, value in (env or {}).items()}
        folder = None if pwd is None else self._absolute(os.fspath(pwd))
        with contextlib.ExitStack() as stack:
            if self._job.run_takes_settings():
                options = self._run_options(further, folder)
            else:
                stack.enter_context(self._changed_for_now(further, folder))
                self._apply()
                options = []
            if user is not None:
                options += ["--user", str(user)]
            if self._job.facts.isolation != "chroot":
                options += ["--network", "host"]
            if terminal:
                options.append("--terminal")
            for volume in volumes or ():
                options += ["--volume", _volume(volume)]
            for mount in mounts or ():
                options += ["--mount", _mount(mount)]
            command = self._job.buildah.command("run", *options, self.name, "--", *words)
            given: dict[str, Any] = {"stdin": subprocess.DEVNULL if stdin is None else stdin}
            if input is not None:
                given = {"input": input.encode() if isinstance(input, str) else input}
            sys.stdout.flush()
            sys.stderr.flush()
            done = subprocess.run(
                command, env=self._job.buildah.environment, check=False, stdout=stdout, stderr=stderr, **given
            )
        output, errors = (
            data if data is None or text is False else data.decode("utf-8", "backslashreplace")
            for data in (done.stdout, done.stderr)
        )
        if done.returncode:
            raise CommandError(done.returncode, words, self._where, output, errors)
        return subprocess.CompletedProcess(words, 0, output, errors)

    def _run_options(self, further: dict[str, str], folder: str | None) -> list[str]:
        """Return the options that give one command its settings, so that buildah need not be told them before."""
        if "volumes" in self._pending() or None in self._environ.changes.values():
            self._apply()
        pending = self._pending()
        options: list[str] = []
        if folder is None and pending.get("workdir") == "":
            folder = "/"
        folder = folder or pending.get("workdir")
        if folder:
            options += ["--workingdir", folder]
        if "user" in pending:
            options += ["--user", pending["user"] or "0:0"]
        for key, value in {**self._environ.changes, **further}.items():
            options += ["--env", f"{key}={value}"]
        return options

    @contextlib.contextmanager
    def _changed_for_now(self, further: dict[str, str], folder: str | None) -> Iterator[None]:
        """Have other settings for the block, where `buildah run` has no options for them."""
        before = {key: self.environ.get(key) for key in further}
        workdir = None if folder is None else self.workdir
        self.environ.update(further)
        if folder is not None:
            self.workdir = folder
        try:
            yield
        finally:
            for key, value in before.items():
                if value is None:
                    del self.environ[key]
                else:
                    self.environ[key] = value
            if workdir is not None:
                self.workdir = workdir

    # files

    def _absolute(self, path: str) -> str:
        """Return a path in the container from its root; a relative one starts in `workdir`."""
        return path if path.startswith("/") else posixpath.join("/", self.workdir, path)

    def _files(self) -> Rootfs:
        if self._rootfs is None:
            self._path = Path(self._buildah("mount", self.name).rstrip("\n"))
            self._rootfs = Rootfs(self._path)
        return self._rootfs

    def copy_in(self, src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
        """Copy a file or a folder's contents into the container; the copies belong to its root.

        Modes and times are kept, missing folders are made, folders are merged.

        Args:
            src: a path outside; relative to the working directory.
            dst: a path in the container, with the file's name; a file goes into a folder that is there, or that is
                named with a slash at the end. Relative to `workdir`.

        Raises:
            OSError: `src` is missing, or something is of the wrong kind.
        """
        self._files().copy_in(Path(src), self._absolute(os.fspath(dst)))

    def copy_out(self, src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
        """Copy a file or a folder's contents out of the container.

        Modes and times are kept, missing folders are made, folders are merged. Links are followed inside the
        container; in a folder, those that lead to something in that folder stay links.

        Args:
            src: a path in the container, from its root.
            dst: a path outside, with the file's name; a file goes into a folder that is there. Relative to the working
                directory.

        Raises:
            OSError: `src` is missing, or something is of the wrong kind.
        """
        self._files().copy_out(os.fspath(src), Path(dst))

    def add_url(self, url: str, dest: str | os.PathLike[str], *, chmod: int | None = None) -> None:
        """Download a file into the container.

        Args:
            url: http, https or ftp.
            dest: a path in the container with the file's name; in a folder that is there, or that is named with a
                slash at the end, the file has the name it has in the URL. Relative to `workdir`.
            chmod: its mode, 0o644 by default.

        Raises:
            URLError: it cannot be had; HTTPError where the server says why.
        """
        import urllib.error  # with TLS and all it takes as long to load as everything else together
        import urllib.parse
        import urllib.request

        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https", "ftp"):
            raise ValueError(f"add_url takes http, https and ftp URLs, not {url!r}; for a file there is copy_in")
        path = self._absolute(os.fspath(dest))
        files = self._files()
        if path.endswith("/") or files.is_folder(path):
            path = posixpath.join(path, posixpath.basename(parts.path) or "index.html")
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as answer, TemporaryFile() as file:
                while data := answer.read(CHUNK):
                    file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644 if chmod is None else chmod)
                files.put(file.fileno(), path)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:
            raise urllib.error.URLError(f"{url}: {error.reason}") from None

    @contextlib.contextmanager
    def mount(self) -> Iterator[Path]:
        """Give the folder that holds the container's files, for as long as the block and the container last.

        It is a folder of the builder: a link in it that is absolute leads to the builder's own files.
        """
        self._files()
        assert self._path is not None
        yield self._path

    # images

    def inspect(self) -> dict[str, Any]:
        """Return what `buildah inspect` says about the container, its settings applied."""
        self._apply()
        inspected: dict[str, Any] = json.loads(self._buildah("inspect", self.name))
        return inspected

    def commit(self) -> Image:
        """Make an image of the container as it is now, and return it.

        Without a name (`Image.add_tag`) it lasts until the job ends, unless the script returns it. An image with a
        health check is in Docker's format; OCI's has none.
        """
        health = self.healthcheck_cmd
        self._apply("--annotation", f"{bases.ARCHITECTURE_ANNOTATION}={self._job.arch}")
        form = ["--format", "docker"] if health else []
        said = self._buildah("commit", "--quiet", *form, self.name).split()
        image = Image._of(said[-1].rpartition(":")[2])
        self._job.committed.append(image.id)
        self._job.buildah.note_use(image.id)
        return image


def _command(cmd: Any, shell: bool) -> list[str]:
    """Return the words of what a script wants to run."""
    if shell:
        line = cmd if isinstance(cmd, str) else shlex.join(str(word) for word in cmd)
        return ["/bin/sh", "-c", line]
    if isinstance(cmd, (str, bytes)):
        raise TypeError(f"run() takes a list of words; to have a shell read a line, say run({cmd!r}, shell=True)")
    words = [os.fsdecode(word) if isinstance(word, (bytes, os.PathLike)) else str(word) for word in cmd]
    if not words:
        raise ValueError("run() needs a command")
    return words


def _volume(value: Any) -> str:
    """Return `outside:inside[:options]`; a relative path outside starts in the working directory."""
    parts = value.split(":") if isinstance(value, str) else [os.fspath(part) for part in value]
    if len(parts) < 2:
        raise ValueError(f"{value!r} is no mount: (outside, inside, *options) is wanted")
    return ":".join([os.path.abspath(parts[0]), *parts[1:]])


def _mount(value: Mapping[str, object]) -> str:
    """Return a mapping as `--mount` takes it; a relative source starts in the working directory."""
    fields = {key: str(field) for key, field in value.items()}
    for key in ("src", "source"):
        if key in fields and fields.get("type", "bind") == "bind":
            fields[key] = os.path.abspath(fields[key])
    return ",".join(f"{key}={field}" for key, field in fields.items())


def _quoted(text: str) -> str:
    """Return a field of a comma-separated line (RFC 4180)."""
    quoted = text.replace('"', '""')
    return f'"{quoted}"' if set(text) & set(',"\n') else text


# images


def _resolve(name: str) -> str:
    """Return the id of the image that a container is to be made of."""
    job = current()
    try:
        return bases.resolve(job.buildah, job.facts, name, job.arch)
    except bases.ImageError as error:
        raise ImageNotFoundError(str(error)) from None


def _find(name: str) -> str:
    """Return the id of a local image, empty where there is none for this architecture; asks no network.

    An image that a job has committed is found again by jobs for the same architecture, whatever it holds.
    """
    job = current()
    hexadecimal = re.fullmatch(r"(?:sha256:)?([0-9a-f]{12,64})", name)
    if hexadecimal:
        found = _inspect_image(hexadecimal[1])
        if found and found["FromImageID"].startswith(hexadecimal[1]):
            return str(found["FromImageID"])
    if not re.fullmatch(r"[A-Za-z0-9][\w.:/@+-]{0,499}", name, re.ASCII):
        return ""
    qualified = bases.qualified(name)
    places = [qualified]
    if not _names_registry(name):
        last = name.rpartition("/")[2]
        places.insert(0, f"localhost/{name}" + ("" if ":" in last or "@" in last else ":latest"))
    for place in places:
        found = _inspect_image(place)
        if not found:
            continue
        made_for = (found.get("ImageAnnotations") or {}).get(bases.ARCHITECTURE_ANNOTATION)
        fits = bases.architecture(found)[0] == bases.PLATFORMS.get(job.arch, (job.arch, ""))[0]
        named = qualified.split("/")[1] in bases.REGISTRY_FOLDERS
        if made_for == job.arch or (made_for is None and (fits or named)):
            return str(found["FromImageID"])
    return ""


def _inspect_image(name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(current().buildah("inspect", "--type", "image", name))
    except BuildahError as error:
        if "not known" in error.stderr or "no such image" in error.stderr.lower():
            return {}
        raise CommandError(error.status, ["buildah", *error.command], stderr=error.stderr) from None
    return found


def _names_registry(name: str) -> bool:
    host, slash, _ = name.partition("/")
    return bool(slash) and ("." in host or ":" in host or host == "localhost")


def _images(buildah: Buildah, every: bool = False) -> list[dict[str, Any]]:
    """Return the local images as buildah lists them, with plain full ids and a list of names."""
    listed = json.loads(buildah("images", "--no-trunc", "--json", *(["--all"] if every else [])) or "null") or []
    return [
        {**entry, "id": str(entry["id"]).rpartition(":")[2], "names": list(entry.get("names") or ())}
        for entry in listed
    ]


class Image:
    """An image on the builder.

    With `with`, it is removed when the block ends, unless it has a name by then.

    Args:
        ident: its id (12 digits or more), or a name. Only a name with a registry's host in it
            (`docker.io/library/debian`) is asked for there; any other is one on the builder, or none.

    Raises:
        ImageNotFoundError: it is not there.
    """

    id: str

    def __init__(self, ident: str | Image) -> None:
        if isinstance(ident, Image):
            self.id = ident.id
            return
        buildah = current().buildah
        with buildah.looking_for_image():
            found = _find(ident)
            if found:
                buildah.note_use(found)
        if not found and _names_registry(ident) and not ident.startswith("localhost/"):
            found = _resolve(ident)
        if not found:
            raise ImageNotFoundError(f"No image {ident} for {current().arch} is on the builder.")
        self.id = found

    @classmethod
    def _of(cls, identity: str) -> Image:
        image = cls.__new__(cls)
        image.id = identity
        return image

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"<Image {self.id}>"

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Image) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __enter__(self) -> Image:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.tags():
            return
        try:
            _run_buildah(f"image {self.id[:12]}", "rmi", self.id)
        except CommandError as failed:
            if error is None:
                raise
            print(f"gamebear: {failed}", file=sys.stderr)  # what went wrong first matters more

    @classmethod
    def pull(cls, name: str) -> Image:
        """Return the image of a name, fetched where it is not on the builder.

        Raises:
            ImageNotFoundError: it cannot be had.
        """
        return cls._of(_resolve(name))

    @classmethod
    def list(cls, name: str | None = None, *, all: bool = False) -> Iterator[dict[str, Any]]:
        """Give the images on the builder as `buildah images --json` describes them, with full ids.

        Args:
            name: only those of this name, any tag where it has none.
            all: intermediate images too.
        """
        wanted = set()
        if name is not None:
            wanted = {bases.qualified(name), bases.qualified(f"localhost/{name}")}
            has_tag = ":" in name.rpartition("/")[2] or "@" in name
        try:
            listed = _images(current().buildah, all)
        except BuildahError as error:
            raise CommandError(error.status, ["buildah", *error.command], stderr=error.stderr) from None
        for entry in listed:
            names = entry["names"] if name is None or has_tag else [_with_tag(each) for each in entry["names"]]
            if name is None or wanted & set(names):
                yield entry

    def tags(self) -> Sequence[str]:
        """Return the image's names, registry and tag in each."""
        try:
            listed = _images(current().buildah, True)
        except BuildahError as error:
            raise CommandError(error.status, ["buildah", *error.command], stderr=error.stderr) from None
        return next((entry["names"] for entry in listed if entry["id"] == self.id), ())

    def add_tag(self, tag: str) -> None:
        """Give the image a further name, `:latest` where it has no tag; one without a registry is `localhost/…`."""
        _run_buildah(f"image {self.id[:12]}", "tag", self.id, tag)

    def inspect(self) -> dict[str, Any]:
        """Return what `buildah inspect` says about the image."""
        found: dict[str, Any] = json.loads(_run_buildah(f"image {self.id[:12]}", "inspect", "--type", "image", self.id))
        return found


def _with_tag(name: str) -> str:
    """Return a name with the tag `latest` in place of its own."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('@')[0].partition(':')[0]}:latest"


def packages_image(
    base: str | Image,
    names: Iterable[str],
    *,
    recommends: bool = False,
    max_age_days: float | None = None,
    rebuild: str = "base",
) -> Image:
    """Return the image of a base with Debian packages installed, built where the builder has none yet.

    Args:
        base: the base image, or its name.
        names: the packages, in any order; `name=version` and `name:architecture` too.
        recommends: whether to install what they recommend as well.
        max_age_days: build it anew when it is older than this; None: however old it is.
        rebuild: `base`: build it anew when the base's name has come to mean another image; `never`: not even then.

    Raises:
        ImageNotFoundError: the base or a package cannot be had.
        CommandError: buildah failed.
    """
    job = current()
    try:
        identity = packages.packages_image(
            job.buildah,
            job.facts,
            str(base),
            names,
            arch=job.arch,
            recommends=recommends,
            max_age_days=max_age_days,
            rebuild=rebuild,
        )
    except bases.ImageError as error:
        raise ImageNotFoundError(str(error)) from None
    except BuildahError as error:
        raise CommandError(error.status, ["buildah", *error.command], stderr=error.stderr) from None
    return Image._of(identity)
