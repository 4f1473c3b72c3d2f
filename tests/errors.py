"""Table of the errors that a user can provoke, and the page docs/reference/errors.md that shows their texts.

The page has the texts that `test_errors.py` provoked. After a change of a text or a row, update it:

    pytest tests/test_errors.py -m 'not slow' --write-errors

A run of single tests (`-k`, or without root: no `-m`) updates their rows and keeps the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LONGEST = 250
"""Characters that a line of an error may have."""


@dataclass(frozen=True)
class Row:
    """An error that a user can provoke.

    Attributes:
        did: What the user did, in words that follow "you".
        what: How a test does it; see the section.
        names: Decisive whole words of the failure (object and cause), an arrow, decisive words of the fix.
        lock: Content of gamebear.lock.
    """

    did: str
    what: str
    names: str
    lock: str = ""

    @property
    def key(self) -> str:
        """First cell of the row in the page."""
        return f"you {_cell(self.did)}"

    def lacks(self, failure: str, fix: str) -> list[str]:
        """Return the words that are missing in the two lines of an error."""
        first, second = self.names.split("→")
        words = [(word, failure) for word in first.split()] + [(word, fix) for word in second.split()]
        return [word for word, line in words if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", line, re.IGNORECASE)]


SETTINGS = [
    Row("set a builder that is not a URL", "builder=nowhere", "nowhere URL → builder=local:"),
    Row("set an empty builder", "builder=", "builder empty variable → local:"),
    Row("misspelled the scheme of a builder", "builder=shh://pi@buildpi", "shh scheme → local ssh dask"),
    Row("wrote something after local:", "builder=local:x", "local:x → local:"),
    Row(
        "set two builders, one without its architecture",
        "builder=armhf=ssh://a,ssh://b",
        "builder armhf variable → armhf=ssh://a,arm64=ssh://b",
    ),
    Row("set two builders for one architecture", "builder=armhf=ssh://a,armhf=ssh://b", "two armhf → one dask://HOST"),
    Row(
        "set an empty builder for one architecture",
        "builder=armhf=,arm64=ssh://pi@buildpi",
        "no builder armhf → armhf=local:",
    ),
    Row(
        "built for an architecture that has no builder",
        "builder=arm64=ssh://pi@buildpi arch=armhf",
        "no builder armhf arm64 → armhf=ssh://user@host",
    ),
    Row("used the kernel's name of an architecture", "arch=armv7l", "armv7l variable → armhf"),
    Row("used an unknown architecture", "arch=arm", "arm variable → armhf amd64 s390x"),
    Row("set base to an unknown value", "base=docker", "base docker → auto registry bootstrap"),
    Row("set interrupt to an unknown value", "interrupt=ignore", "interrupt ignore → cancel detach"),
    Row("set provenance to something other than true or false", "provenance=please", "provenance please → true false"),
    Row("set patience to a text", "patience=a while", "patience → seconds"),
    Row("set patience to a negative number", "patience=-1", "patience -1 → seconds"),
    Row("set time_limit to infinity", "time_limit=inf", "time_limit inf → seconds"),
    Row("left the host out of a URL", "builder=ssh://", "ssh:// host → ssh://[user@]host[:port]"),
    Row(
        "added a path to a URL", "builder=ssh://pi@buildpi/srv", "ssh://pi@buildpi/srv path → ssh://[user@]host[:port]"
    ),
    Row("added a query to a URL", "builder=ssh://pi@buildpi?x=1", "buildpi?x=1 query → ssh://[user@]host[:port]"),
    Row("put a password into a URL", "builder=ssh://pi:secret@buildpi", "buildpi password → key ssh-copy-id"),
    Row("set the port to 0", "builder=ssh://buildpi:0", "ssh://buildpi:0 port → 1 65535"),
    Row("set the port to a name", "builder=ssh://buildpi:http", "buildpi port → 1 65535"),
    Row("used an option of ssh as the host", "builder=ssh://-oProxyCommand=x", "host -oProxyCommand=x → ssh:// host"),
    Row("wrote a space in the host", "builder=ssh://build pi", "host build pi → ssh:// host"),
    Row("used an option of ssh as the user", "builder=ssh://-l@buildpi", "-l user → ssh://[user@]host[:port]"),
    Row("wrote an IPv6 address without brackets", "builder=ssh://::1", "::1 host → IPv6 brackets"),
    Row("set no scheduler for Dask", "builder=dask://", "dask:// scheduler → dask://HOST:8786"),
]
"""Variables of doit. The test reads the settings and opens the builder."""

PYPROJECT = [
    Row("set builder to a number", "builder = 5", "builder 5 string pyproject.toml → remove"),
    Row("set arch to a truth value", "arch = true", "arch True string pyproject.toml → remove"),
    Row("set base to a list", "base = ['auto']", "base auto pyproject.toml → registry bootstrap"),
    Row("set time_limit to a date", "time_limit = 2026-01-01", "time_limit 2026 pyproject.toml → seconds"),
    Row("misspelled a setting", "bulider = 'local:'", "bulider pyproject.toml → builder time_limit"),
    Row("set a builder for an unknown architecture", "builder = {foo = 'local:'}", "foo pyproject.toml → armhf"),
    Row("left a bracket open", "x = [", "pyproject.toml end of document → TOML"),
    Row("used the table's name for a value", "\n[tool]\ngamebear = 5", "tool.gamebear table → arch"),
]
"""Lines below `[tool.gamebear]` in pyproject.toml."""

DODO = [
    Row("named a missing buildscript", "artifact('y.py', outputs=['x'])", "y.py no such file → dodo.py"),
    Row("named a folder as the buildscript", "artifact('build', outputs=['x'])", "build directory → file"),
    Row("wrote a buildscript that is not Python", "artifact('bad.py', outputs=['x'])", "bad.py 2 closed → fix"),
    Row("mixed tabs and spaces in a buildscript", "artifact('tabs.py', outputs=['x'])", "tabs.py 3 tabs → fix"),
    Row("used a number as the program", "artifact(3, outputs=['x'])", "3 buildscript function → artifact"),
    Row("wrote a line break in a file name", r"artifact('a\nb', outputs=['x'])", r"a\nb no such file → dodo.py"),
    Row("used a file name that is not Unicode", r"artifact('\ud800', outputs=['x'])", r"'\ud800' → artifact"),
    Row("wrote outputs without a list", "artifact('x.py', outputs='build/x')", "outputs build/x → ['build/x']"),
    Row("set outputs to None", "artifact('x.py', outputs=None)", "outputs None → PATH"),
    Row("set outputs to a dict", "artifact('x.py', outputs={'x': 'build/x'})", "outputs build/x → PATH"),
    Row("used a number as an output", "artifact('x.py', outputs=[3])", "outputs 3 → PATH"),
    Row("wrote a null byte in a path", r"artifact('x.py', outputs=['a\0b'])", r"outputs a\x00b → PATH"),
    Row("named two outputs alike", "artifact('x.py', outputs=['a/x', 'b/x'])", "two outputs a/x b/x → another name"),
    Row(
        "used the place of a log for an output",
        "artifact('x.py', outputs=['build/logs/x.log'])",
        "x.py build/logs/x.log logs → somewhere else",
    ),
    Row(
        "used the place of the report for an output",
        "artifact('x.py', outputs=['./build/report.html'])",
        "x.py build/report.html report → somewhere else",
    ),
    Row(
        "used the name of a provenance statement for an output",
        "artifact('x.py', outputs=['x', 'x.intoto.json'])",
        "x.py x.intoto.json provenance → another name",
    ),
    Row("used a folder as an output", "artifact('x.py', outputs=['build/..'])", ".. output x.py → file"),
    Row("left an output's path empty", "artifact('x.py', outputs=[''])", "'' output x.py → file"),
    Row("wrote inputs without a list", "artifact('x.py', outputs=['x'], inputs='in')", "inputs in → ['in']"),
    Row("used bytes as an input", "artifact('x.py', outputs=['x'], inputs=[b'in'])", "inputs b'in' → PATH"),
    Row("used None as an input", "artifact('x.py', outputs=['x'], inputs={'in': None})", "inputs None → PATH"),
    Row(
        "used a folder as an input",
        "artifact('x.py', outputs=['x'], inputs=['build'])",
        "build folder → folder('build')",
    ),
    Row(
        "used a path as an input's name",
        "artifact('x.py', outputs=['x'], inputs={'a/b': 'in'})",
        "a/b input x.py → file folder",
    ),
    Row(
        "named two inputs alike", "artifact('x.py', outputs=['x'], inputs=['in', 'a/in'])", "inputs a/in → another name"
    ),
    Row(
        "named an input like the program", "artifact('x.py', outputs=['x'], inputs=['a/x.py'])", "x.py input → another"
    ),
    Row(
        "named an input like a module",
        "artifact('with_modules.py', outputs=['x'], inputs=['a/mod.py'])",
        "mod.py input with_modules.py module → another name",
    ),
    Row("set args to a list", "artifact('x.py', outputs=['x'], args=[1])", "args x.py [1] dict → dict"),
    Row("used a set in args", "artifact('x.py', outputs=['x'], args={'a': {1}})", "args x.py {1} JSON → dict lists"),
    Row("used a number as a key in args", "artifact('x.py', outputs=['x'], args={1: 2})", "args x.py key 1 → dict"),
    Row("used NaN in args", "artifact('x.py', outputs=['x'], args={'a': float('nan')})", "args x.py number → numbers"),
    Row("put args into itself", "artifact('x.py', outputs=['x'], args=LOOP)", "args x.py itself → dict"),
    Row("set sources to a list", "artifact('x.py', outputs=['x'], sources=['up'])", "sources up → git(…)"),
    Row(
        "used a URL as a source",
        "artifact('x.py', outputs=['x'], sources={'up': 'https://git.example/up'})",
        "up https://git.example/up → git() archive() debian()",
    ),
    Row(
        "used a path as a source",
        "artifact('x.py', outputs=['x'], sources={'up': 'src'})",
        "up src → folder('src')",
    ),
    Row(
        "used a path as a source's name",
        "artifact('x.py', outputs=['x'], sources={'a/b': archive('file:///nowhere.tar', sha256='0' * 64)})",
        "a/b source x.py → file folder",
    ),
    Row(
        "used a number as a source's name",
        "artifact('x.py', outputs=['x'], sources={1: archive('file:///nowhere.tar', sha256='0' * 64)})",
        "1 source x.py → file folder",
    ),
    Row(
        "named a source like an input",
        "artifact('x.py', outputs=['x'], inputs=['in'], sources={'in': archive('file:///up.tar', sha256='0' * 64)})",
        "in source x.py input → another name",
    ),
    Row(
        "named a source like a package of modules",
        "artifact('with_modules.py', outputs=['x'], sources={'pkg': archive('file:///up.tar', sha256='0' * 64)})",
        "pkg source with_modules.py package modules → another name",
    ),
    Row(
        "used the kernel's name of an architecture in a task",
        "artifact('x.py', outputs=['x'], arch='armv7l')",
        "armv7l x.py → armhf",
    ),
    Row("used a number as the architecture", "artifact('x.py', outputs=['x'], arch=5)", "arch 5 string x.py → remove"),
    Row(
        "set a task's time_limit to a text",
        "artifact('x.py', outputs=['x'], time_limit='soon')",
        "time_limit soon x.py → seconds",
    ),
    Row("sent a function that uses a lock", "artifact(locked, outputs=['x'])", "locked LOCK → args= buildscript"),
]
"""Expressions in a dodo.py that begins with `from gamebear_tasks import *`."""

SOURCES = [
    Row("gave a text instead of patterns", "folder('src', exclude='*.o')", "src *.o patterns → exclude="),
    Row(
        "gave a pattern that leads out of a folder", "folder('src', include=['../x'])", "src ../x patterns → .gitignore"
    ),
    Row(
        "used an option of git as the URL",
        "git('--upload-pack=touch x', 'main')",
        "--upload-pack=touch URL → https://host/path",
    ),
    Row("left git's URL empty", "git('', 'main')", "git '' URL → https://host/path"),
    Row("put a password into git's URL", "git('https://me:secret@git.example/x', 'main')", "password → ~/.netrc"),
    Row("put a token into git's URL", "git('https://ghp_secret@git.example/x', 'main')", "token → ~/.netrc"),
    Row(
        "wrote a line break in git's URL",
        r"git('https://git.example/x\nhost=evil', 'main')",
        r"https://git.example/x\nhost=evil URL → https://host/path",
    ),
    Row("used an option of git as the branch", "git('https://git.example/x', '--all')", "--all branch → ls-remote"),
    Row("left git's branch empty", "git('https://git.example/x', '')", "git.example/x '' branch → ls-remote"),
    Row("wrote a space in a branch", "git('https://git.example/x', 'two words')", "two words branch → ls-remote"),
    Row("used a refspec as the branch", "git('https://git.example/x', 'a:refs/heads/x')", "a:refs branch → ls-remote"),
    Row("set git's branch to None", "git('https://git.example/x', None)", "None branch → ls-remote"),
    Row(
        "put a token into an archive's URL",
        "archive('https://ghp_secret@web.example/x.tar', sha256='0' * 64)",
        "archive web.example token → remove",
    ),
    Row(
        "used FTP for an archive",
        "archive('ftp://web.example/x.tar', sha256='0' * 64)",
        "ftp://web.example URL → https:// http:// file://",
    ),
    Row(
        "shortened an archive's SHA-256",
        "archive('https://web.example/x.tar', sha256='abc')",
        "https://web.example/x.tar abc SHA-256 → sha256sum",
    ),
    Row(
        "set an archive's strip to a negative number",
        "archive('https://web.example/x.tar', sha256='0' * 64, strip=-1)",
        "https://web.example/x.tar strip=-1 → strip=0",
    ),
    Row("used an option of apt as the package", "debian('-t=sid')", "-t=sid source package → apt-cache"),
    Row("wrote a package's name with a capital", "debian('Hello')", "Hello source package → apt-cache"),
    Row("used an invalid version", "debian('hello', version='-x')", "hello -x version → apt-cache"),
    Row("used an invalid suite", "debian('hello', suite='two words')", "hello two words suite → suite"),
    Row(
        "used a URL as an alternative",
        "either(git='https://git.example/x')",
        "https://git.example/x source → git() archive()",
    ),
    Row("listed no alternatives", "either()", "either() sources → either(git=git(…)"),
]
"""Expressions, as in DODO."""

IMAGES = [
    Row("named an image .iso", "sd_image('base.img', output='card.iso')", "card.iso → .img .img.xz .img.zst"),
    Row("left an image's name empty", "sd_image('base.img', output='build/.img')", "build/.img → .img.xz"),
    Row("used a number as the base", "sd_image(7, output='card.img')", "card.img base 7 → archive(URL"),
    Row(
        "baked an image from itself",
        "sd_image('card.img', output='card.img')",
        "card.img output input → output another",
    ),
    Row(
        "used a name in contents instead of file()",
        "sd_image('base.img', output='card.img', contents=['x'])",
        "card.img contents 'x' → file(…) tar(…)",
    ),
    Row(
        "wrote config without a list",
        "sd_image('base.img', output='card.img', config='dtoverlay=dwc2')",
        "card.img config dtoverlay=dwc2 list → brackets",
    ),
    Row(
        "wrote a line break in cmdline",
        r"sd_image('base.img', output='card.img', cmdline=['a\nb'])",
        r"card.img cmdline a\nb → line break",
    ),
    Row(
        "wrote a host name with a domain",
        "sd_image('base.img', output='card.img', hostname='a.b')",
        "card.img a.b host name → letters domain",
    ),
    Row(
        "wrote an image's size in words",
        "sd_image('base.img', output='card.img', size='4 gigs')",
        "card.img size 4 gigs → 4G",
    ),
    Row(
        "used a size that is not a multiple of a sector",
        "sd_image('base.img', output='card.img', size=1000)",
        "card.img size=1000 512 → 4G",
    ),
    Row(
        "set free to a negative number",
        "sd_image('base.img', output='card.img', free=-1)",
        "card.img free=-1 size → 512M",
    ),
    Row(
        "used a name as the user",
        "sd_image('base.img', output='card.img', user='bear')",
        "card.img user= bear → user=user(…)",
    ),
    Row(
        "baked for an unknown architecture",
        "sd_image('base.img', output='card.img', arch='pdp11')",
        "pdp11 card.img → armhf",
    ),
    Row("used a relative path in the image", "file('x', 'relative')", "x relative image → /usr/local/bin/"),
    Row("used a path that leaves the image", "file('x', '/a/../b')", "/a/../b image → /usr/local/bin/"),
    Row("left a file's path empty", "file('', '/a')", "file '' path → Path"),
    Row("used an invalid mode", "file('x', '/a', mode=0o10000)", "x mode=4096 → 0o7777"),
    Row("used a negative owner", "file('x', '/a', owner=-1)", "x owner=-1 → 4294967294"),
    Row("used a number as a tar file", "tar(7)", "tar 7 path → Path"),
    Row("wrote a user's name with a capital", "user('Bear')", "Bear → a-z"),
    Row("wrote a password into dodo.py", "user('bear', password='secret')", "bear password= hash → openssl passwd"),
    Row(
        "wrote authorized_keys without a list",
        "user('bear', authorized_keys='~/.ssh/id_ed25519.pub')",
        "bear authorized_keys list → brackets",
    ),
    Row("set authorized_keys to None", "user('bear', authorized_keys=None)", "bear authorized_keys list → brackets"),
    Row(
        "used a private key in authorized_keys",
        r"user('bear', authorized_keys=['-----BEGIN OPENSSH PRIVATE KEY-----\nx'])",
        "bear authorized_keys public → .pub",
    ),
    Row("wrote groups without a list", "user('bear', groups='sudo')", "bear groups sudo list → brackets"),
]
"""Expressions, as in DODO."""

UP = "artifact('x.py', outputs=['x'], sources={'up': git('https://git.example/up', 'main')})"
X = "artifact('x.py', outputs=['x'])"

DOIT = [
    Row("named a missing input", "artifact('x.py', inputs=['no'], outputs=['x']) → doit x", "no such file → path"),
    Row("named a folder as a target", "artifact('x.py', outputs=['folder']) → doit x", "folder file → move"),
    Row("named a target below a file", "artifact('x.py', outputs=['in/a/x']) → doit x", "in/a/x file folder → move"),
    Row("did not pin a branch", f"{UP} → doit x", "git https://git.example/up main gamebear.lock → lock commit"),
    Row(
        "did not pin a Debian package",
        "artifact('x.py', outputs=['x'], sources={'up': debian('hello')}) → doit x",
        "debian hello gamebear.lock → lock commit",
    ),
    Row(
        "misspelled an alternative",
        "artifact('x.py', outputs=['x'], sources={'up': either(web=archive('file:///up.tar', sha256='0' * 64),"
        " git=git('https://git.example/up', '0' * 40))}) → doit x sources=debain",
        "sources debain variable → git web",
    ),
    Row(
        "named a missing archive",
        "artifact('x.py', outputs=['x'], sources={'up': archive('file:///no/up.tar', sha256='0' * 64)}) → doit x",
        "archive file:///no/up.tar no such file → path",
    ),
    Row(
        "named a device as an archive",
        "artifact('x.py', outputs=['x'], sources={'up': archive('file:///dev/zero', sha256='0' * 64)}) → doit x",
        "archive file:///dev/zero regular file → path",
    ),
    Row(
        "named a missing repository",
        "artifact('x.py', outputs=['x'], sources={'up': git('/nowhere', '0' * 40)}) → doit x",
        "git /nowhere repository → network",
    ),
    Row(
        "locked a missing repository",
        "artifact('x.py', outputs=['x'], sources={'up': git('/nowhere', 'main')}) → gamebear lock",
        "git /nowhere main repository → URL network",
    ),
    Row("pruned without a limit", f"{X} → gamebear prune", "prune → --older --size --keep --images"),
    Row("pruned to a size in words", f"{X} → gamebear prune --size lots", "--size lots → unit 5G"),
    Row("pruned to a size without a unit", f"{X} → gamebear prune --size 5", "--size 5 unit → 5G"),
    Row("pruned by a negative age", f"{X} → gamebear prune --older -1", "--older -1 → days"),
    Row("pruned to a number in words", f"{X} → gamebear prune --keep some", "--keep some → number"),
    Row("baked from a missing base", "sd_image('no.img', output='card.img') → doit x", "no.img no such file → path"),
    Row("damaged the lock file", f"{UP} → doit x", "gamebear.lock line 1 → gamebear lock", "{"),
    Row(
        "used the lock file of a later release",
        f"{UP} → doit x",
        "gamebear.lock version 2 1 → upgrade",
        '{"version": 2}',
    ),
    Row("followed a job without its ID", f"{X} → gamebear jobs follow", "jobs follow → ID"),
    Row("followed an unknown job", f"{X} → gamebear jobs follow nosuch", "local: nosuch → jobs"),
    Row("cancelled a task that never ran", f"{X} → gamebear jobs cancel x", "job task x local: → jobs"),
    Row("told a builder to forget an unknown job", f"{X} → gamebear jobs forget nosuch", "local: nosuch → jobs"),
    Row("rebuilt without a task", f"{X} → gamebear rebuild", "rebuild task none → TASK --check"),
    Row("checked the build of an unknown task", f"{X} → gamebear rebuild --check y", "task y → x"),
    Row("opened a shell without a task", f"{X} → gamebear shell", "shell task → TASK --container"),
    Row("opened a shell in an unknown task", f"{X} → gamebear shell y", "task y → x"),
    Row(
        "opened a shell in a task without a kept container",
        f"{X} → gamebear shell x",
        "container x local: → keep_failed=yes shell",
    ),
    Row("passed an argument to the report", f"{X} → gamebear report x", "report arguments x → help report"),
    Row("asked for the provenance of an unknown task", f"{X} → gamebear provenance y", "task y → list"),
    Row("asked for the provenance of an outdated task", f"{X} → gamebear provenance x", "x up to date → doit x"),
    Row(
        "passed a builder to the doctor as an argument",
        f"{X} → gamebear doctor ssh://pi@buildpi",
        "task ssh://pi@buildpi → gamebear list builder=URL",
    ),
    Row("set up a project again", f"{X} → gamebear init", "dodo.py exists → artifact folder"),
    Row("set up a missing folder", f"{X} → gamebear init nowhere", "nowhere no such file → folder URL"),
    Row(
        "set up a folder without a build system",
        f"{X} → gamebear init folder",
        "folder build system CMake Containerfile → Makefile dodo.py",
    ),
    Row("set keep_failed to an unknown value", f"{X} → doit x keep_failed=maybe", "keep_failed maybe → true false"),
    Row("set fresh to an unknown value", f"{X} → doit x fresh=maybe", "fresh maybe → true false"),
]
"""A task in dodo.py, and the command."""

PERMISSIONS = [
    Row("may not write to build/", "chmod 555 build", "build/x write → ls -ld build"),
    Row("may not write to build/logs/", "mkdir build/logs && chmod 555 build/logs", "build/logs/x.log write → ls -ld"),
    Row("may not read the buildscript", "chmod 000 x.py", "x.py permission → read"),
    Row("may not read an input", "chmod 000 in", "in permission → permissions"),
    Row("used a FIFO as an input", "rm in && mkfifo in", "in regular file → path"),
    Row("used a device as an input", "rm in && ln -s /dev/zero in", "in regular file → path"),
    Row("used a FIFO as the buildscript", "rm x.py && mkfifo x.py", "x.py regular file → file"),
    Row("have a file for a home", "rmdir ../home && touch ../home", "runner ~/.cache directory → ~/.cache"),
    Row("may not write to your home", "chmod 555 ../home", "runner ~/.cache permission → ~/.cache"),
    Row(
        "may not write to the cache",
        "mkdir -p ../home/.cache/gamebear && chmod 000 ../home/.cache/gamebear",
        "runner ~/.cache/gamebear permission → ~/.cache",
    ),
    Row("may not write to the project's folder", "chmod 555 .", ".doit.db permission → ls -ld"),
    Row("have another file in the place of doit's database", "echo hello > .doit.db", ".doit.db damaged → rm"),
    Row("have a FIFO in the place of doit's database", "mkfifo .doit.db", ".doit.db regular file → mv .doit.db"),
    Row("set HOME to a relative path", "HOME=home", "HOME 'home' → HOME=/home/you"),
    Row("may open only a few files", "ulimit -n 10", "sh open files → ulimit -n 1024"),
    Row("have no programs in PATH", "PATH=/proc/nowhere", "sh no such file → PATH"),
]
"""Shell commands in the project's folder, a variable of the environment, or a limit. Then gamebear builds."""

