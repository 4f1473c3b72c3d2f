"""`Container`, as a buildscript sees it.

A buildah command costs 30 to 150 ms on a PC and far more on a Pi, so there are as few as can be: settings are gathered
and go along with the next command, files are copied through one mount per container, an image's settings are read only
when the script asks for them.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import os
import posixpath
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from ..host.arch import ARCHITECTURE_ANNOTATION, PLATFORMS
from ..host.rootfs import Rootfs
from ..host.streams import Sink, descriptor
from ..images import base_images
from ..util.atomic_files import CHUNK
from .ccache import PLACE, Cache
from .container_settings import Setting, Table, as_duration, as_health_check, as_paths, as_words
from .context import CommandError, current, run_buildah
from .image import Image, called, image_of, resolve

BUILDAHS_OWN = re.compile(
    r"_?(LD|GO|XDG|SSL|TMP|STORAGE|CONTAINERS?|BUILDAH|REGISTRY|DBUS|NOTIFY|.*proxy\b)", re.IGNORECASE
)
"""Variables of a container that would mean something to buildah, too."""

DOWNLOAD_SECONDS = 60.0
"""How long a server may be silent during `add_url`."""


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
        ccache: whether compilers are cached across builds.
        healthcheck_cmd: words of the command that checks a container's health, or one text for its shell.
        healthcheck_interval: time between checks, in Go's notation (`5m`), or seconds.
        healthcheck_timeout: how long a check may take.
        healthcheck_start_period: time after the start in which a failed check does not count.
        healthcheck_retries: failed checks after which the container is unhealthy.
    """

    command = Setting(as_words)
    entrypoint = Setting(as_words)
    volumes = Setting(as_paths)
    workdir = Setting(lambda value: str(value or ""))
    user = Setting(lambda value: "" if value is None else str(value))
    healthcheck_cmd = Setting(as_health_check)
    healthcheck_interval = Setting(as_duration)
    healthcheck_timeout = Setting(as_duration)
    healthcheck_start_period = Setting(as_duration)
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
        self._ccache: Cache | None = None
        self._ccache_was_mounted = False
        command = ["from", "--quiet"]
        if str(image) == "scratch":
            architecture, variant = PLATFORMS[job.arch]
            command += ["--arch", architecture, *(("--variant", variant) if variant else ())]
            identity = "scratch"
        else:
            identity = image.id if isinstance(image, Image) else resolve(str(image))
            job.buildah.note_use(identity)
            job.note_image(identity, used=True, name=called(image) if isinstance(image, Image) else str(image))
        for mount in mounts or ():
            command += ["--volume", _volume(mount)]
        self._image = identity
        job.count += 1
        self._name = f"{job.prefix}{job.count}"
        self._where = f"a container of {called(image) if isinstance(image, Image) else image}"
        run_buildah(self._where, *command, "--name", self.name, identity)
        job.open[self.name] = self._let_go
        job.had_containers = True
        if job.notes is not None:
            job.notes.made(self.name, called(image) if isinstance(image, Image) else str(image))

    @property
    def name(self) -> str:
        """The container's name, of no use beyond messages."""
        return self._name

    def __setattr__(self, name: str, value: object) -> None:
        # A misspelt setting would be lost without a word. A class of the script's own may have attributes of its own.
        if type(self) is Container and not name.startswith("_") and name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(SETTINGS))}"
            raise AttributeError(f"a container has no setting {name!r}; {hint}")
        super().__setattr__(name, value)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<Container {self.name}>"

    def __enter__(self) -> Container:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._let_go()
        self._check_there()
        try:
            self._job.remove(self.name, self._where)
        except CommandError as failed:
            if error is None:
                raise
            print(f"gamebear: {failed}", file=sys.stderr)  # what went wrong first matters more
        else:
            self._job.open.pop(self.name, None)

    def _check_there(self) -> None:
        if self.name not in self._job.open:
            raise ValueError(f"the container {self.name} is removed: its with-block is over")

    def _let_go(self) -> None:
        self.ccache = False
        if self._rootfs is not None:
            self._rootfs.close()
        self._rootfs = self._path = None

    def _buildah(self, *args: str, variables: Mapping[str, str] | None = None) -> str:
        self._check_there()
        return run_buildah(self._where, *args, variables=variables)

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
            "healthcheck_interval": as_duration(health.get("Interval", 0) / 1e9),
            "healthcheck_timeout": as_duration(health.get("Timeout", 0) / 1e9),
            "healthcheck_start_period": as_duration(health.get("StartPeriod", 0) / 1e9),
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
        variables: dict[str, str] = {}
        for key, value in self._environ.changes.items():
            if self._loaded and self._applied["environ"].get(key) == value:
                continue
            if value and self._job.takes_variables() and self._is_free(key):
                variables[key] = value  # not in the command line, which every user of the machine can read
                options += ["--env", key]
            else:
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
        if options:
            self._buildah("config", *options, self.name, variables=variables)
        for name, value in pending.items():
            self._applied[name] = copy.copy(value)
        for table in (self._environ, self._labels):
            if self._loaded:
                table.applied()
            table.changes.clear()

    def _is_free(self, key: str) -> bool:
        """Say whether a variable means nothing to buildah itself, nor its name to `buildah config --env`."""
        return key not in self._job.buildah.environment and not BUILDAHS_OWN.match(key) and not key.endswith("-")

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

    # the compiler cache

    @property
    def ccache(self) -> bool:
        """Whether the compilers that commands run are cached across builds; ccache has to be in the container."""
        return self._ccache is not None

    @ccache.setter
    def ccache(self, wanted: object) -> None:
        if self._ccache is not None:
            self._ccache.close()
            self._ccache = None
        if not wanted:
            return
        cache = Cache(self._job.buildah.root, self._files(), self._image, self._job.arch)
        try:
            if not cache.is_checked:
                cache.check(self.run(["ccache", "--version"], user=0, stdout=subprocess.PIPE).stdout)
        except BaseException:
            cache.close()
            raise
        self._ccache = cache

    def _ccache_options(self, further: dict[str, str], user: str | int | None) -> list[str]:
        """Return the options that let a command use the compiler cache, and add its variables to `further`.

        The cache belongs to the container's root, as whom alone it can be written.
        """
        if self._ccache is None:
            return []
        whom = self.user if user is None else str(user)  # what buildah may have to be asked for
        if whom not in ("", "0", "root", "0:0", "root:root"):
            return []
        further.update(self._ccache.environment(further.get("PATH") or self.environ.get("PATH", "")))
        self._ccache_was_mounted = True
        return ["--volume", f"{self._ccache.folder}:{PLACE}"]

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
            user: whom it runs as, instead of the container's user: name, number, or `user:group`; empty means root.
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
        self._check_there()
        further = {key: str(value) for key, value in (env or {}).items()}
        folder = None if pwd is None else self._absolute(os.fspath(pwd))
        with contextlib.ExitStack() as stack:
            if self._job.takes_variables() and further:
                stack.enter_context(self._changed_for_now(further, None))
                self._apply()
                further = {}
            cache = self._ccache_options(further, user)
            if self._job.run_takes_settings():
                options = self._run_options(further, folder)
            else:
                stack.enter_context(self._changed_for_now(further, folder))
                self._apply()
                options = []
            options += cache
            if user is not None:
                options += ["--user", str(user) or "0:0"]  # the container's user is what buildah takes an empty one for
            if self._job.facts.isolation != "chroot":
                options += ["--network", "host"]
            if terminal:
                options.append("--terminal")
            for volume in volumes or ():
                options += ["--volume", _volume(volume)]
            for mount in mounts or ():
                options += ["--mount", _mount(mount)]
            if input is not None:
                stdin = stack.enter_context(TemporaryFile())
                stdin.write(input.encode() if isinstance(input, str) else input)
                stdin.seek(0)
            sys.stdout.flush()
            sys.stderr.flush()
            if self._job.notes is not None:
                self._job.notes.begun(self.name, words, options)
            out, printed = _sink(stdout, 1)
            err, complained = _sink(stderr, 2)
            in_order = stderr == subprocess.STDOUT or (stdout is stderr is None and os.path.sameopenfile(1, 2))
            status = self._job.buildah.run_in(
                self.name,
                words,
                *options,
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                out=out,
                err=None if in_order else err,
                is_root=user is None and self._is_roots(),
            )
        if self._job.notes is not None:
            self._job.notes.ended(self.name, status)
        texts = [
            data if data is None else bytes(data) if text is False else data.decode("utf-8", "backslashreplace")
            for data in (printed, complained)
        ]
        if status:
            raise CommandError(status, words, self._where, *texts)
        return subprocess.CompletedProcess(words, 0, *texts)

    def _is_roots(self) -> bool:
        """Say whether commands run as root because nobody has ever said otherwise."""
        if self._job.facts.isolation != "chroot" or "user" in self._now:
            return False
        if self._loaded:
            return not self._applied["user"]
        return self._image == "scratch" or not base_images.user(self._job.buildah, self._image)

    def _run_options(self, further: dict[str, str], folder: str | None) -> list[str]:
        """Return the options that give one command its settings, so that buildah need not be told them before."""
        removed = None in self._environ.changes.values()
        if "volumes" in self._pending() or removed or (self._environ.changes and self._job.takes_variables()):
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

        Missing folders are made, folders are merged. Modes, times, hard links, holes and the extended attributes
        `user.*`, `security.capability` and `security.ima` are kept.

        Args:
            src: a path outside; relative to the working directory.
            dst: a path in the container, with the file's name; a file goes into a folder that is there, or that is
                named with a slash at the end. Relative to `workdir`.

        Raises:
            OSError: `src` is missing, something is of the wrong kind, or an attribute cannot be kept there.
        """
        self._files().copy_in(Path(src), self._absolute(os.fspath(dst)))

    def copy_out(self, src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
        """Copy a file or a folder's contents out of the container.

        Missing folders are made, folders are merged. The same is kept as by `copy_in`, but for set-user-ID and
        set-group-ID of files. Links are followed inside the container; in a folder, those that lead to something in
        that folder stay links.

        Args:
            src: a path in the container, from its root.
            dst: a path outside, with the file's name; a file goes into a folder that is there. Relative to the working
                directory.

        Raises:
            OSError: `src` is missing, something is of the wrong kind, or an attribute cannot be kept there.
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
        if self._ccache_was_mounted:
            self._files().remove_empty(PLACE)  # buildah has made it to mount the cache there
        self._apply("--annotation", f"{ARCHITECTURE_ANNOTATION}={self._job.arch}")
        form = ["--format", "docker"] if health else []
        said = self._buildah("commit", "--quiet", *form, self.name).split()
        image = image_of(said[-1].rpartition(":")[2])
        self._job.committed.append(image.id)
        self._job.buildah.note_use(image.id)
        return image


SETTINGS = {
    name
    for name, value in vars(Container).items()
    if isinstance(value, Setting) or (isinstance(value, property) and value.fset is not None)
}
"""What can be assigned to."""


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


def _sink(where: int | IO[Any] | None, usual: int) -> tuple[Sink, bytearray | None]:
    """Return what takes a command's output, as `subprocess.run` is told, and what it keeps of it."""
    if where == subprocess.PIPE:
        kept = bytearray()
        return kept.extend, kept
    if where == subprocess.DEVNULL:
        return len, None
    return descriptor(usual if where is None else where if isinstance(where, int) else where.fileno()), None
