"""Builders that benchmarks share."""

from __future__ import annotations

import contextlib
from functools import cached_property
from pathlib import Path

from . import seed
from .machine import Builder, new_builder


class Place:
    """Builders that benchmarks share, created on first use.

    Attributes:
        folder: Folder for the other side's files and other temporary files.
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self._stack = stack

    @cached_property
    def bare(self) -> Builder:
        """A builder with Debian's default account settings, without images."""
        return self._stack.enter_context(new_builder(self.folder))

    @property
    def arch(self) -> str:
        """Debian's name of this machine's architecture."""
        return str(self.bare.facts["arch"])

    @cached_property
    def found(self) -> Builder:
        """The same builder, with this machine's base image in both of its stores, and the seed's command."""
        self.bare.make_base(self.arch)
        self.bare.import_base(self.arch, self._base)
        seed.install(self.bare, self.arch, self.bare.facts)
        return self.bare

    @cached_property
    def tuned(self) -> Builder:
        """A builder for the other side whose account uses overlay, with the base image and the seed's command."""
        found = self.found
        builder = self._stack.enter_context(new_builder(self.folder, overlay=True))
        builder.import_base(self.arch, self._base)
        seed.install(builder, self.arch, found.facts)
        return builder

    @cached_property
    def _base(self) -> Path:
        return self.bare.export_base(self.arch, self.folder / "base.tar")
