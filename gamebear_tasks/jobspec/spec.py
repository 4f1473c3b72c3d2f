"""Job specification: program, inputs, sources, arguments and architecture as pure data, named by its digest.

The digest is the SHA-256 of the job's canonical JSON.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .canonical_json import FORMAT, Json, canonical_json


@dataclass(frozen=True)
class File:
    """A file of a job.

    Attributes:
        sha256: SHA-256 of its content, in lower-case hex.
        executable: whether its owner may execute it.
    """

    sha256: str
    executable: bool = False

    def document(self) -> dict[str, Json]:
        """Return the file as JSON."""
        return {"sha256": self.sha256, **({"executable": True} if self.executable else {})}


@dataclass(frozen=True)
class Job:
    """A job: a program, its inputs, its arguments and the architecture.

    Attributes:
        arch: Debian's name of the containers' architecture, such as `armhf`.
        program: the name of the buildscript, or of the Python function.
        identity: SHA-256 of the program as it is sent: the buildscript's bytes, or the function's pickle.
        python: `major.minor` of the Python that pickled the function; empty for a buildscript.
        outputs: names of the files and folders that the program creates in its working directory; patterns of files.
        folders: those outputs that become a folder: names of folders, and patterns.
        modules: local modules that the program imports, by their path relative to the buildscript's folder.
        inputs: files that are placed beside the script, by name.
        sources: identities of pinned upstream trees, by name. Each tree is placed beside the script as a folder.
        args: arguments of the program, by name.
        metadata: the content of the program's `__sources__`, by the source's name; empty if the program does not use
            it.
    """

    arch: str
    program: str
    identity: str
    outputs: tuple[str, ...]
    folders: tuple[str, ...] = ()
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
        """Return the job as JSON. The digest covers its canonical text."""
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
            **({"folders": sorted(self.folders)} if self.folders else {}),
            **({"metadata": {name: dict(each) for name, each in self.metadata.items()}} if self.metadata else {}),
        }

    @cached_property
    def canonical(self) -> bytes:
        """The canonical JSON text of the job."""
        return canonical_json(self.document())

    @cached_property
    def digest(self) -> str:
        """The digest, which names the job: SHA-256 of its canonical text, in lower-case hex."""
        return hashlib.sha256(self.canonical).hexdigest()
