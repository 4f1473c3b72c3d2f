"""The process that executes a job: process 1 of its namespace, which watches the supervisor, and a child, which builds.

The first process holds the pipe to the supervisor and ends everything when that closes. It adopts and reaps orphaned
processes of the build. The child runs the buildscript or function in the working directory and writes the result:

    result.json     {"ok": true} with "policies" (see `expiry`) and, if the script returned an image, "image" (id and
                    names, in one string), or
                    {"ok": false, "kind": …, "message": …, "hint": …} with "command" and "status" if a command failed.
                    "containers" is set if there were any when it failed, "containers_left" if some remain: they
                    could not be removed, or are retained (see `retained_containers`). "phases" has the timing (see
                    `phases`), counted from "began" by the monotonic clock.

Kinds of failure: `script` (an exception, a syntax error, a wrong argument), `command`, `image`, `output`, `runner`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pickle
import shlex
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from ..host.buildah import Buildah, BuildahError
from ..host.probe import facts
from ..maintenance.retained_containers import KEEP_VARIABLE, Notes
from ..script import language
from ..script.container import Container
from ..script.context import MATERIALS, CommandError, Job, begin, programs
from ..script.image import Image, ImageNotFoundError, packages_image
from ..store.phases import record_phase
from ..store.store import Store, runner_folder
from ..util.atomic_files import read_json, write_json
from ..util.errors import OUT_OF_MEMORY, RunnerError, ended_by
from ..util.processes import descendants
from . import outputs
from .workspace import failure

KILLED = 128 + signal.SIGKILL
"""Exit status of a build whose supervisor has died."""

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
"""Options of prctl(2)."""

NOT_FOUND = 127
"""Exit status of a command that does not exist."""

NAMES_SHOWN = 12
"""Maximum number of file names that a message lists."""


FOLDER = "a folder", "Pack it into a tar file, in the container or with Python's tarfile."
LINK = "a symbolic link", "Copy the file that it points to."
SPECIAL_FILE = "a special file", "Leave a regular file."
"""Descriptions of outputs that are not regular files, each with its fix."""

NETWORK = "Check the address, and the builder's network."
"""Suggested fix for a network error."""

HINTS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    (ModuleNotFoundError, "Add a `#| pip:` line for its package, or put the module next to the script."),
    (FileNotFoundError, "Fix the path, or pass the file in inputs= of artifact()."),
    (MemoryError, f"{OUT_OF_MEMORY}."),
    ((ConnectionError, TimeoutError, socket.gaierror), NETWORK),
)
"""Suggested fixes for exceptions of a script, by type; the first match counts."""


class OutputError(RunnerError):
    """An output is missing or is not a regular file."""

    kind = "output"


def main(digest: str) -> int:
    """Build a job once its supervisor sends `GO`.

    Runs in the job's folder, with the supervisor's pipe as standard input.

    Returns:
        Does not return: the process exits with 0 if the job was built, else 1, or 128 plus the number of the signal
        that ended the child.
    """
    supervisor = os.dup(0)
    if not os.read(supervisor, 1):
        _end(KILLED)
    os.chdir("work")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.umask(0o022)
    if os.getpid() != 1:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(supervisor)
            if os.getppid() != 1:
                _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            status = build(digest)
        except BaseException:  # noqa: BLE001 - a bug in the runner; the child must not continue in the parent's code
            traceback.print_exc()
        finally:
            os._exit(status)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: None if _ending.locked() else _end(128 + number))
    threading.Thread(target=_watch, args=(supervisor,), daemon=True).start()
    with contextlib.suppress(ChildProcessError):  # race: the other thread has reaped it and is ending this process
        while True:
            pid, outcome = os.waitpid(-1, 0)
            if pid == child:
                status = os.waitstatus_to_exitcode(outcome)
                _end(status if status >= 0 else 128 - status)
    _end(KILLED)


_ending = threading.Lock()


def _watch(supervisor: int) -> None:
    """Wait until the supervisor has died, then end everything."""
    while True:
        with contextlib.suppress(InterruptedError):
            if not os.read(supervisor, 1 << 10):
                _end(KILLED)


def _end(status: int) -> NoReturn:
    """End this process and all of its descendants.

    If it is process 1 of a namespace, the kernel kills the others. Otherwise the descendants are killed until none is
    left; as subreaper, this process is the parent of all orphans. If two threads call this, the first one proceeds and
    the second blocks.
    """
    if not _ending.acquire(blocking=False):
        threading.Event().wait()
    if os.getpid() != 1:
        for _ in range(100):
            left = descendants(os.getpid())
            if not left:
                break
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    os._exit(status)


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# the build


def build(digest: str) -> int:
    """Execute the job in the working directory and write its result; return the exit status."""
    sys.stdout, sys.stderr = _unbuffered(1), _unbuffered(2)
    folder = Path.cwd().parent
    result: dict[str, Any] = {"ok": True}
    try:
        _execute(digest, folder, result)
    except BaseException as error:  # noqa: BLE001 - a script may raise anything
        result = {**result, "ok": False, **_failure(error)}
    try:
        write_json(folder / "result.json", result, sync=False)
    except OSError as error:  # a full disk; the supervisor reports it
        with contextlib.suppress(OSError):
            print(f"gamebear: result.json cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return 0 if result["ok"] else 1


def _unbuffered(fd: int) -> TextIO:
    """Return an unbuffered text file, so that its output and that of child processes reach the log in order."""
    raw = cast(io.BufferedWriter, io.FileIO(fd, "wb", closefd=False))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)


def _execute(digest: str, folder: Path, result: dict[str, Any]) -> None:
    document = read_json(folder / "job.json")
    if folder.name != digest or not isinstance(document, dict):
        raise RunnerError("the stored job is damaged.", "Run doit again.")
    root = folder.parent.parent
    known = facts(root)
    prefix = Store(root).job(digest).container_prefix
    buildah = Buildah(root, known, prefix, folder / "images")
    notes = Notes(folder / "kept.json", attempt) if (attempt := os.environ.get(KEEP_VARIABLE)) else None
    job = Job(buildah, known, str(document["arch"]), prefix, partial(record_phase, folder), notes)
    begin(job)
    try:
        with job.phases.phase("build"):
            _execute_in(job, root, folder, document, result)
    finally:
        result.update(began=job.phases.began, phases=job.phases.spans)
        with contextlib.suppress(OSError):
            materials = {"complete": not job.images, "images": job.images, "by": programs(job.facts)}
            write_json(folder / MATERIALS, materials, sync=False)


def _execute_in(job: Job, root: Path, folder: Path, document: dict[str, Any], result: dict[str, Any]) -> None:
    work = Path.cwd()
    returned: object = None
    succeeded = False
    try:
        try:
            returned = _call(root, folder, document)
        finally:
            os.chdir(work)
        if isinstance(returned, Container):
            raise language.ScriptError(
                "the script returned a container, which no longer exists.", "Return its image: `return c.commit()`."
            )
        if isinstance(returned, Image):
            result["image"] = " ".join([returned.id, *_names(returned)])
            print(f"image {result['image']}")
        elif returned is not None:
            print(returned)
        _check_outputs(document)
        if job.policies:
            result["policies"] = job.policies
        succeeded = True
    finally:
        if job.had_containers and not succeeded:
            result["containers"] = True
        try:
            with job.phases.phase("container"):
                if succeeded or job.notes is None:
                    job.close(returned.id if isinstance(returned, Image) else "")
                elif job.had_containers:
                    job.let_go()
                    result["containers_left"] = sorted([*job.open, *job.finished])
        except BuildahError as error:
            print(f"gamebear: {error}", file=sys.stderr)
            result["containers_left"] = sorted(job.open)


def _call(root: Path, folder: Path, document: dict[str, Any]) -> object:
    """Run the job's script or function; return its return value."""
    work = str(Path.cwd())
    runner = str(runner_folder())
    sys.path[:] = [work, *(path for path in sys.path if path not in ("", runner, work))]
    sys.dont_write_bytecode = True  # only the script adds files to its working directory
    seen = {
        "Container": Container,
        "Image": Image,
        "ImageNotFoundError": ImageNotFoundError,
        "CommandError": CommandError,
        "TemporaryDirectory": language.TemporaryDirectory,
        "packages_image": packages_image,
        "Path": Path,
        "__sources__": _metadata(document),
    }
    language.inject(seen)
    with _ended_by_exit():
        if "function" in document:
            return _call_function(folder, document)
        name = document["script"]["name"]
        path = Path(work, name)
        program = language.read(path.read_bytes(), name)
        language.add_requirements(root, program.requirements)
        values = language.bind(program, document.get("args") or {})
        sys.argv = [str(path)]
        module = types.ModuleType("__script__")  # dataclasses and pickle search sys.modules for it
        sys.modules["__script__"] = module
        names = vars(module)
        names.update(seen, __file__=str(path), __args__=values)
        names.update(values)
        return program.run(names)


