"""The documentation site: it builds without warnings and shows the documents as GitHub does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

SOURCES = ROOT / "site"
PAGES = sorted(
    Path(folder, name).relative_to(SOURCES)
    for folder, _, names in os.walk(SOURCES, followlinks=True)
    for name in names
    if name.endswith(".md")
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built in strict mode: each page is in the navigation, and each link and anchor exists."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def _html(site: Path, page: Path) -> str:
    folder = page.parent if page.name == "README.md" else page.with_suffix("")
    return (site / folder / "index.html").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_shows_each_code_block_table_and_numbered_list(site: Path, page: Path) -> None:
    text = (SOURCES / page).read_text("utf-8")
    html = _html(site, page)
    code = re.findall(r"^ *```\w*\n.*?^ *```$", text, re.MULTILINE | re.DOTALL)
    tables = re.findall(r"^ *\|[-| :]+\|$", text, re.MULTILINE)
    lists = re.findall(r"^1\. ", text, re.MULTILINE)
    assert html.count("<pre") == len(code)
    assert html.count("<table>") == len(tables)
    assert html.count("<ol>") == len(lists), "indent what belongs to an item by four spaces"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_loads_nothing_from_another_host(site: Path, page: Path) -> None:
    loaded = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?://[^\"\s>]+)", _html(site, page))
    assert loaded == []


def test_the_start_page_is_the_readme(site: Path) -> None:
    assert '<h1 id="gamebear-tasks">' in (site / "index.html").read_text("utf-8")
    assert (site / "docs" / "pictures" / "running.svg").exists()
