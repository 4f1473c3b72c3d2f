"""The compiler cache, with gcc and ccache in a Debian container; objects are compared with those of gcc alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
import tiny
from debian import Debian
from test_containers import Builder, Outcome

from gamebear_tasks.runner.host.buildah import remove_tree

pytestmark = pytest.mark.system

SCRIPT = """
import json, subprocess
steps = json.loads({steps!r})
with Container({image!r}) as c:
    c.ccache = True
    c.run(["ccache", "--zero-stats"], stdout=subprocess.DEVNULL)
    c.run(["mkdir", "-p", "/w"])
    c.workdir = "/w"
    c.run(steps, shell=True)
    lines = c.run(["ccache", "--print-stats"], stdout=subprocess.PIPE).stdout.splitlines()
    stats = dict(line.split() for line in lines)
    Path("stats").write_text(json.dumps({{name: int(number) for name, number in stats.items()}}))
"""

STEP = """
both() {
    if gcc -c "$@" -o cached.o && /usr/bin/gcc -c "$@" -o plain.o && cmp cached.o plain.o; then
        echo "right: $*"
    else
        echo "WRONG: $*"
    fi
}
"""
"""Shell function that compiles with and without the cache, and compares the objects."""


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """A builder with the image `compiler`, which has gcc and ccache, and `tiny`, which has neither."""
    folder = tmp_path_factory.mktemp("builder")
    debian = Debian("bookworm", folder / "debian", ["ccache", "diffutils", "gcc", "grep", "libc6-dev", "sed"])
    made = Builder(folder / "store")
    tiny.fill(folder / "tiny", ["sh", "true"])
    for name, tree in (("tiny", folder / "tiny"), ("compiler", debian.ready().root)):
        made.buildah("from", "--name", f"make-{name}", "scratch")
        made.buildah("copy", "--quiet", f"make-{name}", str(tree), "/")
        made.buildah("commit", "--quiet", "--rm", f"make-{name}", name)
    debian.remove()
    yield made
    made.buildah("rm", "--all")
    remove_tree(made.root, made.facts, made.root)


@pytest.fixture(autouse=True)
def _no_cache_yet(builder: Builder) -> None:
    shutil.rmtree(builder.root / "ccache", ignore_errors=True)


def build(builder: Builder, steps: str, image: str = "compiler") -> tuple[Outcome, dict[str, int]]:
    """Run shell commands in a container with cached compilers; return ccache's statistics."""
    outcome = builder.run(SCRIPT.format(steps=json.dumps(STEP + steps), image=image))
    assert outcome.status == 0, outcome.log
    assert "WRONG" not in outcome.log, outcome.log
    return outcome, json.loads((outcome.work / "stats").read_text())


def hits(stats: dict[str, int]) -> tuple[int, int]:
    """Return the number of cache hits and misses."""
    assert stats["direct_cache_hit"] == 0
    return stats["preprocessed_cache_hit"], stats["cache_miss"]


HELLO = "echo '#include <stdio.h>\nint main(void) { return puts(\"hello\"); }' > a.c\n"


def test_the_second_build_reuses_compiled_objects_of_the_first(builder: Builder) -> None:
    assert hits(build(builder, HELLO + "both a.c -O2")[1]) == (0, 1)
    assert hits(build(builder, HELLO + "both a.c -O2")[1]) == (1, 0)
    assert len(list((builder.root / "ccache").iterdir())) == 1


def test_a_change_that_affects_the_object_is_compiled_again(builder: Builder) -> None:
    steps = """
mkdir -p one two deep
echo 'int f(void) { return N; }' > rest.h
printf '#include "n.h"\\n#include "rest.h"\\nconst char *where = __FILE__;' > a.c
echo '#define N 1' > two/n.h;                both a.c -I one -I two
echo '#define N 2' > two/n.h;                both a.c -I one -I two
echo '#define N 3' > one/n.h;                both a.c -I one -I two
both a.c -I one -I two -O2
both a.c -I one -I two -g
cp a.c rest.h deep; (cd deep; both a.c -I ../one -g)
export CPATH=two;                            both a.c -O1
SOURCE_DATE_EPOCH=1; export SOURCE_DATE_EPOCH
echo 'const char *day = __DATE__;' > b.c;    both b.c
SOURCE_DATE_EPOCH=1000000000;                both b.c
"""
    outcome, stats = build(builder, steps)
    assert outcome.log.count("right: ") == 9
    assert hits(stats) == (0, 9)
    outcome, stats = build(builder, steps)
    assert outcome.log.count("right: ") == 9
    assert hits(stats) == (9, 0)


