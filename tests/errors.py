"""Everything that a person can get wrong, and what they see: rows for `test_errors.py` and docs/reference/errors.md."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST = 600
"""Characters that a text may have."""


@dataclass(frozen=True)
class Row:
    """One thing to get wrong.

    Attributes:
        did: what the person did, in words that follow "you".
        what: how a test does it; each part of the table says how.
        says: what is said to have failed.
        do: what is said to do now.
        lock: what is in gamebear.lock.
    """

    did: str
    what: str
    says: str
    do: str
    lock: str = ""


SETTINGS = [
    Row(
        "gave a builder that is no URL",
        "builder=nowhere",
        "The builder 'nowhere' is not a URL.",
        "Say builder=local: or builder=ssh://user@host, for example.",
    ),
    Row(
        "gave no builder",
        "builder=",
        "The setting builder is empty (from the doit variable builder).",
        "Leave it out, or say builder=local:.",
    ),
    Row(
        "misspelt a builder's scheme",
        "builder=shh://pi@buildpi",
        "No installed builder has the scheme 'shh' of 'shh://pi@buildpi'.",
        "There are: dask, dask+tls, local, ssh. Others come with packages that add them.",
    ),
    Row(
        "gave local: something after the colon",
        "builder=local:x",
        "The builder 'local:x' is not known.",
        "This machine is `local:`, nothing after the colon.",
    ),
    Row(
        "named a second builder without its architecture",
        "builder=armhf=ssh://a,ssh://b",
        "The setting builder does not name one builder for armhf (from the doit variable builder): its URL has a"
        " comma or space that another builder or nothing follows.",
        "Say one URL, or one for each architecture with commas between: armhf=ssh://a,arm64=ssh://b.",
    ),
    Row(
        "named two builders for an architecture",
        "builder=armhf=ssh://a,armhf=ssh://b",
        "The setting builder names two builders for armhf (from the doit variable builder).",
        "Name one. Several machines of one architecture are a cluster: dask://HOST.",
    ),
    Row(
        "named no builder for one of the architectures",
        "builder=armhf=,arm64=ssh://pi@buildpi",
        "The setting builder names no builder for armhf (from the doit variable builder).",
        "Leave armhf out, or say armhf=local:.",
    ),
    Row(
        "built for an architecture without a builder",
        "builder=arm64=ssh://pi@buildpi arch=armhf",
        "No builder is set for armhf, only for arm64.",
        ("Name one: builder=arm64=ssh://pi@buildpi,armhf=ssh://user@host, or in the table builder of pyproject.toml."),
    ),
    Row(
        "used the kernel's name of an architecture",
        "arch=armv7l",
        "No architecture is called 'armv7l' (from the doit variable arch).",
        "Debian calls it armhf.",
    ),
    Row(
        "used a name that no architecture has",
        "arch=arm",
        "No architecture is called 'arm' (from the doit variable arch).",
        "There are: amd64, arm64, armel, armhf, i386, loong64, ppc64el, riscv64, s390x.",
    ),
    Row(
        "used another word for where bases come from",
        "base=docker",
        "The setting base is 'docker' (from the doit variable base).",
        "It may be auto or registry or bootstrap.",
    ),
    Row(
        "used another word for what Ctrl-C does",
        "interrupt=ignore",
        "The setting interrupt is 'ignore' (from the doit variable interrupt).",
        "It may be cancel or detach.",
    ),
    Row(
        "used another word for yes",
        "provenance=please",
        "The setting provenance is 'please' (from the doit variable provenance).",
        "It may be true or false.",
    ),
    Row(
        "gave words for seconds",
        "patience=a while",
        "The setting patience is 'a while' (from the doit variable patience).",
        "Give it a number of seconds.",
    ),
    Row(
        "gave a negative time",
        "patience=-1",
        "The setting patience is '-1' (from the doit variable patience).",
        "Give it a number of seconds.",
    ),
    Row(
        "wanted no limit and did not say 0",
        "time_limit=inf",
        "The setting time_limit is 'inf' (from the doit variable time_limit).",
        "Give it a number of seconds.",
    ),
    Row(
        "gave a URL without a host",
        "builder=ssh://",
        "The builder 'ssh://' names no host.",
        "Write it as ssh://[user@]host[:port], an IPv6 address in brackets.",
    ),
    Row(
        "gave a URL with a path",
        "builder=ssh://pi@buildpi/srv",
        (
            "The builder 'ssh://pi@buildpi/srv' has a path, a query or a fragment in its address, and a builder "
            "has none."
        ),
        "Write it as ssh://[user@]host[:port].",
    ),
    Row(
        "gave a URL with a query",
        "builder=ssh://pi@buildpi?x=1",
        (
            "The builder 'ssh://pi@buildpi?x=1' has a path, a query or a fragment in its address, and a builder "
            "has none."
        ),
        "Write it as ssh://[user@]host[:port].",
    ),
    Row(
        "put a password into a URL",
        "builder=ssh://pi:secret@buildpi",
        "The builder ssh://…@buildpi has a password in its address, where others can read it.",
        "Leave it out: log in with a key (ssh-copy-id puts it there), or type the password when asked.",
    ),
    Row(
        "gave a port that there is not",
        "builder=ssh://buildpi:0",
        "The builder 'ssh://buildpi:0' has '0' for a port.",
        "A port is a number from 1 to 65535.",
    ),
    Row(
        "gave a name for a port",
        "builder=ssh://buildpi:http",
        "The builder 'ssh://buildpi:http' has 'http' for a port.",
        "A port is a number from 1 to 65535.",
    ),
    Row(
        "gave an option of ssh for a host",
        "builder=ssh://-oProxyCommand=x",
        ("The builder 'ssh://-oProxyCommand=x' has a host, '-oProxyCommand=x', that is neither a name nor an address."),
        "Write it as ssh://[user@]host[:port], an IPv6 address in brackets.",
    ),
    Row(
        "gave a host with a space in it",
        "builder=ssh://build pi",
        "The builder 'ssh://build pi' has a host, 'build pi', that is neither a name nor an address.",
        "Write it as ssh://[user@]host[:port], an IPv6 address in brackets.",
    ),
    Row(
        "gave an option of ssh for a user",
        "builder=ssh://-l@buildpi",
        "The builder 'ssh://-l@buildpi' has a user, '-l', that no system would have.",
        "Write it as ssh://[user@]host[:port], an IPv6 address in brackets.",
    ),
    Row(
        "gave an IPv6 address without brackets",
        "builder=ssh://::1",
        "The builder 'ssh://::1' has no host that can be understood in '::1'.",
        "Write it as ssh://[user@]host[:port], an IPv6 address in brackets.",
    ),
    Row(
        "gave Dask no scheduler",
        "builder=dask://",
        "The builder 'dask://' names no Dask scheduler.",
        "Say builder=dask://HOST:8786, or dask+tls://HOST:8786; what belongs to TLS is in Dask's configuration.",
    ),
]
"""Variables of doit's, looked up, and the builder opened."""

