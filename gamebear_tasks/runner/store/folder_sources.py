"""Folder sources in the store: the manifest of each is a blob, and so is each file that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..protocol import manifest
from ..util.atomic_files import is_sha256
from .store import Store


def manifests(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of the manifest of each folder source of a job, by the source's name."""
    return {
        name: source["folder"]
        for name, source in document.get("sources", {}).items()
        if is_sha256(source.get("folder"))
    }


def files(store: Store, sha256: str) -> list[str]:
    """Return the SHA-256 of each file that a manifest in the store names.

    Raises:
        OSError: the manifest is not in the store.
        ManifestError: it is damaged.
    """
    return [entry.value for entry in manifest.decode(store.blob(sha256).read_bytes()) if entry.is_file]
