"""Expiry of results: a package image is too old, or the name of its base refers to another image.

The package images are real. apt in their base is a substitute that installs nothing.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from project import Project

from gamebear_tasks.runner.host.buildah import outside
from gamebear_tasks.runner.host.probe import facts
from gamebear_tasks.runner.store import expiry

DAY = 86400

DODO = """
from gamebear_tasks import artifact

def task_x():
    return artifact("x.py", outputs=["build/x"])
"""

SCRIPT = """
with open({count!r}, "a") as file:
    file.write("built\\n")
image = packages_image("gamebear-mini:1", ["thing"], {policy})
with open("x", "w") as file:
    file.write("the artifact")
"""

CLOCK = """
import os, time
true_time = time.time
time.time = lambda: true_time() + float(os.environ.get("CLOCK_AHEAD", 0))
"""
"""Sets a client's clock ahead. The runner is isolated and not affected."""


class Aging:
    """A project with one artifact, whose builder's files can be aged."""

    def __init__(self, project: Project, storage: Path) -> None:
        self.project = project
        project.environment["CONTAINERS_STORAGE_CONF"] = str(storage)
        project.environment["PYTHONPATH"] += f":{project.write('clock/sitecustomize.py', CLOCK).parent}"
        project.write("dodo.py", DODO)
        self.count = project.folder / "count"
        self.target = project.folder / "build" / "x"

    def script(self, policy: str) -> None:
        self.project.write("x.py", SCRIPT.format(count=str(self.count), policy=policy))

    @property
    def builds(self) -> int:
        return len(self.count.read_text().splitlines())

    def buildah(self, *args: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HOME", "CONTAINERS_STORAGE_CONF"):
                patch.setenv(name, self.project.environment[name])
            return outside(self.project.store, facts(self.project.store), *args).strip()

    def make_base(self, label: str) -> None:
        """Create a new image with the base's name."""
        tree = self.project.folder / f"tree-{label}"
        tiny.fill(tree, ["sh", "env", "rm", "true"])
        for name in ("apt-get", "dpkg-query", "apt-mark", "apt-cache"):
            (tree / "bin" / name).write_text(f"#!/bin/sh\necho {label}\n")
            (tree / "bin" / name).chmod(0o755)
        name = f"make-{label}"
        self.buildah("from", "--name", name, "scratch")
        self.buildah("copy", name, str(tree), "/")
        self.buildah("commit", "--rm", name, "gamebear-mini:1")

    def package_images(self) -> list[str]:
        listed = json.loads(self.buildah("images", "--json"))
        return [image["id"] for image in listed if "localhost/gamebear-packages" in str(image.get("names"))]

    def grow_older(self, seconds: float) -> None:
        """Move all timestamps on the builder to the past."""
        (image,) = self.package_images()
        inspected = json.loads(self.buildah("inspect", "--type", "image", image))
        names = next(entry["names"] for entry in json.loads(self.buildah("images", "--json")) if entry["id"] == image)
        then = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds))
        self.buildah("from", "--name", "older", image)
        notes = {**inspected["ImageAnnotations"], "gamebear.created": then}
        options = [word for key, value in notes.items() for word in ("--annotation", f"{key}={value}")]
        self.buildah("config", *options, "older")
        older = self.buildah("commit", "--rm", "--quiet", "older")
        for name in names:
            self.buildah("tag", older, name)
        self.buildah("rmi", image)
        for path in self.project.store.glob("jobs/*/state.json"):
            state = json.loads(path.read_text())
            for entry in state["policies"]:
                entry["made"] -= seconds
            path.write_text(json.dumps(state))


@pytest.fixture
def aging(system: None, project: Project, tmp_path: Path) -> Aging:
    storage = tmp_path / "storage.conf"
    storage.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{tmp_path}/storage"\nrunroot = "{tmp_path}/run-storage"\n'
    )
    made = Aging(project, storage)
    made.make_base("first")
    return made


def test_a_result_is_built_again_when_its_package_image_is_too_old(aging: Aging) -> None:
    aging.script("max_age_days=30")
    aging.project.doit().ok()
    first = aging.package_images()
    assert aging.project.doit("builder=ssh://nobody@nowhere.invalid").ok().ran == [], "that needs no builder"
    aging.grow_older(31 * DAY)
    run = aging.project.doit(CLOCK_AHEAD=str(31 * DAY)).ok()
    assert "x is rebuilt on local: the package image of gamebear-mini:1 with thing is older than 30 days" in run.err
    assert aging.builds == 2
    assert aging.package_images() != first, "the image is a new one"
    assert aging.target.read_text() == "the artifact"
    assert aging.project.doit(CLOCK_AHEAD=str(31 * DAY)).ok().ran == []
    aging.project.doit("clean").ok()
    assert "was built on local: before" in aging.project.doit().ok().err and aging.builds == 2