PYPROJECT = [
    Row(
        "gave a number for a builder",
        "builder = 5",
        "The setting builder is 5, which is no text of one line (from [tool.gamebear] in pyproject.toml).",
        "Leave it out, or give it one.",
    ),
    Row(
        "gave a truth value for an architecture",
        "arch = true",
        "The setting arch is True, which is no text of one line (from [tool.gamebear] in pyproject.toml).",
        "Leave it out, or give it one.",
    ),
    Row(
        "gave a list for one word",
        "base = ['auto']",
        "The setting base is ['auto'] (from [tool.gamebear] in pyproject.toml).",
        "It may be auto or registry or bootstrap.",
    ),
    Row(
        "gave a date for a time",
        "time_limit = 2026-01-01",
        "The setting time_limit is datetime.date(2026, 1, 1) (from [tool.gamebear] in pyproject.toml).",
        "Give it a number of seconds.",
    ),
    Row(
        "misspelt a setting",
        "bulider = 'local:'",
        "[tool.gamebear] in pyproject.toml sets 'bulider', which is no setting.",
        "There are: arch, base, builder, interrupt, keep_failed, patience, provenance, sources, time_limit.",
    ),
    Row(
        "gave an unknown architecture a builder",
        "builder = {foo = 'local:'}",
        "No architecture is called 'foo' (from [tool.gamebear] in pyproject.toml).",
        "There are: amd64, arm64, armel, armhf, i386, loong64, ppc64el, riscv64, s390x.",
    ),
    Row(
        "left a bracket open",
        "x = [",
        "pyproject.toml cannot be read: Invalid value (at end of document).",
        "Mend it there.",
    ),
    Row(
        "made the table something else",
        "\n[tool]\ngamebear = 5",
        "[tool.gamebear] in pyproject.toml is not a table.",
        'Write its settings below it: arch = "armhf".',
    ),
]
"""What is below `[tool.gamebear]` in pyproject.toml."""