SSH = [
    Row(
        "never logged in to the builder",
        "known_hosts.unlink()",
        "ssh://pi@buildpi:2222 host key SHA256:… → fingerprint ssh-keyscan",
    ),
    Row(
        "installed the builder again, or an attacker intercepts the connection",
        "known_hosts.write_text(f'{host} {public(other)}\\n')",
        "ssh://pi@buildpi:2222 host key changed ~/.ssh/known_hosts:1 attack → ssh-keygen -R",
    ),
    Row(
        "know the builder by a key of another type",
        "known_hosts.write_text(f'{host} {public(ecdsa)}\\n')",
        "ssh://pi@buildpi:2222 host key another kind ~/.ssh/known_hosts:1 → fingerprint ssh-keyscan",
    ),
    Row(
        "revoked the builder's key",
        "known_hosts.write_text(f'@revoked * {public(server.host_keys[\"ed25519\"])}\\n')",
        "ssh://pi@buildpi:2222 host key revoked ~/.ssh/known_hosts:1 → new host key",
    ),
    Row(
        "have the builder's key in a list of revoked keys",
        "(home / 'revoked').write_text(public(server.host_keys['ed25519']) + '\\n'),"
        " config.write_text(f'RevokedHostKeys {home}/revoked\\n')",
        "ssh://pi@buildpi:2222 host key revoked ~/revoked → new host key",
    ),
    Row("have no private key", "key.unlink()", "ssh://pi@buildpi:2222 pi ~/.ssh/id_ed25519 public → ssh-copy-id"),
    Row(
        "have a key that the builder does not know",
        "shutil.copy(other, key)",
        "ssh://pi@buildpi:2222 pi ~/.ssh/id_ed25519 SHA256:… → ssh-copy-id",
    ),
    Row(
        "left a key readable to others",
        "key.chmod(0o644)",
        "ssh://pi@buildpi:2222 pi others read chmod 600 → ssh-copy-id",
    ),
    Row(
        "have a key with a passphrase, no agent and no terminal",
        "encrypt(key)",
        "ssh://pi@buildpi:2222 pi ~/.ssh/id_ed25519 passphrase terminal → ssh-add",
    ),
    Row(
        "have a damaged key",
        "key.write_text('-----BEGIN OPENSSH PRIVATE KEY-----\\n')",
        "ssh://pi@buildpi:2222 pi ~/.ssh/id_ed25519 format → ssh-copy-id",
    ),
    Row(
        "used an account that may not log in",
        "url.update(user='nobody')",
        "ssh://nobody@buildpi:2222 nobody ~/.ssh/id_ed25519 → ssh-copy-id nobody@buildpi",
    ),
    Row("used a port without a server", "url.update(port='1')", "ssh://pi@buildpi:1 refused → SSH server"),
    Row(
        "used an unknown host",
        "url.update(host='buildpi.invalid')",
        "ssh://pi@buildpi.invalid:2222 host resolved → name network",
    ),
    Row(
        "chained jump hosts in a circle",
        "config.write_text('Host 127.0.0.1\\n ProxyJump a\\nHost a\\n ProxyJump 127.0.0.1\\n')",
        "ssh://pi@buildpi:2222 jump hosts 8 → ProxyJump ~/.ssh/config",
    ),
]
"""Python that changes the user's home or the builder's URL. Then an SSH connection is opened."""

