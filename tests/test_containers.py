"""Buildscripts in real containers: each test runs the runner's `build` as a supervisor would."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from project import Project, wait_for
from sshd import Account

from gamebear_tasks.jobspec import function_digest
from gamebear_tasks.runner.executor.supervisor import GO
from gamebear_tasks.runner.host.buildah import Buildah, remove_tree
from gamebear_tasks.runner.host.capabilities import Facts, environment, namespace
from gamebear_tasks.runner.host.probe import facts

REPOSITORY = Path(__file__).parent.parent
PROGRAMS = ("sh", "bash", "cat", "env", "id", "ls", "mkdir", "pwd", "sleep", "true", "false")


@dataclasses.dataclass
class Outcome:
    """Outcome of a build."""

    status: int
    result: dict[str, Any]
    log: str
    work: Path

    @property
    def message(self) -> str:
        """Error message of a failed build."""
        return str(self.result.get("message"))


class Builder:
    """A separate store with one small image, `tiny`, made of programs of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        found = facts(root)
        own = ("--root", str(root / "storage"), "--runroot", str(root / "runroot"), "--storage-driver", found.driver)
        self.facts: Facts = found if found.storage[:1] == ("--root",) else found._replace(storage=own)
        self.count = 0

    def buildah(self, *args: str) -> str:
        """Run buildah on the store."""
        command = [*namespace(self.facts), *Buildah(self.root, self.facts).command(*args)]
        return subprocess.run(
            command, env=environment(self.root, self.facts), check=True, capture_output=True, text=True
        ).stdout

    def start(
        self,
        script: str | bytes,
        outputs: tuple[str, ...] = (),
        args: dict[str, object] | None = None,
        modules: dict[str, str] | None = None,
        arch: str = "",
        function: Callable[..., object] | None = None,
    ) -> tuple[subprocess.Popen[bytes], Path]:
        """Start a build; return the process, which ends when its standard input closes, and the job's folder."""
        self.count += 1
        digest = f"{self.count:016x}{0:048x}"
        folder = self.root / "jobs" / digest
        (folder / "work").mkdir(parents=True)
        if function is None:
            (folder / "work" / "script.py").write_bytes(script.encode() if isinstance(script, str) else script)
        for name, text in (modules or {}).items():
            (folder / "work" / name).write_text(text)
        job = {
            "gamebear": 1,
            "arch": arch or self.facts.arch,
            "script": {"name": "script.py", "sha256": ""},
            "modules": {name: {"sha256": ""} for name in modules or {}},
            "inputs": {},
            "sources": {},
            "args": args or {},
            "outputs": list(outputs),
        }
        if function is not None:
            del job["script"]
            job["function"] = {"name": function.__qualname__, "sha256": ""}
            pickled = function_digest.pickled(function)
            (folder / "function.pickle").write_bytes(pickled.data)
            (folder / "function.lines").write_bytes(pickled.lines)
            (folder / "cloudpickle.zip").write_bytes(function_digest.cloudpickle_archive())
        (folder / "job.json").write_text(json.dumps(job))
        program = (
            f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from gamebear_tasks.runner import __main__ as main"
        )
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *namespace(self.facts),
                    sys.executable,
                    "-c",
                    f"{program}; sys.exit(main.main(['build', {digest!r}]))",
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=environment(self.root, self.facts),
                start_new_session=True,
            )
        assert process.stdin is not None
        process.stdin.write(GO)
        process.stdin.flush()
        return process, folder

    def run(self, script: str | bytes, outputs: tuple[str, ...] = (), **more: Any) -> Outcome:
        """Run a build to its end."""
        process, folder = self.start(script, outputs, **more)
        status = process.wait()
        assert process.stdin is not None
        process.stdin.close()
        result = json.loads((folder / "result.json").read_text())
        for when in ("began", "phases"):  # see test_timing
            result.pop(when, None)
        return Outcome(status, result, (folder / "log").read_text(errors="replace"), folder / "work")

    def containers(self) -> list[str]:
        """Return the names of the containers in the store."""
        listed = json.loads(self.buildah("containers", "--json") or "null") or []
        return [entry["containername"] for entry in listed]