DODO = [
    Row(
        "named a buildscript that is not there",
        "artifact('y.py', outputs=['x'])",
        "The buildscript y.py cannot be read: No such file or directory.",
        "Its path is relative to dodo.py's folder.",
    ),
    Row(
        "named a folder for a buildscript",
        "artifact('build', outputs=['x'])",
        "build cannot be read: Is a directory.",
        "It has to be a file that you may read.",
    ),
    Row(
        "wrote a buildscript that is not Python",
        "artifact('bad.py', outputs=['x'])",
        "bad.py, line 2, is not Python: '(' was never closed.",
        "Mend it there.",
    ),
    Row(
        "mixed tabs and spaces in a buildscript",
        "artifact('tabs.py', outputs=['x'])",
        "tabs.py, line 3, is not Python: inconsistent use of tabs and spaces in indentation.",
        "Mend it there.",
    ),
    Row(
        "gave a number for a program",
        "artifact(3, outputs=['x'])",
        "artifact(3): that is neither a buildscript nor a function.",
        'Say artifact("buildscripts/NAME.py", …), or give it a function.',
    ),
    Row(
        "gave a name with a line break for a program",
        "artifact('a\\nb', outputs=['x'])",
        "The buildscript 'a\\nb' cannot be read: No such file or directory.",
        "Its path is relative to dodo.py's folder.",
    ),
    Row(
        "gave a name that no file system takes",
        "artifact('\\ud800', outputs=['x'])",
        "artifact('\\ud800'): that is neither a buildscript nor a function.",
        'Say artifact("buildscripts/NAME.py", …), or give it a function.',
    ),
    Row(
        "gave outputs as one text",
        "artifact('x.py', outputs='build/x')",
        "outputs= is a list, and got the text 'build/x'.",
        "Say outputs=['build/x'].",
    ),
    Row(
        "gave no outputs",
        "artifact('x.py', outputs=[])",
        "artifact('x.py') has no outputs.",
        'Say outputs=["build/NAME"].',
    ),
    Row(
        "gave None for outputs",
        "artifact('x.py', outputs=None)",
        "outputs= is a list of paths, not None.",
        'Say outputs=["PATH"].',
    ),
    Row(
        "gave outputs as a dict",
        "artifact('x.py', outputs={'x': 'build/x'})",
        "outputs= is a list of paths, not {'x': 'build/x'}.",
        'Say outputs=["PATH"].',
    ),
    Row(
        "gave a number for an output",
        "artifact('x.py', outputs=[3])",
        "outputs= is a list of paths, and 3 is none.",
        'Say outputs=["PATH"].',
    ),
    Row(
        "gave a null byte in a name",
        "artifact('x.py', outputs=['a\\0b'])",
        "outputs= is a list of paths, and 'a\\x00b' is none.",
        'Say outputs=["PATH"].',
    ),
    Row(
        "gave two outputs one name",
        "artifact('x.py', outputs=['a/x', 'b/x'])",
        "Two outputs have the name 'x': 'a/x' and 'b/x'.",
        "In the program's folder they would be one file; give one another name.",
    ),
    Row(
        "gave an output the place of a log",
        "artifact('x.py', outputs=['build/logs/x.log'])",
        "artifact('x.py'): the target 'build/logs/x.log' is where logs and the report are written.",
        "Put it somewhere else.",
    ),
    Row(
        "gave an output the place of the report",
        "artifact('x.py', outputs=['./build/report.html'])",
        "artifact('x.py'): the target 'build/report.html' is where logs and the report are written.",
        "Put it somewhere else.",
    ),
    Row(
        "gave an output the name of a provenance statement",
        "artifact('x.py', outputs=['x', 'x.intoto.json'])",
        "artifact('x.py'): the target 'x.intoto.json' has the name of a provenance statement.",
        "Give it another name: `gamebear provenance` writes *.intoto.json.",
    ),
    Row(
        "gave a folder's name for an output",
        "artifact('x.py', outputs=['build/..'])",
        "'..' cannot be the name of an output of x.py.",
        "It has to be a file's name, without a folder and at most 255 bytes long.",
    ),
    Row(
        "gave an output no name",
        "artifact('x.py', outputs=[''])",
        "'' cannot be the name of an output of x.py.",
        "It has to be a file's name, without a folder and at most 255 bytes long.",
    ),
    Row(
        "gave inputs as one text",
        "artifact('x.py', outputs=['x'], inputs='in')",
        "inputs= is a list, and got the text 'in'.",
        "Say inputs=['in'].",
    ),
    Row(
        "gave bytes for an input",
        "artifact('x.py', outputs=['x'], inputs=[b'in'])",
        "inputs= is a list of paths, and b'in' is none.",
        'Say inputs=["PATH"].',
    ),
    Row(
        "gave an input no file",
        "artifact('x.py', outputs=['x'], inputs={'in': None})",
        "inputs= is a list of paths, and None is none.",
        'Say inputs=["PATH"].',
    ),
    Row(
        "gave an input the name of a path",
        "artifact('x.py', outputs=['x'], inputs={'a/b': 'in'})",
        "'a/b' cannot be the name of an input of x.py.",
        "It has to be a file's name, without a folder and at most 255 bytes long.",
    ),
    Row(
        "gave two inputs one name",
        "artifact('x.py', outputs=['x'], inputs=['in', 'a/in'])",
        "Two inputs have the name 'in': 'in' and 'a/in'.",
        "In the program's folder they would be one file; give one another name.",
    ),
    Row(
        "gave an input the program's name",
        "artifact('x.py', outputs=['x'], inputs=['a/x.py'])",
        "'x.py' is an input of x.py, and the program has that name too.",
        "Give one of them another name.",
    ),
    Row(
        "gave an input a module's name",
        "artifact('with_modules.py', outputs=['x'], inputs=['a/mod.py'])",
        "'mod.py' is an input of with_modules.py, and a module has that name too.",
        "Give one of them another name.",
    ),
    Row(
        "gave a list for args",
        "artifact('x.py', outputs=['x'], args=[1])",
        "The args of artifact('x.py') are not plain JSON: [1] is no dict.",
        "Give a dict of numbers, texts, lists and dicts.",
    ),
    Row(
        "gave a set in args",
        "artifact('x.py', outputs=['x'], args={'a': {1}})",
        "The args of artifact('x.py') are not plain JSON: {1} is not JSON.",
        "Give a dict of numbers, texts, lists and dicts.",
    ),
    Row(
        "gave a number for a key in args",
        "artifact('x.py', outputs=['x'], args={1: 2})",
        "The args of artifact('x.py') are not plain JSON: a key is 1, not a string.",
        "Give a dict of numbers, texts, lists and dicts.",
    ),
    Row(
        "gave args what is no number",
        "artifact('x.py', outputs=['x'], args={'a': float('nan')})",
        "The args of artifact('x.py') are not plain JSON: a number is infinite, or none.",
        "Give a dict of numbers, texts, lists and dicts.",
    ),
    Row(
        "gave args that hold themselves",
        "artifact('x.py', outputs=['x'], args=LOOP)",
        "The args of artifact('x.py') are not plain JSON: one holds itself.",
        "Give a dict of numbers, texts, lists and dicts.",
    ),
    Row(
        "gave sources as a list",
        "artifact('x.py', outputs=['x'], sources=['up'])",
        "sources= gives each source the name of its folder, and got ['up'].",
        'Say sources={"NAME": git(…)}.',
    ),
    Row(
        "gave a URL for a source",
        "artifact('x.py', outputs=['x'], sources={'up': 'https://git.example/up'})",
        "The source 'up' is 'https://git.example/up', which is no source.",
        "See git(), archive(), debian().",
    ),
    Row(
        "gave a source the name of a path",
        "artifact('x.py', outputs=['x'], sources={'a/b': archive('file:///nowhere.tar', sha256='0' * 64)})",
        "'a/b' cannot be the name of a source of x.py.",
        "It has to be a file's name, without a folder and at most 255 bytes long.",
    ),
    Row(
        "gave a source a number for a name",
        "artifact('x.py', outputs=['x'], sources={1: archive('file:///nowhere.tar', sha256='0' * 64)})",
        "1 cannot be the name of a source of x.py.",
        "It has to be a file's name, without a folder and at most 255 bytes long.",
    ),
    Row(
        "gave a source and an input one name",
        (
            "artifact('x.py', outputs=['x'], inputs=['in'], sources={'in': archive('file:///nowhere.tar', "
            "sha256='0' * 64)})"
        ),
        "'in' is a source of x.py, and an input has that name too.",
        "Give one of them another name.",
    ),
    Row(
        "gave a source the name of a package of modules",
        (
            "artifact('with_modules.py', outputs=['x'], sources={'pkg': archive('file:///nowhere.tar', "
            "sha256='0' * 64)})"
        ),
        "'pkg' is a source of with_modules.py, and a package of modules has that name too.",
        "Give one of them another name.",
    ),
    Row(
        "asked for an architecture by its other name",
        "artifact('x.py', outputs=['x'], arch='armv7l')",
        "No architecture is called 'armv7l' (from artifact('x.py')).",
        "Debian calls it armhf.",
    ),
    Row(
        "gave a number for an architecture",
        "artifact('x.py', outputs=['x'], arch=5)",
        "The setting arch is 5, which is no text of one line (from artifact('x.py')).",
        "Leave it out, or give it one.",
    ),
    Row(
        "gave words for a time limit",
        "artifact('x.py', outputs=['x'], time_limit='soon')",
        "The setting time_limit is 'soon' (from artifact('x.py')).",
        "Give it a number of seconds.",
    ),
    Row(
        "sent a function that uses a lock",
        "artifact(locked, outputs=['x'])",
        "The function locked uses LOCK, which cannot be sent to a builder: cannot pickle '_thread.lock' object.",
        "Pass what it needs in args=, or use a buildscript.",
    ),
]
"""Expressions in a dodo.py that begins with `from gamebear_tasks import *`."""

