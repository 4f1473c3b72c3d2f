"""Images built from Containerfiles, and images as outputs."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tiny
from project import Project, wait_for
from test_containers import Builder

from gamebear_tasks.runner.host.buildah import ImageError, remove_containers, remove_tree
from gamebear_tasks.runner.script import containerfile
from gamebear_tasks.runner.store.store import Store

PROGRAMS = ("sh", "cat", "sleep", "true", "false")


def parsed(text: str) -> list[containerfile.Instruction]:
    return list(containerfile.instructions(text))


def stages(text: str, **args: str) -> list[containerfile.Stage]:
    return containerfile.stages(parsed(text), args, containerfile.predefined("armhf", "amd64"))


def rewritten(text: str, target: str = "", **args: str) -> str:
    """Return a Containerfile with `<name platform>` instead of an id."""
    found = stages(text, **args)
    wanted = containerfile.needed(found, target)
    return containerfile.rewritten(parsed(text), found, wanted, lambda name, platform: f"<{name} {platform}>")


# The file


def test_names_of_images_are_replaced_and_nothing_else() -> None:
    text = (
        "# a comment\n"
        "ARG VERSION=12\n"
        "from debian:$VERSION as Build\n"
        "RUN echo --from=debian && \\\n"
        "    # another comment\n"
        "    echo FROM x\n"
        "\n"
        "FROM --platform=$BUILDPLATFORM quay.io/a/${NAME:-b}\n"
        "COPY --chown=0:0 --from=build /x /x\n"
        "COPY --from=0 /x /--from=y\n"
        "COPY --from=alpine:3 /y /y\n"
        "RUN --mount=type=cache,target=/c --mount=type=bind,from=busybox,target=/z cp /z/--mount=a,from=b /z\n"
        "FROM build\n"
        "COPY --from=1 /y /\n"
        "FROM scratch\n"
        "COPY --from=2 / /\n"
    )
    expected = (
        text.replace("from debian:$VERSION as Build", "FROM <debian:12 > AS build")
        .replace("FROM --platform=$BUILDPLATFORM quay.io/a/${NAME:-b}", "FROM <quay.io/a/b linux/amd64>")
        .replace("--from=alpine:3", "--from=<alpine:3 >")
        .replace("from=busybox,", "from=<busybox >,")
    )
    assert rewritten(text) == expected


def test_an_arg_has_precedence_over_its_default_if_it_is_declared() -> None:
    assert rewritten("ARG A=1\nARG B=${A}2\nFROM x:$B-${A:+y}\n", A="7", C="3") == (
        "ARG A=1\nARG B=${A}2\nFROM <x:72-y >\n"
    )
    with pytest.raises(ImageError, match="C has no value") as caught:
        stages("FROM x:$C\n", C="3")
    assert "args={'C'" in caught.value.hint


def test_images_of_stages_that_are_not_built_are_not_looked_for() -> None:
    text = "FROM a AS one\nFROM b AS two\nCOPY --from=one x x\nFROM c AS three\n"
    assert rewritten(text, "two") == text.replace("FROM a", "FROM <a >").replace("FROM b", "FROM <b >")
    assert rewritten(text, "ONE") == text.replace("FROM a", "FROM <a >")
    assert rewritten(text) == text.replace("FROM c", "FROM <c >")


def test_lines_of_a_here_document_are_no_instructions() -> None:
    text = "FROM a\nRUN <<EOF cat <<-'END'\nFROM b\nEOF\nFROM c\nEND\nRUN echo 1<<2 <<x\nFROM a\n"
    assert [each.name for each in parsed(text)] == ["FROM", "RUN", "RUN", "FROM"]


def test_another_escape_character_joins_lines() -> None:
    text = "# escape=`\nFROM `\n  a`\n  :1\nRUN dir c:\\\nRUN x\n"
    assert [each.value for each in parsed(text) if each.name] == ["a:1", "dir c:\\", "x"]


@pytest.mark.parametrize("text", ["", "RUN true\n", "FROM a b\n", "FROM\n"])
def test_a_file_without_a_valid_base_is_an_error_with_a_fix(text: str) -> None:
    with pytest.raises(ImageError) as caught:
        stages(text)
    assert "FROM" in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    ("platform", "arch"),
    [("linux/amd64", "amd64"), ("linux/arm", "armhf"), ("linux/arm/v7", "armhf"), ("linux/386", "i386")],
)
def test_platforms_are_debians_architectures(platform: str, arch: str) -> None:
    assert containerfile.debian_architecture(platform) == arch


# Images


@pytest.fixture(scope="module")
def builder(system: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """A builder with the image `tiny`."""
    folder = tmp_path_factory.mktemp("builder")
    made = Builder(folder / "store")
    made.facts = made.facts._replace(graph_root=made.facts.storage[1])
    tiny.fill(folder / "tree", PROGRAMS)
    made.buildah("from", "--name", "make-tiny", "scratch")
    made.buildah("copy", "make-tiny", str(folder / "tree"), "/")
    made.buildah("config", "--cmd", "sh", "make-tiny")
    made.buildah("commit", "--rm", "make-tiny", "tiny")
    yield made
    made.buildah("rm", "--all")
    remove_tree(made.root, made.facts, made.root)


def files(texts: Mapping[str, str]) -> str:
    """Return the lines of a script that write files."""
    return "".join(
        f"Path({name!r}).parent.mkdir(exist_ok=True)\nPath({name!r}).write_text({text!r})\n"
        for name, text in texts.items()
    )


CONTAINERFILE = """\
ARG BASE=nothing
FROM $BASE AS build
ARG GREETING
ARG TARGETARCH
RUN echo "$GREETING $TARGETARCH" > /greeting
COPY file /
FROM tiny AS other
RUN false
FROM tiny
COPY --from=build /greeting /file /
ENV A=b
"""


def test_a_containerfile_is_built_and_its_layers_are_cached(builder: Builder) -> None:
    script = files({"source/Containerfile": CONTAINERFILE, "source/file": "content\n"}) + (
        "args = {'BASE': 'tiny', 'GREETING': 'hello'}\n"
        "image = Image.build('source/Containerfile', context='source', args=args)\n"
        "with Container(image) as c:\n"
        "    assert c.environ['A'] == 'b'\n"
        "    c.copy_out('/greeting', 'greeting')\n"
        "    c.copy_out('/file', 'file')\n"
        "Path('id').write_text(str(image))\n"
        "assert image.inspect()['ImageAnnotations']['gamebear.arch'] == ARCH\n"
    ).replace("ARCH", repr(builder.facts.arch))
    first, again = builder.run(script), builder.run(script)
    assert first.result == again.result == {"ok": True}, first.log
    greeting, copied = (first.work / "greeting").read_text(), (first.work / "file").read_text()
    assert (greeting, copied) == (f"hello {builder.facts.arch}\n", "content\n")
    assert "Using cache" not in first.log
    assert (first.work / "id").read_text() == (again.work / "id").read_text()
    assert not builder.containers()
    used = set((first.work.parent / "images").read_text().split())
    unnamed = {
        image["id"].rpartition(":")[2]
        for image in json.loads(builder.buildah("images", "--all", "--no-trunc", "--json"))
        if not image["names"]
    }
    assert unnamed
    assert unnamed <= used  # so that prune keeps them with the job, and removes them without it
    assert all((builder.root / "images" / f"{identity}.used").exists() for identity in unnamed)


def test_a_target_is_built_without_the_others(builder: Builder) -> None:
    text = "FROM tiny AS one\nENV ONE=1\nFROM nosuch AS two\nENV TWO=2\n"
    script = files({"Containerfile": text}) + (
        "config = Image.build(target='one').inspect()['OCIv1']['config']\nassert 'ONE=1' in config['Env'], config\n"
    )
    outcome = builder.run(script)
    assert outcome.result == {"ok": True}, outcome.log


def test_a_failed_step_is_named_and_leaves_no_container(builder: Builder) -> None:
    script = files({"Containerfile": "FROM tiny\nENV A=1\nRUN echo was here && false\nRUN true\n"})
    outcome = builder.run(f"{script}Image.build()")
    assert outcome.result["kind"] == "command"
    assert outcome.message == "Containerfile: `RUN echo was here && false` failed: exit status 1."
    assert outcome.result["hint"] == "Fix the step in Containerfile; the log has its output."
    assert "was here" in outcome.log
    assert not builder.containers()
    caught = builder.run(f"{script}try:\n    Image.build()\nexcept CommandError as e:\n    print(e.cmd, e.where)")
    assert caught.result == {"ok": True}


@pytest.mark.parametrize(
    ("text", "call", "named"),
    [
        ("FROM 127.0.0.1:1/no:1\n", "", ["127.0.0.1:1/no:1", "connection refused"]),
        ("FROM tiny\nCOPY nosuch /\n", "", ["Containerfile: `COPY nosuch /` failed: ", "no such file"]),
        ("FROM tiny\nFOO bar\n", "", ["Containerfile: `FOO bar` failed: ", 'Unknown instruction: "FOO".']),
        ("FROM tiny\n", "target='nosuch'", ["Containerfile: `buildah build` failed: ", "nosuch"]),
        ("FROM tiny\n", "'nosuch'", ["FileNotFoundError", "nosuch"]),
        ("FROM tiny\n", "context='nosuch'", ["FileNotFoundError", "nosuch"]),
        ("FROM tiny\n", "args={'a=b': 1}", ["'a=b' is not the name of a build argument"]),
    ],
)
def test_an_error_names_its_cause(builder: Builder, text: str, call: str, named: list[str]) -> None:
    outcome = builder.run(files({"Containerfile": text}) + f"Image.build({call})")
    assert all(word in outcome.message for word in named), outcome.message


def test_a_health_check_is_kept(builder: Builder) -> None:
    script = files({"Containerfile": "FROM tiny\nHEALTHCHECK CMD true\n"})
    outcome = builder.run(script + "with Container(Image.build()) as c:\n    print('check', c.healthcheck_cmd)")
    assert "check ['CMD-SHELL', 'true']" in outcome.log


def test_values_of_args_are_in_no_command_line(builder: Builder) -> None:
    script = files({"Containerfile": "FROM tiny\nARG WORD\nRUN cat /proc/[0-9]*/cmdline; echo; echo $WORD-\n"})
    outcome = builder.run(script + "Image.build(args={'WORD': 's3cr' + 'et'})")
    assert outcome.log.count("s3cret") == outcome.log.count("s3cret-") == 1


def test_containers_of_a_killed_build_are_removed(builder: Builder) -> None:
    script = files({"Containerfile": "FROM tiny\nENV A=killed\nRUN echo started; sleep 600\n"}) + "Image.build()"
    process, folder = builder.start(script)
    wait_for(lambda: "started\n" in (folder / "log").read_text(), 60)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    builder.buildah("from", "--name", "others-working-container", "tiny")
    assert len(builder.containers()) > 1
    prefix = Store(builder.root).job(folder.name).container_prefix
    remove_containers(builder.root, builder.facts, prefix)
    assert builder.containers() == ["others-working-container"]
    builder.buildah("rm", "others-working-container")


# Archives


def test_an_image_is_saved_as_the_same_archive_each_time(builder: Builder) -> None:
    script = files({"Containerfile": "FROM tiny\nENV SAVED=1\n"}) + (
        "image = Image.build()\nimage.save('one.tar')\nimage.add_tag('saved:1')\nimport time; time.sleep(1.1)\n"
        "image.save(Path('two.tar'))\nPath('id').write_text(image.id)\n"
    )
    outcome = builder.run(script, outputs=("one.tar", "two.tar"))
    assert outcome.result == {"ok": True}, outcome.log
    one, two = outcome.work / "one.tar", outcome.work / "two.tar"
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as tar:
        names = tar.getnames()
        assert names == sorted(names)
        index = json.load(tar.extractfile("index.json"))  # type: ignore[arg-type]
        (manifest,) = index["manifests"]
        for name in names:
            if name.startswith("blobs/sha256/"):
                content = tar.extractfile(name).read()  # type: ignore[union-attr]
                assert hashlib.sha256(content).hexdigest() == Path(name).name
        assert f"blobs/sha256/{manifest['digest'].partition(':')[2]}" in names
    pulled = builder.buildah("pull", "--quiet", f"oci-archive:{one}").strip()
    assert pulled.rpartition(":")[2] == (outcome.work / "id").read_text()
    assert not list((builder.root / "tmp").glob("*save-*"))


# Tasks


def test_a_task_may_make_only_an_image(system: None, project: Project, tmp_path: Path) -> None:
    storage = tmp_path / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{tmp_path}/images"\nrunroot = "{tmp_path}/run"\n')
    project.environment["CONTAINERS_STORAGE_CONF"] = str(storage)
    script = (
        "with Container('scratch') as c:\n    c.copy_in('base.py', '/x')\n    c.commit().add_tag('gamebear-mine:1')\n"
    )
    project.write("base.py", script)
    project.write("use.py", "with Container('gamebear-mine:1') as c:\n    c.copy_out('/x', 'x')\n")
    project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n"
        "def task_base():\n    return artifact('base.py', outputs=[])\n"
        "def task_use():\n    return {**artifact('use.py', outputs=['build/x']), 'task_dep': ['base']}\n",
    )
    runs = [project.doit() for _ in range(2)]
    assert runs[0].ran == ["base", "use"], runs[0].err
    assert runs[1].ran == [], runs[1].err
    assert (project.folder / "build/x").read_text() == script
    project.write("base.py", f"{script}# changed\n")
    changed = project.doit()
    assert changed.ran == ["base"] and changed.status == 0, changed.err
    listed = project.gamebear("jobs")
    assert listed.status == 0 and "base" in listed.out, listed
    assert project.doit("clean").status == 0
    rebuilt = project.doit()
    assert rebuilt.ran == ["use"] and rebuilt.status == 0, rebuilt.err  # base has nothing to clean