@pytest.fixture(scope="module")
def builder(system: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """A builder with the image `tiny`."""
    folder = tmp_path_factory.mktemp("builder")
    made = Builder(folder / "store")
    tree = folder / "tree"
    tiny.fill(tree, PROGRAMS)
    made.buildah("from", "--name", "make-tiny", "scratch")
    made.buildah("copy", "make-tiny", str(tree), "/")
    made.buildah("config", "--env", "GREETING=hi", "--label", "from=tiny", "--cmd", "sh", "make-tiny")
    made.buildah("commit", "--rm", "make-tiny", "tiny")
    yield made
    made.buildah("rm", "--all")  # a failed test may leave mounts
    remove_tree(made.root, made.facts, made.root)


def test_output_of_commands_and_of_the_script_is_in_order(builder: Builder) -> None:
    outcome = builder.run(
        "print('one', end=' ')\n"
        "with Container('tiny') as c:\n"
        "    c.run(['sh', '-c', 'echo two'])\n"
        "    print('three', end=' ')\n"
        "    c.run('echo four; echo five >&2', shell=True)\n"
        "print('\\udcff')\n"
    )
    assert (outcome.status, outcome.result) == (0, {"ok": True})
    assert outcome.log == "one two\nthree four\nfive\n\\udcff\n"


def test_no_output_of_commands_is_lost(builder: Builder) -> None:
    """With chroot isolation, buildah itself rarely loses the end. So the test inspects the path of the output."""
    outcome = builder.run(
        "import subprocess\n"
        "with Container('tiny') as c:\n"
        "    for count in range(9):\n"
        "        print(c.run(['sh', '-c', f'echo {count}; echo and >&2'], stdout=subprocess.PIPE).stdout, end='')\n"
        "    c.run('echo last; echo words >&2; echo whole', shell=True, user='pi')\n"
        "    way = c.run(['ls', '-l', '/proc/self/fd/1'], stdout=subprocess.PIPE).stdout\n"
        "    assert c._job.facts.isolation != 'chroot' or '/dev/shm/gamebear-' in way, way\n"
    )
    assert outcome.result == {"ok": True}, outcome.message
    assert outcome.log.replace("and\n", "") == "".join(f"{count}\n" for count in range(9)) + "last\nwords\nwhole\n"
    assert outcome.log.count("and\n") == 9


def test_root_has_the_containers_groups_and_a_user_keeps_its_identity(builder: Builder) -> None:
    outcome = builder.run(
        "with Container('tiny') as c:\n"
        "    c.run(['id', '-G'])\n"
        "    with c.mount() as root, (root / 'etc' / 'group').open('a') as file: file.write('more:x:7:pi,root')\n"
        "    c.run(['id', '-G'])\n"
        "    c.run('exit 0; echo not heard', shell=True)\n"
        "    c.user = 'pi'\n"
        "    image = c.commit()\n"
        "with Container(image) as c: c.run(['id', '-u'])\n"
    )
    assert outcome.log.splitlines() == ["0", "0 7", "1000"], outcome.message


def test_the_output_of_a_command_is_appended_to_the_scripts_own_output(builder: Builder) -> None:
    outcome = builder.run(
        "import subprocess\n"
        "with Container('tiny') as c, open('x', 'w') as file:\n"
        "    file.write('first\\n')\n"
        "    c.run('echo second', shell=True, stdout=file)\n"
        "    file.write('third\\n')\n"
        "    c.run('echo fourth >&2', shell=True, stderr=file)\n"
        "print(open('x').read(), end='')\n"
    )
    assert outcome.log.splitlines() == ["first", "second", "third", "fourth"], outcome.message


def test_an_image_without_a_shell_runs_its_program(builder: Builder) -> None:
    outcome = builder.run(
        "import subprocess\n"
        "with Container('tiny') as c:\n"
        "    with c.mount() as root: (root / 'bin' / 'sh').unlink()\n"
        "    print(c.run(['cat'], input='kept', stdout=subprocess.PIPE).stdout)\n"
        "    try: c.run(['ls', '/nowhere'])\n"
        "    except CommandError as error: print(error.returncode)\n"
    )
    assert outcome.result == {"ok": True}, outcome.log
    lines = outcome.log.splitlines()
    assert lines[0] == "kept"
    assert "/nowhere" in lines[1]
    assert lines[-1] == "2"


def test_a_missing_command_is_named(builder: Builder) -> None:
    outcome = builder.run("with Container('tiny') as c:\n    c.run(['gcc', '-v'])\n")
    assert outcome.message == "`gcc -v` exited with 127."
    assert outcome.result["hint"].startswith("Install the program in the image with packages_image(…)")
    assert "script.py, line 2" in outcome.result["hint"]
    assert "gcc: not found" in outcome.log


def test_a_container_is_named_after_its_image(builder: Builder) -> None:
    script = "image = Image('tiny')\nwith Container(Image(image)) as c:\n    c.run(['false'])\n"
    assert builder.run(script).result["where"] == "a container of tiny"


def test_a_misspelt_attribute_is_an_error_with_a_hint(builder: Builder) -> None:
    outcome = builder.run("with Container('tiny') as c:\n    c.workdri = '/tmp'\n")
    assert outcome.message == (
        "script.py, line 2: AttributeError: unknown container setting 'workdri'; did you mean workdir?"
    )
    outcome = builder.run("with Container('tiny') as c:\n    c.colour = 'red'\n")
    assert "unknown container setting 'colour'; use one of ccache, command, entrypoint, environ, " in outcome.message
    outcome = builder.run(
        "class Mine(Container):\n"
        "    def __init__(self):\n"
        "        super().__init__('tiny')\n"
        "        self.colour = 'red'\n"
        "with Mine() as c:\n"
        "    print(c.colour)\n"
    )
    assert outcome.log == "red\n"


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log file with the command line of each buildah process."""
    path = tmp_path / "lines"
    spy = tmp_path / "bin" / "buildah"
    spy.parent.mkdir()
    spy.write_text(f'#!/bin/sh\necho "$@" >> {path}\nexec {shutil.which("buildah")} "$@"\n')
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{spy.parent}:{os.environ['PATH']}")
    return path


def test_a_command_in_a_container_runs_buildah_only_as_needed(builder: Builder, lines: Path) -> None:
    script = "with Container('tiny') as c:\n    c.run(['true'])\n"
    builder.run(script)  # the image's architecture is cached from now on
    lines.unlink()
    assert builder.run(script).status == 0
    own = " ".join(builder.facts.storage)
    asked = [line.removeprefix(own).split()[0] for line in lines.read_text().splitlines() if line.startswith(own)]
    assert asked == ["images", "from", "run", "rm"], lines.read_text()


def test_values_of_variables_are_not_in_command_lines(builder: Builder, lines: Path) -> None:
    outcome = builder.run(
        "import subprocess\n"
        "def seen(c, **more):\n"
        "    line = 'echo $TOKEN $PASSWORD $HTTPS_PROXY'\n"
        "    return c.run(line, shell=True, stdout=subprocess.PIPE, **more).stdout.strip()\n"
        "with Container('tiny') as c:\n"
        "    c.environ['TOKEN'] = 'secret-$HOME'\n"
        "    c.environ['HTTPS_PROXY'] = 'seen$$'\n"
        "    print(seen(c), seen(c, env={'PASSWORD': 'secret too'}), seen(c), sep='; ')\n"
        "    c.environ['TOKEN'] = 'secret-3'\n"
        "    print(seen(c, env={'TOKEN': 'secret-4'}), seen(c, env={'TOKEN': 'secret-4'}), seen(c), sep='; ')\n"
        "    print(sorted(c.commit().inspect()['OCIv1']['config']['Env']))\n"
    )
    assert outcome.log.splitlines() == [
        "secret-$HOME seen$$; secret-$HOME secret too seen$$; secret-$HOME seen$$",
        "secret-4 seen$$; secret-4 seen$$; secret-3 seen$$",
        "['GREETING=hi', 'HTTPS_PROXY=seen$$', 'TOKEN=secret-3']",
    ]
    asked = lines.read_text()
    assert "--env TOKEN" in asked and "HTTPS_PROXY=" in asked
    assert "secret" not in asked


def test_a_file_built_in_a_container_is_copied_out(builder: Builder) -> None:
    outcome = builder.run(
        "output = Path(__file__).resolve().parent\n"
        "with Container('tiny') as c:\n"
        "    c.workdir = '/tmp/tools'\n"
        "    c.run(['sh', '-c', 'echo built > tool && pwd > where'])\n"
        "    c.copy_out('/tmp/tools/tool', 'tool')\n"
        "    c.copy_out(Path('tmp/tools/where'), output / 'where')\n",
        ("tool", "where"),
    )
    assert outcome.result == {"ok": True}
    assert (outcome.work / "tool").read_text() == "built\n"
    assert (outcome.work / "where").read_text() == "/tmp/tools\n"


def test_settings_apply_to_commands_and_to_the_image(builder: Builder) -> None:
    outcome = builder.run(
        "with Container('tiny') as c:\n"
        "    assert c.environ['GREETING'] == 'hi' and c.labels['from'] == 'tiny' and c.command == ['sh'], c.inspect()\n"
        "    c.environ['LITERAL'] = '$HOME, \"quoted\"'\n"
        "    c.environ.update(NUMBER=1)\n"
        "    c.user = 'pi'\n"
        "    c.run(['sh', '-c', 'echo $NUMBER $LITERAL $GREETING; id -u'])\n"
        "    del c.environ['GREETING']\n"
        "    c.run(['sh', '-c', 'echo \"[$GREETING]\" $LITERAL'], user=0)\n"
        "    c.workdir = '/tmp'\n"
        "    c.run(['pwd'])\n"
        "    c.run(['pwd'], pwd='/etc')\n"
        "    c.run(['sh', '-c', 'pwd; echo $ONLY'], env={'ONLY': 'now'}, pwd='down')\n"
        "    c.run(['sh', '-c', 'pwd; echo $ONLY-'])\n"
        "    c.labels['a'] = 'b, c'\n"
        "    del c.labels['from']\n"
        "    c.volumes |= {'/data', '/with,comma'}\n"
        "    c.command = ['a b', \"it's\", '$HOME']\n"
        "    c.entrypoint = ['/bin/entry']\n"
        "    c.healthcheck_cmd = ['status', 'a b']\n"
        "    c.healthcheck_start_period = '5m'\n"
        "    with c.commit() as img:\n"
        "        import json\n"
        "        config = img.inspect()['Docker']['config']\n"
        "        health = config['Healthcheck']\n"
        "        print(json.dumps([config['Env'], config['Labels'].get('a'), config['Labels'].get('from'),\n"
        "            sorted(config['Volumes']), config['Cmd'], config['Entrypoint'], config['WorkingDir'],\n"
        "            config['User'], health['Test'], health['StartPeriod']]))\n"
        "    c.workdir = '/etc'\n"
        "    c.volumes.discard('/data')\n"
        "    c.command = []\n"
        "    c.healthcheck_cmd = None\n"
        "    config = c.inspect()['Docker']['config']\n"
        "    print(config['WorkingDir'], sorted(config['Volumes']), config['Cmd'], config.get('Healthcheck'))\n"
    )
    assert outcome.result == {"ok": True}, outcome.message
    lines = outcome.log.splitlines()
    assert lines[:2] == ['1 $HOME, "quoted" hi', "1000"]
    assert lines[2:10] == ['[] $HOME, "quoted"', "/tmp", "/etc", "/tmp/down", "now", "/tmp", "-", lines[9]]
    env, *rest = json.loads(lines[9])
    assert sorted(env) == ['LITERAL=$HOME, "quoted"', "NUMBER=1"]
    assert rest == [
        "b, c",
        None,
        ["/data", "/with,comma"],
        ["a b", "it's", "$HOME"],
        ["/bin/entry"],
        "/tmp",
        "pi",
        ["CMD", "status", "a b"],
        300_000_000_000,
    ]
    assert lines[10] == "/etc ['/with,comma'] [] None"


def test_an_older_buildah_applies_the_same_settings(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "facts", builder.facts._replace(version="1.19.6"))
    outcome = builder.run(
        "with Container('tiny') as c:\n"
        "    c.environ['A'] = '$1'\n"
        "    c.workdir = '/tmp'\n"
        "    c.run(['sh', '-c', 'echo $A $B; pwd'], env={'B': 2}, pwd='/etc')\n"
        "    c.run(['sh', '-c', 'echo $A $B; pwd'])\n"
    )
    assert outcome.log.splitlines() == ["$1 2", "/etc", "$1", "/tmp"]


@pytest.mark.parametrize("version", ["", "1.26.0", "1.19.6"])
def test_an_empty_value_is_a_value(builder: Builder, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """With the methods for all releases of buildah: environment, options of `run`, `config` alone."""
    if version:
        monkeypatch.setattr(builder, "facts", builder.facts._replace(version=version))
    outcome = builder.run(
        "import json\n"
        "def show(c, **more): c.run('echo \"${GREETING-unset} ${A-unset} ${B-unset}\"', shell=True, **more)\n"
        "def config(image):\n"
        "    found = image.inspect()['OCIv1']['config']\n"
        "    names = ('Env', 'Labels', 'Cmd', 'Entrypoint', 'WorkingDir', 'User')\n"
        "    return {name: found[name] for name in names if found.get(name)}\n"
        "with Container('tiny') as c:\n"
        "    c.environ.update(GREETING='', A='')\n"
        "    show(c)\n"
        "    show(c, env={'B': ''})\n"
        "    c.environ['A'] = 'a'\n"
        "    show(c, env={'A': ''})\n"
        "    show(c)\n"
        "    c.environ['A'] = ''\n"
        "    c.labels['from'] = ''\n"
        "    c.workdir, c.user, c.entrypoint = '/tmp', 'pi', ['entry']\n"
        "    full = c.commit()\n"
        "    assert config(full)['User'] == 'pi' and config(full)['Entrypoint'] == ['entry'], config(full)\n"
        "with Container(full) as c:\n"
        "    assert dict(c.environ, PATH='') == {'GREETING': '', 'A': '', 'PATH': ''}, c.environ\n"
        "    show(c)\n"
        "    c.run('id -u; pwd', shell=True, user='')\n"
        "    c.workdir, c.user, c.entrypoint, c.command = '', '', [], []\n"
        "    c.run('id -u; pwd', shell=True)\n"
        "    print(json.dumps(config(c.commit())))\n"
        "    c.run(['cat'], input='')\n"
        "    c.run(['sh', '-c', 'echo \"$# [$1]\"', '', ''])\n"
    )
    assert outcome.result == {"ok": True}, outcome.message
    lines = outcome.log.splitlines()
    assert lines[:5] == ["  unset", "  ", "  unset", " a unset", "  unset"]
    assert lines[5:9] == ["0", "/tmp", "0", "/"]
    found = json.loads(lines[9])
    assert sorted(found.pop("Env")) == ["A=", "GREETING="]
    found["Labels"].pop("io.buildah.version", None)
    assert found == {"Labels": {"from": ""}}
    assert lines[10:] == ["1 []"]


def test_a_name_that_ends_with_a_dash_is_set_and_not_removed(builder: Builder) -> None:
    outcome = builder.run(
        "with Container('tiny') as c:\n"
        "    c.environ['A-'] = 'a'\n"
        "    c.labels['from-'] = 'b'\n"
        "    config = c.inspect()['OCIv1']['config']\n"
        "    print(config['Env'], config['Labels'])\n"
        "    del c.environ['A-']\n"
        "    print(c.inspect()['OCIv1']['config']['Env'])\n"
    )
    first, second = outcome.log.splitlines()
    assert "'A-=a'" in first and "'from-': 'b'" in first and "'from': 'tiny'" in first
    assert second == "['GREETING=hi']"


def test_input_and_output_of_a_command_can_be_the_scripts(builder: Builder) -> None:
    outcome = builder.run(
        "import subprocess\n"
        "with Container('tiny') as c:\n"
        "    print(repr(c.run(['cat'], input='text', stdout=subprocess.PIPE).stdout))\n"
        "    print(repr(c.run(['cat'], input=b'bytes', stdout=subprocess.PIPE, text=False).stdout))\n"
        "    print(repr(c.run(['cat'], stdout=subprocess.PIPE).stdout))\n"
    )
    assert outcome.log.splitlines() == ["'text'", "b'bytes'", "''"]


def test_folders_can_be_mounted(builder: Builder) -> None:
    outcome = builder.run(
        "Path('here').mkdir()\n"
        "with Container('tiny', mounts=[('here', '/life')]) as c:\n"
        "    c.run(['sh', '-c', 'echo 1 > /life/a'])\n"
        "    c.run(['sh', '-c', 'echo 2 > /now/b'], volumes=['here:/now'])\n"
        "    bind = {'type': 'bind', 'src': 'here', 'dst': '/m', 'rw': 'true'}\n"
        "    c.run(['sh', '-c', 'echo 3 > /m/c'], mounts=[bind])\n"
        "    with c.mount() as root:\n"
        "        (root / 'written').write_text('outside')\n"
        "    c.run(['cat', '/written'])\n"
        "print(sorted(path.name for path in Path('here').iterdir()))\n"
    )
    assert outcome.log == "outside['a', 'b', 'c']\n", outcome.message


def test_what_is_copied_in_belongs_to_root(builder: Builder) -> None:
    outcome = builder.run(
        "import os\n"
        "Path('d').mkdir()\n"
        "Path('d/f').write_text('x')\n"
        "os.chown('d/f', 7, 7)\n"
        "with Container('tiny') as c:\n"
        "    c.workdir = '/tmp'\n"
        "    c.copy_in('d', 'there')\n"
        "    c.run(['sh', '-c', 'ls -ln /tmp/there'])\n"
    )
    assert outcome.log.splitlines()[-1].split()[:4] == ["-rw-r--r--", "1", "0", "0"], outcome.message


@pytest.mark.parametrize(
    ("owner", "ids"),
    [
        ("pi", (1000, 7)),
        ("pi:more", (1000, 70)),
        ("1000", (1000, 7)),
        ("12:more", (12, 70)),
        ("12", (12, 0)),
        ("12:34", (12, 34)),
        (0, (0, 0)),
    ],
)
def test_what_is_copied_in_may_belong_to_another(builder: Builder, owner: object, ids: tuple[int, int]) -> None:
    """A name's group is its primary one; a number's too if it has an entry, else 0, as for `buildah run --user`."""
    outcome = builder.run(
        "import os\n"
        "Path('d/e').mkdir(parents=True)\n"
        "Path('d/f').write_text('x')\n"
        "Path('d/f').chmod(0o6711)\n"
        "os.link('d/f', 'd/g')\n"
        "Path('d/l').symlink_to('f')\n"
        "with Container('tiny') as c:\n"
        "    with c.mount() as root:\n"
        "        (root / 'etc/passwd').write_text('root:x:0:0::/:/bin/sh\\nbroken\\npi:x:1000:7::/:/bin/sh\\n')\n"
        "        (root / 'etc/group').write_text('root:x:0:\\nmore:x:70:\\n')\n"
        f"    c.copy_in('d', '/new/d', owner={owner!r})\n"
        f"    c.copy_in('d/f', '/tmp/alone', owner={owner!r})\n"
        f"    c.copy_in('d/f', '/other/', owner={owner!r})\n"
        "    with c.mount() as root:\n"
        "        for path in (root / 'new', root / 'tmp/alone', root / 'tmp', *sorted((root / 'new').rglob('*'))):\n"
        "            info = path.lstat()\n"
        "            print(path.name, info.st_uid, info.st_gid, oct(info.st_mode & 0o7777))\n"
        "        assert (root / 'other').stat().st_uid == (root / 'other/f').stat().st_uid\n"
    )
    assert outcome.status == 0, outcome.message
    lines = {name: ((int(uid), int(gid)), mode) for name, uid, gid, mode in map(str.split, outcome.log.splitlines())}
    assert {name for name, (found, _) in lines.items() if found == ids} >= {"new", "alone", "d", "e", "f", "g", "l"}
    assert lines["tmp"][0] == (0, 0), "a folder that was there keeps its owner"
    assert [lines[name][1] for name in ("f", "g", "alone")] == ["0o6711"] * 3


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ("nosuch", 'copy_in failed: the container has no user nosuch. Add it before: c.run(["useradd", "nosuch"])'),
        ("pi:nosuch", 'the container has no group nosuch. Add it before: c.run(["groupadd'),
        ("4294967295", "the container has no user 4294967295."),
        ("", "ValueError: invalid owner"),
        (":pi", "ValueError: invalid owner"),
        ("pi:", "ValueError: invalid owner"),
        ("a:b:c", "ValueError: invalid owner"),
    ],
)
def test_an_owner_that_the_container_does_not_know_is_an_error(builder: Builder, owner: str, message: str) -> None:
    outcome = builder.run(f"with Container('tiny') as c:\n    c.copy_in('script.py', '/x', owner={owner!r})\n")
    assert outcome.status == 1
    assert outcome.message.startswith("script.py, line 2: ")
    assert message in f"{outcome.message} {outcome.result.get('hint')}"


CONNECT = 'for to in {places}; do bash -c "echo > /dev/tcp/$to/{port}" && echo reached $to; done 2>/dev/null; true'


def addresses() -> list[str]:
    """Return this machine's loopback address, and another address of its own if it has one."""
    found = ["127.0.0.1"]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as some:
        some.connect(("192.0.2.1", 9))  # sends nothing
        found.append(some.getsockname()[0])
    return found


def test_a_command_without_network_reaches_nothing_of_this_machine(builder: Builder) -> None:
    with socket.create_server(("", 0)) as listener, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(b"\0gamebear-test-%d" % os.getpid())
        line = CONNECT.format(places=" ".join(addresses()), port=listener.getsockname()[1])
        outcome = builder.run(
            f"line = {line!r}\n"
            "with Container('tiny') as c:\n"
            "    for options in ({}, {'user': 'pi'}, {'env': {'A': 'b'}, 'input': 'x'}):\n"
            "        c.run(line, shell=True, **options)\n"
            "        c.run(f'echo without; {line}; cat /proc/net/unix', shell=True, network=False, **options)\n"
            "    c.run(['cat', '/proc/net/fib_trie', '/proc/net/dev'], network=False)\n"
            "    c.run(line, shell=True)\n"
        )
    assert outcome.status == 0, outcome.message
    reached = [f"reached {address}" for address in addresses()]
    said = [line for line in outcome.log.splitlines() if line.startswith(("reached", "without"))]
    assert said == [*reached, "without"] * 3 + reached
    assert f"gamebear-test-{os.getpid()}" not in outcome.log, "no abstract sockets of the builder"
    assert "|-- 127.0.0.1\n" in outcome.log, "the loopback interface is up"


def test_a_command_without_network_may_fail_and_its_status_is_told(builder: Builder) -> None:
    outcome = builder.run("with Container('tiny') as c:\n    c.run('echo out; exit 7', shell=True, network=False)\n")
    assert outcome.result["kind"] == "command" and outcome.result["status"] == 7
    assert outcome.log == "out\n"


ROOTLESS = """
line = {line!r}
with Container("scratch") as c:
    c.copy_in({tree!r}, "/")
    c.copy_in("x.py", "/home/pi/x.py", owner="pi")
    c.run("ls -ldn /home/pi; [ -w /home/pi/x.py ] && echo writable", shell=True, user="pi")
    try:
        c.copy_in("x.py", "/y.py", owner="4000000000")
    except Exception as error:
        print(error)
    c.run(line, shell=True)
    c.run(f"echo without; {{line}}; cat /proc/net/fib_trie", shell=True, network=False, user="pi")
with Container("scratch") as c:
    c.copy_in({tree!r}, "/")
    c.run(["true"], network=False)
open("out", "w").close()
"""

FORBIDDEN = """
Path("/proc/sys/user/max_net_namespaces").write_text("0")  # of the job's user namespace
with Container("scratch") as c:
    c.copy_in({tree!r}, "/")
    c.run("echo not run", shell=True, network=False)
"""


def test_an_ordinary_user_of_the_builder_has_owners_and_no_network(remote_project: Project, account: Account) -> None:
    tree = account.home / f"tiny-{os.urandom(4).hex()}"
    tiny.fill(tree, PROGRAMS)
    remote_project.write(
        "dodo.py",
        "from gamebear_tasks import artifact\n\ndef task_x():\n    return artifact('x.py', outputs=['build/out'])\n",
    )
    log = remote_project.folder / "build/logs/x.log"
    with socket.create_server(("", 0)) as listener:
        line = CONNECT.format(places=" ".join(addresses()), port=listener.getsockname()[1])
        remote_project.write("x.py", ROOTLESS.format(line=line, tree=str(tree)))
        remote_project.doit("x").ok()
    said = log.read_text()
    assert "drwxr-xr-x 2 1000 1000" in said and "writable" in said
    assert "copy_in failed: uid 4000000000 is outside of the builder's user namespace." in said
    reached = [line for line in said.splitlines() if line.startswith(("reached", "without"))]
    assert reached == [*(f"reached {address}" for address in addresses()), "without"]
    assert "|-- 127.0.0.1\n" in said
    remote_project.write("x.py", FORBIDDEN.format(tree=str(tree)))
    remote_project.doit("x").failed(
        "x.py, line 5: run(network=False) failed: the builder cannot create a network namespace", "max_net_namespaces"
    )
    assert "not run" not in log.read_text()


def test_the_seeds_image_cache_is_hit_the_second_time(builder: Builder) -> None:
    script = (
        "try:\n"
        "    img = Image('gamebear-build:abc')\n"
        "    print('found')\n"
        "except ImageNotFoundError:\n"
        "    with Container('tiny') as c:\n"
        "        c.run(['sh', '-c', 'echo 1 > /installed'])\n"
        "        img = c.commit()\n"
        "        img.add_tag('gamebear-build:abc')\n"
        "with Container(img):\n"
        "    c = Container(img)\n"
        "    c.run(['cat', '/installed'])\n"
        "return img\n"
    )
    first, second = builder.run(script), builder.run(script)
    assert (first.log, second.log) == ("1\n" + first.log[2:], "found\n1\n" + second.log[8:])
    identity, name = second.result["image"].split()
    assert len(identity) == 64 and name == "localhost/gamebear-build:abc"
    assert first.result == second.result
    assert builder.containers() == []
    builder.buildah("rmi", identity)


def test_a_missing_image_is_not_pulled(builder: Builder) -> None:
    outcome = builder.run("Image('gamebear-build:nothing')")
    assert outcome.result["kind"] == "image"
    assert outcome.message.startswith("script.py, line 1: image gamebear-build:nothing for ")
    assert outcome.result["hint"] == "Pull it from a registry: Image.pull('gamebear-build:nothing')"


def test_unnamed_images_are_removed_and_named_ones_are_retained(builder: Builder) -> None:
    outcome = builder.run(
        "with Container('tiny') as c:\n"
        "    first = c.commit()\n"
        "    (c.mount().__enter__() / 'x').write_text('x')\n"
        "    with c.commit() as second: pass\n"
        "    with c.commit() as third: third.add_tag('kept:1')\n"
        "    assert Image('kept:1') == third == Image(third.id[:12]) != first and len({third, Image('kept:1')}) == 1\n"
        "    assert [i['names'] for i in Image.list('kept')] == [['localhost/kept:1']]\n"
        "    assert list(Image.list('kept:2')) == []\n"
        "    try:\n"
        "        Image(second.id)\n"
        "    except ImageNotFoundError:\n"
        "        print(first.id, second.id, third.id)\n"
    )
    assert outcome.result == {"ok": True}, outcome.message
    first, second, third = outcome.log.split()
    stored = builder.buildah("images", "--all", "--no-trunc", "--quiet")
    assert third in stored and first not in stored and second not in stored
    builder.buildah("rmi", third)


def test_a_failed_command_is_an_error_without_a_traceback(builder: Builder) -> None:
    outcome = builder.run("with Container('tiny') as c:\n    c.run(['sh', '-c', 'exit 3'])\n")
    assert outcome.status == 1
    assert outcome.result == {
        "ok": False,
        "kind": "command",
        "message": "`sh -c 'exit 3'` exited with 3.",
        "hint": "Fix the command at script.py, line 2, or its input; the log has its output.",
        "command": ["sh", "-c", "exit 3"],
        "status": 3,
        "where": "a container of tiny",
        "containers": True,
    }
    assert "Traceback" not in outcome.log
    assert builder.containers() == []


def test_a_failed_command_can_be_caught_as_a_subprocess_error(builder: Builder) -> None:
    outcome = builder.run(
        "import subprocess\n"
        "with Container('tiny') as c:\n"
        "    try:\n"
        "        c.run(['false'])\n"
        "    except subprocess.CalledProcessError as error:\n"
        "        print(error.returncode, error.cmd, isinstance(error, CommandError))\n"
    )
    assert outcome.log.splitlines()[-1] == "1 ['false'] True"


def test_an_error_in_a_block_is_reported_even_if_its_container_was_removed(builder: Builder) -> None:
    script = "with Container('tiny') as c:\n    c.__exit__(None, None, None)\n    raise KeyError('first')\n"
    assert "KeyError: 'first'" in builder.run(script).message


def test_a_traceback_has_the_scripts_frames_only(builder: Builder) -> None:
    outcome = builder.run(
        "import helper\nimport json\nhelper.parse('{')\n",
        modules={"helper.py": "import json\n\ndef parse(text):\n    return json.loads(text)\n"},
    )
    assert outcome.result["kind"] == "script"
    assert outcome.message.startswith("helper.py, line 4: json.decoder.JSONDecodeError: Expecting property name")
    frames = [line.strip() for line in outcome.log.splitlines() if line.startswith("  File")]
    assert frames == ['File "script.py", line 3, in <module>', 'File "helper.py", line 4, in parse']
    assert "    helper.parse('{')\n" in outcome.log


def test_a_syntax_error_has_pythons_format(builder: Builder) -> None:
    outcome = builder.run("x = 1\ny = = 2\nreturn\n")
    assert outcome.message == "script.py, line 2: SyntaxError: invalid syntax: y = = 2"
    assert outcome.log.startswith('  File "script.py", line 2\n    y = = 2\n        ^\nSyntaxError')


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("x", "script", "script.py, line 1: NameError: name 'x' is not defined"),
        ("import sys\nsys.exit(2)", "script", "script.py, line 2: sys.exit(2)."),
        ("exit('no luck')", "script", "script.py, line 1: no luck."),
        ("#| arg: n: int = x", "script", "script.py, line 1: default of arg n is not a Python literal: x"),
        (b"\xff", "script", "script.py, line"),
        ("Container('tiny').run('true')", "script", "script.py, line 1: TypeError: run: expected a list of words"),
        ("return Container('tiny')", "script", "the script returned a container, which no longer"),
        ("Container('scratch').copy_out('x', 'y')", "script", "script.py, line 1: FileNotFoundError: [Errno 2]"),
        ("c = Container('tiny')\nwith c: pass\nc.run(['true'])", "script", "script.py, line 3: ValueError: contain"),
        ("with Container('scratch').commit() as img: return img", "script", "the script returned an image that its"),
    ],
)
def test_an_invalid_call_is_an_error_without_a_traceback(
    builder: Builder, script: str | bytes, kind: str, message: str
) -> None:
    outcome = builder.run(script)
    assert (outcome.status, outcome.result["kind"]) == (1, kind)
    assert outcome.message.startswith(message) and "\n" not in outcome.message and outcome.result["hint"]
    assert builder.containers() == []