SOURCES = [
    Row(
        "gave git an option for a URL",
        "git('--upload-pack=touch x', 'main')",
        "git(): '--upload-pack=touch x' is no URL.",
        "Write it in full, as https://host/path.",
    ),
    Row(
        "gave git no URL",
        "git('', 'main')",
        "git(): '' is no URL.",
        "Write it in full, as https://host/path.",
    ),
    Row(
        "put a password into git's URL",
        "git('https://me:secret@git.example/x', 'main')",
        (
            "git(): the URL of git.example holds a password, or a user name that may be a token, which would end "
            "up in dodo.py, logs and lock files."
        ),
        "Leave it out; git takes it from its credential helper or ~/.netrc.",
    ),
    Row(
        "put a token into git's URL",
        "git('https://ghp_secret@git.example/x', 'main')",
        (
            "git(): the URL of git.example holds a password, or a user name that may be a token, which would end "
            "up in dodo.py, logs and lock files."
        ),
        "Leave it out; git takes it from its credential helper or ~/.netrc.",
    ),
    Row(
        "gave git a URL with a line break",
        "git('https://git.example/x\\nhost=evil', 'main')",
        "git(): 'https://git.example/x\\nhost=evil' is no URL.",
        "Write it in full, as https://host/path.",
    ),
    Row(
        "gave git an option for a branch",
        "git('https://git.example/x', '--all')",
        "git('https://git.example/x'): '--all' is no commit, branch or tag.",
        "`git ls-remote URL` lists what there is.",
    ),
    Row(
        "gave git no branch",
        "git('https://git.example/x', '')",
        "git('https://git.example/x'): '' is no commit, branch or tag.",
        "`git ls-remote URL` lists what there is.",
    ),
    Row(
        "gave git two words for a branch",
        "git('https://git.example/x', 'two words')",
        "git('https://git.example/x'): 'two words' is no commit, branch or tag.",
        "`git ls-remote URL` lists what there is.",
    ),
    Row(
        "gave git a refspec for a branch",
        "git('https://git.example/x', 'main:refs/heads/x')",
        "git('https://git.example/x'): 'main:refs/heads/x' is no commit, branch or tag.",
        "`git ls-remote URL` lists what there is.",
    ),
    Row(
        "gave git None for a branch",
        "git('https://git.example/x', None)",
        "git('https://git.example/x'): None is no commit, branch or tag.",
        "`git ls-remote URL` lists what there is.",
    ),
    Row(
        "put a token into an archive's URL",
        "archive('https://ghp_secret@web.example/x.tar', sha256='0' * 64)",
        (
            "archive(): the URL of web.example holds a password, or a user name that may be a token, which would "
            "end up in dodo.py, logs and lock files."
        ),
        "Leave it out; git takes it from its credential helper or ~/.netrc.",
    ),
    Row(
        "wanted an archive by FTP",
        "archive('ftp://web.example/x.tar', sha256='0' * 64)",
        "archive('ftp://web.example/x.tar'): that is no URL of a file to download.",
        "It begins with https://, http:// or file://.",
    ),
    Row(
        "gave an archive half a hash",
        "archive('https://web.example/x.tar', sha256='abc')",
        "archive('https://web.example/x.tar'): 'abc' is no SHA-256 (64 hex digits).",
        "`sha256sum` prints that of a file.",
    ),
    Row(
        "left out less than nothing of an archive",
        "archive('https://web.example/x.tar', sha256='0' * 64, strip=-1)",
        "archive('https://web.example/x.tar'): strip=-1 is no count of folders.",
        "Say strip=0 for none, or how many folders are around everything.",
    ),
    Row(
        "gave apt an option for a package",
        "debian('-t=sid')",
        "debian('-t=sid'): '-t=sid' is no name of a source package.",
        "`apt-cache showsrc PACKAGE` shows names and versions; a suite is called as in apt's sources.",
    ),
    Row(
        "wrote a package with a capital",
        "debian('Hello')",
        "debian('Hello'): 'Hello' is no name of a source package.",
        "`apt-cache showsrc PACKAGE` shows names and versions; a suite is called as in apt's sources.",
    ),
    Row(
        "gave a version that is none",
        "debian('hello', version='-x')",
        "debian('hello'): '-x' is no name of a version.",
        "`apt-cache showsrc PACKAGE` shows names and versions; a suite is called as in apt's sources.",
    ),
    Row(
        "gave a suite that is none",
        "debian('hello', suite='two words')",
        "debian('hello'): 'two words' is no name of a suite.",
        "`apt-cache showsrc PACKAGE` shows names and versions; a suite is called as in apt's sources.",
    ),
    Row(
        "gave a URL for an alternative",
        "either(git='https://git.example/x')",
        "either(git=…): 'https://git.example/x' is no source.",
        "See git(), archive(), debian().",
    ),
    Row(
        "gave no alternatives",
        "either()",
        "either() has no sources.",
        "Say either(git=git(…), debian=debian(…)).",
    ),
]
"""The same."""

