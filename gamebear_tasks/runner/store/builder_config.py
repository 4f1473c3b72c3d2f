"""`builder.json`: what belongs to a builder and is said on it, for all who build there.

An object of JSON in `$XDG_CONFIG_HOME/gamebear/builder.json` (by default `~/.config/gamebear/builder.json`); nothing
needs to be said::

    {"slots": 2}

`slots` is how many jobs run at once. What makes no sense is not heeded, and that is said to whoever builds there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from ..util.atomic_files import open_regular

MOST_SLOTS = 999_999
"""More jobs at once than any builder runs."""


class Said(NamedTuple):  # as `Facts`
    """What is said of a builder.

    Attributes:
        slots: how many jobs run at once; None where that is not said.
        wrong: what of it is not heeded and why, as what may follow "on this builder"; empty where all of it is.
        remedy: what mends that.
    """

    slots: int | None = None
    wrong: str = ""
    remedy: str = ""


def path() -> Path:
    """Return where the file is, or would be."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(home) if home.startswith("/") else Path.home() / ".config"
    return folder / "gamebear" / "builder.json"


def read() -> Said:
    """Return what is said of this builder."""
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
