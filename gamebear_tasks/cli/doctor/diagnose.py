"""Diagnosis of every builder of a project: check, apply fixes if requested, check again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...builders.base import Builder, Examined, Several
from ...builders.registry import open_builder
from ...config import Settings
from ...errors import BuilderError, PythonError, SettingsError, StoreError
from ...util.text import size
from ...util.urls import shown
from . import local_checks
from .builder_checks import OK, Finding, judge, stopped
from .fixes import Done, mend, steps_for
from .output import Place
from .requirements import Need

AT_ONCE = 8
"""How many builders are asked at once."""

ROUNDS = 4
"""How often a builder is mended: what was in the way may have hidden more."""

PATIENCE = 30.0
"""Seconds for which a connection that broke is tried again."""

Say = Callable[[str], object]


@dataclass(frozen=True)
class Patient:
    """One builder.

    Attributes:
        name: its URL, and which of several it is.
        builder: what to ask, or why it cannot be asked.
        arches: what it is to build for.
        by_ssh: whether it is reached by SSH.
    """

    name: str
    builder: Builder | Exception
    arches: tuple[str, ...]
    by_ssh: bool = False

    def examined(self, base: str) -> Place:
        """Look at it; nothing is changed by that."""
        try:
            if isinstance(self.builder, Exception):
                raise self.builder
            if isinstance(self.builder, Examined):
                facts = self.builder.examine(self.arches, base)
                return Place(self.name, True, tuple(judge(facts, self.arches, base)), facts)
            return Place(self.name, True, tuple(_described(self.builder.describe())))
        except (BuilderError, SettingsError) as error:
            return Place(self.name, isinstance(error, PythonError | StoreError), tuple(stopped(error, self.by_ssh)))


def _described(said: Mapping[str, object]) -> list[Finding]:
    """Return what a builder says of itself that cannot be examined."""
    found = [
        Finding(name, OK, size(value) if name == "free" and isinstance(value, int) else str(value))
        for name, value in said.items()
    ]
    return [Finding("reachable", OK, "yes; it is of a kind that cannot be examined further"), *found]


def visit(settings: Settings, needs: Sequence[Need], say: Say | None, tell: Say) -> list[Place]:
    """Look at this machine and at each builder of the settings.

    Args:
        settings: of the run.
        needs: what the project's tasks need of this machine.
        say: is given the lines of what is done to mend; None: nothing is mended.
        tell: is given a line about what is going on.
    """
    by_ssh = any(url.startswith("ssh:") for url in settings.builders)
    with contextlib.ExitStack() as opened:
        places = [_here(needs, by_ssh, say, opened)]
        patients = [patient for url in settings.builders for patient in _patients(url, settings, opened)]
        for patient in patients:
            tell(f"looking at {patient.name}")
        found = _side_by_side([lambda patient=patient: patient.examined(settings.base) for patient in patients])  # type: ignore[misc]
        if say is not None:  # one after the other, for each may have to ask for a password
            found = [
                _mended(patient, place, lambda patient=patient: patient.examined(settings.base), say)  # type: ignore[misc]
                for patient, place in zip(patients, found, strict=True)
            ]
        return places + found


def _side_by_side(looks: Sequence[Callable[[], Place]]) -> list[Place]:
    """Take several looks at once, and return what was seen; Ctrl-C waits for none of them."""
    found: list[Place | BaseException | None] = [None] * len(looks)
    left = iter(enumerate(looks))
    taking = threading.Lock()

    def go_on() -> None:
        while True:
            with taking:
                number, look = next(left, (-1, None))
            if look is None:
                return
            try:
                found[number] = look()
            except BaseException as error:  # noqa: BLE001 - raised below
                found[number] = error

    threads = [threading.Thread(target=go_on, daemon=True) for _ in range(min(AT_ONCE, len(looks)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in found:
        if isinstance(place, BaseException):
            raise place
    return [place for place in found if isinstance(place, Place)]


def _here(needs: Sequence[Need], by_ssh: bool, say: Say | None, opened: contextlib.ExitStack) -> Place:
    def examined() -> Place:
        return Place("here", True, tuple(local_checks.findings(needs, by_ssh)))

    place = examined()
    if say is None or not steps_for(place.findings):
        return place
    builder = open_builder("local:")
    opened.callback(builder.close)
    return _mended(Patient("here", builder, ()), place, examined, say)


def _patients(url: str, settings: Settings, opened: contextlib.ExitStack) -> list[Patient]:
    """Return what there is to be asked behind a URL: one builder, or several."""
    arches = settings.architectures_of(url)
    name = shown(url)
    try:
        builder = open_builder(url)
        opened.callback(builder.close)
        builder.patience = min(PATIENCE, settings.patience)
        if not isinstance(builder, Several):
            return [Patient(name, builder, arches, url.startswith("ssh:"))]
        members = builder.members()
    except (BuilderError, SettingsError) as error:
        return [Patient(name, error, arches)]
    if not members:
        nobody = BuilderError("It has no worker.", "Start one: docs/how-to/many-builders.md says how.")
        return [Patient(name, nobody, arches)]
    return [
        Patient(
            f"{name} {worker}",
            BuilderError(f"It cannot be used: {member.rstrip('.')}.", "See what its own log says.")
            if isinstance(member, str)
            else member,
            arches,
        )
        for worker, member in members.items()
    ]


def _mended(patient: Patient, place: Place, examined: Callable[[], Place], say: Say) -> Place:
    """Mend what can be mended, and look again; each command is run once."""
    done: list[Done] = []
    builder = patient.builder
    for _ in range(ROUNDS):
        tried = {each.step.command for each in done if not each.step.may_fail}
        steps = [step for step in steps_for(place.findings) if step.command not in tried]
        if not any(not step.may_fail for step in steps) or not isinstance(builder, Examined):
            break
        say(f"{patient.name}: {len(steps)} {'step' if len(steps) == 1 else 'steps'} to mend it")
        try:
            outcome = mend(builder, steps, lambda line: say(f"  {line}"))
        except BuilderError as error:
            return replace(place, mended=tuple(done), unmended=str(error))
        done += outcome
        place = examined()
        failed = [each.step.command for each in outcome if each.done is False]
        if failed:
            why = f"This failed, and what was to follow was not done: {failed[0]}. See what it says above."
            return replace(place, mended=tuple(done), unmended=why)
    return replace(place, mended=tuple(done))