IMAGES = [
    Row(
        "called an image after what it is not",
        "sd_image('base.img', output='card.iso')",
        "sd_image(): output='card.iso' is no image's name.",
        "It ends with .img, or with .img.xz or .img.zst.",
    ),
    Row(
        "gave an image no name",
        "sd_image('base.img', output='build/.img')",
        "sd_image(): output='build/.img' is no image's name.",
        "It ends with .img, or with .img.xz or .img.zst.",
    ),
    Row(
        "gave a number for a base",
        "sd_image(7, output='card.img')",
        "sd_image('card.img'): the base 7 is neither a file nor an archive().",
        'Say sd_image("base.img.xz", …), or give it an archive(URL, sha256=…).',
    ),
    Row(
        "baked an image from itself",
        "sd_image('card.img', output='card.img')",
        "sd_image('card.img'): it would be baked from itself.",
        "Give the output another name.",
    ),
    Row(
        "put in a name instead of a file()",
        "sd_image('base.img', output='card.img', contents=['x'])",
        "sd_image('card.img'): contents= has 'x'.",
        "Say each as file(…) or tar(…).",
    ),
    Row(
        "gave config as one text",
        "sd_image('base.img', output='card.img', config='dtoverlay=dwc2')",
        "sd_image('card.img'): config= is a list of texts, not 'dtoverlay=dwc2'.",
        "Put it in brackets.",
    ),
    Row(
        "gave cmdline a line break",
        "sd_image('base.img', output='card.img', cmdline=['a\\nb'])",
        "sd_image('card.img'): cmdline= is a list of lines, and 'a\\nb' is none.",
        "Give each as one text, without a line break.",
    ),
    Row(
        "gave a host name with a domain",
        "sd_image('base.img', output='card.img', hostname='a.b')",
        "sd_image('card.img'): 'a.b' is no host name.",
        "It has letters, digits and -, without a domain.",
    ),
    Row(
        "gave a size in words",
        "sd_image('base.img', output='card.img', size='4 gigs')",
        "sd_image('card.img'): size='4 gigs' is no size.",
        'Say it in bytes, or as "512M" or "4G"; up to 1024T.',
    ),
    Row(
        "gave a size of half a sector",
        "sd_image('base.img', output='card.img', size=1000)",
        "sd_image('card.img'): size=1000 is no whole number of sectors of 512 bytes.",
        'Say it in MiB or GiB: size="4G".',
    ),
    Row(
        "wanted less than nothing free",
        "sd_image('base.img', output='card.img', free=-1)",
        "sd_image('card.img'): free=-1 is no size.",
        'Say it in bytes, or as "512M" or "4G"; up to 1024T.',
    ),
    Row(
        "gave a name for a user",
        "sd_image('base.img', output='card.img', user='bear')",
        "sd_image('card.img'): user='bear' is no user.",
        "Say user=user(…).",
    ),
    Row(
        "baked for an unknown architecture",
        "sd_image('base.img', output='card.img', arch='pdp11')",
        "No architecture is called 'pdp11' (from sd_image('card.img')).",
        "There are: amd64, arm64, armel, armhf, i386, loong64, ppc64el, riscv64, s390x.",
    ),
    Row(
        "gave a relative place in the image",
        "file('x', 'relative')",
        "file('x'): 'relative' is no place in an image.",
        'Say it from the root, as in "/usr/local/bin/".',
    ),
    Row(
        "led out of the image",
        "file('x', '/a/../b')",
        "file('x'): '/a/../b' is no place in an image.",
        'Say it from the root, as in "/usr/local/bin/".',
    ),
    Row(
        "gave no file",
        "file('', '/a')",
        "file(''): '' is no path.",
        "Give the name of a file, as a text or a Path.",
    ),
    Row(
        "gave a mode that there is not",
        "file('x', '/a', mode=0o10000)",
        "file('x'): mode=4096 is no such number.",
        "It goes from 0 to 0o7777.",
    ),
    Row(
        "gave a negative owner",
        "file('x', '/a', owner=-1)",
        "file('x'): owner=-1 is no such number.",
        "It goes from 0 to 4294967294.",
    ),
    Row(
        "gave a number for a tar",
        "tar(7)",
        "tar('7'): 7 is no path.",
        "Give the name of a file, as a text or a Path.",
    ),
    Row(
        "gave a user a capital",
        "user('Bear')",
        "user('Bear'): that cannot be a user's name.",
        "Use a-z, 0-9, - and _.",
    ),
    Row(
        "wrote a password into dodo.py",
        "user('bear', password='secret')",
        "user('bear'): its password= is no hash of a password.",
        ("Never write a password into dodo.py: `openssl passwd -6` asks for one and prints the hash to write there."),
    ),
    Row(
        "gave keys as one text",
        "user('bear', authorized_keys='~/.ssh/id_ed25519.pub')",
        "user('bear'): authorized_keys= is a list.",
        "Put the one key in brackets.",
    ),
    Row(
        "gave None for keys",
        "user('bear', authorized_keys=None)",
        "user('bear'): authorized_keys= is a list.",
        "Put the one key in brackets.",
    ),
    Row(
        "gave a private key",
        "user('bear', authorized_keys=['-----BEGIN OPENSSH PRIVATE KEY-----\\nx'])",
        "user('bear'): a key in authorized_keys= is no public SSH key.",
        "Give the line of a .pub file.",
    ),
    Row(
        "gave groups as one text",
        "user('bear', groups='sudo')",
        "user('bear'): groups= is a list of texts, not 'sudo'.",
        "Put it in brackets.",
    ),
]
"""The same."""

