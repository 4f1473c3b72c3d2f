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

MOST_SLOTS = 999_999
"""Upper limit of `slots`."""


class Said(NamedTuple):  # cheaper to import than a dataclass, as `Facts`
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


def read() -> Said:
    """Read this builder's settings. An unreadable or invalid file is reported in `wrong` and does not raise."""
    file = path()
    example = 'have all of it say {"slots": 2}, say, or remove it'
    try:
        with open_regular(file) as opened:
            said = json.loads(opened.read())
    except (FileNotFoundError, NotADirectoryError):
        return Said()
    except OSError as error:
        return Said(wrong=f"{file} cannot be read and is not heeded ({error.strerror})", remedy=f"mend that, {example}")
    except (ValueError, RecursionError, MemoryError) as error:
        return Said(wrong=f"{file} is not JSON and is not heeded ({error})", remedy=example)
    if not isinstance(said, dict):
        return Said(wrong=f"{file} is not an object of JSON and is not heeded", remedy=example)
    slots = said.pop("slots", None)
    if slots is not None and not (type(slots) is int and 0 < slots <= MOST_SLOTS):
        wrong = f"the slots of {file} are {_short(slots)}, which is not heeded"
        return Said(wrong=wrong, remedy='have it say how many jobs run at once, as {"slots": 2} does')
    if said:
        names = ", ".join(map(_short, list(said)[:5]))
        wrong = f"{file} also says {names}, which means nothing and is not heeded"
        return Said(slots, wrong, "slots is all that it may say")
    return Said(slots)


def _short(value: object) -> str:
    return json.dumps(value)[:40]
