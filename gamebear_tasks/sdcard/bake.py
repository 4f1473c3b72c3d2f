"""Build (bake) an image: unpack the base, add the contents, check the file systems, rename the result atomically."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

from doit.exceptions import BaseFail, TaskError, TaskFailed

from ..client import rebuild_reasons
from ..client.cancellation import ending, running
from ..client.install_outputs import statement_of
from ..client.placement_marks import placing
from ..config import settings
from ..errors import GamebearError, ImageError
from ..jobspec.canonical_json import Json
from ..progress.events import EventSender
from ..records import run_journal, task_record
from ..runner.util.atomic_files import CHUNK, data_extents, sync_folder
from ..runner.util.free_space import FULL
from ..util.file_hashes import version
from ..util.messages import notice
from ..util.text import printable, size
from . import base_image, boot_config, contents, elf, systemd_units, users
from .compression import pack
from .filesystems import ext4, ext4_writer, partitions
from .filesystems.fat import Fat
from .filesystems.file_tree import Tree
from .filesystems.partitions import Disk, Partition
from .filesystems.program import check_installed
from .filesystems.sparse_files import copy_part
from .recipe import MISSING_INPUT, SUFFIXES, Recipe, state_of
from .workdir import work_folder

TRIES = 4
"""Maximum number of attempts to grow the file system: each growth itself uses some of the new space, for metadata."""

PROGRAMS = ("/sbin/init", "/bin/sh", "/usr/bin/env")
"""Programs whose ELF headers identify the architecture of the base."""


def bake(recipe: Recipe, task: str) -> BaseFail | str:
    """Bake an image and return the hash of the state that it was baked from; the doit action of the named task."""
    try:
        with running():
            return Baking(recipe, task).run()
    except ImageError as error:
        return TaskFailed(str(error))
    except GamebearError as error:
        return TaskError(str(error))
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
        place = error.filename or recipe.output.parent.absolute()
        hint = f"Make room in {recipe.output.parent.absolute()}" if error.errno in FULL else f"Check {place}"
        return TaskError(str(ImageError(f"{recipe.output} cannot be baked: {what}.", f"{hint}, then run doit again.")))


class Baking:
    """One image build.

    Args:
        recipe: Declaration of the image.
        task: Name of the doit task.
    """

    def __init__(self, recipe: Recipe, task: str) -> None:
        self.recipe = recipe
        self.task = task
        self.events = EventSender(task)
        self.watch = task_record.Stopwatch(self.events)
        self.why: tuple[str, ...] = ()
        self._job: dict[str, Json] = {}
        self._record: task_record.Record | None = None

    def run(self) -> str:
        """Bake the image and return the hash of the state that it was baked from.

        Raises:
            ImageError: The recipe and the base do not fit together, or a program failed.
            OSError: A file cannot be read or written.
        """
        with self.watch.running(), run_journal.recording_failures(self.note):
            target = self.recipe.output
            absent = rebuild_reasons.missing([str(target)])
            before = _stamps(self.recipe)
            self._job = self.recipe.document()
            state = state_of(self._job)
            last = run_journal.last(self.task)
            self.why = rebuild_reasons.reasons_to_bake(self._job, last, absent)
            if settings().fresh:
                self.why = rebuild_reasons.forced(self.why)
            self.events.begins("", last)
            _bake(self.recipe, before, state)
            record = self.note("done")
        self.events.ended(record)
        if settings().provenance:
            from . import provenance

            provenance.write(self.recipe, record)
        return state

    def note(self, state: str, failure: str = "") -> task_record.Record:
        """Record the outcome of the task and return the record. Only the first call has an effect."""
        if self._record is not None:
            return self._record
        if state != "done" and ending.is_set():
            state, failure = "interrupted", ""  # an interrupt removes the work folder before this thread ends
        target = self.recipe.output
        made = task_record.Made(target.name, str(target), target.stat().st_size, "") if state == "done" else None
        self._record = replace(
            self.watch.record(self.task, self.recipe.identity(), "", state, "baked"),
            why=self.why,
            failure=printable(failure)[:2000],
            outputs=(made,) if made else (),
            job=self._job,
        )
        run_journal.keep(self._record, None)
        return self._record


def _bake(recipe: Recipe, before: list[str], state: str) -> None:
    check_installed(recipe.programs)
    suffix = SUFFIXES[recipe.output.suffix]
    target = recipe.output
    if target.is_dir():
        raise ImageError(f"{target} cannot be replaced: it is a folder.", "Move it, or use another output=.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(target) as folder:
        image = folder / "image"
        name = str(recipe.base) if isinstance(recipe.base, Path) else recipe.base.url
        with task_record.phase("unpack"):
            base_image.unpack(recipe.base, image)
        _fill(recipe, image, name)
        done = folder / "done"
        if suffix:
            notice(f"compressing {target}")
        with task_record.phase("compress" if suffix else "place"):
            pack(image, done, suffix)
        if _stamps(recipe) != before:
            raise ImageError(f"{target} was not installed: an input changed during the build.", "Run doit again.")
        with task_record.phase("place"), placing([str(target)], state):
            with done.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(done, target)
            with contextlib.suppress(OSError):
                statement_of(target).unlink()  # the statement describes the previous target
            sync_folder(target.parent)


def _stamps(recipe: Recipe) -> list[str]:
    """Return the version stamp of each input file.

    Raises:
        ImageError: A file is missing or not a regular file.
    """
    found = []
    for path in recipe.files:
        try:
            about = path.stat()
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error.strerror}.", MISSING_INPUT) from error
        if not stat.S_ISREG(about.st_mode):
            raise ImageError(f"{path} is not a regular file.", "Use a file; pack a folder as a tar.")
        found.append(version(about))
    return found


def _fill(recipe: Recipe, image: Path, name: str) -> None:
    """Add the recipe's contents to an image and check its file systems.

    Args:
        recipe: Declaration of the image.
        image: Copy of the base; modified in place.
        name: Display name of the base.
    """
    card = partitions.read(image, name)
    about = ext4.superblock(image, card.root)
    now = about.time
    if about.blocks * about.block > card.root.size:
        raise ImageError(
            f"{name} is damaged: its root file system is larger than partition {card.root.number}.",
            "Download or copy the base image again.",
        )
    with task_record.phase("check"):
        ext4.repair(image, card.root, now, name)
    boot = _boot_of(image, card, now, name)
    with task_record.phase("compose"), ext4.Debugfs(image, card.root, now) as session:
        tree = Tree(ext4.Reader(session, image.parent), image.parent, now)
        _compose(recipe, tree, boot, name)
    if boot is not None:
        boot.check_room(name)
    with task_record.phase("grow"):
        card = _make_room(recipe, image, card, tree, now, name)
    with task_record.phase("write"), ext4.Debugfs(image, card.root, now, write=True) as session:
        leaves = ext4_writer.write(session, tree, ext4.superblock(image, card.root))
    if leaves:
        with task_record.phase("check"):
            ext4.repair(image, card.root, now, str(recipe.output))
    if boot is not None and card.boot is not None:
        with task_record.phase("write"):
            boot.write()
            _copy_back(boot.path, image, card.boot)
    with task_record.phase("check"):
        ext4.check(image, card.root, now)
    about = ext4.superblock(image, card.root)
    notice(
        f"{recipe.output}: {len(tree.added)} files and folders added; {size(image.stat().st_size)},"
        f" {size(about.free_blocks * about.block)} free"
    )


def _boot_of(image: Path, card: Disk, now: int, name: str) -> Fat | None:
    """Copy the boot file system to a separate file. Return None if the image has none."""
    if card.boot is None:
        return None
    path = image.parent / "boot"
    path.touch()
    copy_part(image, card.boot.start, card.boot.size, path, 0)
    os.truncate(path, card.boot.size)
    return Fat(path, now, name)


def _copy_back(boot: Path, image: Path, part: Partition) -> None:
    """Write the boot file system back into the image.

    Both the extents that held data before and those that hold data now are written, so that old data is overwritten.
    """
    with boot.open("rb", buffering=0) as source, image.open("r+b") as out:
        before = data_extents(out.fileno(), part.start, part.start + part.size)
        parts = [(first - part.start, end - part.start) for first, end in before]
        for first, end in [*parts, *data_extents(source.fileno(), 0, part.size)]:
            source.seek(first)
            out.seek(part.start + first)
            while first < end and (data := source.read(min(end - first, CHUNK))):
                out.write(data)
                first += len(data)


def _grow(image: Path, card: Disk, size: int, now: int) -> Disk:
    """Grow an image and its root file system to `size` bytes. Return the new partition layout."""
    root = image.parent / "root"
    root.touch()
    copy_part(image, card.root.start, card.root.size, root, 0)
    card = partitions.grown(card, size)
    os.truncate(root, card.root.size)
    ext4.resize(root, now)
    os.truncate(image, card.root.start)
    os.truncate(image, size)
    copy_part(root, 0, card.root.size, image, card.root.start)
    root.unlink()
    partitions.write(image, card, now)
    return card


def _compose(recipe: Recipe, tree: Tree, boot: Fat | None, name: str) -> None:
    """Add everything that a recipe declares to the tree and to the boot file system."""
    other = _architecture(tree)
    if other and other != recipe.arch:
        raise ImageError(
            f"{name} has the architecture {other}, not {recipe.arch}.",
            f'Set arch="{other}", or use another base.',
        )
    place = _boot_mount(tree)
    if boot is not None and place:
        tree.mount(place, boot.add, boot.is_folder)
    for item in recipe.contents:
        contents.add(item, tree, recipe.arch)
    if recipe.hostname:
        users.set_hostname(tree, recipe.hostname)
    if recipe.user is not None:
        keys = users.public_keys(recipe.user)
        if not keys and recipe.user.password in (None, "!", "*"):
            notice(f"{recipe.output}: user({recipe.user.name!r}) has neither a key nor a password and cannot log in")
        users.set_user(tree, boot, recipe.user, keys)
        if keys and tree.exists("/lib/systemd/system/ssh.service"):
            systemd_units.enable(tree, "ssh.service")  # Raspberry Pi OS installs the unit, but disables it
    for unit in recipe.enable:
        systemd_units.enable(tree, unit)
    _configure(recipe, tree, boot, name)


def _architecture(tree: Tree) -> str:
    """Return Debian's name for the architecture of the image's programs; empty if none of them is found."""
    for path in PROGRAMS:
        data = tree.read(path)
        if data and (found := elf.architecture(data[:64])):
            return found
    return ""


def _boot_mount(tree: Tree) -> str:
    """Return the mount point of the boot file system in the running image; empty if /etc/fstab does not list it."""
    for line in (tree.read("/etc/fstab") or b"").decode("utf-8", "surrogateescape").splitlines():
        words = line.split()
        is_fat = len(words) >= 3 and not words[0].startswith("#") and words[2] in ("vfat", "msdos", "auto")
        if is_fat and re.fullmatch(r"/(boot|efi)(/.*)?", words[1]):
            return words[1]
    return ""


def _configure(recipe: Recipe, tree: Tree, boot: Fat | None, name: str) -> None:
    """Add the recipe's lines to config.txt and its words to cmdline.txt."""
    if not recipe.config and not recipe.cmdline:
        return
    if boot is None:
        raise ImageError(f"{name} has no FAT file system for config.txt.", "Remove config= and cmdline=.")
    for file, wanted, change in (
        ("config.txt", recipe.config, boot_config.with_lines),
        ("cmdline.txt", recipe.cmdline, boot_config.with_words),
    ):
        if not wanted:
            continue
        data = boot.read(file)
        if data is None and file == "cmdline.txt":
            raise ImageError(
                f"{name} has no cmdline.txt on its boot file system.",
                "Add a complete cmdline.txt with file(), and remove cmdline=.",
            )
        text = (data or b"").decode("utf-8", "surrogateescape")
        changed = change(text, wanted)
        if changed != text:
            boot.add(file, tree.entry(changed.encode("utf-8", "surrogateescape"), file, 0o755))