DOIT = [
    Row(
        "named an input that is not there",
        "artifact('x.py', inputs=['no'], outputs=['x']) → doit x",
        "no cannot be read: No such file or directory.",
        "A job needs all of its files: mend its path or its permissions.",
    ),
    Row(
        "named a folder for an input",
        "artifact('x.py', inputs=['folder'], outputs=['x']) → doit x",
        "folder cannot be read: Is a directory.",
        "A job needs all of its files: mend its path or its permissions.",
    ),
    Row(
        "named a folder for a target",
        "artifact('x.py', outputs=['folder']) → doit x",
        "folder is a folder, and should become a file.",
        "Move it out of the way.",
    ),
    Row(
        "named a target below a file",
        "artifact('x.py', outputs=['in/a/x']) → doit x",
        "in is a file, and should be a folder for in/a/x.",
        "Move it out of the way.",
    ),
    Row(
        "did not pin a branch",
        "artifact('x.py', outputs=['x'], sources={'up': git('https://git.example/up', 'main')}) → doit x",
        "git source https://git.example/up main is not pinned: gamebear.lock has no entry for it.",
        "Run `gamebear lock` and commit gamebear.lock.",
    ),
    Row(
        "did not pin a Debian package",
        "artifact('x.py', outputs=['x'], sources={'up': debian('hello')}) → doit x",
        "debian source hello is not pinned: gamebear.lock has no entry for it.",
        "Run `gamebear lock` and commit gamebear.lock.",
    ),
    Row(
        "misspelt an alternative",
        (
            "artifact('x.py', outputs=['x'], sources={'up': either(web=archive('file:///up.tar', sha256='0' * "
            "64), git=git('https://git.example/up', '0' * 40))}) → doit x sources=debain"
        ),
        "The setting sources=debain names no alternative of any source.",
        "There are: git, web.",
    ),
    Row(
        "named an archive that is not there",
        (
            "artifact('x.py', outputs=['x'], sources={'up': archive('file:///nowhere/up.tar', sha256='0' * 64)}) "
            "→ doit x"
        ),
        "archive source file:///nowhere/up.tar cannot be downloaded: No such file or directory.",
        "It is not in the cache, so the network is needed this once.",
    ),
    Row(
        "named a device for an archive",
        ("artifact('x.py', outputs=['x'], sources={'up': archive('file:///dev/zero', sha256='0' * 64)}) → doit x"),
        "archive source file:///dev/zero cannot be downloaded: it is not a regular file.",
        "See whether its path is right.",
    ),
    Row(
        "named a repository that is not there",
        "artifact('x.py', outputs=['x'], sources={'up': git('/nowhere', '0' * 40)}) → doit x",
        (
            "git source /nowhere 0000000000000000000000000000000000000000 cannot be fetched: '/nowhere' does not "
            "appear to be a git repository."
        ),
        "It is not in the cache, so the network is needed this once.",
    ),
    Row(
        "locked a repository that is not there",
        "artifact('x.py', outputs=['x'], sources={'up': git('/nowhere', 'main')}) → gamebear lock",
        "git source /nowhere main cannot be looked up: '/nowhere' does not appear to be a git repository.",
        "Is the URL right, and the network there?",
    ),
    Row(
        "pruned without saying what",
        "artifact('x.py', outputs=['x']) → gamebear prune",
        "gamebear prune does not say what may go.",
        "Say one or more of --older DAYS, --size BYTES (such as 5G), --keep RESULTS and --images.",
    ),
    Row(
        "pruned to a size in words",
        "artifact('x.py', outputs=['x']) → gamebear prune --size lots",
        "--size is 'lots'.",
        "Give it a number of bytes, such as 500M or 5G.",
    ),
    Row(
        "pruned to a size without a unit",
        "artifact('x.py', outputs=['x']) → gamebear prune --size 5",
        "--size is '5', without a unit.",
        "Say 5G, 5M, 5K or 5B.",
    ),
    Row(
        "pruned what is younger than nothing",
        "artifact('x.py', outputs=['x']) → gamebear prune --older -1",
        "--older is '-1'.",
        "Give it a number of days, such as 30.",
    ),
    Row(
        "pruned all but a text",
        "artifact('x.py', outputs=['x']) → gamebear prune --keep some",
        "--keep is 'some'.",
        "Give it a number of results, such as 3.",
    ),
    Row(
        "baked from a base that is not there",
        "sd_image('no.img', output='card.img') → doit x",
        "no.img cannot be read: No such file or directory.",
        "Is it the target of another task, or misspelt?",
    ),
    Row(
        "gave a damaged lock file",
        "artifact('x.py', outputs=['x'], sources={'up': git('https://git.example/up', 'main')}) → doit x",
        "gamebear.lock is damaged: Expecting property name enclosed in double quotes: line 1 column 2 (char 1).",
        "Restore it from version control, or remove it and run `gamebear lock`.",
        "{",
    ),
    Row(
        "gave the lock file of a later release",
        "artifact('x.py', outputs=['x'], sources={'up': git('https://git.example/up', 'main')}) → doit x",
        "gamebear.lock has version 2; this gamebear-tasks knows version 1 only.",
        "Upgrade gamebear-tasks.",
        '{"version": 2}',
    ),
    Row(
        "asked to follow no job",
        "artifact('x.py', outputs=['x']) → gamebear jobs follow",
        "gamebear jobs does not know what to do with 'follow'.",
        "Say `gamebear jobs`, `gamebear jobs follow ID` or `gamebear jobs cancel ID`.",
    ),
    Row(
        "named a job that there is not",
        "artifact('x.py', outputs=['x']) → gamebear jobs follow nosuch",
        "No job on local: begins with 'nosuch', and no task has that name.",
        "`gamebear jobs` lists those there are.",
    ),
    Row(
        "cancelled a task that never ran",
        "artifact('x.py', outputs=['x']) → gamebear jobs cancel x",
        "There is no job of the task 'x' on local:.",
        "`gamebear jobs` lists those there are.",
    ),
    Row(
        "opened a shell in no task",
        "artifact('x.py', outputs=['x']) → gamebear shell",
        "gamebear shell does not say which task's container.",
        "Say gamebear shell [--container N] TASK, or gamebear shell TASK -- COMMAND.",
    ),
    Row(
        "opened a shell in a task that there is not",
        "artifact('x.py', outputs=['x']) → gamebear shell y",
        "There is no task y.",
        "Those that build on one: x.",
    ),
    Row(
        "opened a shell where nothing is kept",
        "artifact('x.py', outputs=['x']) → gamebear shell x",
        "No container of x is kept on local:.",
        (
            "`doit x keep_failed=yes` has it kept if the task fails (what the last 3 failed jobs left, for 7 days), "
            "then `gamebear shell x` opens a shell in it."
        ),
    ),
    Row(
        "gave the report an argument",
        "artifact('x.py', outputs=['x']) → gamebear report x",
        "gamebear report takes no argument, and got 'x'.",
        "Say gamebear report.",
    ),
    Row(
        "asked for the provenance of no task",
        "artifact('x.py', outputs=['x']) → gamebear provenance y",
        "There is no task 'y'.",
        "`doit list --all` shows those there are.",
    ),
    Row(
        "asked for the provenance of what is not built",
        "artifact('x.py', outputs=['x']) → gamebear provenance x",
        "x is not up to date: what would be said of it is not so.",
        "Run doit x first; settings of the command line that it was built with, such as sources=debian, have to be said"
        " here too.",
    ),
    Row(
        "named a builder as the doctor's argument",
        "artifact('x.py', outputs=['x']) → gamebear doctor ssh://pi@buildpi",
        "gamebear doctor knows no task 'ssh://pi@buildpi'.",
        "Name another builder with builder=URL, such as ssh://pi@buildpi.",
    ),
    Row(
        "wanted failures kept perhaps",
        "artifact('x.py', outputs=['x']) → doit x keep_failed=maybe",
        "The setting keep_failed is 'maybe' (from the doit variable keep_failed).",
        "It may be true or false.",
    ),
]
"""A task in dodo.py, and the command."""

