"""Parser of apt's sources: it yields the same addresses as apt itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from gamebear_tasks.runner.images.apt_sources import Archive, archives
from gamebear_tasks.runner.images.sources_list import is_file_of_sources, is_off, parse, text_of
from gamebear_tasks.sources.debian import apt_sources, for_sources

STANZA = "Types: deb\nURIs: http://a.example/debian\nSuites: x\nComponents: main\n"

ENABLED = [
    "no",
    "No",
    "FALSE",
    "off",
    "without",
    "disable",
    "0",
    "00",
    "0x0",
    "0X00",
    "-0",
    "+0",
    "0abc",
    "08",
    "1",
    "2",
    "01",
    "10",
    "yes",
    "YES",
    "true",
    "on",
    "with",
    "enable",
    "bogus",
    "n",
    "none",
    "disabled",
]

TEXTS = [
    *((f"{STANZA}Enabled: {word}\n", ".sources") for word in [*ENABLED, "", "\tno ", "0 1", "no no"]),
    (f"{STANZA}\n\n\n{STANZA.replace('a.', 'b.')}", ".sources"),
    (f"{STANZA} \t\n{STANZA.replace('a.', 'b.')}", ".sources"),
    (f"{STANZA}Enabled: no\nEnabled: yes\n", ".sources"),
    (f"{STANZA}Enabled: yes\nEnabled: no\n", ".sources"),
    (f"# c\n{STANZA}# Enabled: no\n", ".sources"),
    (STANZA.replace("Components", "# x\n#y\nComponents"), ".sources"),
    (f"{STANZA}#x\n  \nEnabled: no\n", ".sources"),
    (STANZA.lower().replace("types", "tyPes") + "eNabled: no\n", ".sources"),
    (STANZA.replace("Suites: x", "Suites:\n x\n\ty z"), ".sources"),
    (STANZA.replace("\n", "\r\n") + "Enabled: no\r\n", ".sources"),
    (STANZA.replace("\n", "\r\n"), ".sources"),
    (STANZA.replace("Suites: x", "Suites:\n x\n# c: d\n y"), ".sources"),
    (STANZA.replace("deb\n", "deb deb-src\n"), ".sources"),
    ("\n".join([STANZA, STANZA.replace("deb\n", "deb-src\n").replace("a.", "b.")]), ".sources"),
    (STANZA.replace("Components: main\n", "").replace("Suites: x", "Suites: x/"), ".sources"),
    (f"{STANZA}Signed-By: /k.gpg /l.gpg\n", ".sources"),
    *(
        (f"{line}\n", ".list")
        for line in (
            "deb http://a.example x main",
            "  deb\thttp://a.example  x main contrib",
            "deb [arch=amd64] http://a.example x main # deb",
            "deb [ arch=amd64  signed-by=/k ]  http://a.example/ x main#c",
            "deb [a=#] http://a.example x main",
            "#deb http://a.example x main",
            "deb-src http://a.example x main",
            "deb http://a.example x main\r",
            "deb http://a.example x m#ain",
            "deb http://a.example ./",
            "deb [enabled=no] http://a.example x main",
            "deb [signed-by=/k,/l] http://a.example x main\ndeb http://b.example y main",
        )
    ),
]


def of_apt(text: str, suffix: str, folder: Path) -> set[tuple[str, ...]]:
    """Return the addresses that apt would download for a sources file."""
    parts = folder / "parts"
    for made in (parts, folder / "lists/partial"):
        made.mkdir(parents=True, exist_ok=True)
    for old in parts.iterdir():
        old.unlink()
    (parts / f"x{suffix}").write_text(text)
    options = [f"Dir::Etc::sourceparts={parts}", "Dir::Etc::sourcelist=/dev/null", f"Dir::State={folder}"]
    options += ["APT::Architectures=amd64", "Acquire::Languages=none"]
    command = ["apt-get", "update", "--print-uris", *(word for option in options for word in ("-o", option))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("'")]
    return {tuple(line.split("/dists/")) for line in lines if "binary-all" not in line}


def of_ours(text: str, suffix: str) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for source in parse(text, suffix):
        for uri in source.uris:
            for suite in source.suites:
                if suite.endswith("/"):
                    place = f"{uri.rstrip('/')}/{suite}"
                    found |= {(f"{place}{name}",) for name in ("InRelease", "Packages.xz")}
                    continue
                found.add((uri.rstrip("/"), f"{suite}/InRelease"))
                for component in source.components:
                    names = {"deb": "binary-amd64/Packages.xz", "deb-src": "source/Sources.xz"}
                    found |= {(uri.rstrip("/"), f"{suite}/{component}/{names[kind]}") for kind in source.types}
    return found


@pytest.mark.system
@pytest.mark.parametrize(("text", "suffix"), TEXTS)
def test_sources_are_read_as_apt_reads_them(tmp_path: Path, text: str, suffix: str) -> None:
    assert of_ours(text, suffix) == of_apt(text, suffix, tmp_path)
    again = text_of(parse(text, suffix))
    assert parse(again, suffix) == parse(text, suffix)
    assert of_apt(again, suffix, tmp_path) == of_apt(text, suffix, tmp_path)


@pytest.mark.parametrize("word", ["false", "off", "0", "without", "no", "Disable"])
def test_a_disabled_source_is_not_used(word: str) -> None:
    assert is_off(word)
    text = f"{STANZA}Enabled: {word}\n\n{STANZA.replace('a.example', 'on.example')}"
    assert archives(text, deb822=True) == [Archive("http://on.example/debian", "x", ("main",))]
    assert for_sources(text, ".sources", None)[0].count("URIs:") == 1
    assert for_sources(f"{STANZA}Enabled: {word}\n", ".sources", None) == ("", set())


def test_only_files_that_apt_reads_are_read(tmp_path: Path) -> None:
    for name in ("a.list", "b.sources", "c_1-2.x.list", "d.list.save", "e list.list", "f~.list", "g"):
        (tmp_path / name).touch()
    (tmp_path / "h.list").mkdir()
    read = [path.name for path in sorted(tmp_path.iterdir()) if is_file_of_sources(path)]
    assert read == ["a.list", "b.sources", "c_1-2.x.list"]


@pytest.mark.system
def test_two_files_of_one_name_are_two_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sources.list").write_text("deb http://a.example x main\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/sources.list").write_text("deb http://b.example y main\n")
    config = tmp_path / "apt.conf"
    config.write_text(f'Dir::Etc::sourcelist "{tmp_path}/sources.list";\nDir::Etc::sourceparts "{tmp_path}/parts";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    texts, suites = apt_sources(None)
    assert sorted(texts.values()) == ["deb-src http://a.example x main\n", "deb-src http://b.example y main\n"]
    assert suites == ["x", "y"]
