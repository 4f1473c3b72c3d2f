"""`builder.json`: settings of a builder, made on the builder for all of its users.

The file is a JSON object in `$XDG_CONFIG_HOME/gamebear/builder.json` (by default `~/.config/gamebear/builder.json`).
Every setting is optional::

    {"slots": 2}

`slots` is the number of jobs that run at once. An invalid setting is ignored, and users of the builder are notified.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from ..util.atomic_files import open_regular

MAX_SLOTS = 999_999
"""Upper limit of `slots`."""


class BuilderConfig(NamedTuple):  # cheaper to import than a dataclass, as `Facts`
    """Settings of a builder.

    Attributes:
        slots: number of jobs that run at once; None if not set.
        wrong: which setting is ignored and why, worded to follow "on this builder"; empty if all are valid.
        remedy: how to fix that.
    """

    slots: int | None = None
    wrong: str = ""
    remedy: str = ""


def path() -> Path:
    """Return the path of the file, whether it exists or not."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(home) if home.startswith("/") else Path.home() / ".config"
    return folder / "gamebear" / "builder.json"


def read() -> BuilderConfig:
    """Read this builder's settings. An unreadable or invalid file is reported in `wrong` and does not raise."""
    file = path()
    example = 'write for example {"slots": 2}, or remove the file'
    try:
        with open_regular(file) as opened:
            settings = json.loads(opened.read())
    except (FileNotFoundError, NotADirectoryError):
        return BuilderConfig()
    except OSError as error:
        return BuilderConfig(
            wrong=f"{file} is ignored: it cannot be read ({error.strerror})",
            remedy=f"fix that, {example}",
        )
    except (ValueError, RecursionError, MemoryError) as error:
        return BuilderConfig(wrong=f"{file} is ignored: it is not JSON ({error})", remedy=example)
    if not isinstance(settings, dict):
        return BuilderConfig(wrong=f"{file} is ignored: it is not a JSON object", remedy=example)
    slots = settings.pop("slots", None)
    if slots is not None and not (type(slots) is int and 0 < slots <= MAX_SLOTS):
        wrong = f"{file} is ignored: slots is {_short(slots)}"
        return BuilderConfig(wrong=wrong, remedy='set it to the number of concurrent jobs, for example {"slots": 2}')
    if settings:
        names = ", ".join(map(_short, list(settings)[:5]))
        wrong = f"{file} has unknown settings, which are ignored: {names}"
        return BuilderConfig(slots, wrong, "remove them; the only setting is slots")
    return BuilderConfig(slots)


def _short(value: object) -> str:
    return json.dumps(value)[:40]
