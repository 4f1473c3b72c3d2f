"""`sd_image()`: declare an SD-card image as a doit task dict."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeGuard

from doit.exceptions import BaseFail

from ..client.cancellation import begin_run, running
from ..client.placement_marks import is_placed
from ..config import architecture, settings
from ..errors import ImageError, SettingsError
from ..records.run_journal import up_to_date
from ..sdcard.recipe import SUFFIXES, File, Recipe, Tar, User, size_of, state_of, texts
from ..sdcard.workdir import remove_work_folders
from ..util.file_hashes import content_of
from .action import RemoveTargets
from .artifact import Task, check_target

if TYPE_CHECKING:
    from ..sources.archive import Archive

HOSTNAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
"""A host name (RFC 1123, 2.1), without a domain."""

SAVED = "gamebear-image"
"""Key of the baked state among the values that doit saves for a task."""

OUTPUT = re.compile(r".*[^.\n]\.img(\.xz|\.zst)?")
"""Pattern of a target's name: more than just a suffix."""


def sd_image(
    base: str | Path | Archive,
    *,
    output: str | Path,
    contents: Iterable[File | Tar] = (),
    config: Iterable[str] = (),
    cmdline: Iterable[str] = (),
    enable: Iterable[str] = (),
    hostname: str | None = None,
    user: User | None = None,
    arch: str | None = None,
    size: int | str | None = None,
    free: int | str = 0,
) -> Task:
    """Return a doit task that bakes an SD-card image: a base image with artifacts and settings in it.

    It is a plain task dict: `file_dep` lists the base, the contents and the key files; `targets` the output; `uptodate`
    covers everything else.

    Args:
        base: the base image, plain or compressed (xz, zstd, gzip, zip): a file, or an `archive()` from the web.
        output: the target; `.img`, or `.img.xz` or `.img.zst` to compress it.
        contents: contents to add, each a `file()` or a `tar()`; a later one replaces files of the same name.
        config: lines of config.txt; a heading such as `[pi4]` among them filters those after it, until `[all]`.
        cmdline: words for cmdline.txt.
        enable: names of units to enable.
        hostname: the host name. Default: the base's.
        user: a `user()`.
        arch: Debian's name of the architecture. Default: the setting `arch`.
        size: size of the image in bytes, or a string such as `4G`. Default: the base's, or what the contents need.
        free: minimum free space of the root file system, in bytes or as such a string.

    Raises:
        SettingsError: an argument is invalid. doit displays the error and exits.
    """
    if not isinstance(output, str | PurePath) or not OUTPUT.fullmatch(str(output).rpartition("/")[2]):
        raise SettingsError(
            f"sd_image(): output={output!r} is not the name of an image.",
            f"Use a name that ends with .img, .img{' or .img'.join(end for end, how in SUFFIXES.items() if how)}.",
        )
    target = Path(output)
    where = f"sd_image({str(target)!r})"
    check_target(str(target), where)
    if isinstance(base, str | PurePath) and str(base):
        base = Path(base)
    elif not _is_archive(base):
        raise SettingsError(
            f"{where}: the base {base!r} is neither a file nor an archive().",
            'Use sd_image("base.img.xz", …), or an archive(URL, sha256=…).',
        )
    items = tuple(contents) if isinstance(contents, Iterable) and not isinstance(contents, str) else (contents,)
    for item in items:
        if not isinstance(item, File | Tar):
            raise SettingsError(
                f"{where}: contents= contains {item!r}, which is neither a file() nor a tar().",
                "Use file(…) or tar(…).",
            )
    if hostname is not None and not (isinstance(hostname, str) and HOSTNAME.fullmatch(hostname)):
        raise SettingsError(
            f"{where}: hostname={hostname!r} is not a host name.", "Use letters, digits and -, without a domain."
        )
    if user is not None and not isinstance(user, User):
        raise SettingsError(f"{where}: user={user!r} is not a user().", "Use user=user(…).")
    recipe = Recipe(
        base=base,
        output=target,
        arch=architecture("arch", arch, where) if arch is not None else settings().arch,
        contents=items,
        config=texts("config", config, where),
        cmdline=texts("cmdline", cmdline, where),
        enable=texts("enable", enable, where),
        hostname=hostname or "",
        user=user,
        size=None if size is None else size_of("size", size, where),
        free=size_of("free", free, where),
    )
    if target in recipe.files:
        raise SettingsError(f"{where}: the output is also an input.", "Give the output another name.")
    if recipe.size is not None and recipe.size % 512:
        raise SettingsError(
            f"{where}: size={size!r} is not a multiple of a sector, 512 bytes.", 'Use MiB or GiB: size="4G".'
        )
    return {
        "actions": [(_bake, [recipe])],
        "file_dep": [str(path) for path in dict.fromkeys(recipe.files)],
        "targets": [str(target)],
        "uptodate": [_SameRecipe(recipe)],
        "clean": [RemoveTargets(), _remove_work_folders],
        "verbosity": 2,
    }


def _is_archive(base: object) -> TypeGuard[Archive]:
    from ..sources.archive import Archive  # imported on use, because most bases are files

    return isinstance(base, Archive)


def _bake(recipe: Recipe, task: Any) -> BaseFail | dict[str, str]:
    from ..sdcard.bake import bake  # imported on use, to load dodo.py quickly

    with running():
        done = bake(recipe, task.name)
    return {SAVED: done} if isinstance(done, str) else done


class _SameRecipe:
    """An `uptodate` callable: whether the target contains the result of the current recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def __call__(self, task: Any, values: Mapping[str, Any]) -> bool:
        """Return whether nothing has changed since the task's last success."""
        is_same = self._is_same(task, values)
        if not is_same:
            begin_run()
        return is_same

    def _is_same(self, task: Any, values: Mapping[str, Any]) -> bool:
        if settings().fresh:
            return False
        baked = values.get(SAVED)
        try:
            if baked is None or baked != state_of(self._recipe.document(content_of)):
                return False
        except ImageError:
            return False  # baking reports the error
        if not is_placed([str(self._recipe.output)], baked):
            return False
        up_to_date.append(task.name)
        return True

    def __repr__(self) -> str:
        if settings().fresh:
            return "the setting fresh"
        return f"the recipe of {self._recipe.output}: its files' content, settings, names and modes"


def _remove_work_folders(task: Any, dryrun: bool) -> None:
    """Clean action: remove the working folders of killed bakings."""
    for target in () if dryrun else task.targets:
        remove_work_folders(Path(target))