def test_a_wrong_clock_causes_a_query_and_no_build(aging: Aging) -> None:
    aging.script("max_age_days=30")
    aging.project.doit(CLOCK_AHEAD=str(5 * 365 * DAY)).ok()
    assert aging.project.doit(CLOCK_AHEAD=str(5 * 365 * DAY)).ok().ran == []
    for ahead in ("0", str(31 * DAY)):
        run = aging.project.doit(CLOCK_AHEAD=ahead).ok()
        assert run.ran == ["x"] and "was built on local: before; downloading" in run.err
        assert aging.project.doit(CLOCK_AHEAD=ahead).ok().ran == []
    assert aging.builds == 1
    assert "the age of the package images" in aging.project.doit("info", "x", CLOCK_AHEAD="0").out


def test_a_result_is_built_again_when_its_base_has_changed(aging: Aging) -> None:
    aging.script("")
    aging.project.doit().ok()
    aging.project.doit("clean").ok()
    assert "built on local: before" in aging.project.doit().ok().err
    aging.make_base("second")
    assert aging.project.doit().ok().ran == [], "doit cannot know it"
    aging.project.doit("clean").ok()
    run = aging.project.doit().ok()
    assert "x is rebuilt on local: gamebear-mini:1 refers to another image now" in run.err
    assert aging.builds == 2
    aging.buildah("rmi", "--force", "gamebear-mini:1")
    aging.project.doit("clean").ok()
    assert "built on local: before" in aging.project.doit().ok().err, "a base that is gone is no other one"


def test_a_result_without_a_rebuild_policy_does_not_expire(aging: Aging) -> None:
    aging.script('rebuild="never"')
    aging.project.doit().ok()
    aging.make_base("second")
    aging.project.doit("clean").ok()
    assert "built on local: before" in aging.project.doit(CLOCK_AHEAD=str(9999 * DAY)).ok().err
    assert aging.builds == 1


def test_a_result_with_a_maximum_age_of_zero_is_built_each_time(aging: Aging) -> None:
    aging.script("max_age_days=0")
    for count in (1, 2):
        assert aging.project.doit().ok().ran == ["x"]
        assert aging.builds == count
    aging.script("max_age_days=-1")
    aging.project.doit().failed("max_age_days is -1, expected a number of days or None")


# on the builder


def state(**more: Any) -> dict[str, Any]:
    entry = {
        "packages": "gcc make",
        "base": "debian",
        "base_id": "a",
        "arch": "armhf",
        "made": 1000.0,
        "max_age": 500.0,
    }
    return {"state": "done", "policies": [{**entry, **more}]}


@pytest.mark.parametrize(
    ("now", "left"),
    [(1000.0, 500.0), (1499.0, 1.0), (1500.0, 0.0), (9999.0, 0.0), (0.0, 500.0), (-1e12, 500.0)],
)
def test_a_result_is_valid_for_the_rest_of_the_maximum_age_at_most(
    now: float, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: now)
    assert expiry.seconds_left(state()) == left
    assert bool(expiry.why_expired(state(), lambda name, arch: "a")) is (left == 0)


def test_the_image_that_expires_first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    both = {"policies": state(max_age=70.0)["policies"] + state(max_age=None)["policies"] + state()["policies"]}
    assert expiry.seconds_left(both) == 70.0


@pytest.mark.parametrize("policies", [[], None, "x", [{}], [{"made": 1}]])
def test_a_result_without_policies_is_always_valid(policies: object) -> None:
    assert expiry.seconds_left({"policies": policies}) is None
    assert expiry.seconds_left({}) is None


def test_an_image_named_by_its_id_never_expires() -> None:
    noted = expiry.policy_of("0123456789ab", "0123", ["make", "gcc", "gcc"], "armhf", {}, None)
    assert expiry.why_expired({"policies": [noted]}, lambda name, arch: "other") == ""
    assert expiry.policy_of("debian", "a", [], "armhf", {}, 3)["max_age"] is None, "that is the base itself"
