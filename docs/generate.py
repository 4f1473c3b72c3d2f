"""Generate the reference from code: settings, commands, signatures. Run `python3 docs/generate.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gamebear_tasks  # noqa: E402
from gamebear_tasks.cli.main import COMMANDS, REPORTER  # noqa: E402
from gamebear_tasks.config import Settings  # noqa: E402
from gamebear_tasks.doit_plugin.reporter import LiveReporter  # noqa: E402
from gamebear_tasks.errors import GamebearError  # noqa: E402
from gamebear_tasks.runner.script.container import Container  # noqa: E402
from gamebear_tasks.runner.script.image import Image, packages_image  # noqa: E402

REFERENCE = ROOT / "docs" / "reference"

MADE = "<!-- Made by docs/generate.py: change the code, then run it. -->\n"

CALLS: dict[str, Callable[..., object]] = {
    **{name: getattr(gamebear_tasks, name) for name in ("artifact", "sd_image", "file", "tar", "user")},
    **{name: getattr(gamebear_tasks, name) for name in ("git", "archive", "debian", "folder", "either")},
    "GamebearError": GamebearError,
    "packages_image": packages_image,
    "Container": Container,
    "Image": Image,
    **{
        f"{owner.__name__}.{name}": getattr(owner, name)
        for owner in (Container, Image)
        for name in dir(owner)
        if not name.startswith("_") and inspect.isroutine(getattr(owner, name))
    },
}
"""Callables by their name in the reference."""

DEFAULTS = {"arch": "this machine's", "sources": "the first"}
"""Descriptions of defaults that are computed."""


def pages() -> dict[Path, str]:
    """Return the expected content of every page that is generated completely or partly."""
    made = {
        REFERENCE / "settings.md": _settings(),
        REFERENCE / "commands.md": _commands(),
    }
    for name in ("api.md", "buildscripts.md"):
        path = REFERENCE / name
        made[path] = _with_signatures(path.read_text("utf-8"))
    return made


def signature(function: Callable[..., object]) -> str:
    """Return the parameters of a callable, without types."""
    found = inspect.signature(function)
    bare = [
        item.replace(annotation=inspect.Parameter.empty) for name, item in found.parameters.items() if name != "self"
    ]
    return str(inspect.Signature(bare)).replace("'", '"')


def _with_signatures(text: str) -> str:
    def current(match: re.Match[str]) -> str:
        name = match[1]
        return f"```text\n{name}{signature(CALLS[name])}\n```" if name in CALLS else match[0]

    return re.sub(r"```text\n([\w.]+)\(.*\)\n```", current, text)


def _settings() -> str:
    rows = []
    descriptions = _attributes(inspect.getdoc(Settings) or "")
    for item in dataclasses.fields(Settings):
        value = f"{item.default:g}" if isinstance(item.default, float) else item.default
        value = str(value).lower() if isinstance(value, bool) else value
        default = DEFAULTS.get(item.name, f"`{value}`")
        variable = f"GAMEBEAR_{item.name.upper()}"
        rows.append([f"`{item.name}`", f"`{variable}`", default, _sentence(descriptions[item.name])])
    return (
        f"# Settings\n\n{MADE}\n"
        "The first of these that sets a value wins:\n\n"
        "1. a doit variable on the command line: `doit arch=armhf`\n"
        "2. an environment variable that is not empty: `GAMEBEAR_ARCH=armhf`\n"
        '3. `[tool.gamebear]` in the `pyproject.toml` next to `dodo.py`: `arch = "armhf"`\n'
        "4. the default\n\n"
        "[The API](api.md#settings) has an example.\n\n"
        + _table(["doit variable, key in `pyproject.toml`", "environment", "default", "meaning"], rows)
        + "\n## Settings in other places\n\n"
        "| place | settings |\n| --- | --- |\n"
        "| `~/.ssh/config`, `known_hosts` and the agent | user, port, key, jump host and host keys of `ssh://` |\n"
        "| `~/.config/gamebear/builder.json` on a builder | "
        '`{"slots": 2}`: number of jobs that run at the same time. Default: one per four processors or one per GiB of '
        "memory, whichever is less, but at least one |\n"
    )


def _commands() -> str:
    parts = []
    parts.append(
        f"# Commands\n\n{MADE}\n"
        "`gamebear` is [doit's command line](https://pydoit.org/cmd-run.html) with additional commands.\n\n"
        "```sh\n"
        "gamebear umtprd arch=armhf    # run tasks, like doit\n"
        "gamebear jobs                 # run a command of this page\n"
        "gamebear help jobs            # show its help\n"
        "```\n\n"
        "doit's own commands, such as `run`, `list`, `clean`, `forget` and `info`, work as in `doit`.\n"
        "A task with the name of a command runs only with `doit`; `gamebear` rejects the name.\n\n"
        "| exit status of these commands | meaning |\n| --- | --- |\n"
        "| 0 | success |\n"
        "| 1 | `doctor`: a check failed; `jobs follow`: the job failed or was cancelled |\n"
        "| 2 | the command failed, or an argument or setting is invalid |\n"
        "| 3 | `dodo.py` is missing or invalid, or an option is unknown |\n"
        "| 130, 129, 143 | ended by Ctrl-C, SIGHUP or SIGTERM |\n"
        "| 141 | the reader of the output exited, as in `gamebear jobs \\| head` |\n\n"
        "`shell` ends with the status of the shell or command.\n"
    )
    for name, place in COMMANDS.items():
        module, _, attribute = place.partition(":")
        command = getattr(import_module(module), attribute)
        parts.append(
            f"## gamebear {name}\n\n{_capital(command.doc_purpose)}.\n\n"
            f"```text\n{f'gamebear {name} {command.doc_usage}'.strip()}\n```\n\n"
            f"{_prose(command.doc_description)}" + _options(command.cmd_options)
        )
    parts.append(
        f"# Reporters\n\n## The reporter {REPORTER}\n\n{_prose(inspect.getdoc(LiveReporter) or '')}\n"
        "It is the default of `gamebear`. To use it with `doit`, set it in `dodo.py`:\n\n"
        f"```python\nfrom gamebear_tasks import {REPORTER}\n\n"
        f'DOIT_CONFIG = {{"reporter": {REPORTER}}}\n```\n\n'
        "To use one of doit's reporters: `gamebear -r console`.\n"
    )
    return "\n".join(parts)


def _options(options: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for option in options:
        names = [f"-{option['short']}"] if option.get("short") else []
        names += [f"--{option['long']}"] if option.get("long") else []
        value = "" if option["type"] is bool else f" {option.get('metavar', option['name'].upper())}"
        rows.append([f"`{', '.join(names)}{value}`", _capital(str(option.get("help", "")))])
    return "\n" + _table(["option", "meaning"], rows) if rows else ""


def _attributes(doc: str) -> dict[str, str]:
    """Return the description of each attribute or argument in a docstring."""
    part = re.split(r"^(?:Attributes|Args):$", doc, flags=re.MULTILINE)[1]
    items = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", part, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in items}


def _prose(text: str) -> str:
    """Join the lines of each paragraph. Indented paragraphs become code blocks."""
    parts = []
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        if paragraph.startswith("  "):
            parts.append(f"```text\n{inspect.cleandoc(paragraph)}\n```")
        elif paragraph:
            parts.append(" ".join(paragraph.split()))
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(_row(cells) for cells in (head, ["---"] * len(head), *rows))


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in cells) + " |\n"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".")


def _sentence(text: str) -> str:
    return _capital(text) + "."


def main() -> None:
    """Write each page whose content is outdated."""
    for path, text in pages().items():
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
            print(f"{path.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