def test_a_missing_output_is_named_with_the_existing_files(builder: Builder) -> None:
    outcome = builder.run("Path('tol').write_text('')\nPath('a b').mkdir()", ("tool",))
    assert outcome.result["kind"] == "output"
    assert outcome.message == ("output tool is missing from the working directory; new files: 'a b', tol.")
    assert outcome.result["hint"] == ("Copy it out of the container: c.copy_out('/path/in/container/tool', 'tool')")


@pytest.mark.parametrize(
    ("script", "kind", "fix"),
    [
        ("Path('out').mkdir()", "a folder", "Pack it into a tar file"),
        ("Path('out').symlink_to('/etc/passwd')", "a symbolic link", "Copy the file"),
        ("import os; os.mkfifo('out')", "a special file", "Leave a regular file"),
    ],
)
def test_an_output_is_a_regular_file(builder: Builder, script: str, kind: str, fix: str) -> None:
    outcome = builder.run(script, ("out",))
    assert outcome.message == f"output out is {kind}, not a regular file."
    assert outcome.result["hint"].startswith(fix)


def test_modules_of_a_script_have_the_same_globals(builder: Builder) -> None:
    outcome = builder.run(
        "import helper\nhelper.build()\n",
        modules={
            "helper.py": "from __buildah__ import Image as Other\n\ndef build():\n"
            "    assert Other is Image\n    with Container('tiny') as c:\n        c.run(['true'])\n"
        },
    )
    assert outcome.result == {"ok": True}, outcome.message


