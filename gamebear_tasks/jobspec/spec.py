"""A job: what is built, from what, with what, for which architecture. Pure data; its digest is its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

FORMAT = 4
"""Version of the canonical form. A change of what the form says, or of how a builder must read it, raises it."""

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


def canonical_json(value: Json) -> bytes:
    """Return the one JSON text that stands for a value: keys sorted, no spaces, ASCII only.

    Equal values give equal bytes on every machine and every Python: numbers are written in the shortest form that reads
    back the same (as RFC 8785 asks), what is not ASCII is escaped.

    Raises:
        TypeError: the value, or something in it, is not JSON; a key is not a string.
        ValueError: a number is infinite or not a number.
    """
    _check(value)
    return _ENCODER.encode(value).encode("ascii")


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _check(value: Json) -> None:
    if type(value) in _SCALARS:
        return
    if isinstance(value, list | tuple):
        for item in value:
            _check(item)
    elif isinstance(value, dict | Mapping):  # the first is the quick one
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a key is {key!r}, not a string")
            _check(item)
    elif not isinstance(value, int | float | str):
        raise TypeError(f"{value!r} is not JSON")


_SCALARS = (str, int, bool, float, type(None))


@dataclass(frozen=True)
class File:
    """A file that goes into a job.

    Attributes:
        sha256: of its content, lower-case hex.
        executable: whether its owner may execute it.
    """

    sha256: str
    executable: bool = False

    def document(self) -> dict[str, Json]:
        """Return the file as JSON."""
        return {"sha256": self.sha256, **({"executable": True} if self.executable else {})}


@dataclass(frozen=True)
class Job:
    """What a builder is asked to build.

    Attributes:
        arch: Debian's name of the architecture of the containers, such as `armhf`.
        program: the name of the buildscript, or of the Python function.
        identity: SHA-256 of the program as it is sent: the buildscript's bytes, or the function's pickle.
        python: `major.minor` of the Python that pickled the function; empty for a buildscript.
        outputs: file names that the program leaves in its folder.
        modules: local modules which the program imports, by their path below the buildscript's folder.
        inputs: files laid beside the script, by name.
        sources: pinned upstream trees laid beside the script as folders, by name: each its content's identity.
        args: values for the program, by name.
        metadata: what the program sees in `__sources__`, by the source's name; empty where it does not look.
    """

    arch: str
    program: str
    identity: str
    outputs: tuple[str, ...]
    python: str = ""
    modules: Mapping[str, File] = field(default_factory=dict)
    inputs: Mapping[str, File] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    args: Mapping[str, Json] = field(default_factory=dict)
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def is_function(self) -> bool:
        """Whether the program is a pickled function."""
        return bool(self.python)

    def document(self) -> dict[str, Json]:
        """Return the job as JSON, in the form whose canonical text is digested."""
        program: dict[str, Json] = {"name": self.program, "sha256": self.identity}
        if self.is_function:
            program["python"] = self.python
        return {
            "gamebear": FORMAT,
            "arch": self.arch,
            "function" if self.is_function else "script": program,
            "modules": {path: file.document() for path, file in self.modules.items()},
            "inputs": {name: file.document() for name, file in self.inputs.items()},
            "sources": {name: dict(source) for name, source in self.sources.items()},
            "args": dict(self.args),
            "outputs": sorted(self.outputs),
            **({"metadata": {name: dict(each) for name, each in self.metadata.items()}} if self.metadata else {}),
        }

    @cached_property
    def canonical(self) -> bytes:
        """The canonical JSON text of the job."""
        return canonical_json(self.document())

    @cached_property
    def digest(self) -> str:
        """The job's name: SHA-256 of its canonical text, in lower-case hex."""
        return hashlib.sha256(self.canonical).hexdigest()
