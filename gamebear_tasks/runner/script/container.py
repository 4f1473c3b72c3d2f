"""`Container`: working containers, as buildscripts use them.

A buildah command costs 30 to 150 ms on a PC and far more on a Pi, so this module runs as few as possible. Settings are
collected and applied with the next command. Files are copied through one mount per container. An image's settings are
read only when the script accesses them.
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

from ..host import accounts
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
"""Names of environment variables that buildah itself interprets."""

DOWNLOAD_SECONDS = 60.0
"""Seconds that a server may be silent during `add_url`."""


class Container:
    """A working container: a copy of an image's files and settings, in which commands run.

    The container is created by the constructor. It is removed at the end of its `with` block, or else at the end of the
    job. After that, every method that needs buildah raises ValueError.

    The settings below are initially the image's. Each can be read, assigned and, if it is a dict, list or set, changed
    in place. A change applies to the next `run` and to images made with `commit`. An assignment to any other attribute
    raises AttributeError.

    Args:
        image: An `Image`, an image's name or id, or `"scratch"` for an empty container.
        mounts: Bind mounts that last as long as the container, each `(outside, inside, *options)` or
            `"outside:inside:options"`. A relative path outside starts in the working directory.

    Raises:
        ImageNotFoundError: The image does not exist or cannot be fetched.
        ValueError: A mount does not have at least two parts.
        CommandError: buildah failed.

    Attributes:
        environ: Environment variables, a dict of strings.
        command: Default command of containers made from the image; a list of words.
        entrypoint: Words that `command` is appended to; a list.
        labels: Labels of the image, a dict of strings.
        volumes: Folders that containers of the image store in volumes, outside the image; a set of paths.
        workdir: Folder in which commands run and relative paths in the container start; empty means `/`.
        user: User that runs commands: a name, a number or `user:group`; empty means root.
        ccache: Whether compilers are cached across builds with ccache.
        healthcheck_cmd: Command that checks a container's health: a list of words, one line for the container's shell,
            or None for no check.
        healthcheck_interval: Time between two checks, in seconds or in Go's notation (`5m`).
        healthcheck_timeout: Time limit of one check, in seconds or in Go's notation.
        healthcheck_start_period: Time after the start during which failed checks do not count, in seconds or in Go's
            notation.
        healthcheck_retries: Number of failed checks after which the container is unhealthy.

    Example:
        ```python
        with Container("debian:bookworm") as c:
            c.environ["LANG"] = "C.UTF-8"
            c.copy_in("source", "/src")
            c.run(["cp", "/src/README", "/tmp/README"])
            c.copy_out("/tmp/README", "README")
        ```
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
        self._caches: dict[str, Path] = {}
        self._mount_points: list[str] = []
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
        """Name of the container, for messages only."""
        return self._name

    def __setattr__(self, name: str, value: object) -> None:
        # A misspelt setting would be silently ignored. Subclasses in scripts may have attributes of their own.
        if type(self) is Container and not name.startswith("_") and name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, 1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(sorted(SETTINGS))}"
            raise AttributeError(f"unknown container setting {name!r}; {hint}")
        super().__setattr__(name, value)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<Container {self.name}>"

    def __enter__(self) -> Container:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._let_go()
        if error is None:
            self._check_there()
        elif self.name not in self._job.open:
            return  # the first error is more important
        try:
            self._job.remove(self.name, self._where)
        except CommandError as failed:
            if error is None:
                raise
            print(f"gamebear: {failed}", file=sys.stderr)  # the first error is more important
        else:
            self._job.open.pop(self.name, None)

    def _check_there(self) -> None:
        if self.name not in self._job.open:
            raise ValueError(f"container {self.name} has been removed: its with block has ended")

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
        """Environment variables; assigned values are converted to strings."""
        return self._environ

    @environ.setter
    def environ(self, values: Mapping[str, object]) -> None:
        self._environ.replace(values)

    @property
    def labels(self) -> Table:
        """Labels of the image; assigned values are converted to strings."""
        return self._labels

    @labels.setter
    def labels(self, values: Mapping[str, object]) -> None:
        self._labels.replace(values)

    def _live(self, name: str) -> Any:
        """Return the value of a setting that buildah currently has."""
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
        """Return the settings that were changed and not yet applied to buildah's container."""
        if "volumes" in self._now:
            self._live("volumes")
        unknown = object()
        return {name: value for name, value in self._now.items() if value != self._applied.get(name, unknown)}

    def _apply(self, *more: str) -> None:
        """Apply all pending settings in one `buildah config`; `more` are additional options of it."""
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
                # buildah expands $NAME in the value, and turns $$ into $
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
        """Return whether a variable is safe in buildah's own environment.

        It is unsafe if buildah itself interprets it, or if its name ends in `-`, because `buildah config --env NAME-`
        removes NAME.
        """
        return key not in self._job.buildah.environment and not BUILDAHS_OWN.match(key) and not key.endswith("-")

    def _health(self) -> list[str]:
        """Return the options for the health check.

        All of them are set, because buildah replaces missing ones by its defaults.
        """
        test = self.healthcheck_cmd
        if test is None:
            return ["--healthcheck", ""]
        options = ["--healthcheck", f"{test[0]} {shlex.join(test[1:])}".strip()]
        for name in ("interval", "timeout", "start-period"):
            value = self._read(f"healthcheck_{name.replace('-', '_')}")
            options += [f"--healthcheck-{name}", value] if value not in ("0s", "") else []
        retries = self.healthcheck_retries
        return options + (["--healthcheck-retries", str(retries)] if retries else [])

    # caches

    def cache(self, path: str | os.PathLike[str], *, name: str = "") -> None:
        """Mount a folder that persists across builds into the container, for the following commands.

        The folder is initially empty and belongs to the container's root. It is kept on the builder under its name,
        the container's image and the architecture. One job at a time uses it. Jobs that need it at the same time get
        further folders. It is not part of the digest, and not part of images.

        Args:
            path: Path in the container; a relative path starts in `workdir`. Missing folders are created. Contents of
                the image at this path are hidden.
            name: Name of the cache; by default the path.

        Raises:
            ValueError: The path is `/` or contains a colon, or the container is removed.
            NotADirectoryError: A part of the path is not a folder.

        Example:
            ```python
            c.cache("/root/.cargo/registry")
            c.run(["cargo", "build", "--release"], pwd="/src")
            ```
        """
        self._check_there()
        absolute = posixpath.normpath(self._absolute(os.fspath(path)))
        if absolute.strip("/") == "" or ":" in absolute:
            raise ValueError(f"cache: {os.fspath(path)!r} cannot be a mount point; use a folder without a colon")
        inside, created = self._files().mount_point(absolute)
        self._mount_points += created
        self._caches[inside] = self._job.cache(name or absolute, self._image)

    def _cache_options(self) -> list[str]:
        """Return the options that mount the caches for a command."""
        return [word for inside, files in sorted(self._caches.items()) for word in ("--volume", f"{files}:{inside}")]

    @property
    def ccache(self) -> bool:
        """Whether ccache caches the results of compilers across builds; False by default.

        Set it after ccache and the compilers are installed in the container. Only commands that run as root use the
        cache.

        Raises:
            CacheError: The container has no ccache, one that is too old, no compiler, or no grep.
        """
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
        """Return the options that mount the compiler cache for a command, and add its variables to `further`.

        Commands of other users than root run without the cache: only the container's root can write to it.
        """
        if self._ccache is None:
            return []
        whom = self.user if user is None else str(user)  # may need a `buildah inspect`
        if whom not in ("", "0", "root", "0:0", "root:root"):
            return []
        further.update(self._ccache.environment(further.get("PATH") or self.environ.get("PATH", "")))
        if PLACE not in self._mount_points:
            self._mount_points.append(PLACE)
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
        network: bool = True,
        stdin: int | IO[Any] | None = None,
        input: str | bytes | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool | None = None,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command in the container and wait for it; by default its output is appended to the log.

        Args:
            cmd: Words of the command: strings, paths or numbers. With `shell`, one command line.
            shell: Run the line with the container's `/bin/sh -c`. A list is quoted and joined first.
            pwd: Folder to run in, instead of `workdir`. A relative path starts in `workdir`.
            env: Additional environment variables, for this command only.
            user: User to run as, instead of the container's `user`: a name, a number or `user:group`; empty means root.
            volumes: Bind mounts for this command only, each `"outside:inside[:options]"` or a sequence of these parts.
            mounts: Mounts for this command only, as mappings of the fields of `buildah run --mount`: `{"type": "bind",
                "src": …, "dst": …}`.
            terminal: Allocate a terminal for the command.
            network: Whether the command has the builder's network; without it, only a loopback interface.
            stdin: Standard input, as for `subprocess.run`; empty by default.
            input: Text or bytes for the standard input. Overrides `stdin`.
            stdout: Standard output, as for `subprocess.run`: None for the log, `PIPE` to capture it, `DEVNULL` or a
                file.
            stderr: Standard error, likewise; `STDOUT` merges it into the standard output.
            text: If False, captured output is bytes. Otherwise it is decoded as UTF-8, with invalid bytes escaped.

        Returns:
            The completed process: the command as `args`, status 0, and the output that was captured with `PIPE`.

        Raises:
            CommandError: The command ended with another status than 0, or could not be started.
            NetworkError: `network` is False, and the builder cannot create a network namespace.
            TypeError: `cmd` is one string and `shell` is not set.
            ValueError: There are no words, a mount does not have at least two parts, or the container is removed.

        Example:
            ```python
            c.run(["make", "-j4"], pwd="/src", env={"CFLAGS": "-O2"})
            c.run("./configure && make", shell=True, pwd="/src")
            version = c.run(["git", "--version"], stdout=subprocess.PIPE).stdout
            ```
        """
        words = _command(cmd, shell)
        self._check_there()
        if not network:
            self._job.check_network()
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
            options += [*cache, *self._cache_options()]
            if user is not None:
                options += ["--user", str(user) or "0:0"]  # buildah replaces an empty user by the container's user
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
                network=network,
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
        """Return whether commands run as root because neither the image nor the script sets a user."""
        if self._job.facts.isolation != "chroot" or "user" in self._now:
            return False
        if self._loaded:
            return not self._applied["user"]
        return self._image == "scratch" or not base_images.user(self._job.buildah, self._image)

    def _run_options(self, further: dict[str, str], folder: str | None) -> list[str]:
        """Return the `buildah run` options that pass the settings to one command, to save a `buildah config`."""
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
        """Change environment and working directory for the length of the block.

        Used if `buildah run` has no options for them, and to keep variables off the command line.
        """
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
        """Return an absolute path in the container; a relative path starts in `workdir`."""
        return path if path.startswith("/") else posixpath.join("/", self.workdir, path)

    def _files(self) -> Rootfs:
        if self._rootfs is None:
            self._path = Path(self._buildah("mount", self.name).rstrip("\n"))
            self._rootfs = Rootfs(self._path)
        return self._rootfs

    def copy_in(
        self, src: str | os.PathLike[str], dst: str | os.PathLike[str], *, owner: str | int | None = None
    ) -> None:
        """Copy a file or the contents of a folder into the container.

        The container's root owns the copies, or `owner`. Missing folders are created, existing folders are merged,
        existing files and links are replaced. Symbolic links in a folder stay links. Modes, times, hard links, holes
        and the extended attributes `user.*`, `security.capability` and `security.ima` are preserved. An existing folder
        keeps its own owner, mode, times and attributes.

        Args:
            src: Path outside; a relative path starts in the working directory.
            dst: Path in the container, including the file's name. A file is copied *into* `dst` if that is an existing
                folder or ends in a slash. A relative path starts in `workdir`.
            owner: Owner of everything that is created, missing folders included: `user` or `user:group`, each a name
                in the container's /etc/passwd or /etc/group, or a number. Without a group it is the user's.

        Raises:
            OwnerError: The container has no such user or group.
            ValueError: `owner` has another form.
            FileNotFoundError: `src` does not exist.
            IsADirectoryError: A folder exists where a file or link belongs.
            NotADirectoryError: A part of the path is not a folder.
            OSError: The file system cannot store an attribute, or a file is neither a regular file, a folder nor a
                link.

        Example:
            ```python
            c.copy_in("source", "/src")          # the contents of source become the contents of /src
            c.copy_in("settings.h", "/src/")     # becomes /src/settings.h
            c.copy_in("source", "/home/pi/src", owner="pi")
            ```
        """
        files = self._files()
        ids = None if owner is None else accounts.owner(files, str(owner))
        files.copy_in(Path(src), self._absolute(os.fspath(dst)), ids)

    def copy_out(self, src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
        """Copy a file or the contents of a folder out of the container.

        The script's user owns the copies. Missing folders are created, existing folders are merged, existing files and
        links are replaced. The same metadata is preserved as by `copy_in`, except that files lose set-user-ID and
        set-group-ID. Existing folders get the mode, times and attributes of the copied ones, `dst` itself only the
        times. Symbolic links are followed inside the container, never to the builder's own files. In a folder, a link
        to something in the same folder stays a link.

        Args:
            src: Path in the container, relative to its root.
            dst: Path outside, including the file's name. A file is copied *into* `dst` if that is an existing folder. A
                relative path starts in the working directory.

        Raises:
            FileNotFoundError: `src` does not exist.
            IsADirectoryError: A folder exists where a file or link belongs.
            NotADirectoryError: A part of the path is not a folder.
            OSError: The file system cannot store an attribute, or a file is neither a regular file, a folder nor a
                link.

        Example:
            ```python
            c.copy_out("/src/hello", "hello")    # the file becomes the output hello
            ```
        """
        self._files().copy_out(os.fspath(src), Path(dst))

    def add_url(self, url: str, dest: str | os.PathLike[str], *, chmod: int | None = None) -> None:
        """Download a file into the container.

        The content is not verified and is not part of the job's digest. For build inputs, an `archive` source with a
        checksum is safer.

        Args:
            url: `http`, `https` or `ftp` URL.
            dest: Path in the container, including the file's name. If it is an existing folder or ends in a slash, the
                file's name is the last part of the URL. A relative path starts in `workdir`.
            chmod: Mode of the file; 0o644 by default.

        Raises:
            ValueError: The URL has another scheme.
            HTTPError: The server refused the request (`urllib.error`).
            URLError: The server cannot be reached (`urllib.error`).
            OSError: The server was silent for 60 seconds, or `dest` is not a possible place for a file.
        """
        import urllib.error  # deferred: with TLS, importing it takes as long as importing everything else
        import urllib.parse
        import urllib.request

        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https", "ftp"):
            raise ValueError(f"add_url: {url!r} is not an http, https or ftp URL; use copy_in for a file")
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
        """Return a context manager that yields the folder of the container's files, a `Path` on the builder.

        The folder is valid until the end of the block or of the container, whichever is first. It is not a chroot: an
        absolute symbolic link in it leads to the builder's own files, and `root / "/etc"` is the builder's `/etc`.
        Write `root / "etc"`.

        Example:
            ```python
            with c.mount() as root:
                (root / "motd").write_text("hello")
            ```
        """
        self._files()
        assert self._path is not None
        yield self._path

    # images

    def inspect(self) -> dict[str, Any]:
        """Apply the settings and return the output of `buildah inspect` for the container, as a dict.

        Raises:
            CommandError: buildah failed.
        """
        self._apply()
        inspected: dict[str, Any] = json.loads(self._buildah("inspect", self.name))
        return inspected

    def commit(self) -> Image:
        """Create an image of the container's current files and settings, and return it.

        The container stays usable. An image without a tag (see `Image.add_tag`) is removed at the end of the job,
        unless the script returns it. The format is OCI, or Docker if the image has a health check, which OCI images
        cannot have.

        Raises:
            CommandError: buildah failed.

        Example:
            ```python
            image = c.commit()
            image.add_tag("hello:1")
            ```
        """
        health = self.healthcheck_cmd
        for path in reversed(self._mount_points):
            self._files().remove_empty(path)  # created for a cache
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
"""Attributes of a container that a script can assign."""


def _command(cmd: Any, shell: bool) -> list[str]:
    """Return the words of the command that a script passed to `run`."""
    if shell:
        line = cmd if isinstance(cmd, str) else shlex.join(str(word) for word in cmd)
        return ["/bin/sh", "-c", line]
    if isinstance(cmd, (str, bytes)):
        raise TypeError(f"run: expected a list of words, got a string; for a shell, use run({cmd!r}, shell=True)")
    words = [os.fsdecode(word) if isinstance(word, (bytes, os.PathLike)) else str(word) for word in cmd]
    if not words:
        raise ValueError("run: the command is empty")
    return words


def _volume(value: Any) -> str:
    """Return `outside:inside[:options]`; a relative path outside starts in the working directory."""
    parts = value.split(":") if isinstance(value, str) else [os.fspath(part) for part in value]
    if len(parts) < 2:
        raise ValueError(f"invalid mount {value!r}, expected (outside, inside, *options)")
    return ":".join([os.path.abspath(parts[0]), *parts[1:]])


def _mount(value: Mapping[str, object]) -> str:
    """Return a mapping in the syntax of `--mount`; a relative source starts in the working directory."""
    fields = {key: str(field) for key, field in value.items()}
    for key in ("src", "source"):
        if key in fields and fields.get("type", "bind") == "bind":
            fields[key] = os.path.abspath(fields[key])
    return ",".join(f"{key}={field}" for key, field in fields.items())


def _quoted(text: str) -> str:
    """Return a field of a comma-separated line, quoted if necessary (RFC 4180)."""
    quoted = text.replace('"', '""')
    return f'"{quoted}"' if set(text) & set(',"\n') else text


def _sink(where: int | IO[Any] | None, usual: int) -> tuple[Sink, bytearray | None]:
    """Return the sink for an output of a command, and the buffer that it fills with `PIPE`.

    Args:
        where: The argument of `run`, as for `subprocess.run`.
        usual: File descriptor for None.
    """
    if where == subprocess.PIPE:
        kept = bytearray()
        return kept.extend, kept
    if where == subprocess.DEVNULL:
        return len, None
    if where is None or isinstance(where, int):
        return descriptor(usual if where is None else where), None
    where.flush()  # earlier output of the script comes first
    return descriptor(where.fileno()), None