def _metadata(document: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return each source's metadata for the script, with the common timestamp of its files as `date`."""
    metadata: dict[str, dict[str, str]] = document.get("metadata") or {}
    return {name: {**values, "date": _date(Path.cwd() / name)} for name, values in metadata.items()}


def _date(folder: Path) -> str:
    """Return the timestamp of a source in UTC, in ISO 8601; an empty string if it has no files."""
    with os.scandir(folder) as entries:
        for entry in entries:
            return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.stat(follow_symlinks=False).st_mtime))
    return ""


@contextlib.contextmanager
def _ended_by_exit() -> Iterator[None]:
    """Treat a successful `sys.exit()` as the normal end of a script."""
    try:
        yield
    except SystemExit as error:
        if error.code not in (None, 0):
            raise


def _call_function(folder: Path, document: dict[str, Any]) -> object:
    name = document["function"]["name"]
    sys.path.insert(1, str(folder / "cloudpickle.zip"))
    try:
        function = _Unpickler(folder).load()
    except Exception as error:  # noqa: BLE001 - unpickling may raise anything
        raise language.ScriptError(
            f"the function {name} cannot be loaded on the builder: {type(error).__name__}: {error}.",
            "Use only the standard library and modules of the project in it.",
        ) from None
    try:
        return function(**(document.get("args") or {}))
    except language.Finished as finished:
        return finished.value