SCRIPTS = [
    Row("did not write an output", "pass", "output out missing → c.copy_out"),
    Row("wrote a folder instead of an output", "import os; os.mkdir('out')", "out folder → tar"),
    Row("wrote a link instead of an output", "import os; os.symlink('/etc/passwd', 'out')", "out link → copy"),
    Row("called sys.exit() in a script", "import sys; sys.exit(3)", "x.py 1 sys.exit(3) → x.py 1"),
    Row("raised SystemExit with a message", "raise SystemExit('no such luck')", "x.py 1 no such luck → x.py 1"),
    Row("raised an exception", "1 / 0", "x.py 1 ZeroDivisionError → x.py 1 log"),
    Row("misspelled a name", "Contianer('x')", "x.py 1 NameError Contianer → x.py 1"),
    Row("imported a module that the builder does not have", "import nosuch", "x.py 1 nosuch → pip:"),
    Row("opened a missing file", "open('config.json')", "x.py 1 FileNotFoundError config.json → inputs="),
    Row("wrote outside of the working directory", "open('/proc/nowhere/x', 'w')", "x.py 1 /proc/nowhere/x → path"),
    Row("used an invalid image name", "Container('Debian: Bookworm')", "x.py 1 Bookworm → debian:bookworm"),
    Row("used an image that the builder does not have", "Image('nosuch')", "x.py 1 nosuch amd64 → Image.pull"),
    Row(
        "copied a file for a user that the container does not have",
        "Container('scratch').copy_in('x.py', '/x', owner='pi')",
        "x.py 1 copy_in user pi → useradd number",
    ),
    Row(
        "copied a missing file in a Containerfile",
        r"Path('Containerfile').write_text('FROM scratch\nCOPY nosuch /\n'); Image.build()",
        "Containerfile COPY nosuch no such file → Containerfile step",
    ),
    Row("declared an arg without a name", "#| arg: = 3", "x.py 1 arg: → default"),
    Row("declared an arg of an unknown type", "#| arg: level: number = 3", "x.py 1 level number → pathlib.Path"),
    Row("set no value for an arg without a default", "#| arg: level = ...", "x.py 1 level → args="),
    Row("wrote an unknown #| line", "#| pipi: x", "x.py 1 pipi: → pip: arg:"),
    Row("killed the script", "import os; os.kill(os.getpid(), 9)", "x killed SIGKILL → memory dmesg"),
]
"""Buildscripts that should write `out`; one run of doit builds all."""