def test_files_included_by_the_assembler_are_part_of_the_key(builder: Builder) -> None:
    steps = r"""
printf '.data\n.include "x.inc"\n' > a.S
cp a.S b.s
printf '.data\n.macro m f\n.InCbIn "\\f"\n.endm\nm x.inc\n' > c.S
cat > d.c <<'END'
asm(".data\n.include \"x.inc\"\n.text");
END
cat > e.c <<'END'
asm(".data\n.incbin" " " "\"x.inc\"\n.text");
END
echo 'struct s { int include; }; int f(struct s *p) { return p->include; }' > f.c
/usr/bin/gcc -E d.c > g.i
for text in 1 2; do
    echo ".byte $text" > x.inc
    for file in a.S b.s c.S d.c e.c f.c g.i; do both $file; done
    both -x assembler a.S; echo b.s > list; both @list
done
"""
    outcome, stats = build(builder, steps)
    assert outcome.log.count("right: ") == 18
    assert hits(stats) == (1, 1), "only f.c may be cached"


OTHER_COMPILER = """
mkdir -p /usr/local/bin
printf '#!/bin/sh\\nexec /usr/bin/gcc -DOTHER "$@"\\n' > /usr/local/bin/gcc
chmod +x /usr/local/bin/gcc
echo '#ifdef OTHER
const int other = 1;
#endif' > a.c
gcc -c a.c -o cached.o && /usr/local/bin/gcc -c a.c -o plain.o && cmp cached.o plain.o && echo right
"""


def test_another_compiler_does_not_reuse_objects(builder: Builder) -> None:
    build(builder, "echo '' > a.c; both a.c")
    outcome, stats = build(builder, OTHER_COMPILER)
    assert "right" in outcome.log and hits(stats) == (0, 1), "its program is another"
    touch = "    c.run(['touch', '/usr/lib/gcc/new-part'])\n"
    script = SCRIPT.replace("    c.ccache", f"{touch}    c.ccache")
    assert builder.run(script.format(steps=json.dumps("true"), image="compiler")).status == 0
    assert len(list((builder.root / "ccache").iterdir())) == 2, "a part of it is another"


def test_a_damaged_entry_is_not_used(builder: Builder) -> None:
    build(builder, HELLO + "both a.c")
    entries = [path for path in (builder.root / "ccache").glob("*/cache/?/?/*") if path.name != "stats"]
    assert entries
    for path in entries:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    outcome, stats = build(builder, HELLO + "both a.c")
    assert "right: a.c" in outcome.log
    assert hits(stats) == (0, 1)


def test_concurrent_jobs_share_the_cache(builder: Builder) -> None:
    steps = 'for n in 1 2 3 4 5; do echo "int f = $n;" > a.c; both a.c; done'
    script = SCRIPT.format(steps=json.dumps(STEP + steps), image="compiler")
    running = [builder.start(script) for _ in range(3)]
    for process, folder in running:
        assert process.wait() == 0, (folder / "log").read_text()
        assert process.stdin is not None
        process.stdin.close()
        assert (folder / "log").read_text().count("right: a.c") == 5
    assert hits(build(builder, steps)[1]) == (5, 0)


def test_the_cache_is_not_in_images_and_not_readable_by_other_users(builder: Builder) -> None:
    outcome = builder.run(
        """
with Container("compiler") as c:
    c.ccache = True
    c.run("echo 'int x;' > /tmp/a.c; gcc -c /tmp/a.c -o /tmp/a.o", shell=True)
    c.run("env; chmod 777 /tmp; gcc -c /tmp/a.c -o /tmp/b.o", shell=True, user="nobody")
    assert c.ccache
    c.ccache = False
    c.run(["test", "!", "-e", "/run/gamebear-ccache/bin"])
    with Container(c.commit()) as other:
        other.run(["test", "!", "-e", "/run/gamebear-ccache"])
        print(other.inspect()["OCIv1"]["config"].get("Env"), other.ccache)
""",
    )
    assert outcome.status == 0, outcome.log
    assert "CCACHE" not in outcome.log and "gamebear-ccache" not in outcome.log
    assert outcome.log.endswith(" False\n")


@pytest.mark.parametrize(
    ("image", "before", "message"),
    [
        ("tiny", "", 'ccache is not installed in the container. Install it: packages_image(…, ["ccache", "gcc", …])'),
        ("compiler", "rm /bin/grep", "grep is not installed in the container"),
        ("compiler", "rm /usr/bin/*gcc*", "no compiler is installed in the container"),
        (
            "compiler",
            r"printf '#!/bin/sh\necho ccache version 3.7.12' > /usr/bin/ccache",
            "ccache 3.7 in the container is too old",
        ),
    ],
)
def test_an_unsupported_use_of_the_cache_is_an_immediate_error(
    builder: Builder, image: str, before: str, message: str
) -> None:
    script = f"with Container({image!r}) as c:\n    c.run({before or 'true'!r}, shell=True)\n    c.ccache = True\n"
    outcome = builder.run(script)
    assert outcome.status == 1
    text = f"{outcome.message} {outcome.result['hint']}"
    assert text.startswith("script.py, line 3: ") and message in text
    assert "Traceback" not in outcome.log