class _Unpickler(pickle.Unpickler):
    """Loads a function's pickle, in which the code locations are persistent ids such as `file 3`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(io.BytesIO((folder / "function.pickle").read_bytes()))
        self._lines = json.loads((folder / "function.lines").read_bytes())

    def persistent_load(self, pid: str) -> str | int | bytes:
        """Return the file name, first line or line table of a code object; a default if unknown."""
        part, _, number = pid.partition(" ")
        try:
            file, first, table = self._lines[int(number)]
            known = str(file), int(first), base64.b64decode(table)
        except (IndexError, KeyError, TypeError, ValueError):  # line numbers are only needed for tracebacks
            known = "<function>", 1, b""
        return known[("file", "first", "table").index(part)]


def _names(image: Image) -> list[str]:
    entry = next((entry for entry in Image.list(all=True) if entry["id"] == image.id), None)
    if entry is None:
        raise language.ScriptError(
            "the script returned an image that its own with-block has removed.",
            "Tag the image in the block (`img.add_tag(…)`), or return it outside of the block.",
        )
    return list(entry["names"])


def _check_outputs(document: dict[str, Any]) -> None:
    """Ensure that every output is in the working directory, owned and readable by the builder's user.

    Raises:
        OutputError: an output is missing, or is not a regular file or, if it is a folder, not a folder.
    """
    folders = document.get("folders") or ()
    for name in document["outputs"]:
        if name in folders and outputs.is_pattern(name):
            found = outputs.matching(Path.cwd(), document, name)
            if not found:
                raise OutputError(
                    f"no file in the working directory matches the output {name!r}; {_whats_new(document)}.",
                    f"Copy it out of the container: c.copy_out('/path/in/container/NAME', 'NAME matching {name}')",
                )
            for each in found:
                outputs.own(each)
            continue
        try:
            info = os.lstat(name)
        except FileNotFoundError:
            missing = [each for each in document["outputs"] if not os.path.lexists(each)]
            are = "output {} is" if len(missing) == 1 else "outputs {} are"
            raise OutputError(
                f"{are.format(_listed(missing))} missing from the working directory; {_whats_new(document)}.",
                f"Copy it out of the container: c.copy_out({f'/path/in/container/{missing[0]}'!r}, {missing[0]!r})",
            ) from None
        if name in folders:
            if not stat.S_ISDIR(info.st_mode) or not os.listdir(name):
                kind = "empty" if stat.S_ISDIR(info.st_mode) else "not a folder"
                raise OutputError(f"output {_listed([name])}/ is {kind}.", f"Leave the artifact's files in {name}/.")
            outputs.own(name)
            continue
        if not stat.S_ISREG(info.st_mode):
            tests = (stat.S_ISDIR, *FOLDER), (stat.S_ISLNK, *LINK)
            kind, hint = next(((kind, hint) for test, kind, hint in tests if test(info.st_mode)), SPECIAL_FILE)
            raise OutputError(f"output {_listed([name])} is {kind}, not a regular file.", hint)
        outputs.own(name)


def _whats_new(document: dict[str, Any]) -> str:
    """Describe the files that the script added to its working directory."""
    new = sorted(set(os.listdir()) - outputs.given(document))
    return f"new files: {_listed(new)}" if new else "it has no new files"


def _listed(names: list[str]) -> str:
    """Format file names for a message, quoting those with special characters."""
    shown = [name if shlex.quote(name) == name else repr(name) for name in names[:NAMES_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


# failures


def _failure(error: BaseException) -> dict[str, Any]:
    """Return the part of a result that describes an exception; print what is useful of it to the log.

    The message is one line about the cause. Internal commands, ids and tracebacks go to the log only.
    """
    where = _place(error)
    prefix, at = (f"{where}: ", f" at {where}") if where else ("", "")
    if isinstance(error, SyntaxError) and not where:
        print("".join(traceback.format_exception_only(type(error), error)), end="", file=sys.stderr)
        line = f": {error.text.strip()}" if error.text else ""
        place = f"{error.filename}, line {error.lineno}"
        return failure("script", f"{place}: {type(error).__name__}: {error.msg}{line}", f"Fix the syntax at {place}.")
    if isinstance(error, CommandError):
        command = [os.fsdecode(word) for word in error.cmd]
        details = {"command": command, "status": error.returncode, "where": error.where}
        if error.is_buildahs:
            print(f"gamebear: {error}", file=sys.stderr)
        return failure("command", f"{error.cause}.", error.hint or _command_hint(error, at), **details)
    if isinstance(error, BuildahError):
        print(f"gamebear: {error}", file=sys.stderr)
        own = CommandError(error.status, ["buildah", *error.command], stderr=error.stderr)
        return failure(error.kind, f"{own.cause}.", error.hint or _command_hint(own, at))
    if isinstance(error, RunnerError):
        return failure(error.kind, f"{prefix}{error.message}", error.hint)
    if isinstance(error, ImageNotFoundError):
        return failure("image", f"{prefix}{error.message}", error.hint or f"Fix the name of the image{at}.")
    if isinstance(error, SystemExit):
        cause = f"sys.exit({error.code!r})" if isinstance(error.code, int) else str(error.code)
        return failure("script", f"{prefix}{cause}.", f"Fix the cause for which the script exits{at}.")
    _print_traceback(error)
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    if type(error).__name__ == "HTTPError":
        text += f" ({getattr(error, 'url', '')})"
    if isinstance(error, subprocess.CalledProcessError):
        command = [str(word) for word in error.cmd] if isinstance(error.cmd, (list, tuple)) else [str(error.cmd)]
        text = CommandError(error.returncode, command, stderr=error.stderr).cause
    return failure("script", prefix + " ".join(text.split("\n")), _exception_hint(error, at))


def _command_hint(error: CommandError, at: str) -> str:
    """Return the suggested fix for a failed command.

    Args:
        error: the failure.
        at: file and line of the script, to append to a sentence; may be empty.
    """
    if error.is_buildahs:
        return f"Fix the call{at}; the log has buildah's whole message."
    if ended_by(error.returncode).endswith("SIGKILL"):
        return f"{OUT_OF_MEMORY}{at}."
    if error.returncode == NOT_FOUND:  # as shells and buildah report it
        return f"Install the program in the image with packages_image(…), or fix its name{at}."
    return f"Fix the command{at}, or its input; the log has its output."


def _exception_hint(error: BaseException, at: str) -> str:
    """Return the suggested fix for an exception of a script; the parameters are those of `_command_hint`."""
    if type(error).__module__ == "urllib.error":
        return NETWORK
    hint = next((hint for types, hint in HINTS if isinstance(error, types)), "")
    return hint or f"Fix the script{at}; the log has the traceback."


def _place(error: BaseException) -> str:
    """Return file and line of the innermost frame in the script's own code; empty if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_the_users(frame.filename)]
    return f"{_shown(frames[-1].filename)}, line {frames[-1].lineno}" if frames else ""