LOADED = "When `dodo.py` is loaded. Nothing has run; `doit` ends with status 3."

SECTIONS: dict[str, tuple[str, Sequence[Row]]] = {
    "Settings": ("A doit variable, the environment or `pyproject.toml`; the error names which.", SETTINGS),
    "pyproject.toml": ("Below `[tool.gamebear]`.", PYPROJECT),
    "Artifacts": (LOADED, DODO),
    "Sources": (LOADED, SOURCES),
    "Images": (LOADED, IMAGES),
    "Runs": ("When a task or a command runs.", DOIT),
    "Files and folders": ("Permissions and limits of your machine, as `gamebear` reports them.", PERMISSIONS),
    "SSH": ("When doit first connects to the builder.", SSH),
    "Scripts": ("When a build fails. The next line names the log.", SCRIPTS),
}
"""Sections of the page: when the errors occur, and their rows."""

ROWS = [row for _, rows in SECTIONS.values() for row in rows]

HEAD = """# Errors

<!-- Written by tests/test_errors.py --write-errors: see tests/errors.py. -->

Every error has two lines: the failure with its cause, and the fix behind an arrow. This page lists
the errors that you can provoke. `buildpi`, `2222` and `…` stand for your builder, its port and a
fingerprint.
"""


class Page:
    """The error reference: the text of each row, by what the user did.

    Args:
        path: The Markdown file. Its texts are the initial ones.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.written = path.read_text("utf-8")
        self.cells = dict(re.findall(r"^\| (you .+?) \| (.+) \|$", self.written, re.MULTILINE))

    def text(self) -> str:
        """Return the page. A row whose error was never provoked is missing."""
        parts = [HEAD]
        for title, (when, rows) in SECTIONS.items():
            cells = [f"| {row.key} | {self.cells[row.key]} |\n" for row in rows if row.key in self.cells]
            parts.append(f"## {title}\n\n{when}\n\n| what happened | error |\n| --- | --- |\n{''.join(cells)}")
        return "\n".join(parts)

    def write(self) -> None:
        """Write the file."""
        self._path.write_text(self.text(), "utf-8")


def cell(failure: str, fix: str) -> str:
    """Return the second cell of a row in the page."""
    return f"{_code(failure)}<br>→ {_code(fix)}"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _code(text: str) -> str:
    """Format text as inline code, so that links and tags in it are not rendered."""
    fence, room = ("``", " ") if "`" in text else ("`", "")
    return f"{fence}{room}{_cell(text)}{room}{fence}"