PERMISSIONS = [
    Row(
        "may not write to build/",
        "chmod 555 build",
        "build/x cannot be made: you may not write to build.",
        "See whose it is: ls -ld build.",
    ),
    Row(
        "may not write to build/logs/",
        "mkdir build/logs && chmod 555 build/logs",
        "build/logs/x.log cannot be made: you may not write to build/logs.",
        "See whose it is: ls -ld build/logs.",
    ),
    Row(
        "may not read the buildscript",
        "chmod 000 x.py",
        "x.py cannot be read: Permission denied.",
        "It has to be a file that you may read.",
    ),
    Row(
        "may not read an input",
        "chmod 000 in",
        "in cannot be read: Permission denied.",
        "A job needs all of its files: mend its path or its permissions.",
    ),
    Row(
        "gave a FIFO for an input",
        "rm in && mkfifo in",
        "in cannot be read: it is not a regular file.",
        "A job needs all of its files: mend its path or its permissions.",
    ),
    Row(
        "gave a device for an input",
        "rm in && ln -s /dev/zero in",
        "in cannot be read: it is not a regular file.",
        "A job needs all of its files: mend its path or its permissions.",
    ),
    Row(
        "gave a FIFO for a buildscript",
        "rm x.py && mkfifo x.py",
        "x.py cannot be read: it is not a regular file.",
        "It has to be a file that you may read.",
    ),
    Row(
        "have a file for a home",
        "rmdir ../home && touch ../home",
        "The runner cannot be put on this machine: [Errno 20] Not a directory: '~/.cache'.",
        "See that its disk has room and that ~/.cache there can be written to.",
    ),
    Row(
        "may not write to your home",
        "chmod 555 ../home",
        "The runner cannot be put on this machine: [Errno 13] Permission denied: '~/.cache'.",
        "See that its disk has room and that ~/.cache there can be written to.",
    ),
    Row(
        "may not write to the cache",
        "mkdir -p ../home/.cache/gamebear && chmod 000 ../home/.cache/gamebear",
        "The runner cannot be put on this machine: [Errno 13] Permission denied: '~/.cache/gamebear/v1'.",
        "See that its disk has room and that ~/.cache there can be written to.",
    ),
    Row(
        "may not write to the project's folder",
        "chmod 555 .",
        "doit's database .doit.db cannot be opened: Permission denied.",
        "See whose it is, and its folder: ls -ld . .doit.db*",
    ),
    Row(
        "have another file for doit's database",
        "echo hello > .doit.db",
        "doit's database .doit.db cannot be opened: it is damaged, or another Python's.",
        "Remove it: rm -r .doit.db*; doit then finds on the builder what was built.",
    ),
    Row(
        "have a FIFO for doit's database",
        "mkfifo .doit.db",
        "doit's database .doit.db cannot be opened: it is not a regular file.",
        "See what it is, then move it away: ls -ld .doit.db",
    ),
    Row(
        "have a part of a path for a home",
        "HOME=home",
        "HOME is 'home', which is no whole path.",
        "Set it to your home folder, such as HOME=/home/you.",
    ),
    Row(
        "may open a few files only",
        "ulimit -n 10",
        "sh cannot be started: Too many open files.",
        "Let doit open more files: ulimit -n 1024",
    ),
    Row(
        "have no programs in your PATH",
        "PATH=/proc/nowhere",
        "sh cannot be started: No such file or directory.",
        "See that it is in your PATH.",
    ),
]
"""What is done before doit, which then has no right to disregard what files allow."""

SSH = [
    Row(
        "never logged in to the builder",
        "known_hosts.unlink()",
        "The builder ssh://pi@buildpi:2222 is refused: its host key SHA256:… (ED25519) is not known here.",
        (
            "Compare the fingerprint with the builder's own (on it: `ssh-keygen -lf "
            "/etc/ssh/ssh_host_ed25519_key.pub`), then run `ssh -p 2222 pi@buildpi` once and accept it, or "
            "`ssh-keyscan -p 2222 buildpi >> ~/.ssh/known_hosts`."
        ),
    ),
    Row(
        "set up the builder anew, or somebody is in between",
        "known_hosts.write_text(f'{host} {public(other)}\\n')",
        (
            "The builder ssh://pi@buildpi:2222 is refused: its host key has changed. It is now SHA256:… "
            "(ED25519); known is SHA256:… (ED25519) (~/.ssh/known_hosts:1). This may be an attack: somebody "
            "between you and the builder. Or the builder was set up anew."
        ),
        (
            "Only if you know that it was: `ssh-keygen -R '[buildpi]:2222' -f ~/.ssh/known_hosts`, then `ssh -p "
            "2222 pi@buildpi` and compare the fingerprint."
        ),
    ),
    Row(
        "know the builder by a key of another kind",
        "known_hosts.write_text(f'{host} {public(ecdsa)}\\n')",
        (
            "The builder ssh://pi@buildpi:2222 is refused: its host key SHA256:… (ED25519) is not known here. "
            "Only keys of another kind are known for it (~/.ssh/known_hosts:1), which it does not have any more."
        ),
        (
            "Compare the fingerprint with the builder's own (on it: `ssh-keygen -lf "
            "/etc/ssh/ssh_host_ed25519_key.pub`), then run `ssh -p 2222 pi@buildpi` once and accept it, or "
            "`ssh-keyscan -p 2222 buildpi >> ~/.ssh/known_hosts`."
        ),
    ),
    Row(
        "revoked the builder's key",
        "known_hosts.write_text(f'@revoked * {public(server.host_keys[\"ed25519\"])}\\n')",
        (
            "The builder ssh://pi@buildpi:2222 is refused: its host key SHA256:… (ED25519) is marked as revoked "
            "(~/.ssh/known_hosts:1)."
        ),
        "It must not be trusted any more: give the builder a new host key.",
    ),
    Row(
        "put the builder's key on a list of revoked ones",
        (
            "(home / 'revoked').write_text(public(server.host_keys['ed25519']) + '\\n'), "
            "config.write_text(f'RevokedHostKeys {home}/revoked\\n')"
        ),
        (
            "The builder ssh://pi@buildpi:2222 is refused: its host key SHA256:… (ED25519) is marked as revoked "
            "(~/revoked (RevokedHostKeys): Invalid KRL file ~/revoked: KRL file has invalid magic number)."
        ),
        "It must not be trusted any more: give the builder a new host key.",
    ),
    Row(
        "have no key",
        "key.unlink()",
        (
            "The builder ssh://pi@buildpi:2222 does not let pi in. Tried: nothing, for want of a key that can be "
            "used. Not used: ~/.ssh/id_ed25519 (only its public half is here)."
        ),
        (
            "Put your key there with `ssh-copy-id -i ~/.ssh/id_ed25519 -p 2222 pi@buildpi`; if it is there "
            "already, see that the account is not locked. `ssh -p 2222 pi@buildpi true` must work."
        ),
    ),
    Row(
        "have a key that the builder does not know",
        "shutil.copy(other, key)",
        "The builder ssh://pi@buildpi:2222 does not let pi in. Tried: ~/.ssh/id_ed25519 SHA256:… (ED25519).",
        (
            "Put your key there with `ssh-copy-id -i ~/.ssh/id_ed25519 -p 2222 pi@buildpi`; if it is there "
            "already, see that the account is not locked. `ssh -p 2222 pi@buildpi true` must work."
        ),
    ),
    Row(
        "left a key readable to others",
        "key.chmod(0o644)",
        (
            "The builder ssh://pi@buildpi:2222 does not let pi in. Tried: nothing, for want of a key that can be "
            "used. Not used: ~/.ssh/id_ed25519 (others can read it; `chmod 600 ~/.ssh/id_ed25519`)."
        ),
        (
            "Put your key there with `ssh-copy-id -i ~/.ssh/id_ed25519 -p 2222 pi@buildpi`; if it is there "
            "already, see that the account is not locked. `ssh -p 2222 pi@buildpi true` must work."
        ),
    ),
    Row(
        "have a key with a passphrase, no agent and no terminal",
        "encrypt(key)",
        (
            "The builder ssh://pi@buildpi:2222 does not let pi in. Tried: nothing, for want of a key that can be "
            "used. ~/.ssh/id_ed25519 needs its passphrase, and there is no terminal to ask for it."
        ),
        "Run `ssh-add ~/.ssh/id_ed25519` first.",
    ),
    Row(
        "have a key that is damaged",
        "key.write_text('-----BEGIN OPENSSH PRIVATE KEY-----\\n')",
        (
            "The builder ssh://pi@buildpi:2222 does not let pi in. Tried: nothing, for want of a key that can be "
            "used. Not used: ~/.ssh/id_ed25519 (a key of a kind or format that cannot be read here; `ssh-add "
            "~/.ssh/id_ed25519` may)."
        ),
        (
            "Put your key there with `ssh-copy-id -i ~/.ssh/id_ed25519 -p 2222 pi@buildpi`; if it is there "
            "already, see that the account is not locked. `ssh -p 2222 pi@buildpi true` must work."
        ),
    ),
    Row(
        "named a user who may not log in",
        "url.update(user='nobody')",
        ("The builder ssh://nobody@buildpi:2222 does not let nobody in. Tried: ~/.ssh/id_ed25519 SHA256:… (ED25519)."),
        (
            "Put your key there with `ssh-copy-id -i ~/.ssh/id_ed25519 -p 2222 nobody@buildpi`; if it is there "
            "already, see that the account is not locked. `ssh -p 2222 nobody@buildpi true` must work."
        ),
    ),
    Row(
        "named a port where nobody listens",
        "url.update(port='1')",
        "The builder ssh://pi@buildpi:1 cannot be reached: buildpi port 1: connection refused.",
        "See that it is switched on, on the network, and runs an SSH server.",
    ),
    Row(
        "named a host that there is not",
        "url.update(host='buildpi.invalid')",
        (
            "The builder ssh://pi@buildpi.invalid:2222 cannot be reached: no host buildpi.invalid is known here "
            "(Name or service not known)."
        ),
        "See that its name is right and that the network is there.",
    ),
    Row(
        "led jump hosts in a circle",
        "config.write_text('Host 127.0.0.1\\n ProxyJump a\\nHost a\\n ProxyJump 127.0.0.1\\n')",
        "The builder ssh://pi@buildpi:2222 is behind more than 8 jump hosts.",
        "See whether ProxyJump goes round in a circle in ~/.ssh/config, at a.",
    ),
]
"""What is done to a home from which the builder's account is reached."""