def _print_traceback(error: BaseException) -> None:
    """Print an exception and its causes, with only the frames of the script and its modules."""
    found = traceback.TracebackException.from_exception(error)
    seen: set[int] = set()
    waiting = [found]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        kept = [frame for frame in each.stack if _is_the_users(frame.filename)]
        for frame in kept:
            frame.filename = _shown(frame.filename)
        each.stack = traceback.StackSummary.from_list(kept)
        waiting += [other for other in (each.__cause__, each.__context__) if other is not None]
        waiting += getattr(each, "exceptions", None) or []
    print("".join(found.format()), end="", file=sys.stderr)


def _is_the_users(filename: str) -> bool:
    """Return whether a file belongs to the script, and not to the runner, Python or a package."""
    if filename.startswith(str(Path.cwd())):
        return True
    if filename.startswith("<") or "/site-packages/" in filename or "/dist-packages/" in filename:
        return False
    ours = runner_folder()
    places = [str(ours), str(Path.cwd().parent / "cloudpickle.zip"), *sysconfig.get_paths().values()]
    return not any(filename.startswith(f"{place}/") for place in places if place and place != "/")


def _shown(filename: str) -> str:
    """Return a file's name for display: relative if it is in the working directory."""
    work = f"{Path.cwd()}/"
    return filename[len(work) :] if filename.startswith(work) else filename
