"""Diagnosis of every builder of a project: check, apply fixes if requested, check again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...builders.base import Builder, Examined, Several
from ...builders.registry import open_builder
from ...config import Settings, origin_in_errors
from ...errors import BuilderError, PythonError, SettingsError, StoreError
from ...util.text import size
from ...util.urls import shown
from . import local_checks
from .builder_checks import OK, Finding, connection_findings, findings_of
from .fixes import StepResult, apply_fixes, steps_for
from .output import Place
from .requirements import Need

CONCURRENCY = 8
"""Maximum number of builders that are checked at the same time."""

ROUNDS = 4
"""Maximum number of rounds of fixes for a builder: a fixed problem may have hidden another."""

PATIENCE = 30.0
"""Seconds to retry a lost connection."""

PrintLine = Callable[[str], object]


@dataclass(frozen=True)
class Target:
    """A builder, or a worker of a cluster, to check.

    Attributes:
        name: Its URL, followed by the name of the worker.
        builder: The builder, or the reason why it cannot be opened.
        arches: Architectures that it has to build for.
        by_ssh: Whether it is reached by SSH.
    """

    name: str
    builder: Builder | Exception
    arches: tuple[str, ...]
    by_ssh: bool = False

    def check(self, base: str) -> Place:
        """Check it without changing anything."""
        try:
            if isinstance(self.builder, Exception):
                raise self.builder
            if isinstance(self.builder, Examined):
                facts = self.builder.examine(self.arches, base)
                return Place(self.name, True, tuple(findings_of(facts, self.arches, base)), facts)
            return Place(self.name, True, tuple(_described(self.builder.describe())))
        except (BuilderError, SettingsError) as error:
            return Place(
                self.name, isinstance(error, PythonError | StoreError), tuple(connection_findings(error, self.by_ssh))
            )


def _described(description: Mapping[str, object]) -> list[Finding]:
    """Return findings about a builder that has no diagnostics."""
    found = [
        Finding(name, OK, size(value) if name == "free" and isinstance(value, int) else str(value))
        for name, value in description.items()
    ]
    return [Finding("reachable", OK, "yes (this kind of builder has no further checks)"), *found]


def diagnose(
    settings: Settings, needs: Sequence[Need], fix_output: PrintLine | None, progress: PrintLine
) -> list[Place]:
    """Check this machine and each configured builder.

    Args:
        settings: Settings of the run.
        needs: Programs of this machine that the project's tasks need.
        fix_output: Function that receives the output of fixes; None to apply no fixes.
        progress: Function that receives progress messages.
    """
    by_ssh = any(url.startswith("ssh:") for url in settings.builders)
    with contextlib.ExitStack() as stack:
        places = [_check_here(needs, by_ssh, fix_output, stack)]
        targets = [target for url in settings.builders for target in _targets(url, settings, stack)]
        for target in targets:
            progress(f"checking {target.name}")
        found = _concurrently([lambda target=target: target.check(settings.base) for target in targets])  # type: ignore[misc]
        if fix_output is not None:  # sequentially, because sudo may ask for a password on each builder
            found = [
                _fixed(target, place, lambda target=target: target.check(settings.base), fix_output)  # type: ignore[misc]
                for target, place in zip(targets, found, strict=True)
            ]
        return places + found


def _concurrently(checks: Sequence[Callable[[], Place]]) -> list[Place]:
    """Run checks in daemon threads, so that Ctrl-C does not wait for them, and return their results in order."""
    found: list[Place | BaseException | None] = [None] * len(checks)
    pending = iter(enumerate(checks))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number, check = next(pending, (-1, None))
            if check is None:
                return
            try:
                found[number] = check()
            except BaseException as error:  # noqa: BLE001 - raised below
                found[number] = error

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(CONCURRENCY, len(checks)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in found:
        if isinstance(place, BaseException):
            raise place
    return [place for place in found if isinstance(place, Place)]


def _check_here(
    needs: Sequence[Need], by_ssh: bool, fix_output: PrintLine | None, stack: contextlib.ExitStack
) -> Place:
    """Check this machine, and apply fixes if requested."""

    def check() -> Place:
        return Place("here", True, tuple(local_checks.findings(needs, by_ssh)))

    place = check()
    if fix_output is None or not steps_for(place.findings):
        return place
    builder = open_builder("local:")
    stack.callback(builder.close)
    return _fixed(Target("here", builder, ()), place, check, fix_output)


def _targets(url: str, settings: Settings, stack: contextlib.ExitStack) -> list[Target]:
    """Return the builder of a URL, or each worker of a cluster."""
    arches = settings.architectures_of(url)
    name = shown(url)
    try:
        with origin_in_errors("builder"):
            builder = open_builder(url)
        stack.callback(builder.close)
        builder.patience = min(PATIENCE, settings.patience)
        if not isinstance(builder, Several):
            return [Target(name, builder, arches, url.startswith("ssh:"))]
        members = builder.members()
    except (BuilderError, SettingsError) as error:
        return [Target(name, error, arches)]
    if not members:
        no_worker = BuilderError("The cluster has no worker.", "Start one, see docs/how-to/many-builders.md.")
        return [Target(name, no_worker, arches)]
    return [
        Target(
            f"{name} {worker}",
            BuilderError(f"The worker failed: {member.rstrip('.')}.", "Read the worker's log.")
            if isinstance(member, str)
            else member,
            arches,
        )
        for worker, member in members.items()
    ]


def _fixed(target: Target, place: Place, check: Callable[[], Place], output: PrintLine) -> Place:
    """Apply fixes, check again, and repeat while there are new fixes; each command runs once."""
    done: list[StepResult] = []
    builder = target.builder
    for _ in range(ROUNDS):
        tried = {each.step.command for each in done if not each.step.may_fail}
        steps = [step for step in steps_for(place.findings) if step.command not in tried]
        if not any(not step.may_fail for step in steps) or not isinstance(builder, Examined):
            break
        output(f"{target.name}: applying {len(steps)} {'fix' if len(steps) == 1 else 'fixes'}")
        try:
            results = apply_fixes(builder, steps, lambda line: output(f"  {line}"))
        except BuilderError as error:
            return replace(place, fixed=tuple(done), fix_error=str(error))
        done += results
        place = check()
        failed = [each.step.command for each in results if each.succeeded is False]
        if failed:
            cause = f"This command failed, so the remaining fixes were skipped: {failed[0]}"
            return replace(place, fixed=tuple(done), fix_error=cause)
    return replace(place, fixed=tuple(done))