def test_args_are_globals_and_in_a_table(builder: Builder) -> None:
    script = "#| arg: name: str.title\n#| arg: many: int = 2\nprint(name, many, __args__, __name__)"
    outcome = builder.run(script, args={"name": "ann"})
    assert outcome.log == "Ann 2 {'name': 'Ann', 'many': 2} __script__\n"


def test_an_empty_container_has_the_jobs_architecture(builder: Builder) -> None:
    outcome = builder.run(
        "with Container('scratch') as c:\n"
        "    with c.mount() as root: (root / 'hello').write_text('hello')\n"
        "    print(c.commit().inspect()['OCIv1']['architecture'])\n",
        arch="arm64",
    )
    assert outcome.log == "arm64\n", outcome.message


def test_an_image_made_for_another_architecture_is_not_found(builder: Builder) -> None:
    make = "with Container('scratch') as c:\n    c.commit().add_tag('mine:1')\n"
    builder.run(make, arch="arm64")
    assert builder.run("Image('mine:1')", arch="arm64").result == {"ok": True}
    assert builder.run("Image('mine:1')", arch="riscv64").result["kind"] == "image"
    builder.buildah("rmi", "mine:1")


SLEEP = f"sleep 4{os.getpid():08}"
"""A command line that no other process has."""


def is_asleep() -> bool:
    """Return whether `SLEEP` runs, or its processes."""
    return SLEEP in subprocess.run(["ps", "axww", "-o", "args"], check=True, capture_output=True, text=True).stdout