def _make_room(recipe: Recipe, image: Path, card: Disk, tree: Tree, now: int, name: str) -> Disk:
    """Grow the root file system as requested or required, before any content is written. Return the new layout.

    Raises:
        ImageError: The contents do not fit, or the file system cannot grow.
    """
    have = image.stat().st_size
    if recipe.size is not None and recipe.size < have:
        raise ImageError(
            f"{recipe.output} cannot have {size(recipe.size)}: its base {name} has {size(have)}.",
            "Set a larger size=, or remove it.",
        )
    wanted = recipe.size or 0
    about = ext4.superblock(image, card.root)
    # Use free space in the base first: behind the root partition, and in the partition behind the file system.
    is_filled = (
        bool(card.fixed) or partitions.grown(card, have).root.size < about.blocks * about.block + partitions.ALIGNED
    )
    for _ in range(TRIES):
        if wanted > have or (wanted == have and not is_filled):
            if card.fixed:
                raise ImageError(
                    f"{name} cannot grow: {card.fixed}.",
                    "Add less, or use a base whose root partition is the last.",
                )
            card = _grow(image, card, wanted, now)
            have, is_filled = wanted, True
        about = ext4.superblock(image, card.root)
        blocks, inodes = ext4_writer.room(tree, about.block)
        blocks += -(-recipe.free // about.block)
        missing = max(blocks - about.free_blocks, 0)
        groups = -(-max(inodes - about.free_inodes, 0) // about.inodes_per_group)
        if not missing and not groups:
            return card
        if recipe.size is not None:
            what = f"{size(blocks * about.block)} needed, {size(about.free_blocks * about.block)} free"
            if not missing:
                what = f"{inodes} files and folders needed, {about.free_inodes} free"
            raise ImageError(
                f"{recipe.output} is too small: {what} on the root file system.",
                f"Set size= to more than {size(recipe.size)}, or remove it: the image then grows as needed.",
            )
        # New space is partly used for inode tables and for the blocks that are reserved for root.
        more = max(missing * 9 // 8, groups * about.blocks_per_group)
        wanted = max(
            partitions.size_for(card, (about.blocks + more) * about.block), have + is_filled * partitions.ALIGNED
        )
    raise ImageError(f"{recipe.output} is too small: its root file system does not grow.", "Set size=.")
