"""Imports between the packages point one way: down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT

PACKAGE = ROOT / "gamebear_tasks"

LAYERS = (
    "runner.util",
    "runner.protocol",
    "runner.store",
    "runner.host",
    "runner.images",
    "runner.maintenance",
    "runner.script",
    "runner.executor",
    "runner.server",
    "runner",
    "util",
    "errors",
    "config",
    "sources",
    "jobspec",
    "records",
    "progress",
    "builders",
    "builders.protocol",
    "builders.transports",
    "builders.transports.ssh",
    "builders.dask",
    "client",
    "sdcard.filesystems",
    "sdcard",
    "html_report",
    "doit_plugin",
    "cli",
    "cli.doctor",
    "cli.init",
    "",
)
"""The packages, lowest first; the last is the public API. Each imports only from those before it."""

DEBTS = {
    ("progress.live_view", "client.cancellation"),  # the reporter is to begin the run, not the view
}
"""Known imports that point up. Remove entries that no longer exist; add none."""

DOIT = {"config", "errors", "sdcard.bake"}
"""Known modules outside `doit_plugin` and `cli` that import doit. Add none."""


def name_of(path: Path) -> str:
    """Return a module's name below the package, from its file or its folder."""
    parts = path.relative_to(PACKAGE).parts
    return ".".join(parts).removesuffix(".py").removesuffix("__init__").rstrip(".")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def package_of(module: str) -> str:
    """Return the entry of `LAYERS` that a module is in."""
    return module if module in LAYERS else module.rpartition(".")[0]


def imports(module: str) -> Iterator[tuple[str, str]]:
    """Yield a module's imports, including those in functions and for types: of the package (`.name`) and others."""
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (("", alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield "", node.module or ""
        elif isinstance(node, ast.ImportFrom):
            folder = name_of(path.parents[node.level - 1])
            base = ".".join(filter(None, (folder, node.module)))
            for alias in node.names:
                full = ".".join(filter(None, (base, alias.name)))
                yield ".", full if full in MODULES else base


def edges() -> set[tuple[str, str]]:
    """Return the imports between modules of different packages."""
    found = {(module, other) for module in MODULES for ours, other in imports(module) if ours}
    return {(module, other) for module, other in found if package_of(module) != package_of(other)}


def test_every_module_is_in_a_layer() -> None:
    assert {package_of(module) for module in MODULES} <= set(LAYERS)


def test_no_import_points_up() -> None:
    up = {
        (module, other)
        for module, other in edges()
        if LAYERS.index(package_of(other)) > LAYERS.index(package_of(module))
    }
    assert up == DEBTS, "a new import points up, or a debt is paid and still listed"


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name == "__init__.py" and name])
def test_a_package_imports_nothing(module: str) -> None:
    (docstring,) = ast.parse(MODULES[module].read_text()).body
    assert isinstance(docstring, ast.Expr)


def test_only_the_plugin_and_the_commands_import_doit() -> None:
    found = {module for module in MODULES for _, other in imports(module) if other.partition(".")[0] == "doit"}
    assert {module for module in found if module.partition(".")[0] not in ("doit_plugin", "cli")} == DOIT


def test_one_module_imports_dask() -> None:
    found = {module for module in MODULES for _, other in imports(module) if other.partition(".")[0] == "distributed"}
    assert found == {"builders.dask.distributed_api"}


def test_modules_of_the_package_are_imported_relatively() -> None:
    found = {module for module in MODULES for _, other in imports(module) if other.startswith("gamebear")}
    assert found == set(), "the runner has another name where it has travelled"