SCRIPTS = [
    Row(
        "left an output out",
        "pass",
        "The build ended, but its output out is not in its working directory; nothing new is there.",
        "Copy it out of the container: c.copy_out('/path/in/container/out', 'out')",
    ),
    Row(
        "left a folder for an output",
        "import os; os.mkdir('out')",
        "The build ended, but its output out is a folder; an output is a regular file.",
        "Pack a folder into a tar file, in the container or with Python's tarfile.",
    ),
    Row(
        "left a link for an output",
        "import os; os.symlink('/etc/passwd', 'out')",
        "The build ended, but its output out is a link; an output is a regular file.",
        "Leave a copy of what it leads to.",
    ),
    Row(
        "ended itself",
        "import sys; sys.exit(3)",
        "x.py, line 1: The script ended itself: sys.exit(3)",
        "",
    ),
    Row(
        "ended itself with words",
        "raise SystemExit('no such luck')",
        "x.py, line 1: The script ended itself: no such luck",
        "",
    ),
    Row(
        "raised an exception",
        "1 / 0",
        "x.py, line 1: ZeroDivisionError: division by zero",
        "",
    ),
    Row(
        "used a name that there is not",
        "Contianer('x')",
        "x.py, line 1: NameError: name 'Contianer' is not defined",
        "",
    ),
    Row(
        "imported what the builder does not have",
        "import nosuchmodule",
        "x.py, line 1: ModuleNotFoundError: No module named 'nosuchmodule'",
        "",
    ),
    Row(
        "opened a file that is not there",
        "open('config.json')",
        "x.py, line 1: FileNotFoundError: [Errno 2] No such file or directory: 'config.json'",
        "",
    ),
    Row(
        "wrote outside of its folder",
        "open('/proc/nowhere/x', 'w')",
        "x.py, line 1: FileNotFoundError: [Errno 2] No such file or directory: '/proc/nowhere/x'",
        "",
    ),
    Row(
        "named an image badly",
        "Container('Debian: Bookworm')",
        "x.py, line 1: 'Debian: Bookworm' is not the name of an image.",
        "Write it as debian:bookworm, or host/folder/name:tag.",
    ),
    Row(
        "asked for an image that is nowhere",
        "Image('nosuch')",
        "x.py, line 1: No image nosuch for amd64 is on the builder; Image.pull() gets one from a registry.",
        "",
    ),
    Row(
        "declared an arg badly",
        "#| arg: = 3",
        "x.py, line 1: `#| arg: = 3` cannot be understood.",
        (
            "Write `#| arg: name: type = default`, where the type (a dotted name) and the default (a Python "
            "literal) may be left out."
        ),
    ),
    Row(
        "declared an arg of an unknown type",
        "#| arg: level: number = 3",
        "x.py, line 1: arg level is to be a number, and there is no such type or function.",
        "It is a builtin (`int`, `bool`, `str`) or the full name of something in a module (`pathlib.Path`).",
    ),
    Row(
        "wanted an arg that it was not given",
        "#| arg: level = ...",
        "x.py needs a value for its arg level (line 1).",
        'Give it in the task: args={"level": …}.',
    ),
    Row(
        "wrote an unknown #| line",
        "#| pipi: x",
        "x.py, line 1: a buildscript has no `#| pipi:` line.",
        "It has `#| pip:` and `#| arg:`.",
    ),
    Row(
        "killed itself",
        "import os; os.kill(os.getpid(), 9)",
        "The build ended with status 137 without saying why; the builder may have run out of memory.",
        "Look at the log, and at `dmesg` on the builder; then run doit again.",
    ),
]
"""Buildscripts that should leave `out`; all are built by one doit."""
