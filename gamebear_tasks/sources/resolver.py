"""Implement `gamebear lock`: query upstream for the current commits and versions, and write the lock file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import SourceError
from .alternatives import Declared, Either, Source
from .debian import Debian
from .git import Git
from .lockfile import DebianEntry, GitEntry, Lock


def resolve(
    sources: Iterable[Declared], lock_path: Path, cache: Path, *, update: bool = False, prune: bool = False
) -> list[str]:
    """Update the lock file with all declared sources.

    Other pins are kept unless `prune` is set: another dodo.py, a variable, or a task that is created later may declare
    them, and a branch without its pin would silently be built from another commit. Alternatives (`either()`) that
    cannot be resolved keep their previous pins, as long as one alternative has a pin.

    Args:
        sources: All declared sources.
        lock_path: The lock file. It is not written if nothing changes or an error occurs.
        cache: Cache folder that contains the private apt.
        update: Resolve sources again that have an entry already.
        prune: Remove the pins of undeclared sources.

    Returns:
        Messages: one line for each change, for each source that could not be resolved, and for each undeclared pin.

    Raises:
        SourceError: A source cannot be resolved, or the lock file cannot be read or written.
    """
    old = Lock.read(lock_path)
    git: dict[str, GitEntry] = {}
    debian: dict[str, DebianEntry] = {}
    refreshed: set[str | None] = set()

    def look_up(source: Source) -> None:
        if isinstance(source, Git) and source.floating and source.key not in git:
            known = old.git.get(source.key)
            git[source.key] = known if known and not update else source.resolve()
        elif isinstance(source, Debian) and source.key not in debian:
            known_entry = old.debian.get(source.key)
            if known_entry is None or (update and source.floating):
                known_entry = source.resolve(cache, refresh=source.suite not in refreshed)
                refreshed.add(source.suite)
            debian[source.key] = known_entry

    notes = []
    for declared in sources:
        if not isinstance(declared, Either):
            look_up(declared)
            continue
        failures = []
        for _, source in declared.options:
            try:
                look_up(source)
            except SourceError as error:
                failures.append(error)
                notes.append(f"not resolved: {error.message}")
                if isinstance(source, Git) and source.key in old.git:
                    git[source.key] = old.git[source.key]
                elif isinstance(source, Debian) and source.key in old.debian:
                    debian[source.key] = old.debian[source.key]
        if failures and not any(source.pin(Lock(git, debian)) for _, source in declared.options):
            raise failures[0]
    undeclared = [("git", key) for key in sorted(old.git.keys() - git)]
    undeclared += [("debian", key) for key in sorted(old.debian.keys() - debian)]
    if not prune:
        git.update((key, commit) for key, commit in old.git.items() if key not in git)
        debian.update((key, entry) for key, entry in old.debian.items() if key not in debian)
        notes += [f"{kind} {key}: not declared, kept; `gamebear lock --prune` removes it" for kind, key in undeclared]
    new = Lock(git, debian)
    changes = [
        *_changes("git", *({key: str(entry) for key, entry in lock.git.items()} for lock in (old, new))),
        *_changes(
            "debian",
            {key: entry.version for key, entry in old.debian.items()},
            {key: entry.version for key, entry in new.debian.items()},
        ),
    ]
    if new != old:
        new.write(lock_path)
    return changes + notes


def _changes(kind: str, old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            yield f"{kind} {key}: removed, not declared"
        elif key not in old:
            yield f"{kind} {key}: {new[key]}"
        elif old[key] != new[key]:
            yield f"{kind} {key}: {old[key]} -> {new[key]}"