def test_all_processes_end_with_the_supervisor(builder: Builder) -> None:
    process, folder = builder.start(f"with Container('tiny') as c:\n    c.run(['sh', '-c', 'echo go; {SLEEP}'])\n")
    wait_for(lambda: (folder / "log").read_text() == "go\n")
    wait_for(is_asleep)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 137
    wait_for(lambda: not is_asleep())
    assert not (folder / "result.json").exists()
    for name in builder.containers():
        builder.buildah("rm", name)


def test_background_processes_of_a_build_end_with_it(builder: Builder) -> None:
    outcome = builder.run(f"import subprocess\nsubprocess.Popen('({SLEEP} &) & exit', shell=True).wait()\n")
    assert outcome.result == {"ok": True}
    wait_for(lambda: not is_asleep())


def test_a_build_without_a_pid_namespace_leaves_no_process(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid():
        pytest.skip("without a PID namespace, `buildah unshare` is between us and the build")
    monkeypatch.setattr(builder, "facts", builder.facts._replace(pid_namespace=False))
    try:
        test_background_processes_of_a_build_end_with_it(builder)
        test_all_processes_end_with_the_supervisor(builder)
    finally:  # without a mount namespace, buildah's mounts are visible to all processes
        store = builder.root / "storage" / "overlay"
        subprocess.run(["umount", "--recursive", store], check=False, capture_output=True)


def make(who: str) -> None:
    """A function as program, sent to the builder."""
    with Container("tiny") as c:  # type: ignore[name-defined]
        c.run(["sh", "-c", f"echo {who} > /out"])
        c.copy_out("/out", "out")
    if who == "nobody":
        raise ValueError(who)


def test_a_function_is_called_with_the_args(builder: Builder) -> None:
    outcome = builder.run("", ("out",), args={"who": "me"}, function=make)
    assert outcome.result == {"ok": True}, outcome.message
    assert (outcome.work / "out").read_text() == "me\n"
    failed = builder.run("", ("out",), args={"who": "nobody"}, function=make)
    assert failed.message.startswith("tests/test_containers.py, line ") and failed.message.endswith(
        ": ValueError: nobody"
    )
    assert builder.run("", args={"whom": 1}, function=make).message.startswith("TypeError: make() got an unexpected")


def test_a_file_is_downloaded_into_the_container(builder: Builder, tmp_path: Path) -> None:
    (tmp_path / "tool.sh").write_text("echo downloaded")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        outcome = builder.run(
            "with Container('tiny') as c:\n"
            f"    c.add_url('{url}/tool.sh', '/opt/t', chmod=0o755)\n"
            f"    c.add_url('{url}/tool.sh?x', '/opt/')\n"
            "    c.run(['sh', '-c', '/bin/sh /opt/t; ls -l /opt'])\n"
            f"    c.add_url('{url}/nothing', '/opt/')\n"
        )
        server.shutdown()
    assert outcome.log.startswith("downloaded\n")
    assert [line.split()[0] for line in outcome.log.splitlines()[2:4]] == ["-rwxr-xr-x", "-rw-r--r--"]
    assert outcome.message.startswith("script.py, line 5: urllib.error.HTTPError: HTTP Error 404")
    assert outcome.message.endswith(f"({url}/nothing)")
